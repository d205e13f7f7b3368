"""Encoding a data set: the rate of `vqtok tokenize` beside that of the bare model on the same batches, in one run.

    python benchmarks/bulk.py --report docs/tokenize_speed.md

One Parquet shard of JPEG pictures, 256 x 256, is encoded by one process with one thread of torch. Contenders take turns: reading the
shard alone; decoding alone, on one thread; the bare forward, on batches that lie ready in memory; and the whole, from the shard on the disk
to the shard of codes on the disk with its checksum. The weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
import datetime
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import torch
from measuring import machine_line
from PIL import Image

from vqtok import VQTokenizer, tokenize_dataset
from vqtok.bulk.inputs import open_input
from vqtok.bulk.tables import Columns
from vqtok.bulk.units import Settings, encode_batch, prepare, prepared_batches
from vqtok.image.pictures import PICTURES

SIDE, BATCH = 256, 16
GOAL = 0.9
IMAGES, GPUS, GPU_RATE = 10**9, 64, 1000.0  # the last is an assumption: no GPU was measured


def write_input(path: Path, count: int) -> float:
    """Write a shard of pictures that are as hard to decode as photographs; return the bytes of one."""
    rng = np.random.default_rng(0)
    cells = []
    for _ in range(count):
        parts = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (8, 32, 128)]
        layers = [np.asarray(Image.fromarray(part).resize((SIDE, SIDE), 3), np.float32) for part in parts]
        mixed = 0.6 * layers[0] + 0.3 * layers[1] + 0.1 * layers[2]
        stream = io.BytesIO()
        Image.fromarray(mixed.astype(np.uint8)).save(stream, format="JPEG", quality=90)
        cells.append({"bytes": stream.getvalue(), "path": None})
    parquet.write_table(arrow.table({"image": cells, "text": ["a picture"] * count}), path)
    return sum(len(cell["bytes"]) for cell in cells) / count


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(tokenizer: VQTokenizer, folder: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    settings = Settings(BATCH, None, 1, 2)
    source = open_input(folder / "in", PICTURES, Columns(), 4096)
    items = list(source.read(0))
    batches = list(prepared_batches(tokenizer, items, settings, [], []))

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            [level.cpu() for level in encode_batch(tokenizer, batch)]

    def whole(number: int) -> None:
        result = tokenize_dataset(
            folder / "in", folder / f"out-{number}", tokenizer, batch_size=BATCH, readers=settings.readers, device="cpu"
        )
        assert result.num_samples == count

    times: dict[str, list[float]] = {name: [] for name in ("reading", "decoding", "bare", "whole")}
    for number in range(rounds):
        times["reading"].append(seconds(lambda: list(source.read(0))))
        times["decoding"].append(seconds(lambda: [prepare(tokenizer, item, settings) for item in items]))
        times["bare"].append(seconds(bare))
        times["whole"].append(seconds(lambda number=number: whole(number)))
    return times


def billion(rates: dict[str, float], picture_bytes: float, code_bytes: float) -> str:
    """What a billion pictures cost, by arithmetic from measured rates and one assumption."""
    total = GPUS * GPU_RATE
    hours = IMAGES / total / 3600
    cores = GPU_RATE / rates["decoding"]
    rows = [
        ["GPUs", f"{IMAGES:,} / ({GPUS} x {GPU_RATE:,.0f}/s)", f"{hours:.1f} hours, {hours * GPUS / 24:.0f} GPU-days"],
        ["decoding", f"{GPU_RATE:,.0f}/s / {rates['decoding']:.0f}/s of a core", f"{cores:.1f} cores for each GPU"],
        ["", f"{IMAGES:,} / {rates['decoding']:.0f}/s", f"{IMAGES / rates['decoding'] / 3600 / 24:.0f} core-days"],
        ["reading", f"{total:,.0f}/s x {picture_bytes / 1024:.1f} KiB", f"{total * picture_bytes / 1e9:.2f} GB/s from storage"],
        ["", f"{GPU_RATE:,.0f}/s / {rates['reading']:,.0f}/s of a core", f"{GPU_RATE / rates['reading']:.2f} cores for each GPU"],
        ["pictures", f"{IMAGES:,} x {picture_bytes / 1024:.1f} KiB", f"{IMAGES * picture_bytes / 1e12:.1f} TB"],
        ["codes", f"{IMAGES:,} x {code_bytes:,.0f} bytes", f"{IMAGES * code_bytes / 1e12:.2f} TB"],
        ["bare CPU", f"{IMAGES:,} / {rates['whole']:.1f}/s", f"{IMAGES / rates['whole'] / 3600 / 24 / 365:.1f} core-years"],
    ]  # fmt: skip
    return table(["what", "formula", "costs"], rows)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="image/vqvae2-256")
    parser.add_argument("--num_samples", type=int, help="None takes what the bare model does in --seconds")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "in").mkdir()
        VQTokenizer.from_config(args.config).save_pretrained(folder / "tok")
        tokenizer = VQTokenizer.from_pretrained(folder / "tok")
        media = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1
        with torch.no_grad():
            tokenizer.model.encode(media)
            once = seconds(lambda: tokenizer.model.encode(media))
        count = args.num_samples or BATCH * max(4, min(64, round(args.seconds / once)))
        picture_bytes = write_input(folder / "in" / "part.parquet", count)
        times = measure(tokenizer, folder, count, args.rounds)
        code_bytes = (folder / "out-0" / "codes-00000.parquet").stat().st_size / count
    rates = {name: count / statistics.median(values) for name, values in times.items()}
    share = statistics.median(b / w for b, w in zip(times["bare"], times["whole"], strict=True))
    reached = table(
        ["what", "goal", "reached", "met"],
        [["rate of the whole over that of the bare model", f"at least {GOAL}", f"{share:.3f}", "yes" if share >= GOAL else "**no**"]],
    )  # fmt: skip
    names = {
        "reading": "reading alone",
        "decoding": "decoding alone, one thread",
        "bare": "bare model, one thread",
        "whole": "whole",
    }
    rows = [
        [names[name], f"{rate:,.1f}", f"{count / max(times[name]):,.1f} to {count / min(times[name]):,.1f}"]
        for name, rate in rates.items()
    ]
    text = (
        f"{reached}\n\n{count} pictures of {picture_bytes / 1024:.1f} KiB, {args.config}, batches of {BATCH}, {args.rounds} rounds.\n\n"
        f"{table(['what', 'pictures/s, median', 'rounds'], rows)}\n\n## A billion pictures on {GPUS} GPUs\n\n"
        f"By arithmetic from the rates above. The rate of one GPU, {GPU_RATE:,.0f} pictures/s, is an assumption: none was "
        "at hand. Put your own into the formula; `vqtok tokenize` shows it while it runs.\n\n"
        f"{billion(rates, picture_bytes, code_bytes)}\n"
    )
    print(text)
    if args.report:
        where = machine_line(torch.device("cpu"), "pyarrow", "pillow")
        head = f"# Encoding a data set: speed\n\n{__doc__.split(chr(10), 1)[0]}\n{__doc__.split(chr(10), 1)[1]}"
        args.report.write_text(f"{head}\nWritten on {datetime.date.today()} ({where}).\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
