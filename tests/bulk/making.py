"""Small inputs of every kind, and processes that encode them."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet

from tests.tiny import picture

ROOT = Path(__file__).resolve().parents[2]
BROKEN = b"\x89PNG\r\n\x1a\nnothing more"


def png(height=16, width=16, seed=0):
    stream = io.BytesIO()
    picture(height, width, seed).save(stream, format="PNG")
    return stream.getvalue()


def parquet_shards(folder, shards=3, rows=5, size=lambda i: (16, 16), broken=()):
    """`part-0.parquet` ...: pictures with captions and labels; row numbers count through, those in `broken` are no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        cells = [{"bytes": BROKEN if i in broken else png(*size(i), seed=i), "path": None} for i in numbers]
        columns = {"image": cells, "text": [f"number {i}" for i in numbers], "label": [i % 3 for i in numbers]}
        parquet.write_table(
            arrow.table({**columns, "id": [f"x{i}" for i in numbers]}), folder / f"part-{shard}.parquet"
        )
    return folder


def tar_shard(path, members):
    """An archive of (name, bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def loose_files(folder, count=7):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:02d}.png").write_bytes(png(seed=i))
    return folder


def contents(folder):
    """Every file of a folder of codes, and its bytes."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def skipped(folder):
    lines = [line for path in sorted(Path(folder).glob("*.skipped.jsonl")) for line in path.read_text().splitlines()]
    return [(row["name"], row["reason"]) for row in map(json.loads, lines)]


def start(*arguments, **environment):
    """`vqtok tokenize` in a process of its own."""
    command = [sys.executable, "-m", "vqtok.cli", "tokenize", *map(str, arguments), "--device", "cpu"]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
