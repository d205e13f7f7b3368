"""A tokenizer on held-out photographs, beside JPEG and WebP at the same bits per pixel.

    python benchmarks/photographs.py --tokenizer out/photos --dataset photos/ --holdout calla elephants --report docs/photographs.md

JPEG and WebP get, picture by picture, the highest quality whose file is not larger than the codes at log2 K bits each, headers included.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqtok import VQTokenizer
from vqtok.evaluation.protocols import PROTOCOL, mean_psnr, psnr, ssim
from vqtok.evaluation.report import machine
from vqtok.files import write_text, write_with
from vqtok.image.data import load_images
from vqtok.training import parse_arguments
from vqtok.training.setup import run_script


@dataclass
class BenchmarkArguments:
    """What to measure, and where to write it."""

    tokenizer: str = field(metadata={"help": "Folder of a tokenizer."})
    dataset: str = field(metadata={"help": "Folder of photographs."})
    holdout: list[str] = field(metadata={"help": "The held-out photographs, by name, as in training."})
    report: str | None = field(default=None, metadata={"help": "Markdown file to write."})
    show: str | None = field(default=None, metadata={"help": "The held-out photograph to show in the report, by name."})
    credit: str = field(default="", metadata={"help": "Author, source and licence of the photograph that is shown."})
    num_threads: int = field(default=0, metadata={"help": "Threads of torch; 0 leaves torch's choice."})


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write the report; returns one row per photograph."""
    (args,) = parse_arguments([BenchmarkArguments], argv, description=__doc__)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    tokenizer = VQTokenizer.from_pretrained(args.tokenizer)
    photographs = load_images(args.dataset, "test", holdout=args.holdout)
    rows = []
    for index in range(len(photographs)):
        original = photographs[index]["image"].convert("RGB")
        codes = tokenizer.encode([original])
        budget = tokenizer.layout.bits(codes.sizes[0].tolist())
        versions = {
            "vqtok": tokenizer.decode(codes)[0],
            "jpeg": _at_most(budget, lambda q, picture=original: _coded(picture, "JPEG", quality=q, optimize=True)),
            "webp": _at_most(budget, lambda q, picture=original: _coded(picture, "WEBP", quality=q, method=6)),
        }
        row: dict[str, Any] = {
            "name": Path(photographs.name(index)).stem,
            "bits_per_pixel": budget / (original.width * original.height),
        }
        for name, picture in versions.items():
            row[name] = {"psnr_db": psnr(picture, original), "ssim": ssim(picture, original)}
        rows.append(row)
        if args.report and row["name"] == args.show:
            sheet = _crops([original, *versions.values()])
            write_with(
                Path(args.report).with_suffix(".jpg"),
                lambda path, picture=sheet: picture.save(path, format="JPEG", quality=90),
            )
    table = _table(rows)
    print(table)
    if args.report:
        write_text(args.report, _page(args, tokenizer, rows, table))
    return rows


def _coded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _at_most(budget: float, code: Callable[[int], bytes]) -> Image.Image:
    """The picture at the highest quality whose file has at most `budget` bits."""
    low, high = 1, 95
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if 8 * len(code(middle)) <= budget else (low, middle - 1)
    data = code(low)
    if 8 * len(data) > budget:
        raise ValueError(f"not even quality 1 fits into {budget:.0f} bits: choose a tokenizer of a higher rate")
    return Image.open(io.BytesIO(data)).convert("RGB")


def _crops(pictures: Sequence[Image.Image], side: int = 320) -> Image.Image:
    """The middle of each picture, side by side."""
    sheet = Image.new("RGB", (len(pictures) * (side + 4) - 4, side), "white")
    for index, picture in enumerate(pictures):
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        sheet.paste(picture.crop((left, top, left + side, top + side)), (index * (side + 4), 0))
    return sheet


def _table(rows: list[dict[str, Any]]) -> str:
    kinds = ("vqtok", "jpeg", "webp")
    lines = [
        "| photograph | bits/pixel | " + " | ".join(f"{k} PSNR dB | {k} SSIM" for k in kinds) + " |",
        "| --- |" + " ---: |" * 7,
    ]
    for row in rows:
        cells = " | ".join(f"{row[k]['psnr_db']:.2f} | {row[k]['ssim']:.4f}" for k in kinds)
        lines.append(f"| {row['name']} | {row['bits_per_pixel']:.4f} | {cells} |")
    means = " | ".join(
        f"**{mean_psnr(row[k]['psnr_db'] for row in rows):.2f}** | {sum(row[k]['ssim'] for row in rows) / len(rows):.4f}"
        for k in kinds
    )
    lines.append(f"| mean | {sum(row['bits_per_pixel'] for row in rows) / len(rows):.4f} | {means} |")
    return "\n".join(lines)


def _page(args: BenchmarkArguments, tokenizer: VQTokenizer, rows: list[dict[str, Any]], table: str) -> str:
    training = json.loads((Path(args.tokenizer) / "training.json").read_text(encoding="utf-8"))["arguments"]
    here = ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items())
    shown = f"![original, vqtok, JPEG, WebP]({Path(args.report).with_suffix('.jpg').name})\n\n" if args.show else ""
    words = f"From left: original, vqtok, JPEG, WebP. {args.credit}\n\n" if args.show else ""
    return (
        f"# Photographs\n\n"
        f"`{training['config']}`, trained for {training['max_steps']} steps of {training['batch_size']} crops of "
        f"{training['image_size']} pixels; here on {len(rows)} photographs that it never saw, held out by name. Written by "
        f"`benchmarks/photographs.py` on {date.today().isoformat()} ({here}; protocol {PROTOCOL}).\n\n"
        f"JPEG and WebP have, picture by picture, the highest quality whose file is not larger than the codes at their nominal "
        f"rate. The codes are not entropy coded.\n\n{table}\n\n{shown}{words}```\n{tokenizer}\n```\n"
    )


if __name__ == "__main__":
    run_script(main)
