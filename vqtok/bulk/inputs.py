"""What is to be encoded, cut into units: a unit is one input shard, or a fixed number of loose files or rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vqtok.hub.folders import HUB_ID
from vqtok.sources.dataset import open_source
from vqtok.sources.folder import walk
from vqtok.sources.medium import Medium
from vqtok.sources.tables import is_saved_dataset

from .archives import read_archive
from .tables import Columns, check_files, read_parquet, read_rows, undecoded

MAX_MEDIUM_BYTES = 1 << 28  # of one picture, recording or text, before it is decoded


class Item(NamedTuple):
    """One sample, not decoded yet.

    Args:
        name: inside its unit's source.
        medium: bytes, a text, or the path of a file; None where there is a problem.
        extras: what is kept beside its codes.
        problem: why it cannot be used.
    """

    name: str
    medium: bytes | str | Path | None
    extras: dict[str, Any]
    problem: str | None = None


class Source(Protocol):
    """An input. It is pickled to the processes that read it.

    Attributes:
        kind: "files", "parquet", "tar" or "rows".
        units: what is known of each unit before it is read: its `name`, and how much it holds.
        label_names: the names of the labels, None for mere numbers.
    """

    kind: str
    units: list[dict[str, Any]]
    label_names: list[str] | None

    def read(self, number: int) -> Iterator[Item]:
        """The samples of a unit, in an order that never changes."""
        ...


class LooseFiles(NamedTuple):
    """Files of a folder, a fixed number to a unit."""

    folder: Path
    files: list[Path]
    texts: list[str | None]
    labels: list[int] | None
    rows: int
    label_names: list[str] | None
    kind: str = "files"

    @property
    def units(self) -> list[dict[str, Any]]:
        names = [path.relative_to(self.folder).as_posix() for path in self.files]
        parts = [names[start : start + self.rows] for start in range(0, len(names), self.rows)]
        return [
            {
                "name": f"{part[0]} ...",
                "samples": len(part),
                "names": hashlib.sha256("\0".join(part).encode("utf-8", "surrogateescape")).hexdigest()[:16],
            }
            for part in parts
        ]

    def read(self, number: int) -> Iterator[Item]:
        for index in range(number * self.rows, min((number + 1) * self.rows, len(self.files))):
            path = self.files[index]
            extras: dict[str, Any] = {} if self.texts[index] is None else {"text": self.texts[index]}
            if self.labels is not None:
                extras["label"] = self.labels[index]
            name, size = path.relative_to(self.folder).as_posix(), path.stat().st_size
            if size > MAX_MEDIUM_BYTES:
                yield Item(name, None, {}, f"it has {size:,} bytes, more than {MAX_MEDIUM_BYTES:,}")
            else:
                yield Item(name, path, extras)


class ShardFiles(NamedTuple):
    """Parquet files or archives, each a unit."""

    folder: Path
    files: list[str]
    kind: str
    medium: Medium
    columns: Columns
    label_names: list[str] | None = None

    @property
    def units(self) -> list[dict[str, Any]]:
        return [{"name": name, "bytes": (self.folder / name).stat().st_size} for name in self.files]

    def read(self, number: int) -> Iterator[Item]:
        reader = read_parquet if self.kind == "parquet" else read_archive
        for found in reader(self.folder / self.files[number], self.medium, self.columns, MAX_MEDIUM_BYTES):
            yield Item(*found)


class Rows(NamedTuple):
    """A data set of the package `datasets`: a fixed number of rows to a unit, or, streamed, one of its own shards."""

    data: Any
    streaming: bool
    rows: int
    medium: Medium
    columns: Columns
    label_names: list[str] | None
    kind: str = "rows"

    @property
    def units(self) -> list[dict[str, Any]]:
        if self.streaming:
            return [{"name": f"shard {number}"} for number in range(self.data.num_shards)]
        starts = range(0, len(self.data), self.rows)
        return [{"name": f"rows from {n}", "samples": min(self.rows, len(self.data) - n)} for n in starts]

    def read(self, number: int) -> Iterator[Item]:
        if self.streaming:
            part, first = self.data.shard(num_shards=self.data.num_shards, index=number), 0
        else:
            first = number * self.rows
            part = self.data.select(range(first, min(first + self.rows, len(self.data))))
        for found in read_rows(part, first, self.medium, self.columns, MAX_MEDIUM_BYTES):
            yield Item(*found)


def open_input(
    source: Any,
    medium: Medium,
    columns: Columns,
    rows: int,
    split: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Source:
    """Return what a name or a data set stands for.

    Args:
        source: a folder of media, of .parquet or of .tar files, one such file, a data set on the Hub, or one of `datasets`.
        medium: what to look for in it.
        columns: see `Columns`.
        rows: samples to a unit where there are no input shards.
        split: of a folder of media None is all; of a data set on the Hub None is "train".
        config_name, revision, streaming: of a data set on the Hub.

    Raises:
        ValueError: there is nothing of the kind in it; the sentence says what to do.
    """
    path = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    on_hub = path is not None and not path.exists() and isinstance(source, str) and HUB_ID.fullmatch(source)
    for name, value in (("config_name", config_name), ("revision", revision), ("streaming", streaming)):
        if value and not on_hub:
            raise ValueError(f"{name} is for a data set on the Hub, {str(source)[:80]!r} is none: leave it out")
    if path is None:
        return _rows(source, rows, medium, columns)
    if on_hub:
        return _rows(_load(str(source), split or "train", config_name, revision, streaming), rows, medium, columns)
    if not path.exists():
        raise ValueError(f"there is no folder and no file {path}: check the path")
    if path.is_dir() and is_saved_dataset(path):
        import datasets  # here, because it takes a second to import

        data = datasets.load_from_disk(str(path))
        return _rows(data[split or "train"] if isinstance(data, dict) else data, rows, medium, columns)
    return _open_path(path.resolve(), medium, columns, rows, split)


def _open_path(path: Path, medium: Medium, columns: Columns, rows: int, split: str | None) -> Source:
    folder, files = (path, walk(path)) if path.is_dir() else (path.parent, [path])
    shards = {kind: [file for file in files if file.suffix == f".{kind}"] for kind in ("parquet", "tar")}
    loose = [file for file in files if file.suffix.lower() in medium.suffixes and path.is_dir()]
    found = {**{kind: chosen for kind, chosen in shards.items() if chosen}, **({"loose files": loose} if loose else {})}
    if len(found) > 1:
        counts = ", ".join(f"{len(chosen)} {kind}" for kind, chosen in found.items())
        raise ValueError(f"{path} holds {counts}: put each kind into a folder of its own")
    if not found:
        packed = next((file.name for file in files if file.name.endswith((".tar.gz", ".tgz", ".tar.zst"))), None)
        hint = f" ({packed} is compressed: unpack it to .tar)" if packed else ""
        raise ValueError(f"{path} holds no {medium.one} and no .parquet or .tar shard{hint}: name another")
    if loose:
        options = {"caption_column": columns.caption, "label_column": columns.label, "media_column": None}
        options |= {"config_name": None, "holdout": None}
        if columns.keep or columns.media:
            raise ValueError("a folder of media has no other columns: leave out keep and the column of the media")
        chosen: Any = open_source(medium, path, split or "all", options)
        labels, names = (chosen.labels.numbers, chosen.labels.names) if chosen.labels else (None, None)
        return LooseFiles(chosen.folder, chosen.files, chosen.texts, labels, rows, names)
    if split is not None:
        raise ValueError(f"the shards of {path} have no split {split!r}: leave it out, or name the folder of one split")
    ((kind, chosen),) = found.items()
    names = [file.relative_to(folder).as_posix() for file in chosen]
    return ShardFiles(
        folder, names, kind, medium, check_files(chosen, medium, columns) if kind == "parquet" else columns
    )


def _rows(data: Any, rows: int, medium: Medium, columns: Columns) -> Rows:
    import datasets

    if not isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(
            f"an input of type {type(data).__name__} is not supported: give a folder, a name or a datasets.Dataset"
        )
    if data.features is None:
        data = data._resolve_features()
    labels = data.features.get(columns.label or "label")
    names = list(labels.names) if isinstance(labels, datasets.ClassLabel) else None
    data, chosen = undecoded(data, medium, columns)
    return Rows(data, isinstance(data, datasets.IterableDataset), rows, medium, chosen, names)


def _load(name: str, split: str, config_name: str | None, revision: str | None, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # whatever the network, the Hub and the readers of many formats raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot load the data set {name} ({why}): check the name, or name an existing folder"
        ) from error
