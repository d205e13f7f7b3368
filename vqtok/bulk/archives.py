"""WebDataset archives, read as a stream: nothing is ever extracted, and no path of an archive is ever a path here."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqtok.sources.medium import Medium

from .tables import Columns

MAX_TEXT_BYTES = 1 << 20  # of a caption, a label or a .json beside a medium
Found = tuple[str, bytes | str | None, dict[str, Any], str | None]


def read_archive(path: Path, medium: Medium, columns: Columns, most_bytes: int) -> Iterator[Found]:
    """Yield (name, medium or None, what is kept beside it, problem or None) of each sample.

    A sample is the neighbouring members whose names are alike up to the first dot after the last slash: its medium, `.txt` (the
    caption), `.cls` (the label) and `.json` (an object with any columns). Members that are no plain files are left out.

    Args:
        path: a .tar file.
        medium: says which suffixes are media.
        columns: which of the .json's fields are kept, and which are caption and label.
        most_bytes: a larger medium is not read.

    An archive that is cut off or damaged ends with a problem; what stands before is yielded.
    """
    key, parts, problem = None, {}, None
    name = path.name
    try:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                place, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not member.isfile() or not suffix:
                    continue
                if (place + slash + stem) != key:
                    if key is not None:
                        yield _sample(key, parts, problem, medium, columns)
                    key, parts, problem = place + slash + stem, {}, None
                suffix = suffix.lower()
                is_medium = f".{suffix.rpartition('.')[2]}" in medium.suffixes
                if not is_medium and suffix not in ("txt", "cls", "json"):
                    continue
                most = most_bytes if is_medium else MAX_TEXT_BYTES
                if member.size > most:
                    problem = f".{suffix} has {member.size:,} bytes, more than {most:,}"
                    continue
                stream = archive.extractfile(member)
                parts[suffix] = b"" if stream is None else stream.read()
    except (tarfile.TarError, EOFError, ValueError) as error:  # of the system's errors none: those stop the run
        if key is not None:
            yield _sample(key, parts, problem, medium, columns)
        yield name, None, {}, f"the archive is damaged or cut off, nothing after this could be read ({error})"
        return
    if key is not None:
        yield _sample(key, parts, problem, medium, columns)


def _sample(key: str, parts: dict[str, bytes], problem: str | None, medium: Medium, columns: Columns) -> Found:
    media = [suffix for suffix in parts if f".{suffix.rpartition('.')[2]}" in medium.suffixes]
    if problem is None and len(media) != 1:
        problem = f"it has {len(media) or 'no'} {medium.one if len(media) < 2 else medium.many}: one is needed"
    if problem is not None:
        return key, None, {}, problem
    try:
        return key, _medium(parts, media[0], medium), _extras(parts, media[0], columns), None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        return key, None, {}, f"what stands beside it cannot be read ({error})"


def _medium(parts: dict[str, bytes], name: str, medium: Medium) -> bytes | str:
    return parts[name].decode() if medium.feature == "Value" else parts[name]


def _extras(parts: dict[str, bytes], media: str, columns: Columns) -> dict[str, Any]:
    fields = json.loads(parts["json"]) if "json" in parts else {}
    if not isinstance(fields, dict):
        raise ValueError("the .json is no object")
    if "txt" in parts and media != "txt":
        fields.setdefault("text", parts["txt"].decode().strip())
    if "cls" in parts:
        fields.setdefault("label", int(parts["cls"]))
    return columns.of(fields)
