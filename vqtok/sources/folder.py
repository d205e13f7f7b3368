"""A folder of media as a list of files: which there are, which split each belongs to, their captions and labels.

The convention is that of `imagefolder` and `audiofolder` of `datasets`: subfolders for the splits and, inside them, for
the classes; or captions in `metadata.csv` or `metadata.jsonl`.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .hashing import hash64
from .medium import Medium

FILE_COLUMN = "file_name"
METADATA = ("metadata.csv", "metadata.jsonl")
SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "testing", "validation", "valid", "val", "eval")}
TEST_SHARE = 0.1  # of a source that has no test split of its own


class Entry(NamedTuple):
    """What metadata says of one file.

    Args:
        text: the caption, None if there is none.
        label: the label as written, None if none was asked for.
    """

    text: str | None
    label: str | int | None


class Labels(NamedTuple):
    """The classes of files.

    Args:
        numbers: one per file, from 0.
        names: the name of each number, None for mere numbers.
    """

    numbers: list[int]
    names: list[str] | None


def walk(folder: Path) -> list[Path]:
    """Return all files below a folder but hidden ones, in a fixed order."""
    found = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def choose_split(
    medium: Medium, folder: Path, files: list[Path], split: str, holdout: Sequence[str] | None
) -> list[Path]:
    """Return the files of one split, never an empty list.

    Args:
        medium: what the files are, for messages.
        folder: the folder that was named.
        files: all files of that medium below it.
        split: "train", "test" or "all".
        holdout: stems or names of the files that are "test"; None splits by subfolders or by hash.

    Raises:
        ValueError: if the split is unknown or empty, a held-out file does not exist, or the subfolders split already.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r} of the folder {folder}: use 'train', 'test' or 'all'")
    if split == "all":
        return files
    own = _own_splits(folder)
    has_own = all(own.values())
    if holdout is not None:
        if has_own:
            raise ValueError(f"{folder} is split by its own train and test folders: leave out holdout={holdout}")
        names = {holdout} if isinstance(holdout, str) else set(holdout)
        unknown = names - {path.stem for path in files} - {path.name for path in files}
        if unknown:
            raise ValueError(f"the held-out file {min(unknown)!r} is not in {folder}: give names of files in it")
        test = {path for path in files if path.stem in names or path.name in names}
    elif has_own:
        chosen = [path for path in files if own[split] in path.parents]
        if not chosen:
            raise ValueError(f"the folder {own[split]} holds no {medium.one}: put files like {medium.examples} into it")
        return chosen
    else:
        test = {files[i] for i in hashed_test([path.relative_to(folder).as_posix() for path in files])}
    chosen = [path for path in files if (path in test) == (split == "test")]
    if not chosen:
        raise ValueError(
            f"split {split!r} of {folder} with its {len(files)} {medium.many} is empty: "
            f"add {medium.many}, hold out others with holdout, or use split='all'"
        )
    return chosen


def _own_splits(folder: Path) -> dict[str, Path | None]:
    """The subfolders of "train" and of "test"; a folder with both is split by them."""
    return {
        key: next((folder / n for n in names if (folder / n).is_dir()), None) for key, names in SPLIT_FOLDERS.items()
    }


def hashed_test(names: Iterable[str]) -> list[int]:
    """Return which names are test: about a tenth, decided for each name alone, but at least one of two or more."""
    hashes = [hash64(os.fsencode(name)) for name in names]
    test = [i for i, value in enumerate(hashes) if value < TEST_SHARE * 2**64]
    if not test and len(hashes) > 1:
        test = [min(range(len(hashes)), key=hashes.__getitem__)]
    return test


def read_metadata(files: list[Path], caption_column: str | None, label_column: str | None) -> dict[Path, Entry]:
    """Return path -> caption and label for every row of every metadata file.

    Args:
        files: all files of a folder; `file_name` is relative to the metadata file's own place.
        caption_column: the column of the captions, which every row must then have; None takes `text` where there is
            one.
        label_column: the column of the labels, which every row must then have; None reads none.

    Raises:
        ValueError: if a metadata file is not CSV or JSON lines, lacks the columns, names a file that does not exist
            or names one twice; if a caption is not a text, or a label neither a text nor a whole number from 0.
    """
    entries: dict[Path, Entry] = {}
    known, tables = set(files), [path for path in files if path.name in METADATA]
    for table in tables:
        if sum(other.parent == table.parent for other in tables) > 1:
            raise ValueError(f"{table.parent} has both {METADATA[0]} and {METADATA[1]}: keep one of them")
        for line, row in _rows(table):
            path, text = _caption(table, line, row, caption_column)
            if path not in known:
                raise ValueError(
                    f"{table} line {line} names {row[FILE_COLUMN]!r}, which is not in {table.parent}: "
                    "add the file or take the line out"
                )
            if path in entries:
                raise ValueError(f"{table} line {line} names {row[FILE_COLUMN]!r} a second time: keep one row per file")
            entries[path] = Entry(text, None if label_column is None else _label(table, line, row, label_column))
    return entries


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


def _caption(table: Path, line: int, row: dict[str, Any], caption_column: str | None) -> tuple[Path, str | None]:
    """One row -> the file's path and its caption."""
    name = row.get(FILE_COLUMN)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{table} line {line} has no {FILE_COLUMN!r}: give every row the path of its file")
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


def _label(table: Path, line: int, row: dict[str, Any], column: str) -> str | int:
    """The label of one row, of CSV a number where it is written like one."""
    where = f"{table} line {line}"
    if column not in row:
        raise ValueError(f"{where} has no column {column!r} for the labels: its columns are {list(row)}")
    label = row[column]
    if label is None or (isinstance(label, str) and not label.strip()):
        raise ValueError(f"{where} has no label in column {column!r} for {row[FILE_COLUMN]!r}: write one")
    if table.suffix == ".csv" and re.fullmatch("0|-?[1-9][0-9]*", label):  # '007' stays a name
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, (str, int)) or (isinstance(label, int) and label < 0):
        raise ValueError(
            f"{where} has the label {label!r} in column {column!r} for {row[FILE_COLUMN]!r}: "
            "write a name or a whole number from 0"
        )
    return label


def number_names(names: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Return name -> label and the names in the order of their labels, which is the sorted one."""
    ordered = sorted(set(names))
    return {name: label for label, name in enumerate(ordered)}, ordered


def file_labels(
    folder: Path, files: list[Path], chosen: list[Path], entries: dict[Path, Entry], label_column: str | None
) -> Labels | None:
    """Return the labels of the chosen files, or None if the folder gives none.

    Args:
        folder: the folder that was named.
        files: all files of the medium below it, of all splits, so that the splits number alike.
        chosen: some of them.
        entries: what `read_metadata` gave for `label_column`, with a row for every chosen file if there is one.
        label_column: None takes the class subfolders, unless there are captions.
    """
    if label_column is not None:
        written = {path: entry.label for path, entry in entries.items()}
        numbers = [label for path in chosen if isinstance(label := written[path], int)]
        if all(isinstance(label, int) for label in written.values()):
            return Labels(numbers, None)
        # One name among the numbers makes all of them names.
        class_of = {path: str(label) for path, label in written.items()}
    elif any(entry.text is not None for entry in entries.values()):
        return None
    else:
        class_of = _class_folders(folder, files)
    if not class_of:
        return None
    label_of, names = number_names(class_of.values())
    return Labels([label_of[class_of[path]] for path in chosen], names)


def _class_folders(folder: Path, files: list[Path]) -> dict[Path, str]:
    """The subfolders of files that all lie in one level of them, below splits if there are such; or nothing."""
    places = {path: path.relative_to(folder).parent.parts for path in files}
    splits = {name for names in SPLIT_FOLDERS.values() for name in names}
    if all(parts and parts[0] in splits for parts in places.values()):
        places = {path: parts[1:] for path, parts in places.items()}
    elif all(_own_splits(folder).values()):
        return {}  # with files beside the splits, and a split is not a class
    if any(len(parts) != 1 for parts in places.values()) or len(set(places.values())) < 2:
        return {}  # one subfolder alone is a place and not a class, for `imagefolder` too
    return {path: parts[0] for path, parts in places.items()}
