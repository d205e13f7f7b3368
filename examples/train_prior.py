"""Train a GPT-style prior over the codes of a tokenizer, and save it with tokenizer and text tokenizer as one pipeline.

    accelerate launch examples/train_prior.py --config prior/digits --tokenizer out/vq --output_dir out/pipeline
    accelerate launch examples/train_prior.py --config prior/digits --tokenizer out/vq --codes out/codes --output_dir out/pipeline

Stopped anywhere, the same command continues.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
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
from vqtok.files import write_json, write_text
from vqtok.fingerprint import check_fingerprint
from vqtok.hub.card import pipeline_card
from vqtok.image.data import load_images
from vqtok.prior.data import MANIFEST, CodeDataset, prior_collate
from vqtok.prior.text import encode_prompts, seen_token_ids, train_text_tokenizer
from vqtok.training import (
    PriorStep,
    StepSampler,
    TrainingArguments,
    fit,
    parse_arguments,
    read_recipe,
    step_loader,
)
from vqtok.training.setup import finish, make_accelerator, run_script, save_training


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
    num_samples: int | None = field(default=None, metadata={"help": "How many samples of the data set at most."})
    text_tokenizer: str | None = field(
        default=None, metadata={"help": "A tokenizer of transformers; None trains a byte-pair one."}
    )
    text_vocab_size: int = field(default=1024, metadata={"help": "Most entries of a byte-pair tokenizer trained here."})
    max_text_length: int = field(default=128, metadata={"help": "Most tokens of a caption; a longer one is refused."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the backbone while training (sdpa, eager, ...); None is transformers' choice."},
    )
    eval_samples: int = field(default=512, metadata={"help": "Held-out samples of an evaluation."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure on held-out codes and save the pipeline; returns the metrics that metrics.json holds."""
    script, args = _arguments(sys.argv[1:] if argv is None else argv)
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    vq_tokenizer = VQTokenizer.from_pretrained(script.tokenizer)
    codes, train, test = _codes(accelerator, vq_tokenizer, script, args)
    config, condition, text_tokenizer, seen = _build(accelerator, script, args, codes)
    model = CodePriorModel(config)
    if script.attn_implementation:
        model.set_attn_implementation(script.attn_implementation)
    if (Path(config_folder(script.config)) / "generation_config.json").exists():  # the recipe's sampling defaults
        model.generation_config.update(**_json(script.config, "generation_config.json"))
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(
        f"{len(train)} samples to train on, {len(test)} to test; {parameters:,} parameters", file=sys.stderr
    )
    collate = prior_collate(condition)

    def loader(start: int) -> Any:
        sampler = StepSampler(
            _groups(codes, train), args.batch_size, args.max_steps, args.seed, start, accelerator.process_index,
            accelerator.num_processes, args.gradient_accumulation_steps,
        )  # fmt: skip
        return step_loader(codes, collate, sampler, args.num_workers)

    def evaluate(step: int) -> dict[str, float]:
        return _score(model, test, script.eval_samples, condition)

    step = PriorStep(accelerator, model, args)
    history = fit(accelerator, step, loader, args, evaluate=evaluate, extra_arguments=asdict(script))
    metrics: dict[str, Any] = {}
    if accelerator.is_main_process:
        model.eval()
        pipeline = VQPipeline(model, vq_tokenizer, text_tokenizer, seen)
        metrics = _publish(pipeline, evaluate(args.max_steps), test, script, args, history)
    finish(accelerator)
    return metrics


def _arguments(argv: Sequence[str]) -> tuple[PriorArguments, TrainingArguments]:
    classes = (PriorArguments, TrainingArguments)
    chosen = parse_arguments(classes, argv, {"output_dir": ""}, description=__doc__)[0]
    return parse_arguments(classes, argv, read_recipe(config_folder(chosen.config)), description=__doc__)


def _codes(
    accelerator: Accelerator, vq_tokenizer: VQTokenizer, script: PriorArguments, args: TrainingArguments
) -> tuple[CodeDataset, Subset, Subset]:
    """The code cache, and which of its samples are trained on and which are held out."""
    folder = Path(script.codes or Path(args.output_dir) / "codes")
    if accelerator.is_main_process and not script.codes and not (folder / MANIFEST).exists():
        images = load_images(script.dataset, caption_column=script.caption_column, num_samples=script.num_samples)
        encode_dataset(vq_tokenizer, images, folder, facts={"dataset": Path(script.dataset).name})
    accelerator.wait_for_everyone()
    codes = CodeDataset(folder)
    check_fingerprint(vq_tokenizer.fingerprint, codes.fingerprint, f"the codes in {folder}")
    numbers = np.arange(len(codes))
    if not script.eval_codes:
        return codes, Subset(codes, numbers[numbers % 50 != 0].tolist()), Subset(codes, numbers[::50].tolist())
    held_out = CodeDataset(script.eval_codes)
    check_fingerprint(codes.fingerprint, held_out.fingerprint, f"the codes in {script.eval_codes}")
    return codes, Subset(codes, numbers.tolist()), Subset(held_out, list(range(len(held_out))))


def _groups(codes: CodeDataset, train: Subset) -> list[np.ndarray]:
    chosen = np.isin(np.arange(len(codes)), train.indices)
    return [group[chosen[group]] for group in codes.groups()]


def _build(
    accelerator: Accelerator, script: PriorArguments, args: TrainingArguments, codes: CodeDataset
) -> tuple[CodePriorConfig, Callable[[dict[str, Any]], list[int] | None], Any, list[int] | None]:
    """The prior's config, how a sample becomes condition ids, the text tokenizer if there is one, and the ids it was trained on."""
    recipe = _json(script.config, "config.json")
    kind = recipe.get("condition", "none")
    text_tokenizer, text_size, longest, seen = None, 0, 1, None
    if kind == "text":
        captions = sorted(set(_column(codes, "text", script)))
        text_tokenizer = (
            AutoTokenizer.from_pretrained(script.text_tokenizer)
            if script.text_tokenizer
            else train_text_tokenizer(captions, script.text_vocab_size)
        )
        rows = encode_prompts(text_tokenizer, captions, script.max_text_length)
        text_size, longest = len(text_tokenizer), max(len(row) for row in rows)
        known = dict(zip(captions, rows, strict=True))
        if not script.text_tokenizer:  # a pretrained one knows words that these captions do not have
            seen = seen_token_ids(rows)
    elif kind == "class":
        text_size = max(_column(codes, "label", script)) + 1

    def condition(item: dict[str, Any]) -> list[int] | None:
        if kind == "text":
            return known.get(item["text"]) or encode_prompts(text_tokenizer, [item["text"]], script.max_text_length)[0]
        return [item["label"]] if kind == "class" else None

    coarsest = np.array([codes.layout.padded(size) for size in codes.sizes.tolist()]) // codes.layout.stride
    config = CodePriorConfig(
        **{
            **recipe,
            "layout": codes.layout.to_dict(),
            "text_size": text_size,
            "max_text_length": min(script.max_text_length, 2 * longest),
            "max_grid": int(coarsest.max()),
            "fingerprint": codes.fingerprint,
        }
    )
    return config, condition, text_tokenizer, seen


def _json(config: str, file: str) -> dict[str, Any]:
    return json.loads((Path(config_folder(config)) / file).read_text(encoding="utf-8"))


def _column(codes: CodeDataset, name: str, script: PriorArguments) -> list[Any]:
    values = codes.columns.get(name, [])
    if not values or any(value is None for value in values):
        raise ValueError(
            f"the recipe {script.config} needs a {name} for every sample, {sum(v is None for v in values)} of {len(codes)} codes lack "
            "it: name the column with --caption_column when encoding, or use a recipe without condition"
        )
    return values


@torch.no_grad()
def _score(
    model: CodePriorModel, test: Subset, num_samples: int, condition: Callable[[dict[str, Any]], list[int] | None]
) -> dict[str, float]:
    """Held-out nats per token and per code of each level, batch by batch of one size."""
    collate = prior_collate(condition)
    by_size: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for i in range(min(num_samples, len(test))):
        by_size.setdefault(tuple(test[i]["codes"][0].shape), []).append(test[i])
    totals, weight = torch.zeros(1 + len(model.config.layout["levels"])), 0
    for items in by_size.values():
        for start in range(0, len(items), 64):
            batch = collate(items[start : start + 64])
            output = model(**_to(batch, model.device))
            n = len(batch["sizes"])
            totals += n * torch.cat([output.loss.view(1), output.nats_per_code]).float().cpu()
            weight += n
    values = (totals / weight).tolist()
    return {"loss": values[0], **{f"nats_level_{i}": value for i, value in enumerate(values[1:])}}


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: tuple(t.to(device) for t in v) if isinstance(v, tuple) else v.to(device) for k, v in batch.items()}


def _publish(
    pipeline: VQPipeline,
    scores: dict[str, float],
    test: Subset,
    script: PriorArguments,
    args: TrainingArguments,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    folder = Path(args.output_dir)
    pipeline.save_pretrained(folder)
    save_training(folder, {**asdict(script), **asdict(args)}, history)
    levels = pipeline.vq_tokenizer.layout.levels
    nats = [scores[f"nats_level_{i}"] for i in range(len(levels))]
    size = test[0]["size"]
    grids = pipeline.vq_tokenizer.layout.grids(size)
    bits = sum(
        n / np.log(2) * np.prod(g) * level.num_codebooks for n, g, level in zip(nats, grids, levels, strict=True)
    )
    metrics = {
        "nats_per_code": nats,
        "ln_codebook_size": [float(np.log(level.codebook_size)) for level in levels],
        "prior_bits_per_pixel": float(bits / np.prod(size)),
        "held_out_samples": min(script.eval_samples, len(test)),
    }
    write_json(folder / "metrics.json", metrics)
    kind = pipeline.prior.config.condition
    write_text(folder / "README.md", pipeline_card(folder.resolve().name, metrics, read_recipe(folder), kind))
    prompts = (
        None if kind == "none" else [test[i]["text" if kind == "text" else "label"] for i in range(min(8, len(test)))]
    )
    (folder / "samples").mkdir(exist_ok=True)
    contact_sheet([pipeline(prompts, seed=args.seed)]).save(folder / "samples" / "samples.png")
    for level, (value, limit) in enumerate(zip(nats, metrics["ln_codebook_size"], strict=True)):
        print(f"level {level}: {value:.3f} nats per code of ln K = {limit:.3f}")
    print(f"wrote {folder}: from vqtok import VQPipeline; VQPipeline.from_pretrained({str(folder)!r})")
    return metrics


if __name__ == "__main__":
    run_script(main)
