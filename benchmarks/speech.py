"""Trained codecs on held-out speech: PESQ-WB, STOI, SI-SDR and mel distance at several rates, beside published rows.

    accelerate launch examples/train_tokenizer.py --config audio/speech-spectra-16khz --dataset speech/ --output_dir out/speech \\
        --num_threads 1 --holdout $(cat benchmarks/speech_holdout.txt)
    python benchmarks/speech.py --tokenizer out/speech --dataset speech/ --report docs/speech_codec.md

What was held out is read from the tokenizer's `training.json`; `--holdout` names other files. `--num_codebooks` says how many of the
residual codebooks are used. The measures are those of the protocol vqtok-audio-eval v1 (`vqtok/evaluation/audio_protocols.py`); what
cannot be measured is counted and left out of its mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqtok import VQTokenizer
from vqtok.audio.data import load_audio
from vqtok.evaluation.audio_protocols import DESCRIPTION, PROTOCOL
from vqtok.evaluation.audio_report import PUBLISHED, PUBLISHED_SOURCE, evaluate
from vqtok.evaluation.report import machine
from vqtok.evaluation.spectrograms import spectrograms
from vqtok.files import write_text, write_with
from vqtok.training import parse_arguments
from vqtok.training.setup import run_script

# At about these rates: a name, kbps, measure, and what it should exceed.
GOALS = (
    ("first goal", 1.5, "pesq_wb", 1.56),
    ("first goal", 1.5, "stoi", 0.85),
    ("stretch", 6.0, "pesq_wb", 2.77),
    ("stretch", 6.0, "stoi", 0.94),
)
WORDS = {"pesq_wb": "PESQ-WB", "stoi": "STOI", "si_sdr_db": "SI-SDR dB", "mel_distance": "mel distance"}


@dataclass
class BenchmarkArguments:
    """What to measure, and where to write it."""

    tokenizer: list[str] = field(metadata={"help": "Folders of tokenizers."})
    dataset: str = field(metadata={"help": "Folder of speech."})
    holdout: list[str] = field(
        default_factory=list,
        metadata={"help": "The held-out files, by name; none takes those of the first tokenizer's training."},
    )
    num_codebooks: list[int] = field(default_factory=lambda: [3, 12], metadata={"help": "Residual codebooks to use."})
    show: str | None = field(default=None, metadata={"help": "The held-out file to draw; none takes the first."})
    credit: str = field(default="", metadata={"help": "Speaker, source and licence of the speech."})
    report: str | None = field(default=None, metadata={"help": "Markdown file to write, and a .png beside it."})
    num_threads: int = field(default=0, metadata={"help": "Threads of torch; 0 leaves torch's choice."})


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the tables, write the report; returns one result of `evaluate` per tokenizer and number of codebooks."""
    (args,) = parse_arguments([BenchmarkArguments], argv, description=__doc__)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    tokenizers = {Path(folder).resolve().name: VQTokenizer.from_pretrained(folder) for folder in args.tokenizer}
    trainings = {Path(folder).resolve().name: _training(folder) for folder in args.tokenizer}
    holdout = _held_out(args.holdout, trainings)
    results = []
    for name, tokenizer in tokenizers.items():
        speech = _speech(tokenizer, args.dataset, holdout)
        results += [evaluate(tokenizer, speech, name=name, num_codebooks=number) for number in args.num_codebooks]
    text = _tables(results)
    print(text)
    if args.report:
        shown = args.show or sorted(holdout)[0]
        picture = _picture(tokenizers, args, shown)
        path = Path(args.report).with_suffix(".png")
        # A palette is enough for the colours of spectrograms, and half the size.
        picture = picture.convert("RGB").quantize(256)
        write_with(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))
        write_text(args.report, _page(args, text, results, trainings, holdout, f"![{shown}]({path.name})"))
    return results


def _training(folder: str) -> dict[str, Any]:
    path = Path(folder) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"arguments": {}}


def _held_out(given: list[str], trainings: dict[str, dict[str, Any]]) -> list[str]:
    """The files to measure on: no tokenizer may have seen them."""
    known = {name: training["arguments"].get("holdout") or [] for name, training in trainings.items()}
    chosen = given or next(iter(known.values()))
    if not chosen:
        raise ValueError("nobody says which files were held out: name them with --holdout")
    for name, own in known.items():
        if own and (seen := sorted(set(chosen) - set(own))):
            raise ValueError(f"{name} was trained on {', '.join(seen)}: name files with --holdout that it has not seen")
    return sorted(chosen)


def _speech(tokenizer: VQTokenizer, dataset: str, holdout: list[str]) -> Any:
    processor = tokenizer.processor
    return load_audio(dataset, processor.sampling_rate, processor.num_channels, "test", holdout=holdout)


# -- the page


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _value(result: dict[str, Any], key: str) -> str:
    digits = {"pesq_wb": 3, "stoi": 3, "si_sdr_db": 2, "mel_distance": 2}[key]
    return "-" if result.get(key) is None else f"{result[key]:.{digits}f}"


def goal_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A row for every goal and every result whose codes have about its rate."""
    rows = []
    for kind, kbps, key, least in GOALS:
        for result in results:
            if abs(_code_kbps(result) / kbps - 1) < 0.1:
                reached = result[key]
                met = "not measured" if reached is None else "yes" if reached > least else "**no**"
                what = f"{result['name']}, {kbps:g} kbps: {WORDS[key]} ({kind})"
                rows.append([what, f"above {least:g}", _value(result, key), met])
    return rows


def _code_kbps(result: dict[str, Any]) -> float:
    """What the codes take per second, without the padding of each file to a whole step."""
    seen = result["tokenizer"]
    levels = seen["layout"]["levels"]
    number = result["num_codebooks"] or max(level["num_codebooks"] for level in levels)
    bits = [min(number, level["num_codebooks"]) * np.log2(level["codebook_size"]) / level["stride"] for level in levels]
    return float(sum(bits)) * seen["sampling_rate"] / 1000


def _tables(results: list[dict[str, Any]]) -> str:
    head = ["codec", "codebooks", "kbps nominal", "with padding", "payload", "files", *WORDS.values(), "failed"]
    rows = []
    for result in results:
        failed = sum(sum(reasons.values()) for reasons in result["failures"].values())
        rates = [f"{result['kbps'][key]:.3f}" for key in ("nominal", "payload", "file")]
        own = [result["name"], str(result["num_codebooks"] or "all"), f"{_code_kbps(result):g}", *rates]
        rows.append([*own, *(_value(result, key) for key in WORDS), str(failed)])
    for row in PUBLISHED:
        own = [f"{row['name']}, published", "", f"{row['kbps']:g}", "", "", ""]
        rows.append([*own, f"{row['pesq_wb']:.2f}", f"{row['stoi']:.2f}", "", "", ""])
    reached = table(["what", "goal", "reached", "met"], goal_rows(results))
    failures = [
        f"{result['name']}, {result['num_codebooks']} codebooks: {WORDS.get(key, key)} failed for {number} ({reason})."
        for result in results
        for key, reasons in result["failures"].items()
        for reason, number in reasons.items()
    ]
    missing = sorted({f"{WORDS[key]}: {why}." for result in results for key, why in result["not_measured"].items()})
    return "\n\n".join([reached, table(head, rows), *failures, *missing])


def _usage(results: list[dict[str, Any]]) -> str:
    """A row per codebook of every tokenizer, at its largest rate."""
    widest = {}
    for result in results:
        widest[result["name"]] = max(
            result, widest.get(result["name"], result), key=lambda r: sum(map(len, r["usage"]))
        )
    rows = []
    for name, result in widest.items():
        for index, level in enumerate(result["tokenizer"]["layout"]["levels"]):
            columns = zip(*(result[key][index] for key in ("usage", "perplexity", "entropy_bits")), strict=True)
            for number, (used, perplexity, bits) in enumerate(columns, 1):
                size = level["codebook_size"]
                own = f"{bits:.2f} of {np.log2(size):g}"
                rows.append([name, str(number), f"{100 * used:.1f} %", f"{perplexity:.0f} of {size}", own])
    return table(["codec", "codebook", "used", "perplexity", "bits of entropy"], rows)


def _picture(tokenizers: dict[str, VQTokenizer], args: BenchmarkArguments, shown: str) -> Any:
    """Spectrograms of one held-out file and of what each codec makes of it."""
    sounds: dict[str, np.ndarray] = {}
    for name, tokenizer in tokenizers.items():
        sound = _speech(tokenizer, args.dataset, [shown])[0]["audio"]
        rate = tokenizer.processor.sampling_rate
        sounds.setdefault(f"{shown}, original", sound)
        for number in args.num_codebooks:
            codes = tokenizer.encode(sound, sampling_rate=rate, num_codebooks=number)
            sounds[f"{name}, {number} codebooks"] = np.asarray(tokenizer.decode(codes)[0])
    return spectrograms(sounds, rate)


def _trained(name: str, training: dict[str, Any]) -> str:
    """How a codec came to be, as its `training.json` says."""
    arguments, history = training["arguments"], training.get("history", [])
    if "max_steps" not in arguments:
        return f"`{name}`: its folder does not say how it was trained."
    planned = arguments["max_steps"]
    steps = max((record["step"] for record in history), default=planned)
    so_far = "" if steps == planned else f" (of {planned:,} that are planned)"
    minutes = f" in {training['seconds'] / 60:.0f} minutes" if "seconds" in training else ""
    number = arguments.get("num_threads") or 0
    threads = f" with {number} thread{'s' * (number > 1)}" if number else ""
    start = arguments.get("adversarial_start", 0)
    plays = start < steps and any("discriminator_loss" in record for record in history)
    against = f", from step {start:,} on against discriminators" if plays else ", without discriminators"
    hours = steps * arguments["batch_size"] * arguments["seconds"] / 3600
    return (
        f"`{name}`: `{arguments['config'] or arguments['tokenizer']}`, {steps:,} steps{so_far} of {arguments['batch_size']} crops of "
        f"{arguments['seconds']:g} s{minutes}{threads}{against}; {hours:.1f} hours of sound, each recording many times."
    )


def _page(
    args: BenchmarkArguments,
    text: str,
    results: list[dict[str, Any]],
    trainings: dict[str, dict[str, Any]],
    holdout: list[str],
    picture: str,
) -> str:
    here = ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items())
    data = results[0]["data"]
    measures = "\n".join(f"- {WORDS.get(key, key)}: {DESCRIPTION[key]}." for key in (*WORDS, "kbps"))
    summary, rest = (__doc__ or "").split("\n", 1)
    credit = f" {args.credit}" if args.credit else ""
    return (
        f"# A codec of speech\n\n{summary}\n{rest}\n"
        f"Written on {date.today()} ({here}; protocol {PROTOCOL}).\n\n{text}\n\n"
        f"The published rows are for orientation: {PUBLISHED_SOURCE}. They are no comparison: here is one voice, and one is easier "
        f"than many.\n\n"
        f"## What was trained, and on what\n\n"
        + "\n\n".join(_trained(name, training) for name, training in trainings.items())
        + f"\n\nThe speech is the folder `{Path(args.dataset).resolve().name}`.{credit} Measured on {data['num_recordings']} recordings, "
        f"{data['seconds']:.0f} s, that no codec here was trained on (sha256 of the samples {data['sha256'][:16]}...): "
        + ", ".join(f"`{name}`" for name in holdout)
        + f".\n\n## Use of the codebooks\n\nOn the same recordings.\n\n{_usage(results)}\n\n"
        f"## Seen\n\n{picture}\n\n## What the measures are\n\n{measures}\n"
    )


if __name__ == "__main__":
    run_script(main)
