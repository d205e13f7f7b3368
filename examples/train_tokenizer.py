"""Train an image tokenizer, from scratch or from an existing one, on a folder of pictures, a data set or the embedded digits.

    accelerate launch examples/train_tokenizer.py --config image/vqvae2-digits --output_dir out/vq
    accelerate launch examples/train_tokenizer.py --config image/vqvae2-photos --dataset photos/ --output_dir out/photos
    accelerate launch examples/train_tokenizer.py --tokenizer out/photos --decoder_only --dataset mine/ --output_dir out/mine

Stopped anywhere, the same command continues.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqtok import VQTokenizer
from vqtok.auto import config_folder
from vqtok.evaluation.pictures import contact_sheet
from vqtok.evaluation.report import evaluate as evaluate_tokenizer
from vqtok.files import write_json, write_text, write_with
from vqtok.hub.card import tokenizer_card
from vqtok.image.data import CropDataset, load_images, skipped_summary
from vqtok.training import (
    StepSampler,
    TokenizerStep,
    TrainingArguments,
    fit,
    parse_arguments,
    read_recipe,
    step_loader,
)
from vqtok.training.setup import finish, make_accelerator, model_fields, run_script, save_training


@dataclass
class TokenizerArguments:
    """What to train, and on what."""

    config: str | None = field(
        default=None, metadata={"help": "A recipe (image/vqvae2-digits) or a folder with config.json."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "A trained tokenizer to continue from, instead of --config."}
    )
    decoder_only: bool = field(
        default=False, metadata={"help": "With --tokenizer: train the decoder alone; codes stay valid."}
    )
    dataset: str = field(
        default="digits", metadata={"help": "digits, a folder of pictures, or a data set of `datasets`."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of pictures, if there are several."})
    holdout: list[str] = field(default_factory=list, metadata={"help": "Files of a folder kept for the test, by name."})
    image_size: int = field(default=0, metadata={"help": "Side of random crops; 0 takes whole pictures of one size."})
    num_samples: int | None = field(
        default=None, metadata={"help": "How many pictures at most (digits: how many scenes)."}
    )
    eval_samples: int = field(default=256, metadata={"help": "Pictures of the final evaluation."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate on the test split and save; returns the metrics that metrics.json holds."""
    script, args = _arguments(sys.argv[1:] if argv is None else argv)
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    tokenizer = (
        VQTokenizer.from_pretrained(script.tokenizer) if script.tokenizer else VQTokenizer.from_config(script.config)
    )
    if script.decoder_only:
        tokenizer.model.freeze_codes()
    load = partial(load_images, script.dataset, image_column=script.image_column, holdout=script.holdout or None)
    train, test = load("train", num_samples=script.num_samples), load("test", num_samples=script.eval_samples)
    accelerator.print(f"{len(train)} pictures to train on, {len(test)} to test", file=sys.stderr)
    crops = CropDataset(train, script.image_size, seed=args.seed, shuffle=False) if script.image_size else train

    def loader(start: int) -> Any:
        sampler = StepSampler(
            [np.arange(len(crops))], args.batch_size, args.max_steps, args.seed, start, accelerator.process_index,
            accelerator.num_processes, args.gradient_accumulation_steps,
        )  # fmt: skip
        return step_loader(crops, partial(_pixels, tokenizer.processor), sampler, args.num_workers)

    # Whole pictures, or with --image_size one crop of each, so that an evaluation between steps stays quick.
    held_out = _evaluation_batch(tokenizer, test, script.image_size)

    def evaluate(step: int) -> dict[str, float]:
        model = tokenizer.model
        output = model.decode(model.encode(held_out.to(model.device)).codes).reconstruction.float().cpu()
        mse = ((output.clamp(-1, 1) - held_out) / 2).square().flatten(1).mean(1).clamp_min(1e-10)
        if step < args.max_steps:
            rows = [
                tokenizer.processor.postprocess(pixels[:8], [pixels.shape[2:]] * len(pixels[:8]))
                for pixels in (held_out, output)
            ]
            _save_sheet(rows, Path(args.output_dir) / "samples" / f"step-{step}.png")
        return {"loss": float(mse.mean()), "psnr_db": float((-10 * mse.log10()).mean())}

    step = TokenizerStep(accelerator, tokenizer.model, args, epoch_size=len(train))
    same_run = {**asdict(script), "model": model_fields(tokenizer.model.config), "num_train": len(train)}
    history = fit(accelerator, step, loader, args, evaluate=evaluate, extra_arguments=same_run)
    metrics: dict[str, Any] = {}
    if accelerator.is_main_process:
        metrics = _publish(tokenizer, test, script, args, history)
        for part in (train, test):
            if summary := skipped_summary(part):
                print(summary, file=sys.stderr)
    finish(accelerator)
    return metrics


def _arguments(argv: Sequence[str]) -> tuple[TokenizerArguments, TrainingArguments]:
    classes = (TokenizerArguments, TrainingArguments)
    chosen = parse_arguments(classes, argv, {"output_dir": ""}, description=__doc__)[0]
    if bool(chosen.config) == bool(chosen.tokenizer):
        raise ValueError(
            "give either --config (a recipe, to train from scratch) or --tokenizer (to continue from a trained one)"
        )
    if chosen.decoder_only and not chosen.tokenizer:
        raise ValueError("--decoder_only needs --tokenizer: there are no codes to keep without a trained tokenizer")
    recipe = read_recipe(config_folder(chosen.config)) if chosen.config else {}
    return parse_arguments(classes, argv, recipe, description=__doc__)


def _pixels(processor: Any, items: list[dict[str, Any]]) -> torch.Tensor:
    pixels = [processor.prepare(item["image"])[0] for item in items]
    sizes = {tuple(p.shape[1:]) for p in pixels}
    if len(sizes) > 1:
        raise ValueError(
            f"pictures of several sizes in a batch ({sorted(sizes)[:3]}): set --image_size to train on crops"
        )
    return torch.stack(pixels)


def _evaluation_batch(tokenizer: VQTokenizer, test: Any, image_size: int) -> torch.Tensor:
    items = [test[i] for i in range(min(64, len(test)))]
    if image_size:
        items = [CropDataset([item], image_size)[0] for item in items]
    return _pixels(tokenizer.processor, items)


def _publish(
    tokenizer: VQTokenizer,
    test: Any,
    script: TokenizerArguments,
    args: TrainingArguments,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    folder = Path(args.output_dir)
    tokenizer.save_pretrained(folder)
    save_training(folder, {**asdict(script), **asdict(args)}, history)
    metrics = evaluate_tokenizer(tokenizer, test, name=folder.resolve().name)
    write_json(folder / "metrics.json", metrics)
    write_text(
        folder / "README.md",
        tokenizer_card(metrics["name"], metrics, json.loads((folder / "training.json").read_text(encoding="utf-8"))),
    )
    originals = [test[i]["image"] for i in range(min(8, len(test)))]
    _save_sheet([originals, tokenizer.reconstruct(originals)], folder / "samples" / "reconstructions.png")
    print(tokenizer)
    shares = " ".join(f"{used:.1%}" for used in metrics["usage"])
    perplexities = " ".join(f"{value:.1f}" for value in metrics["perplexity"])
    print(f"PSNR {metrics['psnr_db']:.2f} dB, usage {shares}, perplexity {perplexities}")
    print(f"wrote {folder}: from vqtok import VQTokenizer; VQTokenizer.from_pretrained({str(folder)!r})")
    return metrics


def _save_sheet(rows: list[list[Any]], path: Path) -> None:
    write_with(path, lambda temporary: contact_sheet(rows).save(temporary, format="PNG"))


if __name__ == "__main__":
    run_script(main)
