"""Tables of media: Parquet files, and data sets of the package `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqtok.sources.medium import Medium

_ROWS = 32  # read at once
Found = tuple[str, bytes | str | None, dict[str, Any], str | None]


class Columns(NamedTuple):
    """Which columns are used.

    Args:
        media: of the media; None takes the only one there is.
        caption: kept as `text`; None keeps `text` if there is one.
        label: whole numbers, kept as `label`; None keeps `label` if it is of whole numbers.
        keep: more columns to keep beside the codes, under their own names.
    """

    media: str | None = None
    caption: str | None = None
    label: str | None = None
    keep: tuple[str, ...] = ()

    def of(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is kept of a row.

        Raises:
            ValueError: a column that was asked for is missing, or of a type that is not kept.
        """
        extras: dict[str, Any] = {}
        text, label = row.get(self.caption or "text"), row.get(self.label or "label")
        if isinstance(text, str):
            extras["text"] = text
        elif self.caption is not None:
            raise ValueError(f"the caption {self.caption!r} is {_shown(text)}, not a text")
        if type(label) is int:
            extras["label"] = label
        elif self.label is not None:
            raise ValueError(f"the label {self.label!r} is {_shown(label)}, not a whole number")
        for name in self.keep:
            value = row.get(name)
            if value is None:
                continue
            # Of a value without a fixed type (in a .json), columns of one type are made as texts.
            extras[name] = value if isinstance(value, (str, int, float, bytes)) else json.dumps(value, default=str)
        return extras

    def used(self, media: str, names: Sequence[str]) -> list[str]:
        """The columns to read of those there are."""
        wanted = [media, self.caption or "text", self.label or "label", *self.keep]
        return [name for name in dict.fromkeys(wanted) if name in names]


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else type(value).__name__


def check_files(files: Sequence[Path], medium: Medium, columns: Columns) -> Columns:
    """The columns with the name of the media's, which the first file tells.

    Raises:
        ValueError: there is no such column, or several; or one to keep is missing.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    for file in files:
        try:
            schema = parquet.read_schema(file)
        except (arrow.ArrowException, OSError):  # damaged: it is listed when its turn comes
            continue
        kinds = {field.name: field.type for field in schema}
        return _chosen(kinds, _is_media(kinds, medium), medium, columns, f"{files[0].name} and its neighbours")
    raise ValueError(f"none of the {len(files)} .parquet files can be read, first {files[0]}: replace them")


def _is_media(kinds: dict[str, Any], medium: Medium) -> list[str]:
    import pyarrow.types as types

    def good(kind: Any) -> bool:
        if medium.feature == "Value":
            return types.is_string(kind) or types.is_large_string(kind)
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    return [name for name, kind in kinds.items() if good(kind)]


def _chosen(names: Any, media: Sequence[str], medium: Medium, columns: Columns, title: str) -> Columns:
    for name in (columns.caption, columns.label, *columns.keep):
        if name is not None and name not in names:
            raise ValueError(f"{title} have no column {name!r}: their columns are {', '.join(names)}")
    if columns.media is None and medium.feature == "Value" and "text" in media:
        return columns._replace(media="text")
    if columns.media is None and len(media) != 1:
        found = f"the columns of {medium.many} {', '.join(media)}" if media else f"no column of {medium.many}"
        raise ValueError(f"{title} have {found} among {', '.join(names)}: name one with media_column")
    if columns.media is not None and columns.media not in media:
        raise ValueError(
            f"{title} have no column of {medium.many} {columns.media!r}: there are {', '.join(media) or 'none'}"
        )
    return columns._replace(media=columns.media or media[0])


def read_parquet(path: Path, medium: Medium, columns: Columns, most_bytes: int) -> Iterator[Found]:
    """Yield (name, medium or None, what is kept beside it, problem or None) of each row.

    A file that is damaged ends with a problem; what stands before is yielded.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    assert columns.media is not None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            wanted = columns.used(columns.media, file.schema_arrow.names)
            if columns.media not in wanted:
                raise arrow.ArrowInvalid(f"it has no column {columns.media!r}")
            for batch in file.iter_batches(_ROWS, columns=wanted, use_threads=False):
                for cells in batch.to_pylist():
                    yield _found(f"row {row}", cells, medium, columns, most_bytes)
                    row += 1
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:  # of the system, not of the file: it may be good tomorrow
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield path.name, None, {}, f"the file is damaged, nothing from row {row} on could be read ({why})"


def _found(name: str, cells: dict[str, Any], medium: Medium, columns: Columns, most_bytes: int) -> Found:
    assert columns.media is not None
    cell = cells.get(columns.media)
    value = cell.get("bytes") if isinstance(cell, dict) else cell
    if value is None:
        # A path in somebody's table is never followed.
        return (
            name,
            None,
            {},
            f"it has no {medium.one}" if cell is None else f"it names a file and holds no {medium.one}",
        )
    if len(value) > most_bytes:
        return name, None, {}, f"it has {len(value):,} bytes, more than {most_bytes:,}"
    others = cells if medium.feature != "Value" else {k: v for k, v in cells.items() if k != columns.media}
    try:
        return name, value, columns.of(others), None
    except ValueError as error:
        return name, None, {}, str(error)


def undecoded(data: Any, medium: Medium, columns: Columns) -> tuple[Any, Columns]:
    """A data set of `datasets` whose media are bytes, and the columns with the name of theirs.

    Raises:
        ValueError: see `check_files`.
    """
    import datasets

    kind = getattr(datasets, medium.feature)
    own = [name for name, feature in data.features.items() if isinstance(feature, kind) or _are_bytes(feature)]
    if medium.feature == "Value":
        own = [name for name in own if data.features[name].dtype in ("string", "large_string")]
    chosen = _chosen(data.features, own, medium, columns, "the rows")
    assert chosen.media is not None
    data = data.select_columns(chosen.used(chosen.media, list(data.features)))
    decodes = medium.feature != "Value" and isinstance(data.features[chosen.media], kind)
    return data.cast_column(chosen.media, kind(decode=False)) if decodes else data, chosen


def _are_bytes(feature: Any) -> bool:
    """Whether a column of a data set holds files that nobody has declared to be media, as plain Parquet does."""
    return (isinstance(feature, dict) and "bytes" in feature) or getattr(feature, "dtype", "") in (
        "binary",
        "large_binary",
    )


def read_rows(part: Any, first: int, medium: Medium, columns: Columns, most_bytes: int) -> Iterator[Found]:
    """As `read_parquet`, of the rows of a part of what `undecoded` returned; `first` is the number of its first row."""
    for number, cells in enumerate(part, first):
        yield _found(f"row {number}", cells, medium, columns, most_bytes)
