"""The whole path: handwriting and words -> tokenizer -> codes -> prior -> pictures drawn from words, judged and reported.

    python examples/demo.py --output_dir demo          (`make demo` sets everything up first)

A stage that is finished is not repeated, so that a stopped demo continues. Remove the folder to start over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from vqtok import VQPipeline, VQTokenizer
from vqtok.encoding import encode_dataset
from vqtok.evaluation.digit_judge import judge_drawings
from vqtok.evaluation.html import Page
from vqtok.evaluation.pictures import contact_sheet
from vqtok.evaluation.plots import code_map, curves, usage_bars
from vqtok.evaluation.report import machine
from vqtok.evaluation.stages import Stages, launch, record_judged
from vqtok.files import write_json, write_text, write_with
from vqtok.image.digits import SIZE, CaptionedDigits
from vqtok.prior.data import MANIFEST
from vqtok.quantizers import code_counts
from vqtok.training import parse_arguments
from vqtok.training.setup import best_device, run_script

HERE = Path(__file__).resolve().parent
PROMPTS = (
    "a red three top left",
    "a blue seven bottom right",
    "a green zero top right and a white nine bottom left",
    "a yellow one top left and a purple five top right",
    "a white eight bottom left",
    "a purple two top right and a red four bottom right",
)
GOALS = {
    "psnr_db": 30.0, "lowest_usage": 0.90, "place_accuracy": 0.99, "colour_accuracy": 0.99, "digit_accuracy": 0.95,
    "unseen_pair_accuracy": 0.85,
}  # fmt: skip


@dataclass
class DemoArguments:
    """How much of it."""

    output_dir: str = field(default="demo", metadata={"help": "Folder of everything that is made."})
    tokenizer_steps: int = field(default=0, metadata={"help": "Steps of the tokenizer; 0 takes the recipe's."})
    prior_steps: int = field(default=0, metadata={"help": "Steps of the prior; 0 takes the recipe's."})
    num_scenes: int = field(default=20_000, metadata={"help": "Scenes whose codes the prior is trained on."})
    num_judged: int = field(default=500, metadata={"help": "Held-out captions that are drawn and judged."})
    num_threads: int = field(default=0, metadata={"help": "Threads of torch; 0 takes every core."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is not done yet, write the report, and return what metrics.json holds."""
    (args,) = parse_arguments([DemoArguments], argv, description=__doc__)
    folder = Path(args.output_dir)
    torch.set_num_threads(args.num_threads or os.cpu_count() or 1)
    stages = Stages(folder / "progress.json")

    stages.run("train the tokenizer", lambda: launch(HERE / "train_tokenizer.py", folder / "tokenizer", [
        "--config", "image/vqvae2-digits",
    ], args.num_threads, args.tokenizer_steps))  # fmt: skip
    tokenizer = VQTokenizer.from_pretrained(folder / "tokenizer", device=best_device())
    for split, number in (("train", args.num_scenes), ("test", 512)):
        if not (folder / "codes" / split / MANIFEST).exists():
            scenes = CaptionedDigits(split, num_samples=number, seed=0)
            stages.run(f"encode {split}", lambda s=scenes, p=split: encode_dataset(tokenizer, s, folder / "codes" / p))
    stages.run("train the prior", lambda: launch(HERE / "train_prior.py", folder / "pipeline", [
        "--config", "prior/digits", "--tokenizer", str(folder / "tokenizer"),
        "--codes", str(folder / "codes" / "train"), "--eval_codes", str(folder / "codes" / "test"),
    ], args.num_threads, args.prior_steps))  # fmt: skip

    stages.forget("draw and judge", "report")
    with stages.timed("draw and judge"):
        pipeline = VQPipeline.from_pretrained(folder / "pipeline", device=best_device())
        judged = judge_drawings(pipeline, tokenizer, args.num_judged)
    metrics = _metrics(folder, judged, stages)
    with stages.timed("report"):
        _report(folder, pipeline, tokenizer, metrics, judged)
    metrics["minutes"] = round(stages.seconds / 60, 2)
    judged = {
        name: metrics[name] for name in (*GOALS, "num_judged", "samples_per_second", "minutes", "machine", "date")
    }
    judged["digit_accuracy_of_the_judge_on_real_pictures"] = metrics["judge_accuracy_on_real"]["digit_accuracy"]
    record_judged(folder / "pipeline", judged, PROMPTS[0])
    write_json(folder / "metrics.json", metrics)
    _say(folder, metrics)
    return metrics


def _metrics(folder: Path, judged: dict[str, Any], stages: Stages) -> dict[str, Any]:
    tokenizer = json.loads((folder / "tokenizer" / "metrics.json").read_text())
    prior = json.loads((folder / "pipeline" / "metrics.json").read_text())
    held_out, unseen = judged["held_out"], judged["unseen_pairs"]
    keys = ("psnr_db", "ssim", "usage", "perplexity", "bits_per_pixel")
    return {
        **{key: tokenizer[key] for key in keys},
        "lowest_usage": min(tokenizer["usage"]),
        **{f"{what}_accuracy": held_out["drawn"][f"{what}_accuracy"] for what in ("place", "colour", "digit")},
        "unseen_pair_accuracy": unseen["drawn"]["colour_and_digit_accuracy"],
        "judge_accuracy_on_real": held_out["real"],
        "judge_accuracy_on_reconstructions": held_out["reconstructed"],
        "judge_accuracy_on_real_unseen_pairs": unseen["real"],
        **{key: prior[key] for key in ("nats_per_code", "ln_codebook_size", "prior_bits_per_pixel")},
        "samples_per_second": held_out["samples_per_second"],
        "num_judged": len(held_out["captions"]),
        "seconds_per_stage": {name: round(value, 1) for name, value in stages.spent.items()},
        "machine": ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items()),
        "date": date.today().isoformat(),
    }


def _report(
    folder: Path, pipeline: VQPipeline, tokenizer: VQTokenizer, metrics: dict[str, Any], judged: dict[str, Any]
) -> None:
    page = Page("Pictures of handwriting, drawn from words", f"vqtok demo, {metrics['date']}, {metrics['machine']}")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)

    def add(name: str, picture: Any) -> None:
        write_with(pictures / f"{name}.png", lambda path: picture.save(path, format="PNG"))
        page.picture(picture, name)

    page.heading("Drawn from words")
    rows = [pipeline([prompt], num_samples=6, seed=7, sizes=(SIZE, SIZE)) for prompt in PROMPTS]
    for prompt, row in zip(PROMPTS, rows, strict=True):
        page.text(prompt)
        page.tiles(row, width=96)
    write_with(pictures / "prompts.png", lambda path: contact_sheet(rows, tile=96).save(path, format="PNG"))

    page.heading("Figures")
    page.table(["figure", "reached", "asked", ""], [
        [name, float(metrics[name]), goal, "met" if metrics[name] >= goal else "missed"] for name, goal in GOALS.items()
    ])  # fmt: skip
    page.text(
        "A classifier that only ever saw real training digits judges each digit that was asked for. On real held-out scenes it is "
        f"right in {metrics['judge_accuracy_on_real']['digit_accuracy']:.1%} of the digits, on their reconstructions in "
        f"{metrics['judge_accuracy_on_reconstructions']['digit_accuracy']:.1%}."
    )
    page.table(["level", "nats per code", "ln K", "usage", "perplexity"], [
        [i, *values] for i, values in enumerate(
            zip(metrics["nats_per_code"], metrics["ln_codebook_size"], metrics["usage"], metrics["perplexity"], strict=True)
        )
    ])  # fmt: skip

    page.heading("Held-out captions")
    page.text("None of these scenes was in training, in any wording.")
    held_out = judged["held_out"]
    page.tiles(held_out["pictures"][:24], held_out["captions"][:24], width=96)
    page.heading("Digits in colours they never had in training")
    unseen = judged["unseen_pairs"]
    page.tiles(unseen["pictures"][:12], unseen["captions"][:12], width=96)

    page.heading("Reconstructions")
    data = CaptionedDigits("test", num_samples=512, seed=0)
    items = [data[i] for i in range(len(data))]
    codes = tokenizer.encode([item["image"] for item in items])
    levels = tokenizer.layout.levels
    prefixes = [tokenizer.decode(codes[range(10)].prefix(n)) for n in range(1, len(levels) + 1)]
    page.text("From above: held-out scenes; decoded from the coarsest level alone; then with each finer level.")
    add("reconstructions", contact_sheet([[item["image"] for item in items[:10]], *prefixes]))
    page.text("The codes of the same scenes, one colour per code, coarse to fine.")
    maps = [[code_map(codes.levels[i][n, 0], level.codebook_size) for n in range(10)] for i, level in enumerate(levels)]
    add("code_maps", contact_sheet(maps, tile=96))
    counts = [code_counts(value, level.codebook_size) for value, level in zip(codes.levels, levels, strict=True)]
    add("usage", usage_bars(counts, [f"level {i}, K = {level.codebook_size}" for i, level in enumerate(levels)]))

    page.heading("Training")
    history = json.loads((folder / "tokenizer" / "training.json").read_text())["history"]
    add(
        "tokenizer_loss",
        curves(history, {"reconstruction_loss": "reconstruction", "commitment_loss": "commitment"}, "loss", True),
    )
    history = json.loads((folder / "pipeline" / "training.json").read_text())["history"]
    names = {f"nats_level_{i}": f"level {i}, ln K = {value:.2f}" for i, value in enumerate(metrics["ln_codebook_size"])}
    add("prior_loss", curves(history, names, "nats per code"))
    write_text(folder / "report.html", page.render())


def _say(folder: Path, metrics: dict[str, Any]) -> None:
    print()
    for name, goal in GOALS.items():
        mark = "" if metrics[name] >= goal else "   below the goal"
        print(f"{name:22} {metrics[name]:8.4g}   goal {goal:g}{mark}")
    real = metrics["judge_accuracy_on_real"]
    shares = ", ".join(f"{what} {real[f'{what}_accuracy']:.3f}" for what in ("place", "colour", "digit"))
    print(f"{'the judge on real':22} {shares}")
    nats = " ".join(
        f"{a:.2f}/{b:.2f}" for a, b in zip(metrics["nats_per_code"], metrics["ln_codebook_size"], strict=True)
    )
    print(
        f"{'nats per code / ln K':22} {nats}   {metrics['prior_bits_per_pixel']:.3f} of {metrics['bits_per_pixel']:.3f} bits per pixel"
    )
    print(f"{'samples per second':22} {metrics['samples_per_second']:8.4g}   {metrics['minutes']} minutes in all")
    print(f"\nLook at {folder / 'report.html'}, then try:")
    print(
        f'  .venv/bin/vqtok generate {folder / "pipeline"} "a green eight bottom left" --output_dir {folder / "mine"}'
    )
    print(f"  .venv/bin/vqtok info {folder / 'tokenizer'}")
    print(f"  .venv/bin/vqtok evaluate {folder / 'tokenizer'} digits")


if __name__ == "__main__":
    run_script(main)
