"""A folder of pictures as a list of files: which there are, which split each belongs to, and their captions.

The convention is `imagefolder` of `datasets`: subfolders for the splits, captions in `metadata.csv` or
`metadata.jsonl`.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .digits import hash64

FILE_COLUMN = "file_name"
METADATA = ("metadata.csv", "metadata.jsonl")
SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "testing", "validation", "valid", "val", "eval")}
TEST_SHARE = 0.1  # of a source that has no test split of its own


def walk(folder: Path) -> list[Path]:
    """Return all files below a folder but hidden ones, in a fixed order."""
    found = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def choose_split(folder: Path, pictures: list[Path], split: str, holdout: Sequence[str] | None) -> list[Path]:
    """Return the pictures of one split, never an empty list.

    Args:
        folder: the folder that was named.
        pictures: all pictures below it.
        split: "train", "test" or "all".
        holdout: stems or names of the files that are "test"; None splits by subfolders or by hash.

    Raises:
        ValueError: if the split is unknown or empty, a held-out file does not exist, or the subfolders split already.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r} of the folder {folder}: use 'train', 'test' or 'all'")
    if split == "all":
        return pictures
    own = {
        key: next((folder / n for n in names if (folder / n).is_dir()), None) for key, names in SPLIT_FOLDERS.items()
    }
    has_own = all(own.values())
    if holdout is not None:
        if has_own:
            raise ValueError(f"{folder} is split by its own train and test folders: leave out holdout={holdout}")
        names = {holdout} if isinstance(holdout, str) else set(holdout)
        unknown = names - {path.stem for path in pictures} - {path.name for path in pictures}
        if unknown:
            raise ValueError(f"the held-out file {min(unknown)!r} is not in {folder}: give names of files in it")
        test = {path for path in pictures if path.stem in names or path.name in names}
    elif has_own:
        chosen = [path for path in pictures if own[split] in path.parents]
        if not chosen:
            raise ValueError(f"the folder {own[split]} holds no picture: put files like .png, .jpg or .webp into it")
        return chosen
    else:
        test = {pictures[i] for i in hashed_test([path.relative_to(folder).as_posix() for path in pictures])}
    chosen = [path for path in pictures if (path in test) == (split == "test")]
    if not chosen:
        raise ValueError(
            f"split {split!r} of {folder} with its {len(pictures)} pictures is empty: "
            "add pictures, hold out others with holdout, or use split='all'"
        )
    return chosen


def hashed_test(names: Iterable[str]) -> list[int]:
    """Return which names are test: about a tenth, decided for each name alone, but at least one of two or more."""
    hashes = [hash64(os.fsencode(name)) for name in names]
    test = [i for i, value in enumerate(hashes) if value < TEST_SHARE * 2**64]
    if not test and len(hashes) > 1:
        test = [min(range(len(hashes)), key=hashes.__getitem__)]
    return test


def read_captions(files: list[Path], caption_column: str | None) -> dict[Path, str | None]:
    """Return picture path -> caption (None where the row has none) for every row of every metadata file.

    Args:
        files: all files of a folder; `file_name` is relative to the metadata file's own place.
        caption_column: the column of the captions, which every row must then have; None takes `text` where there is
            one.

    Raises:
        ValueError: if a metadata file is not CSV or JSON lines, lacks the columns, names a picture that does not exist
            or names one twice, or if a caption is not a text.
    """
    captions: dict[Path, str | None] = {}
    known, tables = set(files), [path for path in files if path.name in METADATA]
    for table in tables:
        if sum(other.parent == table.parent for other in tables) > 1:
            raise ValueError(f"{table.parent} has both {METADATA[0]} and {METADATA[1]}: keep one of them")
        for line, row in _rows(table):
            path, text = _entry(table, line, row, caption_column)
            if path not in known:
                raise ValueError(
                    f"{table} line {line} names {row[FILE_COLUMN]!r}, which is not in {table.parent}: "
                    "add the file or take the line out"
                )
            if path in captions:
                raise ValueError(
                    f"{table} line {line} names {row[FILE_COLUMN]!r} a second time: keep one caption per file"
                )
            captions[path] = text
    return captions


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row, of a CSV or a JSON lines file."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            if table.suffix == ".csv":
                reader = csv.DictReader(stream)
                for row in reader:
                    if None in row:
                        raise ValueError(
                            f"{table} line {reader.line_num} has more fields than the first line: "
                            'put a caption with commas in double quotes ("...")'
                        )
                    yield reader.line_num, row
            else:
                for line, content in enumerate(stream, start=1):
                    if content.strip():
                        yield line, _json_object(table, line, content)
    except csv.Error as error:
        raise ValueError(f"{table} is not readable as CSV ({error}): save it again as UTF-8 CSV") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{table} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def _json_object(table: Path, line: int, content: str) -> dict[str, Any]:
    try:
        row = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{table} line {line} is not JSON ({error.msg}): write one object per line") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{table} line {line} is not a JSON object: write one object like {{{FILE_COLUMN!r}: ...}} per line"
        )
    return row


def _entry(table: Path, line: int, row: dict[str, Any], caption_column: str | None) -> tuple[Path, str | None]:
    """One row -> the picture's path and its caption."""
    name = row.get(FILE_COLUMN)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{table} line {line} has no {FILE_COLUMN!r}: give every row the path of its picture")
    path = Path(os.path.normpath(table.parent / name))
    if caption_column is not None and caption_column not in row:
        raise ValueError(
            f"{table} line {line} has no column {caption_column!r} for the captions: its columns are {list(row)}"
        )
    text = row.get("text" if caption_column is None else caption_column)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{table} line {line} has the caption {text!r}, which is not a text: put it in quotes")
    if text is None or not text.strip():
        if caption_column is not None:
            raise ValueError(f"{table} line {line} has no caption in column {caption_column!r} for {name!r}: write one")
        text = None
    return path, text
