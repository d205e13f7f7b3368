"""Train a GPT-style prior over the codes of a tokenizer, and save it with tokenizer and text tokenizer as one pipeline.

    accelerate launch examples/train_prior.py --config prior/digits --tokenizer out/vq --output_dir out/pipeline
    accelerate launch examples/train_prior.py --config prior/digits --tokenizer out/vq --codes out/codes --output_dir out/pipeline

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
from transformers import AutoTokenizer

from vqtok import CodePriorConfig, CodePriorModel, VQPipeline, VQTokenizer
from vqtok.auto import config_folder
from vqtok.encoding import encode_dataset
from vqtok.evaluation.pictures import contact_sheet
from vqtok.files import write_json, write_text, write_with
from vqtok.fingerprint import check_fingerprint
from vqtok.hub.card import pipeline_card
from vqtok.image.data import load_images, skipped_summary
from vqtok.prior import PRIORS
from vqtok.prior.conditions import COLUMNS, Conditions, check_values
from vqtok.prior.data import CONDITION, MANIFEST, CodeDataset, prior_collate
from vqtok.prior.features import FeatureConditions, TextEncoder
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
    codes: str | None = field(
        default=None, metadata={"help": "A code cache to train on, instead of encoding --dataset."}
    )
    eval_codes: str | None = field(
        default=None, metadata={"help": "A held-out code cache; None keeps every 50th sample apart."}
    )
    dataset: str = field(default="digits", metadata={"help": "Encoded first when there is no --codes."})
    caption_column: str | None = field(default=None, metadata={"help": "Column of captions."})
    label_column: str | None = field(default=None, metadata={"help": "Column of class labels."})
    num_samples: int | None = field(default=None, metadata={"help": "How many samples of the data set at most."})
    text_tokenizer: str | None = field(
        default=None, metadata={"help": "A tokenizer of transformers; None trains a byte-pair one."}
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
        metadata={"help": "Attention of the backbone on a CPU (sdpa, eager, ...); None is transformers' choice."},
    )
    eval_samples: int = field(default=512, metadata={"help": "Held-out samples of an evaluation."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure on held-out codes and save the pipeline; returns the metrics that metrics.json holds."""
    script, args = _arguments(sys.argv[1:] if argv is None else argv)
    recipe = _read(script.config, "config.json")
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    vq_tokenizer = VQTokenizer.from_pretrained(script.tokenizer, device=accelerator.device)
    kind = _kind(recipe, script)
    encoder = TextEncoder.from_pretrained(script.text_encoder) if script.text_encoder else None
    codes, train, held_out = _codes(accelerator, vq_tokenizer, kind, script, args)
    if encoder is None:
        conditions = _conditions(kind, codes, train, script)
    else:
        conditions = _features(accelerator, encoder, codes, held_out, script, Path(args.output_dir) / "features")
    test = _known(accelerator, held_out, conditions, script.eval_samples)
    model = _model(accelerator, recipe, codes, conditions, script)
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(
        f"{len(train)} samples to train on, {len(test)} to test; {parameters:,} parameters", file=sys.stderr
    )
    pipeline = VQPipeline(model, vq_tokenizer, conditions.text_tokenizer, conditions.seen, encoder)

    def loader(start: int) -> Any:
        groups = [group[np.isin(group, train)] for group in codes.groups()]
        sampler = StepSampler(
            groups, args.batch_size, args.max_steps, args.seed, start, accelerator.process_index,
            accelerator.num_processes, args.gradient_accumulation_steps,
        )  # fmt: skip
        return step_loader(codes, prior_collate(conditions.ids), sampler, args.num_workers)

    def evaluate(step: int) -> dict[str, float]:
        if step < args.max_steps:
            _draw(pipeline, test, conditions, args, f"step-{step}.png")
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
    if accelerator.is_main_process:
        metrics = _publish(pipeline, _score(model, test, conditions), len(test), script, args, history)
        _draw(pipeline, test, conditions, args, "samples.png")
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
    columns = {"caption_column": script.caption_column, "label_column": script.label_column}
    asked = {"dataset": script.dataset, "num_samples": script.num_samples, **columns}
    if accelerator.is_main_process and not script.codes and not (folder / MANIFEST).exists():
        images = load_images(script.dataset, num_samples=script.num_samples, **_given(columns))
        if column := COLUMNS.get(kind):
            check_values(kind, [images[0].get(column)])
        encode_dataset(vq_tokenizer, images, folder, facts={"asked": {**asked, "dataset": Path(script.dataset).name}})
        if summary := skipped_summary(images):
            print(summary, file=sys.stderr)
    accelerator.wait_for_everyone()
    codes = CodeDataset(folder)
    check_fingerprint(vq_tokenizer.fingerprint, codes.fingerprint, f"the codes in {folder}")
    before = codes.manifest.get("asked")
    if not script.codes and before != {**asked, "dataset": Path(script.dataset).name}:
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


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _conditions(kind: str, codes: CodeDataset, train: list[int], script: PriorArguments) -> Conditions:
    column = codes.columns.get(COLUMNS.get(kind) or "", [])
    tokenizer = None
    if script.text_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(script.text_tokenizer, trust_remote_code=False)
    values = column if kind == "codes" else [column[i] for i in train] if column else []
    return Conditions(kind, values, tokenizer, script.text_vocab_size, script.max_text_length)


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
    accelerator: Accelerator, recipe: dict[str, Any], codes: CodeDataset, conditions: Conditions, script: PriorArguments
) -> CodePriorModel:
    layout, sizes = codes.layout, codes.sizes.tolist()
    model_type = recipe.get("model_type", CodePriorConfig.model_type)
    if model_type not in PRIORS:
        raise ValueError(f"{script.config} is of model_type {model_type!r}, which is no prior ({', '.join(PRIORS)})")
    config_class, model_class = PRIORS[model_type]
    config = config_class(
        **{
            **{name: value for name, value in recipe.items() if name != "model_type"},
            "layout": layout.to_dict(),
            **conditions.fields,
            "max_grid": max(n // layout.stride for size in sizes for n in layout.padded(size)),
            "fingerprint": codes.fingerprint,
        }
    )
    largest = max(sizes, key=layout.num_codes)
    needed, most = (
        config.prefix_length + 1 + layout.ndim + layout.num_codes(largest),
        config.backbone_config.max_position_embeddings,
    )
    if needed > most:
        raise ValueError(
            f"the largest picture, {largest}, makes a sequence of {needed} tokens, the backbone takes {most}: use smaller pictures, "
            "or a recipe with a larger max_position_embeddings in backbone_config"
        )
    model = model_class(config)
    if script.attn_implementation and accelerator.device.type == "cpu":
        model.set_attn_implementation(script.attn_implementation)
    if (Path(config_folder(script.config)) / "generation_config.json").exists():  # the recipe's sampling defaults
        model.generation_config.update(**_read(script.config, "generation_config.json"))
    return model


@torch.no_grad()
def _score(model: CodePriorModel, test: list[dict[str, Any]], conditions: Conditions) -> dict[str, float]:
    """Held-out nats per token, nats per code of each level, and bits per pixel of the codes, over all samples together."""
    collate = prior_collate(conditions.ids)
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for sample in test:
        groups.setdefault(tuple(sample["codes"][0].shape), []).append(sample)
    levels = len(test[0]["codes"])
    nats, counts = torch.zeros(levels, dtype=torch.float64), torch.zeros(levels, dtype=torch.float64)
    loss = pixels = 0.0
    for items in groups.values():
        for start in range(0, len(items), 64):
            batch = collate(items[start : start + 64])
            output = model(**to_device(batch, model.device))
            codes = torch.tensor([float(level.numel()) for level in batch["codes"]], dtype=torch.float64)
            counts += codes
            nats += codes * output.nats_per_code.double().cpu()
            loss += float(output.loss) * float(codes.sum())
            pixels += float(batch["sizes"].prod(1).sum())
    per_level = {f"nats_level_{i}": float(value) for i, value in enumerate(nats / counts)}
    return {"loss": loss / float(counts.sum()), **per_level, "bits_per_pixel": float(nats.sum()) / math.log(2) / pixels}


def _publish(
    pipeline: VQPipeline,
    scores: dict[str, float],
    num_held_out: int,
    script: PriorArguments,
    args: TrainingArguments,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    folder, levels = Path(args.output_dir), pipeline.vq_tokenizer.layout.levels
    pipeline.save_pretrained(folder)
    save_training(folder, {**asdict(script), **asdict(args)}, history)
    metrics = {
        "nats_per_code": [scores[f"nats_level_{i}"] for i in range(len(levels))],
        "ln_codebook_size": [math.log(level.codebook_size) for level in levels],
        "prior_bits_per_pixel": scores["bits_per_pixel"],
        "held_out_samples": num_held_out,
    }
    write_json(folder / "metrics.json", metrics)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = pipeline_card(folder.resolve().name, metrics, training, pipeline.prior.config.condition)
    write_text(folder / "README.md", card)
    for level, (value, limit) in enumerate(zip(metrics["nats_per_code"], metrics["ln_codebook_size"], strict=True)):
        print(f"level {level}: {value:.3f} nats per code of ln K = {limit:.3f}")
    print(f"wrote {folder}: from vqtok import VQPipeline; VQPipeline.from_pretrained({str(folder)!r})")
    return metrics


def _draw(
    pipeline: VQPipeline, test: list[dict[str, Any]], conditions: Conditions, args: TrainingArguments, name: str
) -> None:
    """A sheet of samples for the first held-out conditions."""
    prompts = [conditions.prompt(sample) for sample in test[:8]] if conditions.column else None
    drawn = pipeline(prompts, num_samples=1 if conditions.column else 8, seed=args.seed)
    path = Path(args.output_dir) / "samples" / name
    write_with(path, lambda temporary: contact_sheet([drawn]).save(temporary, format="PNG"))


if __name__ == "__main__":
    run_script(main)
