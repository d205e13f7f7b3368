"""The code cache: codes of a data set in Parquet shards with a manifest that ties them to the tokenizer that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqtok.codes import CodeLayout, Codes
from vqtok.files import read_json, write_json
from vqtok.fingerprint import check_fingerprint

from .sequence import pad_conditions, pad_features
from .shards import MappedShard, Shard, code_row, read_shard, write_shard

FORMAT = 1
MANIFEST = "manifest.json"
_CHECKED_AT_ONCE = 1 << 28  # bytes of a cache that is checked as a whole when it is opened
_MAPPED_AT_ONCE = 256
CONDITION = "condition"  # the column of a sample's condition, where that is a sample of another code cache


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
        rows += [code_row(sample, extra) for sample, extra in zip(codes, extras, strict=True)]
        while len(rows) >= rows_per_shard:
            shards.append(write_shard(folder, shard_name(len(shards)), rows[:rows_per_shard], first.layout))
            rows = rows[rows_per_shard:]
    if first is None:
        raise ValueError("there is nothing to encode: the data set has no readable sample")
    if rows:
        shards.append(write_shard(folder, shard_name(len(shards)), rows, first.layout))
    assert first.fingerprint is not None
    return write_manifest(folder, first.fingerprint, first.layout, shards, facts)


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"codes-{number:05d}.parquet"


def write_manifest(
    folder: Path, fingerprint: str, layout: CodeLayout, shards: list[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write `manifest.json`, which makes a folder of shards a code cache, and return it.

    Raises:
        OSError: it could not be written.
    """
    manifest = {
        "vqtok_format": FORMAT,
        "fingerprint": fingerprint,
        "layout": layout.to_dict(),
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "shards": shards,
        **facts,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


class CodeDataset(Dataset):
    """The samples of a code cache: {"codes": tuple of int64 (Q, *grid), "size": (ndim,), and the other columns}.

    The codes stay on the disk and are mapped into memory where they are used; shards of older caches, in which they cannot be, are
    read whole. A shard is checked when it is first touched: all of them now where they are small together. A column that only some
    samples have is None for the others.

    Attributes:
        layout, fingerprint: of the codes.
        sizes: int64 `(num_samples, ndim)`.
        columns: sequences of the other columns' cells, read where they are asked for.

    Raises:
        ValueError: no manifest, a manifest that makes no sense or is of a newer format, a shard that is missing, lies elsewhere or
            does not fit it, codes out of range or of another number than their grid has.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.layout = CodeLayout.from_dict(self.manifest["layout"])
        self.fingerprint: str = self.manifest["fingerprint"]
        entries = self.manifest["shards"]
        self._shards: list[MappedShard | Shard] = [_open_shard(folder, entry, self.layout) for entry in entries]
        self._firsts = np.cumsum([0, *(entry["num_samples"] for entry in entries)])
        self._mapped: dict[int, MappedShard] = {}  # those in use, the latest last
        if (
            sum(shard.entry["num_bytes"] for shard in self._shards if isinstance(shard, MappedShard))
            <= _CHECKED_AT_ONCE
        ):
            for number in range(len(self._shards)):
                self._shard(number)
        self.sizes = _joined([shard.sizes for shard in self._shards])
        names = [shard.columns for shard in self._shards]
        self.columns: dict[str, Any] = {name: Column(self, name) for own in names for name in own}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = self._find(index)
        size = self.sizes[index].tolist()
        codes = tuple(
            torch.from_numpy(_flat(shard, level, row).astype(np.int64)).view(-1, *grid)
            for level, grid in enumerate(self.layout.grids(size))
        )
        return {"codes": codes, "size": size, **{name: values[index] for name, values in self.columns.items()}}

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the files itself: what is mapped here would be sent to it.
        for shard in self._mapped.values():
            shard.close()
        return {**self.__dict__, "_mapped": {}}

    @property
    def distinct_sizes(self) -> list[list[int]]:
        """The sizes there are, each once."""
        if self.sizes.strides[0] == 0:
            return self.sizes[:1].tolist()
        return np.unique(self.sizes, axis=0).tolist()

    def cell(self, name: str, index: int) -> Any:
        """One cell of another column, None where there is none."""
        shard, row = self._find(index)
        if isinstance(shard, MappedShard):
            return shard.cell(name, row)
        return shard.columns[name][row] if name in shard.columns else None

    def _find(self, index: int) -> tuple[MappedShard | Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._shard(number), int(index - self._firsts[number])

    def _shard(self, number: int) -> MappedShard | Shard:
        """A shard, ready for use; of too many that are mapped the one used longest ago is closed."""
        shard = self._shards[number]
        if isinstance(shard, MappedShard):
            self._mapped.pop(number, None)
            self._mapped[number] = shard
            shard.touch()
            if len(self._mapped) > _MAPPED_AT_ONCE:
                self._mapped.pop(next(iter(self._mapped))).close()
        return shard

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


class Column(Sequence[Any]):
    """The cells of one column of a code cache, read where they are asked for."""

    def __init__(self, data: CodeDataset, name: str):
        self._data, self._name = data, name

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._data.cell(self._name, index + len(self) if index < 0 else index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, Column)) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _open_shard(folder: Path, entry: dict[str, Any], layout: CodeLayout) -> MappedShard | Shard:
    path = folder / entry["file"]
    if entry.get("ends") is None:
        return read_shard(path, entry["num_samples"], layout)
    return MappedShard(path, entry, layout)


def _flat(shard: MappedShard | Shard, level: int, row: int) -> np.ndarray:
    return shard.level(level, row) if isinstance(shard, MappedShard) else shard.levels[level][row]


def _joined(sizes: list[np.ndarray]) -> np.ndarray:
    """All sizes below each other; where all are alike, one row seen many times."""
    alike = all(part.strides[0] == 0 and (part[:1] == sizes[0][:1]).all() for part in sizes)
    if not alike:
        return np.concatenate(sizes)
    return np.broadcast_to(sizes[0][0], (sum(map(len, sizes)), sizes[0].shape[1]))


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
