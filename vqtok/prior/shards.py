"""One shard of codes: the Parquet file that every code cache consists of, written so that it can be mapped into memory.

The file is plain Parquet, which any reader takes. Beyond that its bytes are a function of the rows alone, nothing is compressed and no
column has a dictionary, so that the codes of a row group lie in one piece, as integers of 32 bits (Parquet has none of 16), at
the end of their column chunk. Where these pieces end is noted beside the file, in the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vqtok.codes import CodeLayout, Codes, check_range
from vqtok.files import write_with

MAX_CODES_PER_SHARD = 1 << 30
ROWS_PER_GROUP, CODES_PER_GROUP = 1024, 1 << 24  # at most
_ITEM = np.dtype("<u4")  # what uint16 and uint32 are in Parquet


def code_row(sample: Codes, extra: dict[str, Any]) -> dict[str, Any]:
    """A row: the flattened codes of each level as small integers, the size, and what is kept beside them.

    Raises:
        ValueError: a column of `extra` has a name that is ours.
    """
    row: dict[str, Any] = {}
    for i, (codes, level) in enumerate(zip(sample.levels, sample.layout.levels, strict=False)):
        row[f"level_{i}"] = codes[0].reshape(-1).cpu().numpy().astype(_integers_of(level.codebook_size))
    row |= {f"size_{axis}": n for axis, n in enumerate(sample.sizes[0].tolist())}
    if taken := sorted(row.keys() & extra.keys()):
        raise ValueError(
            f"a column {taken[0]!r} cannot be kept beside the codes, which have one of that name: rename it"
        )
    return row | extra


def write_shard(folder: Path, file: str, rows: Sequence[dict[str, Any]], layout: CodeLayout) -> dict[str, Any]:
    """Write a shard, whole or not at all, and return its entry for the manifest.

    Args:
        folder, file: where.
        rows: of `code_row`; a column that only some rows have is empty for the others.
        layout: of the codes.

    Returns:
        `file`; `num_samples`; `num_bytes` and `sha256` of the file; `size`, which all samples have, or None; `columns`, what is kept
        beside the codes; `row_groups`, the rows of each; `ends`, for each level where the codes of each row group end in the file.

    Raises:
        OSError: it could not be written; the sentence names the file and says why.
        ValueError: a column mixes types.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = arrow.table(_columns(rows, layout))
    except arrow.ArrowException as error:
        raise ValueError(f"the columns beside the codes of {file} cannot be stored ({error})") from None
    groups = list(_groups(rows))
    entry: dict[str, Any] = {"file": file, "num_samples": len(rows)}

    def write(path: str) -> None:
        options: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
        options |= {"version": "2.6", "data_page_version": "1.0", "data_page_size": 1 << 30, "store_schema": True}
        with parquet.ParquetWriter(path, table.schema, **options) as writer:
            start = 0
            for count in groups:
                writer.write_table(table.slice(start, count), row_group_size=count)
                start += count
        data = Path(path).read_bytes()
        entry["num_bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
        entry["size"] = _common_size(rows, layout.ndim)
        entry["columns"] = [name for name in table.column_names if not name.startswith(("level_", "size_"))]
        entry["row_groups"], entry["ends"] = groups, _ends(path, data, rows, groups, len(layout.levels))

    write_with(folder / file, write)
    return entry


def _integers_of(codebook_size: int) -> str:
    return "uint16" if codebook_size <= 65_536 else "uint32"


def _columns(rows: Sequence[dict[str, Any]], layout: CodeLayout) -> dict[str, Any]:
    import pyarrow as arrow

    columns: dict[str, Any] = {}
    names = dict.fromkeys(name for row in rows for name in row)
    ours = [name for name in names if name.startswith(("level_", "size_"))]
    for name in [*ours, *sorted(names.keys() - set(ours))]:  # the order must not depend on which row comes first
        values = [row.get(name) for row in rows]
        if name.startswith("level_"):
            kind = _integers_of(layout.levels[int(name.removeprefix("level_"))].codebook_size)
            columns[name] = arrow.array(values, arrow.list_(arrow.type_for_alias(kind)))
        else:
            columns[name] = arrow.array(values)
    return columns


def _groups(rows: Sequence[dict[str, Any]]) -> Iterator[int]:
    """How many rows go into each row group."""
    count = codes = 0
    for row in rows:
        own = max(len(row[name]) for name in row if name.startswith("level_"))
        if count and (count == ROWS_PER_GROUP or codes + own > CODES_PER_GROUP):
            yield count
            count = codes = 0
        count, codes = count + 1, codes + own
    if count:
        yield count


def _common_size(rows: Sequence[dict[str, Any]], ndim: int) -> list[int] | None:
    sizes = {tuple(row[f"size_{axis}"] for axis in range(ndim)) for row in rows}
    return list(sizes.pop()) if len(sizes) == 1 else None


def _ends(
    path: str, data: bytes, rows: Sequence[dict[str, Any]], groups: list[int], levels: int
) -> list[list[int]] | None:
    """Where the codes of each level end in each row group; None if this version of pyarrow lays them out in another way."""
    import pyarrow.parquet as parquet

    metadata = parquet.read_metadata(path)  # of a file of our own, so that single columns may be asked for
    names = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)] if groups else []
    ends: list[list[int]] = []
    for level in range(levels):
        column = next(i for i, name in enumerate(names) if name.split(".")[0] == f"level_{level}")
        ends.append([])
        start = 0
        for group, count in enumerate(groups):
            chunk = metadata.row_group(group).column(column)
            end = chunk.data_page_offset + chunk.total_compressed_size
            wanted = np.concatenate([row[f"level_{level}"] for row in rows[start : start + count]])
            if not np.array_equal(_view(data, end, len(wanted)), wanted):
                return None
            ends[-1].append(end)
            start += count
    return ends


def _view(data: Any, end: int, count: int) -> np.ndarray:
    """`count` codes that end at `end`, without a copy."""
    start = end - count * _ITEM.itemsize
    if start < 0 or end > len(data):
        raise ValueError(f"codes from byte {start} to {end}")
    return np.frombuffer(data, _ITEM, count, start)


class Shard(NamedTuple):
    """A shard in memory: sizes int64 `(rows, ndim)`, of each level the codes of every row, and the other columns."""

    sizes: np.ndarray
    levels: list[list[np.ndarray]]
    columns: dict[str, list[Any]]


def read_shard(path: Path, num_samples: int, layout: CodeLayout) -> Shard:
    """A shard, checked against manifest and layout. Sizes come first: they say how many codes may follow.

    Raises:
        ValueError: it is missing or damaged, or does not fit; the file is named.
    """
    axes, levels = (
        [f"{what}_{i}" for i in range(n)] for what, n in (("size", layout.ndim), ("level", len(layout.levels)))
    )
    with _opened(path, num_samples) as file:
        _check_columns(file.schema_arrow, axes, levels)
        table = file.read(columns=axes, use_threads=False)
        sizes = np.stack([_integers(table[axis].combine_chunks(), axis) for axis in axes], 1)
        wanted = _code_counts(sizes, layout)
        table = file.read(use_threads=False)
        rows = [_codes(table[f"level_{i}"], i, wanted[i], layout) for i in range(len(levels))]
        columns = {name: table[name].to_pylist() for name in table.column_names if name not in (*axes, *levels)}
    return Shard(sizes, rows, columns)


@contextmanager
def _opened(path: Path, num_samples: int) -> Iterator[Any]:
    """The open Parquet file; whatever damage leads to becomes one ValueError. The metadata of single columns is never asked: of a
    damaged file pyarrow 26 ends the process there."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows != num_samples:
                raise ValueError(f"it has {file.metadata.num_rows} rows, the manifest says {num_samples}")
            yield file
    except (OSError, ValueError, LookupError, TypeError, OverflowError, arrow.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}): encode again") from None


def _read_column(path: Path, name: str, num_samples: int, group: int) -> list[Any]:
    with _opened(path, num_samples) as file:
        if name not in file.schema_arrow.names:
            return []
        return file.read_row_group(group, columns=[name], use_threads=False)[name].to_pylist()


def _check_columns(schema: Any, axes: list[str], levels: list[str]) -> None:
    import pyarrow.types as kinds

    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two columns have one name")
    for name in (*axes, *levels):
        if name not in schema.names:
            raise ValueError(f"it has no column {name!r}")
        kind = schema.field(name).type
        good = kinds.is_list(kind) and kinds.is_integer(kind.value_type) if name in levels else kinds.is_integer(kind)
        if not good:
            raise ValueError(f"column {name!r} is of type {kind}")


def _integers(array: Any, name: str) -> np.ndarray:
    if array.null_count:
        raise ValueError(f"column {name!r} has empty cells")
    values = array.to_numpy(zero_copy_only=False)
    if values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"column {name!r} holds {values.max()}")
    return values.astype(np.int64)


def _code_counts(sizes: np.ndarray, layout: CodeLayout) -> list[np.ndarray]:
    """Positions of the grid of each row, per level: bounded, before a code is read."""
    if sizes.size and (sizes.min() < 1 or sizes.max() > 1 << 31):
        raise ValueError(f"sizes from {sizes.min()} to {sizes.max()}")
    padded = -(-sizes // layout.stride) * layout.stride
    # Floats first: a product of large sizes must not wrap around to a small one.
    if float(np.prod((padded // layout.levels[-1].stride).astype(np.float64), axis=1).sum()) > MAX_CODES_PER_SHARD:
        raise ValueError(f"its sizes ask for more than {MAX_CODES_PER_SHARD:,} codes")
    return [np.prod(padded // level.stride, axis=1) for level in layout.levels]


def _codes(column: Any, index: int, positions: np.ndarray, layout: CodeLayout) -> list[np.ndarray]:
    """The codes of a level, one array per row."""
    level, array = layout.levels[index], column.combine_chunks()
    if array.null_count:
        raise ValueError(f"level {index} has empty cells")
    lengths = np.diff(array.offsets.to_numpy())
    depths = lengths // positions
    if len(lengths) and ((lengths != depths * positions).any() or depths.min() != depths.max()):
        raise ValueError(f"level {index} has rows whose codes do not fill their grids")
    if len(lengths) and not 1 <= depths[0] <= level.num_codebooks:
        raise ValueError(f"level {index} has {depths[0]} codes per position, the layout {level.num_codebooks}")
    values = array.flatten()
    if values.null_count:
        raise ValueError(f"level {index} has empty codes")
    flat = values.to_numpy(zero_copy_only=False)
    check_range(torch.from_numpy(flat.astype(np.int64)), level.codebook_size, f"level {index}")
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def read_sizes(path: Path, num_samples: int, layout: CodeLayout) -> np.ndarray:
    """The sizes of a shard, int64 `(rows, ndim)`.

    Raises:
        ValueError: see `read_shard`.
    """
    axes = [f"size_{axis}" for axis in range(layout.ndim)]
    with _opened(path, num_samples) as file:
        _check_columns(file.schema_arrow, axes, [])
        table = file.read(columns=axes, use_threads=False)
        sizes = np.stack([_integers(table[axis].combine_chunks(), axis) for axis in axes], 1)
        _code_counts(sizes, layout)
    return sizes


class MappedShard:
    """A shard whose codes stay on the disk. It is checked as `read_shard` does when it is first touched.

    Args:
        path: of the file.
        entry: of the manifest, with `num_bytes`, `row_groups` and `ends`.
        layout: of the codes.

    Raises:
        ValueError: the file is missing, has another number of bytes, or the entry makes no sense; the file is named.
    """

    def __init__(self, path: Path, entry: dict[str, Any], layout: CodeLayout):
        self.path, self.entry, self.layout = path, entry, layout
        found = path.stat().st_size if path.is_file() else None
        if found is None or found != entry.get("num_bytes"):
            state = (
                "is missing" if found is None else f"has {found:,} bytes, the manifest says {entry.get('num_bytes')!r}"
            )
            raise ValueError(f"{path} cannot be read (it {state}): encode again")
        number = entry["num_samples"]
        if number > found:  # none takes less than a byte, and memory is taken for each before the rows are seen
            raise ValueError(f"{path} has {found:,} bytes, the manifest says {number} samples: encode again")
        self._data: Any = None
        self._bounds = np.zeros(1, np.int64)  # the first row of each row group, and the end
        self._starts: list[
            np.ndarray | int
        ] = []  # codes before each row, or codes of any row; empty until it is checked
        self._cells: tuple[Any, list[Any]] = (None, [])  # of the row group last read
        self.sizes = self._sizes()
        self.columns = entry.get("columns", [])
        if not isinstance(self.columns, list) or not all(isinstance(name, str) for name in self.columns):
            raise ValueError(f"{path}: the manifest gives the columns {self.columns!r}: encode again")

    def __len__(self) -> int:
        return self.entry["num_samples"]

    def _sizes(self) -> np.ndarray:
        """Int64 `(rows, ndim)`: one row seen many times if all are alike, else read."""
        size, rows, ndim = self.entry.get("size"), len(self), self.layout.ndim
        if size is None:
            return read_sizes(self.path, rows, self.layout)
        if (
            not isinstance(size, list)
            or len(size) != ndim
            or not all(type(n) is int and 0 < n <= 1 << 31 for n in size)
        ):
            raise ValueError(f"{self.path}: the manifest gives the size {size!r}: encode again")
        return np.broadcast_to(np.array(size, np.int64), (rows, ndim))

    def level(self, index: int, row: int) -> np.ndarray:
        """The flat codes of one level of one row."""
        self.touch()
        start, stop = self._before(index, row), self._before(index, row + 1)
        group = self._group(row)
        after = self._before(index, int(self._bounds[group + 1])) - start  # codes from here to the end of the row group
        return _view(self._data, self.entry["ends"][index][group], after)[: stop - start]

    def _before(self, index: int, row: int) -> int:
        """How many codes of a level stand before a row."""
        starts = self._starts[index]
        return row * starts if isinstance(starts, int) else int(starts[row])

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1

    def touch(self) -> None:
        """Map the file, and the first time check it."""
        if self._data is None:
            try:
                self._data = np.memmap(self.path, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.path} cannot be read ({error}): encode again") from None
        if not self._starts:
            shard = read_shard(self.path, len(self), self.layout)
            try:
                self._check(shard)
            except (ValueError, TypeError, LookupError, OverflowError) as error:
                raise ValueError(
                    f"{self.path} is not what the manifest says ({error or type(error).__name__}): encode again"
                ) from None

    def _check(self, shard: Shard) -> None:
        if not np.array_equal(shard.sizes, self.sizes):
            raise ValueError("other sizes")
        groups, ends = self.entry["row_groups"], self.entry["ends"]
        if not all(type(n) is int and n > 0 for n in groups) or sum(groups) != len(self):
            raise ValueError(f"row_groups {str(groups)[:80]}")
        if [len(level) for level in ends] != [len(groups)] * len(shard.levels):
            raise ValueError(f"ends {str(ends)[:80]}")
        self._bounds = np.cumsum([0, *groups])
        starts: list[np.ndarray | int] = []
        for level, rows in enumerate(shard.levels):
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            alike = len(set(map(len, rows))) == 1  # then they are not listed: the memory must not grow with the data
            starts.append(len(rows[0]) if alike else np.concatenate([[0], np.cumsum(lengths)]))
            for group, end in enumerate(ends[level]):
                first, last = self._bounds[group : group + 2]
                wanted = np.concatenate(rows[first:last])
                if type(end) is not int or not np.array_equal(_view(self._data, end, len(wanted)), wanted):
                    raise ValueError(f"the codes of level {level} do not end at byte {end!r}")
        self._starts = starts

    def cell(self, name: str, row: int) -> Any:
        """The cell of another column of one row; None if there is no such column."""
        self.touch()
        group = self._group(row)
        if self._cells[0] != (name, group):
            self._cells = ((name, group), _read_column(self.path, name, len(self), group))
        cells = self._cells[1]
        return cells[row - self._bounds[group]] if cells else None

    def close(self) -> None:
        """Give the mapping back; the next use maps again."""
        self._data, self._cells = None, (None, [])
