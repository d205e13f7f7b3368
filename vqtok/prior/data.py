"""The code cache: codes of a data set in Parquet shards with a manifest that ties them to the tokenizer that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqtok.codes import CodeLayout, Codes, check_range
from vqtok.files import read_json, write_json, write_with
from vqtok.fingerprint import check_fingerprint

from .sequence import pad_conditions, pad_features

FORMAT = 1
MANIFEST = "manifest.json"
CONDITION = "condition"  # the column of a sample's condition, where that is a sample of another code cache
MAX_CODES_PER_SHARD = 1 << 30


def write_code_cache(
    folder: str | Path,
    batches: Iterable[tuple[Codes, Sequence[dict[str, Any]]]],
    facts: dict[str, Any],
    rows_per_shard: int = 16_384,
) -> dict[str, Any]:
    """Write `codes-00000.parquet` ... and, last, `manifest.json`; return the manifest.

    Args:
        folder: of the cache; it must not hold a cache already.
        batches: codes, and for each sample the columns to keep beside it (`text`, `label`, ...).
        facts: for the manifest: tokenizer, data set, versions.
        rows_per_shard: samples per file.

    Raises:
        ValueError: codes without a fingerprint (save the tokenizer first), of several code spaces, or no samples at all.
        FileExistsError: the folder holds a finished cache.
        OSError: a shard could not be written; without a manifest the folder is no cache, and the same call starts over.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise FileExistsError(
            f"{folder} holds a code cache already: use it with --codes {folder}, or choose another folder"
        )
    for stale in folder.glob("codes-*.parquet"):  # of a run that was cut off
        stale.unlink()
    rows: list[dict[str, Any]] = []
    shards: list[dict[str, Any]] = []
    first: Codes | None = None
    for codes, extras in batches:
        first = first or codes
        if codes.fingerprint is None:
            raise ValueError(
                "codes of an unsaved tokenizer cannot be cached: save the tokenizer, load it again and encode with that"
            )
        check_fingerprint(first.fingerprint, codes.fingerprint, "codes of a later batch")
        rows += [_row(sample, extra) for sample, extra in zip(codes, extras, strict=True)]
        while len(rows) >= rows_per_shard:
            shards.append(_write_shard(folder, len(shards), rows[:rows_per_shard], first.layout))
            rows = rows[rows_per_shard:]
    if first is None:
        raise ValueError("there is nothing to encode: the data set has no readable sample")
    if rows:
        shards.append(_write_shard(folder, len(shards), rows, first.layout))
    manifest = {
        "vqtok_format": FORMAT,
        "fingerprint": first.fingerprint,
        "layout": first.layout.to_dict(),
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "shards": shards,
        **facts,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


class CodeDataset(Dataset):
    """The samples of a code cache, in memory: {"codes": tuple of int64 (Q, *grid), "size": (ndim,), and the other columns}.

    A column that only some samples have is None for the others.

    Attributes:
        layout, fingerprint: of the codes.
        sizes: int64 `(num_samples, ndim)`.

    Raises:
        ValueError: no manifest, a manifest that makes no sense or is of a newer format, a shard that is missing, lies elsewhere or
            does not fit it, codes out of range or of another number than their grid has.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.layout = CodeLayout.from_dict(self.manifest["layout"])
        self.fingerprint: str = self.manifest["fingerprint"]
        self._levels: list[list[np.ndarray]] = [[] for _ in self.layout.levels]
        sizes: list[np.ndarray] = []
        self.columns: dict[str, Any] = {}
        for shard in self.manifest["shards"]:
            part = _read_shard(folder / shard["file"], shard["num_samples"], self.layout)
            before = sum(map(len, sizes))
            sizes.append(part.sizes)
            for rows, new in zip(self._levels, part.levels, strict=True):
                rows += new
            for name in dict.fromkeys((*self.columns, *part.columns)):  # a shard need not have every column
                values = part.columns.get(name, [None] * len(part.sizes))
                self.columns.setdefault(name, [None] * before).extend(values)
        self.sizes = np.concatenate(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = self.sizes[index].tolist()
        codes = tuple(
            torch.from_numpy(rows[index].astype(np.int64)).view(-1, *grid)
            for rows, grid in zip(self._levels, self.layout.grids(size), strict=True)
        )
        return {"codes": codes, "size": size, **{name: values[index] for name, values in self.columns.items()}}

    def pair(self, conditions: CodeDataset) -> None:
        """Let each sample have the sample of the same number of `conditions`, as the column "condition".

        Raises:
            ValueError: another number of samples, or captions that differ: these are not the same things.
        """
        if len(conditions) != len(self):
            raise ValueError(
                f"there are {len(self)} samples and {len(conditions)} conditions: encode the same data set with both tokenizers"
            )
        for name in ("text", "label"):
            pairs = zip(self.columns.get(name, []), conditions.columns.get(name, []), strict=False)
            for row, (mine, other) in enumerate(pairs):
                if mine != other:
                    raise ValueError(
                        f"sample {row} has the {name} {mine!r}, its condition {other!r}: encode the same data set in the same order"
                    )
        self.columns[CONDITION] = conditions

    def groups(self, by_grid: bool = True, least: int = 1) -> list[np.ndarray]:
        """Sample numbers grouped by grid, because the samples of a batch must share one.

        Args:
            by_grid: false where a batch may mix sizes. Samples of like size are then grouped, so that little of a batch is padding.
            least: samples that such a group has at least; there are at most eight.
        """
        if not by_grid:
            order = np.argsort(self.sizes.prod(axis=1), kind="stable")
            return np.array_split(order, min(8, max(1, len(order) // least)))
        padded = np.array([self.layout.padded(size) for size in self.sizes.tolist()])
        _, inverse = np.unique(padded, axis=0, return_inverse=True)
        return [np.flatnonzero(inverse.reshape(-1) == value) for value in range(inverse.max() + 1)]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a code cache.

    Raises:
        ValueError: there is none, it is of a newer format, or it makes no sense.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} is no code cache (it has no {MANIFEST}): make one with examples/encode_dataset.py")
    manifest = read_json(path)
    version = manifest.get("vqtok_format", 0)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(f"{path} has vqtok_format {version!r}, this vqtok knows {FORMAT}: upgrade vqtok")
    try:
        CodeLayout.from_dict(manifest["layout"])
        shards = [(shard["file"], shard["num_samples"]) for shard in manifest["shards"]]
        if not isinstance(manifest["fingerprint"], str) or not shards:
            raise ValueError("it names no code space or no shard")
        for file, rows in shards:
            if type(file) is not str or not file or Path(file).name != file or "\\" in file or ":" in file:
                raise ValueError(f"a shard must be a file beside it, got {file!r}")
            if type(rows) is not int or rows < 0:
                raise ValueError(f"num_samples {rows!r}")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} makes no sense ({type(error).__name__}: {error}): encode again") from None
    return manifest


def prior_collate(
    condition: Callable[[dict[str, Any]], list[int] | torch.Tensor | None],
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a collate function that makes batches for `CodePriorModel.forward` from items of `CodeDataset`.

    Args:
        condition: the condition of an item: ids (of text, a class, codes), features `(L, D)` of a text encoder, or None for a prior
            without condition.
    """

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        levels = zip(*(item["codes"] for item in items), strict=True)
        batch: dict[str, Any] = {
            "codes": tuple(_stack(level) for level in levels),
            "sizes": torch.tensor([item["size"] for item in items]),
        }
        rows = [condition(item) for item in items]
        width = next((row.shape[1] for row in rows if isinstance(row, torch.Tensor)), None)
        if width is not None:
            batch["condition_features"], batch["condition_mask"] = pad_features(rows, width)
        elif any(row is not None for row in rows):
            batch["condition_ids"], batch["condition_mask"] = pad_conditions([row or [] for row in rows])
        return batch

    return collate


def _stack(level: Sequence[Tensor]) -> Tensor:
    """Codes of one level, `(B, Q, *grid)`; of different length they are padded on the right with 0."""
    grid = [max(extents) for extents in zip(*(codes.shape[1:] for codes in level), strict=True)]
    out = level[0].new_zeros(len(level), level[0].shape[0], *grid)
    for row, codes in zip(out, level, strict=True):
        row[(slice(None), *map(slice, codes.shape[1:]))] = codes
    return out


class _Shard(NamedTuple):
    sizes: np.ndarray
    levels: list[list[np.ndarray]]
    columns: dict[str, list[Any]]


def _read_shard(path: Path, num_samples: int, layout: CodeLayout) -> _Shard:
    """A shard, checked against manifest and layout. Sizes come first: they say how many codes may follow."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    axes, levels = (
        [f"{what}_{i}" for i in range(n)] for what, n in (("size", layout.ndim), ("level", len(layout.levels)))
    )
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows != num_samples:
                raise ValueError(f"it has {file.metadata.num_rows} rows, the manifest says {num_samples}")
            _check_columns(file.schema_arrow, axes, levels)
            table = file.read(columns=axes, use_threads=False)
            sizes = np.stack([_integers(table[axis].combine_chunks(), axis) for axis in axes], 1)
            wanted = _code_counts(sizes, layout)
            # The metadata of single columns is not asked: of a damaged file pyarrow 26 ends the process there.
            table = file.read(use_threads=False)
            rows = [_codes(table[f"level_{i}"], i, wanted[i], layout) for i in range(len(levels))]
            columns = {name: table[name].to_pylist() for name in table.column_names if name not in (*axes, *levels)}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, arrow.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}): encode again") from None
    return _Shard(sizes, rows, columns)


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


def _row(sample: Codes, extra: dict[str, Any]) -> dict[str, Any]:
    row = {f"level_{i}": codes[0].reshape(-1).cpu().numpy() for i, codes in enumerate(sample.levels)}
    row |= {f"size_{axis}": n for axis, n in enumerate(sample.sizes[0].tolist())}
    return row | extra


def _write_shard(folder: Path, number: int, rows: list[dict[str, Any]], layout: CodeLayout) -> dict[str, Any]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if name.startswith("level_"):
            size = layout.levels[int(name.removeprefix("level_"))].codebook_size
            columns[name] = arrow.array(values, arrow.list_(arrow.uint16() if size <= 65_536 else arrow.uint32()))
        else:
            columns[name] = arrow.array(values)
    # Dictionary encoding stays on (the default): Parquet stores 16-bit integers in 32 bits without it.
    file = f"codes-{number:05d}.parquet"
    write_with(folder / file, lambda path: parquet.write_table(arrow.table(columns), path))
    return {"file": file, "num_samples": len(rows)}
