"""What each order of codes gives at the same training time: priors over the codes of the captioned digits, judged and timed.

    python benchmarks/orders.py --output_dir out/orders --seconds 120 --report docs/orders.md

Three tokenizers of nearly the same rate: two levels (VQ-VAE-2), residual codes, and growing resolutions (VAR). For each prior the
time of a step is measured first; then it gets as many steps as fit into the same seconds, with its schedule stretched over them.
The two stages of a cascade share them. Samples are drawn with each recipe's own defaults.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from vqtok import VQPipeline, VQTokenizer
from vqtok.encoding import encode_dataset
from vqtok.evaluation.digit_judge import judge_drawings
from vqtok.evaluation.pictures import contact_sheet
from vqtok.evaluation.report import machine
from vqtok.files import write_json, write_text, write_with
from vqtok.image.digits import SIZE, CaptionedDigits
from vqtok.prior import fast
from vqtok.prior.data import MANIFEST
from vqtok.training import parse_arguments
from vqtok.training.setup import run_script

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# name: tokenizer, recipes of the stages
PRIORS = {
    "flat": ("vqvae2-digits", ["digits"]),
    "cascade": ("vqvae2-digits", ["digits-top", "digits-bottom"]),
    "masked": ("vqvae2-digits", ["digits-masked"]),
    "flat, residual": ("residual-digits", ["digits"]),
    "delay": ("residual-digits", ["digits-delay"]),
    "depth": ("residual-digits", ["digits-depth"]),
    "next scale": ("multiscale-digits", ["digits-next-scale"]),
}
PROMPTS = ("a red three top left", "a green zero top right and a white nine bottom left", "a blue seven bottom right")
ACCURACIES = ("place_accuracy", "colour_accuracy", "digit_accuracy")


@dataclass
class OrderArguments:
    """How long, and where to."""

    output_dir: str = field(metadata={"help": "Folder of everything that is made; what is there is not made again."})
    seconds: float = field(default=120.0, metadata={"help": "Training time of each prior."})
    num_judged: int = field(default=500, metadata={"help": "Captions of each kind that are drawn and judged."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    only: list[str] | None = field(default=None, metadata={"help": "Some of the priors, by name."})
    report: str | None = field(default=None, metadata={"help": "Markdown file to write, with a picture beside it."})


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train what is missing, judge, time, print the table; returns one row per prior."""
    (args,) = parse_arguments([OrderArguments], argv, description=__doc__)
    torch.set_num_threads(args.num_threads)
    folder, rows, sheets = Path(args.output_dir), [], []
    for name in args.only or PRIORS:
        tokenizer_recipe, recipes = PRIORS[name]
        tokenizer = _tokenizer(folder, tokenizer_recipe, args)
        steps = []
        for index, recipe in enumerate(recipes):
            coarse = _place(folder, name, index - 1) if index else None
            steps.append(_prior(folder, name, index, recipe, tokenizer_recipe, coarse, args))
        pipeline = VQPipeline.from_pretrained(_place(folder, name, len(recipes) - 1))
        rows.append(
            {"order": name, "tokenizer": tokenizer_recipe, "steps": steps, **_figures(pipeline, tokenizer, args)}
        )
        rows[-1] |= _likelihood(_place(folder, name, len(recipes) - 1))
        sheets.append([picture for prompt in PROMPTS for picture in _draw(pipeline, prompt, 4)])
        print(_line(rows[-1]), flush=True)
        write_json(folder / "orders.json", {"rows": rows})
    if args.report:
        _report(Path(args.report), rows, sheets, args)
    return rows


def _place(folder: Path, name: str, index: int) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}-{index}"


def _tokenizer(folder: Path, recipe: str, args: OrderArguments) -> VQTokenizer:
    place = folder / recipe
    if not (place / "metrics.json").exists():
        _run("train_tokenizer.py", ["--config", f"image/{recipe}", "--output_dir", str(place)], args)
    tokenizer = VQTokenizer.from_pretrained(place)
    for split, number in (("train", 20_000), ("test", 512)):
        if not (folder / f"{recipe}-{split}" / MANIFEST).exists():
            scenes = CaptionedDigits(split, num_samples=number, seed=0)
            encode_dataset(tokenizer, scenes, folder / f"{recipe}-{split}")
    return tokenizer


def _prior(
    folder: Path, name: str, index: int, recipe: str, tokenizer: str, coarse: Path | None, args: OrderArguments
) -> int:
    """Train one stage in its share of the seconds, unless it is there; returns its steps."""
    place = _place(folder, name, index)
    flags = ["--config", f"prior/{recipe}", "--tokenizer", str(folder / tokenizer), "--warmup_steps", "20"]
    flags += ["--codes", str(folder / f"{tokenizer}-train"), "--eval_codes", str(folder / f"{tokenizer}-test")]
    flags += [] if coarse is None else ["--coarse", str(coarse)]
    if not (place / "metrics.json").exists():
        seconds = args.seconds / len(PRIORS[name][1])
        trial = ["--output_dir", f"{place}-trial", "--max_steps", "60", "--log_every", "20", "--eval_samples", "8"]
        lines = re.findall(r"step (\d+)/60 .*?([\d.]+) steps/s", _run("train_prior.py", [*flags, *trial], args))
        (a, rate_a), (b, rate_b) = ((int(step), float(rate)) for step, rate in (lines[0], lines[-1]))
        rate = (b - a) / (b / rate_b - a / rate_a)  # without the first steps, which also warm up
        steps = max(60, round(seconds * rate))
        _run("train_prior.py", [*flags, "--output_dir", str(place), "--max_steps", str(steps)], args)
    return json.loads((place / "training.json").read_text())["arguments"]["max_steps"]


def _run(script: str, flags: list[str], args: OrderArguments) -> str:
    """Run an example in a process of its own; returns what it said."""
    command = [sys.executable, str(EXAMPLES / script), *flags, "--num_threads", str(args.num_threads)]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(args.num_threads)}
    )
    if done.returncode:
        raise ValueError(f"{script} {' '.join(flags)} failed: {done.stderr[-2000:]}")
    return done.stderr


def _draw(pipeline: VQPipeline, prompt: str, number: int) -> list[Any]:
    return pipeline([prompt], num_samples=number, seed=7, sizes=(SIZE, SIZE))


def _figures(pipeline: VQPipeline, tokenizer: VQTokenizer, args: OrderArguments) -> dict[str, Any]:
    judged = judge_drawings(pipeline, tokenizer, args.num_judged)
    seconds = []
    for _ in range(6):  # the first warms up
        start = time.perf_counter()
        _draw(pipeline, PROMPTS[0], 1)
        seconds.append(time.perf_counter() - start)
    return {
        **{name: judged["held_out"]["drawn"][name] for name in ACCURACIES},
        "unseen_pair_accuracy": judged["unseen_pairs"]["drawn"]["colour_and_digit_accuracy"],
        "reconstructed_digit_accuracy": judged["held_out"]["reconstructed"]["digit_accuracy"],
        "passes": _passes(pipeline),
        "seconds_alone": statistics.median(seconds[1:]),
        "seconds_in_64": 1 / judged["held_out"]["samples_per_second"],
        "parameters": sum(p.numel() for p in pipeline.prior.parameters()),
    }


def _passes(pipeline: VQPipeline) -> int:
    """Passes of the transformers for one picture, those of the small one over codebooks not counted."""
    backbones = [id(stage.backbone) for stage in getattr(pipeline.prior, "stages", [pipeline.prior])]
    count, made = 0, fast.FastDecoder.__init__

    def watched(self: Any, backbone: Any, *arguments: Any) -> None:
        made(self, backbone, *arguments)
        self.is_counted = id(backbone) in backbones

    call = fast.FastDecoder.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += self.is_counted
        return call(self, *arguments)

    fast.FastDecoder.__init__, fast.FastDecoder.__call__ = watched, counted
    try:
        _draw(pipeline, PROMPTS[0], 1)
    finally:
        fast.FastDecoder.__init__, fast.FastDecoder.__call__ = made, call
    return count


def _likelihood(place: Path) -> dict[str, Any]:
    metrics, training = (json.loads((place / f"{name}.json").read_text()) for name in ("metrics", "training"))
    found = {name: metrics[name] for name in ("nats_per_code", "ln_codebook_size", "prior_bits_per_pixel")}
    return {**found, "threads": training["arguments"]["num_threads"]}


HEAD = (
    *(
        "order",
        "codes of",
        "parameters",
        "steps",
        "threads",
        "place",
        "colour",
        "digit",
        "unseen pairs",
        "nats per code",
        "bits per pixel",
    ),
    *("passes", "s/image alone", "s/image in 64"),
)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["order"],
        row["tokenizer"],
        f"{row['parameters'] / 1e6:.2f} M",
        " + ".join(map(str, row["steps"])),
        str(row["threads"]),
        *(f"{row[name]:.1%}" for name in (*ACCURACIES, "unseen_pair_accuracy")),
        " ".join(f"{value:.2f}" for value in row["nats_per_code"]),
        f"{row['prior_bits_per_pixel']:.3f}",
        str(row["passes"]),
        f"{row['seconds_alone']:.3f}",
        f"{row['seconds_in_64']:.4f}",
    ]


def _line(row: dict[str, Any]) -> str:
    return "  ".join(_cells(row))


def _report(path: Path, rows: list[dict[str, Any]], sheets: list[list[Any]], args: OrderArguments) -> None:
    where = ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items())
    table = [HEAD, ["---"] * len(HEAD), *map(_cells, rows)]
    picture = path.with_suffix(".png")
    write_with(picture, lambda temporary: contact_sheet(sheets, tile=64).save(temporary, format="PNG"))
    lines = [
        "# Orders of codes",
        "",
        *__doc__.splitlines()[:1],
        "",
        f"Written by `benchmarks/orders.py` on {date.today().isoformat()} ({where}), {args.seconds:g} seconds of training each, "
        f"{args.num_judged} held-out captions and as many with pairs of digit and colour that were never seen together. Nats per code "
        "stand coarse to fine. The likelihood of a masked prior is that of uncovering random groups of codes, another process than "
        "the one that draws. Bits per pixel compare priors over the codes of one tokenizer.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        f"![Drawings, one row per prior]({picture.name})",
        "",
        f"*One row per prior, in the order of the table; four seeds each, not selected, of: {'; '.join(PROMPTS)}.*",
        "",
    ]
    write_text(path, "\n".join(lines))


if __name__ == "__main__":
    run_script(main)
