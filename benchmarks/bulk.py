"""Encoding a data set: the rate of `vqtok tokenize` beside that of the bare model on the same batches, in one run.

    python benchmarks/bulk.py --report docs/tokenize_speed.md

Parquet shards of JPEG pictures, 256 x 256, are encoded by one process with one thread of torch. Contenders take turns, in the other order
every second round: reading the shards alone; decoding alone, on one thread; the bare forward, on batches that lie ready in memory; and the
whole, from shards on the disk to shards of codes on the disk with checksums, records and manifest. Counted is the call of
`tokenize_dataset` with a tokenizer that is loaded: what a process needs once to start (importing, loading weights, some seconds) is not,
because jobs run for hours; the first batch, which nothing overlaps, and every end of a shard are. The seconds of processor time say what
the same work costs where every core has a process of its own, so that reading and decoding have no core beside it. The weights are random,
which changes no time.
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

SIDE, BATCH, SHARDS = 256, 16, 4
GOAL = 0.9
IMAGES, GPUS, GPU_RATE = 10**9, 64, 1000.0  # the last is an assumption: no GPU was measured


def write_input(folder: Path, count: int) -> float:
    """Write shards of pictures that are as hard to decode as photographs; return the bytes of one picture."""
    rng, total = np.random.default_rng(0), 0
    folder.mkdir()
    for shard in range(SHARDS):
        cells = []
        for _ in range(count // SHARDS):
            parts = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (8, 32, 128)]
            layers = [np.asarray(Image.fromarray(part).resize((SIDE, SIDE), 3), np.float32) for part in parts]
            mixed = 0.6 * layers[0] + 0.3 * layers[1] + 0.1 * layers[2]
            stream = io.BytesIO()
            Image.fromarray(mixed.astype(np.uint8)).save(stream, format="JPEG", quality=90)
            cells.append({"bytes": stream.getvalue(), "path": None})
            total += len(cells[-1]["bytes"])
        rows = {"image": cells, "text": ["a picture"] * len(cells)}
        parquet.write_table(arrow.table(rows), folder / f"part-{shard}.parquet")
    return total / count


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock and of the processor, all threads together."""
    start, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - used


def measure(tokenizer: VQTokenizer, folder: Path, count: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Both kinds of seconds of each contender in each round."""
    settings = Settings(BATCH, None, 1, 2)
    source = open_input(folder / "in", PICTURES, Columns(), 4096)
    shards = [list(source.read(number)) for number in range(SHARDS)]
    batches = [batch for items in shards for batch in prepared_batches(tokenizer, items, settings, [], [])]

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            [level.cpu() for level in encode_batch(tokenizer, batch)]

    def whole() -> None:
        output = Path(tempfile.mkdtemp(dir=folder))
        result = tokenize_dataset(
            folder / "in", output, tokenizer, batch_size=BATCH, readers=settings.readers, device="cpu"
        )
        assert result.manifest is not None and result.num_samples == count
        (output / "codes-00000.parquet").replace(folder / "codes.parquet")  # for its size

    calls: dict[str, Callable[[], Any]] = {
        "reading": lambda: [list(source.read(number)) for number in range(SHARDS)],
        "decoding": lambda: [prepare(tokenizer, item, settings) for items in shards for item in items],
        "bare": bare,
        "whole": whole,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            times[name].append(seconds(calls[name]))
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
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        VQTokenizer.from_config(args.config).save_pretrained(folder / "tok")
        tokenizer = VQTokenizer.from_pretrained(folder / "tok")
        media = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1
        with torch.no_grad():
            tokenizer.model.encode(media)
            once = seconds(lambda: tokenizer.model.encode(media))[0]
        group = SHARDS * BATCH
        count = group * max(1, round((args.num_samples or args.seconds / once * BATCH) / group))
        picture_bytes = write_input(folder / "in", count)
        times = measure(tokenizer, folder, count, args.rounds)
        code_bytes = (folder / "codes.parquet").stat().st_size / (count / SHARDS)
    clock = {name: [each[0] for each in values] for name, values in times.items()}
    used = {name: statistics.median(each[1] for each in values) / count for name, values in times.items()}
    rates = {name: count / statistics.median(values) for name, values in clock.items()}
    share = statistics.median(b / w for b, w in zip(clock["bare"], clock["whole"], strict=True))
    reached = table(
        ["what", "goal", "reached", "met"],
        [["rate of the whole over that of the bare model", f"at least {GOAL}", f"{share:.3f}", "yes" if share >= GOAL else "**no**"],
         ["the same of processor time, all threads together", "", f"{used['bare'] / used['whole']:.3f}", ""]],
    )  # fmt: skip
    names = {
        "reading": "reading alone",
        "decoding": "decoding alone, one thread",
        "bare": "bare model, one thread",
        "whole": "whole",
    }
    rows = [
        [
            names[name],
            f"{rate:,.1f}",
            f"{count / max(clock[name]):,.1f} to {count / min(clock[name]):,.1f}",
            f"{1000 * used[name]:.3g}",
        ]
        for name, rate in rates.items()
    ]
    text = (
        f"{reached}\n\n{count} pictures of {picture_bytes / 1024:.1f} KiB in {SHARDS} shards, {args.config}, "
        f"batches of {BATCH}, {args.rounds} rounds.\n\n"
        f"{table(['what', 'pictures/s, median', 'rounds', 'processor, ms each'], rows)}\n\n## A billion pictures on {GPUS} GPUs\n\n"
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
