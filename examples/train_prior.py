"""Train a GPT-style prior over the codes of a tokenizer, and save it with tokenizer and text tokenizer as one pipeline.

    accelerate launch examples/train_prior.py --config prior/digits --tokenizer out/vq --output_dir out/pipeline
    accelerate launch examples/train_prior.py --config prior/digits --tokenizer out/vq --codes out/codes --output_dir out/pipeline
    accelerate launch examples/train_prior.py --config prior/digits --tokenizer out/vq --init_from Qwen/Qwen3-0.6B --lora_rank 8 \\
        --output_dir out/pipeline

A cascade is trained stage by stage: the coarsest levels, then finer ones, which are given these, with the pipeline so far as --coarse.

    accelerate launch examples/train_prior.py --config prior/digits-top --tokenizer out/vq --output_dir out/top
    accelerate launch examples/train_prior.py --config prior/digits-bottom --tokenizer out/vq --coarse out/top --output_dir out/both

What it is told comes from the recipe (`condition`), from a frozen text encoder (--text_encoder), or from other codes (--condition_codes).

Stopped anywhere, the same command continues.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from vqtok import CodePriorConfig, CodePriorModel, VQPipeline, VQTokenizer
from vqtok.audio.files import write_file
from vqtok.auto import config_folder
from vqtok.code_vectors import code_vectors
from vqtok.encoding import encode_dataset, load_media
from vqtok.evaluation.pictures import contact_sheet
from vqtok.files import write_json, write_text, write_with
from vqtok.fingerprint import check_fingerprint
from vqtok.hub.card import pipeline_card
from vqtok.prior import PRIORS, CodeCascade
from vqtok.prior.adapters import add_lora, check_peft, merge_lora
from vqtok.prior.attention import checkpoint_activations, set_attention
from vqtok.prior.conditions import COLUMNS, Conditions, check_values
from vqtok.prior.data import CONDITION, MANIFEST, CodeDataset, prior_collate
from vqtok.prior.features import FeatureConditions, TextEncoder
from vqtok.prior.pretrained import begin_with_vectors, load_text_weights, text_backbone
from vqtok.prior.text import open_text_tokenizer
from vqtok.sources.dataset import skipped_summary
from vqtok.training import PriorStep, StepSampler, TrainingArguments, fit, parse_arguments, read_recipe, step_loader
from vqtok.training.setup import finish, make_accelerator, model_fields, run_script, save_training
from vqtok.training.steps import to_device


@dataclass
class PriorArguments:
    """What to train, and on what."""

    config: str = field(metadata={"help": "A recipe (prior/digits) or a folder with config.json."})
    tokenizer: str = field(
        metadata={"help": "The VQ tokenizer: made the codes, draws the samples, is part of the pipeline."}
    )
    coarse: str | None = field(
        default=None,
        metadata={"help": "A pipeline that draws the levels that this prior is given: the cascade so far."},
    )
    codes: str | None = field(
        default=None, metadata={"help": "A code cache to train on, instead of encoding --dataset."}
    )
    eval_codes: str | None = field(
        default=None, metadata={"help": "A held-out code cache; None keeps every 50th sample apart."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Encoded first when there is no --codes; None takes the embedded data of the medium."},
    )
    audio_column: str | None = field(default=None, metadata={"help": "Column of sound."})
    text_column: str | None = field(default=None, metadata={"help": "Column of text, of a tokenizer of text."})
    resample: bool = field(default=False, metadata={"help": "Bring sound of another rate to the tokenizer's."})
    caption_column: str | None = field(default=None, metadata={"help": "Column of captions."})
    label_column: str | None = field(default=None, metadata={"help": "Column of class labels."})
    num_samples: int | None = field(default=None, metadata={"help": "How many samples of the data set at most."})
    text_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "A tokenizer of transformers; None takes that of --init_from, or trains a byte-pair one. With both, its words are new "
            "to the text model."
        },
    )
    text_vocab_size: int = field(default=1024, metadata={"help": "Most entries of a byte-pair tokenizer trained here."})
    max_text_length: int = field(default=128, metadata={"help": "Most tokens of a caption; a longer one is refused."})
    text_encoder: str | None = field(
        default=None,
        metadata={
            "help": "A frozen text encoder of transformers whose features are the condition, in place of tokens."
        },
    )
    condition_codes: str | None = field(
        default=None, metadata={"help": "A second code cache: row by row the condition of the first one."}
    )
    eval_condition_codes: str | None = field(default=None, metadata={"help": "The same for --eval_codes."})
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of the backbone: sdpa, flex_attention, flash_attention_2, ..., or eager, which is for CPUs and changes "
            "nothing elsewhere; None is transformers' choice."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "A folder or Hub id of a causal language model; its backbone takes the place of the recipe's."
        },
    )
    init_codes: str = field(
        default="random",
        metadata={
            "help": "How the rows of codes begin: random, or codebook, as the tokenizer's vectors, which saves training.",
            "choices": ["random", "codebook"],
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={"help": "Rank of adapters on the backbone of --init_from, merged at the end; 0 trains everything."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations twice instead of keeping them."}
    )
    eval_samples: int = field(default=512, metadata={"help": "Held-out samples of an evaluation."})

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or (self.lora_rank and not self.init_from):
            raise ValueError(
                f"--lora_rank {self.lora_rank} must be at least 0, and above 0 it needs --init_from: adapters adapt something"
            )
        if self.lora_rank:
            check_peft()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure on held-out codes and save the pipeline; returns the metrics that metrics.json holds."""
    script, args = _arguments(sys.argv[1:] if argv is None else argv)
    recipe = _read(script.config, "config.json")
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    vq_tokenizer = VQTokenizer.from_pretrained(script.tokenizer, device=accelerator.device)
    kind = _kind(recipe, script)
    encoder = TextEncoder.from_pretrained(script.text_encoder) if script.text_encoder else None
    coarse = _coarse(recipe, vq_tokenizer, script)
    codes, train, held_out = _codes(accelerator, vq_tokenizer, kind, script, args)
    if encoder is None:
        conditions = _conditions(kind, codes, train, script, coarse)
    else:
        conditions = _features(accelerator, encoder, codes, held_out, script, Path(args.output_dir) / "features")
    test = _known(accelerator, held_out, conditions, script.eval_samples)
    model = _model(accelerator, recipe, codes, conditions, vq_tokenizer, script)
    counts = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    if script.lora_rank:
        counts += f", {sum(p.numel() for p in model.parameters() if p.requires_grad):,} of them learn"
    accelerator.print(f"{len(train)} samples to train on, {len(test)} to test; {counts}", file=sys.stderr)
    pipeline = _pipeline(model, vq_tokenizer, conditions, coarse)

    def loader(start: int) -> Any:
        groups = codes.groups(by_grid=not model.config.stops, least=16 * args.batch_size)
        groups = [group[np.isin(group, train)] for group in groups]
        sampler = StepSampler(
            groups, args.batch_size, args.max_steps, args.seed, start, accelerator.process_index,
            accelerator.num_processes, args.gradient_accumulation_steps,
        )  # fmt: skip
        return step_loader(codes, prior_collate(conditions.ids), sampler, args.num_workers)

    def evaluate(step: int) -> dict[str, float]:
        if step < args.max_steps:
            _draw(pipeline, test, conditions, args, f"step-{step}")
        return _score(model, test, conditions)

    step = PriorStep(accelerator, model, args)
    same_run = {
        **asdict(script),
        "model": model_fields(model.config),
        "code_space": codes.fingerprint,
        "num_train": len(train),
    }
    history = fit(accelerator, step, loader, args, evaluate=evaluate, extra_arguments=same_run)
    metrics: dict[str, Any] = {}
    if script.lora_rank:
        merge_lora(model)
    if accelerator.is_main_process:
        metrics = _publish(pipeline, _score(model, test, conditions), len(test), script, args, history, step.seconds)
        _draw(pipeline, test, conditions, args, "samples")
    finish(accelerator)
    return metrics


def _arguments(argv: Sequence[str]) -> tuple[PriorArguments, TrainingArguments]:
    classes = (PriorArguments, TrainingArguments)
    chosen = parse_arguments(classes, argv, {"output_dir": ""}, description=__doc__)[0]
    return parse_arguments(classes, argv, read_recipe(config_folder(chosen.config)), description=__doc__)


def _kind(recipe: dict[str, Any], script: PriorArguments) -> str:
    """The condition: of the recipe, unless a flag brings another one."""
    kind = recipe.get("condition", "none")
    if script.text_encoder and script.condition_codes:
        raise ValueError("--text_encoder and --condition_codes are two conditions: give one")
    if kind == "features" and not script.text_encoder:
        raise ValueError(f"{script.config} has the condition 'features': name a text encoder with --text_encoder")
    if kind == "codes" and not script.condition_codes:
        raise ValueError(f"{script.config} has the condition 'codes': name their cache with --condition_codes")
    if script.condition_codes and not script.codes:
        raise ValueError("--condition_codes needs --codes: encode the same data set with both tokenizers first")
    if bool(script.condition_codes and script.eval_codes) != bool(script.eval_condition_codes):
        raise ValueError(
            "--eval_condition_codes goes with --eval_codes and --condition_codes: give all three, or not this one"
        )
    return "features" if script.text_encoder else "codes" if script.condition_codes else kind


def _read(config: str, file: str) -> dict[str, Any]:
    path = Path(config_folder(config)) / file
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _codes(
    accelerator: Accelerator, vq_tokenizer: VQTokenizer, kind: str, script: PriorArguments, args: TrainingArguments
) -> tuple[CodeDataset, list[int], Subset]:
    """The code cache, the numbers of its samples that are trained on, and the held-out samples."""
    folder = Path(script.codes or Path(args.output_dir) / "codes")
    options = {"caption_column": script.caption_column, "label_column": script.label_column}
    options |= {
        "image": {},
        "audio": {"audio_column": script.audio_column, "resample": script.resample},
        "text": {"text_column": script.text_column},
    }[vq_tokenizer.modality]
    asked = {"dataset": script.dataset, "num_samples": script.num_samples, **options}
    noted = {**asked, "dataset": script.dataset and Path(script.dataset).name}
    if accelerator.is_main_process and not script.codes and not (folder / MANIFEST).exists():
        media = load_media(vq_tokenizer, script.dataset, num_samples=script.num_samples, **options)
        if column := COLUMNS.get(kind):
            check_values(kind, [media[0].get(column)])
        encode_dataset(vq_tokenizer, media, folder, facts={"asked": noted})
        if summary := skipped_summary(media):
            print(summary, file=sys.stderr)
    accelerator.wait_for_everyone()
    codes = CodeDataset(folder)
    check_fingerprint(vq_tokenizer.fingerprint, codes.fingerprint, f"the codes in {folder}")
    before = codes.manifest.get("asked")
    if not script.codes and before != noted:
        raise ValueError(
            f"{folder} holds the codes of {before}, not of {asked}: delete it, or choose another --output_dir"
        )
    if script.condition_codes:
        codes.pair(CodeDataset(script.condition_codes))
    numbers = list(range(len(codes)))
    if not script.eval_codes:
        return codes, [i for i in numbers if i % 50], Subset(codes, numbers[::50])
    held_out = CodeDataset(script.eval_codes)
    check_fingerprint(codes.fingerprint, held_out.fingerprint, f"the codes in {script.eval_codes}")
    if script.eval_condition_codes:
        given = codes.columns[CONDITION].fingerprint
        held_out.pair(CodeDataset(script.eval_condition_codes))
        check_fingerprint(given, held_out.columns[CONDITION].fingerprint, f"codes in {script.eval_condition_codes}")
    return codes, numbers, Subset(held_out, list(range(len(held_out))))


def _coarse(recipe: dict[str, Any], vq_tokenizer: VQTokenizer, script: PriorArguments) -> VQPipeline | None:
    """The cascade so far."""
    first = recipe.get("first_level", 0)
    if bool(first) != bool(script.coarse):
        raise ValueError(
            f"{script.config} predicts levels from {first} on: give the pipeline that draws the coarser ones with --coarse"
            if first
            else f"{script.config} predicts all levels from the coarsest on and is given none: leave --coarse away"
        )
    if not script.coarse:
        return None
    if not (Path(script.coarse) / "metrics.json").is_file():  # its figures become part of this pipeline's
        raise ValueError(
            f"--coarse {script.coarse} is no folder that this script wrote (it has no metrics.json): train that stage first"
        )
    coarse = VQPipeline.from_pretrained(script.coarse)
    check_fingerprint(vq_tokenizer.fingerprint, coarse.vq_tokenizer.fingerprint, f"the pipeline {script.coarse}")
    return coarse


def _pipeline(
    model: CodePriorModel,
    vq_tokenizer: VQTokenizer,
    conditions: Conditions | FeatureConditions,
    coarse: VQPipeline | None,
) -> VQPipeline:
    """What will be published: the prior, or the cascade with it as its last stage."""
    if coarse is None:
        pipeline = VQPipeline(model, vq_tokenizer, conditions.text_tokenizer, conditions.seen, conditions.encoder)
        pipeline.text_tokenizer_source = conditions.text_source
        return pipeline
    before = coarse.prior.stages if isinstance(coarse.prior, CodeCascade) else [coarse.prior]
    cascade = CodeCascade([*before, model])
    pipeline = VQPipeline(cascade, vq_tokenizer, coarse.text_tokenizer, coarse.text_ids_seen, conditions.encoder)
    pipeline.text_tokenizer_source = coarse.text_tokenizer_source
    return pipeline


def _conditions(
    kind: str, codes: CodeDataset, train: list[int], script: PriorArguments, coarse: VQPipeline | None
) -> Conditions:
    column = codes.columns.get(COLUMNS.get(kind) or "", [])
    tokenizer = None if coarse is None else coarse.text_tokenizer  # the stages of a cascade read the same tokens
    origin = None
    if kind == "text" and tokenizer is None and (name := script.text_tokenizer or script.init_from):
        tokenizer, origin = open_text_tokenizer(name)
    values = column if kind == "codes" else [column[i] for i in train] if column else []
    conditions = Conditions(kind, values, tokenizer, script.text_vocab_size, script.max_text_length)
    conditions.text_source = origin
    return conditions


def _features(
    accelerator: Accelerator,
    encoder: TextEncoder,
    codes: CodeDataset,
    held_out: Subset,
    script: PriorArguments,
    folder: Path,
) -> FeatureConditions:
    """Captions as the text encoder's features; the first process encodes those that the cache in `folder` lacks."""
    sources = [codes] if held_out.dataset is codes else [codes, held_out.dataset]
    captions = [source.columns.get("text", [None])[i] for source in sources for i in range(len(source))]
    check_values("features", captions)
    encoder.to(accelerator.device)
    conditions = FeatureConditions(encoder, captions, script.max_text_length)
    if accelerator.is_main_process:
        count = conditions.prepare(folder)
        print(f"{count} captions encoded, {len(conditions) - count} were in {folder}", file=sys.stderr)
    accelerator.wait_for_everyone()
    conditions.prepare(folder, encode=False)
    return conditions


def _known(
    accelerator: Accelerator, held_out: Subset, conditions: Conditions, num_samples: int
) -> list[dict[str, Any]]:
    """The held-out samples that can be scored; others, with words that training never saw, are counted."""
    samples = [held_out[i] for i in range(min(num_samples, len(held_out)))]
    known = [sample for sample in samples if conditions.knows(sample)]
    if len(known) < len(samples):
        accelerator.print(
            f"{len(samples) - len(known)} held-out samples have conditions that training never saw", file=sys.stderr
        )
    if not known:
        raise ValueError(
            f"none of {len(samples)} held-out samples can be scored: give --eval_codes with known captions"
        )
    return known


def _model(
    accelerator: Accelerator,
    recipe: dict[str, Any],
    codes: CodeDataset,
    conditions: Conditions,
    vq_tokenizer: VQTokenizer,
    script: PriorArguments,
) -> CodePriorModel:
    layout, sizes = codes.layout, codes.distinct_sizes
    model_type = recipe.get("model_type", CodePriorConfig.model_type)
    if model_type not in PRIORS:
        raise ValueError(f"{script.config} is of model_type {model_type!r}, which is no prior ({', '.join(PRIORS)})")
    config_class, model_class = PRIORS[model_type]
    backbone = {"backbone_config": text_backbone(script.init_from)} if script.init_from else {}
    config = config_class(
        **{
            **{name: value for name, value in recipe.items() if name != "model_type"},
            **backbone,
            "layout": layout.to_dict(),
            **conditions.fields,
            "max_grid": max(n // layout.stride for size in sizes for n in layout.padded(size)),
            "fingerprint": codes.fingerprint,
        }
    )
    model = model_class(config)
    model.check_size(max(sizes, key=layout.num_codes))
    if (name := script.attn_implementation) and (name != "eager" or accelerator.device.type == "cpu"):
        set_attention(model, name, accelerator.device)
    text_rows = 0
    if script.init_from:
        text_rows = load_text_weights(model, script.init_from, keep_text=not (script.text_tokenizer or script.coarse))
    if script.init_codes == "codebook":
        begin_with_vectors(model, code_vectors(model.vocabulary, vq_tokenizer.model))
    if script.lora_rank:
        add_lora(model, script.lora_rank, text_rows)
    if script.gradient_checkpointing:
        checkpoint_activations(model)
    if (Path(config_folder(script.config)) / "generation_config.json").exists():  # the recipe's sampling defaults
        model.generation_config.update(**_read(script.config, "generation_config.json"))
    return model


@torch.no_grad()
def _score(model: CodePriorModel, test: list[dict[str, Any]], conditions: Conditions) -> dict[str, float]:
    """Held-out nats per token, nats per code of each level, and bits per pixel or sample of the codes, over all samples together."""
    collate = prior_collate(conditions.ids)
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for sample in test:
        groups.setdefault(tuple(sample["codes"][0].shape), []).append(sample)
    own = model.config.own_levels
    levels = len(test[0]["codes"][own])
    nats, counts = torch.zeros(levels, dtype=torch.float64), torch.zeros(levels, dtype=torch.float64)
    loss = pixels = 0.0
    for items in groups.values():
        for start in range(0, len(items), 64):
            batch = collate(items[start : start + 64])
            output = model(**to_device(batch, model.device))
            codes = torch.tensor([float(level.numel()) for level in batch["codes"][own]], dtype=torch.float64)
            counts += codes
            nats += codes * output.nats_per_code.double().cpu()
            loss += float(output.loss) * float(codes.sum())
            pixels += float(batch["sizes"].prod(1).sum())
    per_level = {f"nats_level_{i}": float(value) for i, value in enumerate(nats / counts)}
    return {"loss": loss / float(counts.sum()), **per_level, "bits_per_unit": float(nats.sum()) / math.log(2) / pixels}


def _publish(
    pipeline: VQPipeline,
    scores: dict[str, float],
    num_held_out: int,
    script: PriorArguments,
    args: TrainingArguments,
    history: list[dict[str, float]],
    seconds: float,
) -> dict[str, Any]:
    folder = Path(args.output_dir)
    stage = pipeline.prior.stages[-1] if isinstance(pipeline.prior, CodeCascade) else pipeline.prior
    levels = pipeline.vq_tokenizer.layout.levels[stage.config.own_levels]
    pipeline.save_pretrained(folder)
    save_training(folder, {**asdict(script), **asdict(args)}, history, seconds)
    modality = pipeline.modality
    unit = {"image": "pixel", "audio": "second"}.get(modality) or pipeline.vq_tokenizer.processor.unit
    bits = f"prior_bits_per_{unit}"
    metrics = {
        "nats_per_code": [scores[f"nats_level_{i}"] for i in range(len(levels))],
        "ln_codebook_size": [math.log(level.codebook_size) for level in levels],
        bits: scores["bits_per_unit"] * (pipeline.sampling_rate or 1),
        "held_out_samples": num_held_out,
    }
    if script.coarse:
        before = json.loads((Path(script.coarse) / "metrics.json").read_text(encoding="utf-8"))
        for name in ("nats_per_code", "ln_codebook_size", bits):
            metrics[name] = before[name] + metrics[name]
    write_json(folder / "metrics.json", metrics)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = pipeline_card(folder.resolve().name, metrics, training, pipeline.prior.config.condition, modality)
    write_text(folder / "README.md", card)
    for level, (value, limit) in enumerate(zip(metrics["nats_per_code"], metrics["ln_codebook_size"], strict=True)):
        print(f"level {level}: {value:.3f} nats per code of ln K = {limit:.3f}")
    print(f"wrote {folder}: from vqtok import VQPipeline; VQPipeline.from_pretrained({str(folder)!r})")
    return metrics


def _draw(
    pipeline: VQPipeline, test: list[dict[str, Any]], conditions: Conditions, args: TrainingArguments, name: str
) -> None:
    """Samples for the first held-out conditions: a sheet of pictures, a file of texts, or files of sound."""
    if isinstance(pipeline.prior, CodeCascade):  # what learns was moved, the stages before it were not
        pipeline.prior.to(pipeline.prior.stages[-1].device)
    prompts = [conditions.prompt(sample) for sample in test[:8]] if conditions.column else None
    drawn = pipeline(prompts, num_samples=1 if conditions.column else 8, seed=args.seed)
    folder = Path(args.output_dir) / "samples"
    if pipeline.modality == "text":
        write_text(folder / f"{name}.txt", "\n\n---\n\n".join(drawn) + "\n")
        return
    if pipeline.sampling_rate is None:
        write_with(folder / f"{name}.png", lambda path: contact_sheet([drawn]).save(path, format="PNG"))
        return
    for index, sound in enumerate(drawn):
        write_file(folder / f"{name}-{index}.wav", sound, pipeline.sampling_rate)


if __name__ == "__main__":
    run_script(main)
