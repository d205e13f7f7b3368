"""From the name of a source to a map-style data set whose items are read when asked for."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .folder import Labels, choose_split, file_labels, read_metadata, walk
from .medium import Medium
from .tables import Table, is_saved_dataset, open_table

# What a folder of `datasets` may consist of when it holds no media files of its own.
_TABLES = frozenset((".parquet", ".arrow", ".tar"))
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class FolderSource(NamedTuple):
    """Chosen files of a folder, with one text (or None) and maybe one label each."""

    folder: Path
    files: list[Path]
    texts: list[str | None]
    labels: Labels | None
    title: str

    def open(self, position: int) -> Path:
        return self.files[position]

    def name(self, position: int) -> str:
        return self.files[position].relative_to(self.folder).as_posix()


class TableSource(NamedTuple):
    """Rows of a data set of the package `datasets`."""

    medium: Medium
    table: Table

    @property
    def texts(self) -> list[str | None]:
        return self.table.texts

    @property
    def labels(self) -> Labels | None:
        return self.table.labels

    @property
    def title(self) -> str:
        return self.table.title

    def open(self, position: int) -> str | BytesIO:
        cell = self.table.rows[position][self.table.media_column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError(f"the row has no {self.medium.one}")
        return cell["path"] if cell["bytes"] is None else BytesIO(cell["bytes"])

    def name(self, position: int) -> str:
        return f"row {position}"


class MediaDataset(Dataset[dict[str, Any]]):
    """Media that are read when asked for. A room's class says how: `_read`, `_complaint` and the medium.

    `skipped` lists what was left out because it cannot be read, as (name, reason); `label_names` the names of the labels,
    None if they have none.
    """

    medium: Medium
    skipped: list[tuple[str, str]]
    label_names: list[str] | None

    def __init__(self, source: FolderSource | TableSource) -> None:
        self.title = source.title
        self.skipped = []
        self.label_names = None if source.labels is None else source.labels.names
        self._source = source
        self._kept = list(range(len(source.texts)))

    def _read(self, source: Path | str | BytesIO) -> dict[str, Any]:
        """What an item holds beside text and label."""
        raise NotImplementedError

    def _complaint(self, position: int) -> str | None:
        """Why a file cannot be read, or None; called on threads."""
        try:
            self._read(self._source.open(position))
        except Exception as error:  # readers raise whatever broken bytes lead to
            return self._reason(error)
        return None

    def _reason(self, error: Exception) -> str:
        return str(error) or type(error).__name__

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self._kept[index]
        try:
            item = self._read(self._source.open(position))
        except Exception as error:  # see _complaint
            raise ValueError(
                f"cannot read the {self.medium.one} {self._source.name(position)} ({self._reason(error)}): "
                "replace it, or load with verify=True to leave it out"
            ) from error
        labels = self._source.labels
        label = {} if labels is None else {"label": labels.numbers[position]}
        return {**item, "text": self._source.texts[position], **label}

    def name(self, index: int) -> str:
        """Return the name of one item: its path inside the folder, or its row."""
        return self._source.name(self._kept[index])

    def keep(self, num_samples: int | None, verify: bool) -> None:
        """Keep at most the first `num_samples` items and, to verify, of these the ones that can be read.

        Raises:
            ValueError: if none is left.
        """
        self._kept = self._kept[:num_samples]
        if not verify:
            return
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checked = tqdm(
                pool.map(self._complaint, self._kept),
                f"checking {self.medium.many}",
                len(self._kept),
                delay=2,
                leave=False,
                disable=None,
            )
            complaints = list(checked)
        self.skipped = [(self._source.name(i), why) for i, why in zip(self._kept, complaints, strict=True) if why]
        self._kept = [i for i, why in zip(self._kept, complaints, strict=True) if not why]
        if not self._kept:
            name, why = self.skipped[0]
            raise ValueError(
                f"none of the {len(self.skipped)} {self.medium.many} of {self.title} can be read, "
                f"the first, {name}, because: {why}; replace them"
            )


def open_source(medium: Medium, source: Any, split: str, options: dict[str, Any]) -> FolderSource | TableSource:
    """Return the files or rows of one split.

    Args:
        medium: what to look for.
        source: a folder, or what `datasets` opens.
        split: see `choose_split` and `open_table`.
        options: caption_column, label_column, media_column, config_name and holdout, None for those not given.

    Raises:
        ValueError: one sentence, naming value and remedy; see the loaders of the rooms.
    """
    folder = _existing_folder(medium, source)
    files = [] if folder is None or is_saved_dataset(folder) else walk(folder)
    caption_column, label_column = options["caption_column"], options["label_column"]
    if folder is not None and any(path.suffix.lower() in medium.suffixes for path in files):
        refuse_options(medium, f"the folder {folder}", options, allowed=("caption_column", "label_column", "holdout"))
        return _open_folder(medium, folder, files, split, caption_column, label_column, options["holdout"])
    if folder is not None and not is_saved_dataset(folder) and not any(path.suffix in _TABLES for path in files):
        raise ValueError(
            f"the folder {folder} holds no {medium.one}: put files like {medium.examples} into it, or name another"
        )
    refuse_options(
        medium, "a data set", options, allowed=("caption_column", "label_column", "media_column", "config_name")
    )
    table = open_table(
        medium, source, split, caption_column, label_column, options["media_column"], options["config_name"]
    )
    return TableSource(medium, table)


def skipped_summary(dataset: Any) -> str:
    """Return the lines to show at the end of a run about what was left out, "" when there is nothing.

    Args:
        dataset: any data set; one without `skipped` has left out nothing.
    """
    skipped = getattr(dataset, "skipped", [])
    if not skipped:
        return ""
    medium = dataset.medium
    count = f"1 {medium.one} was" if len(skipped) == 1 else f"{len(skipped)} {medium.many} were"
    return "\n".join([f"{count} skipped:", *(f"  {name}: {reason}" for name, reason in skipped)])


def refuse_options(medium: Medium, kind: str, options: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """Return nothing if only allowed options are given.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in options.items():
        if value is not None and name not in allowed:
            said = medium.column_option if name == "media_column" else name
            raise ValueError(f"{kind} cannot use {said}={value!r}: leave it out")


def _existing_folder(medium: Medium, source: Any) -> Path | None:
    """The folder that a source names, or None if it names a data set."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()  # without "..", so that every file below has one spelling
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name the folder of the {medium.many}")
    if isinstance(source, os.PathLike) or not _HUB_NAME.fullmatch(source):
        raise ValueError(f"there is no folder {folder}: check the path")
    return None


def _open_folder(
    medium: Medium,
    folder: Path,
    files: list[Path],
    split: str,
    caption_column: str | None,
    label_column: str | None,
    holdout: Sequence[str] | None,
) -> FolderSource:
    entries = read_metadata(files, caption_column, label_column)
    # What the metadata names is of the medium whatever its suffix; whether it can be read, reading will tell.
    found = [path for path in files if path.suffix.lower() in medium.suffixes or path in entries]
    chosen = choose_split(medium, folder, found, split, holdout)
    without = [path for path in chosen if path not in entries]  # a row lacks nothing that was asked for
    for what, column in (("captions", caption_column), ("labels", label_column)):
        if column is not None and without:
            raise ValueError(
                f"{what} were asked for, but {len(without)} of {len(chosen)} {medium.many} have none, first {without[0]}: "
                f"add it to {folder / 'metadata.csv'} with the columns 'file_name' and {column!r}"
            )
    texts = [entries[path].text if path in entries else None for path in chosen]
    labels = file_labels(folder, found, chosen, entries, label_column)
    return FolderSource(folder, chosen, texts, labels, f"{folder}, split {split!r}")
