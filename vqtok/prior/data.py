"""The code cache: codes of a data set in Parquet shards with a manifest that ties them to the tokenizer that made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqtok.codes import CodeLayout, Codes, check_range
from vqtok.files import write_json, write_with
from vqtok.fingerprint import check_fingerprint

from .sequence import pad_conditions, pad_features

FORMAT = 1
MANIFEST = "manifest.json"
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

    Attributes:
        layout, fingerprint: of the codes.
        sizes: int64 `(num_samples, ndim)`.

    Raises:
        ValueError: no manifest, a manifest of a newer format, a shard that is missing or does not fit it, codes out of range.
    """

    def __init__(self, folder: str | Path):
        import pyarrow.parquet as parquet

        folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.layout = CodeLayout.from_dict(self.manifest["layout"])
        self.fingerprint: str = self.manifest["fingerprint"]
        self._levels: list[list[np.ndarray]] = [[] for _ in self.layout.levels]
        sizes: list[np.ndarray] = []
        self.columns: dict[str, Any] = {}
        for shard in self.manifest["shards"]:
            try:
                table = parquet.read_table(folder / shard["file"])
            except (OSError, ValueError) as error:
                raise ValueError(f"{folder / shard['file']} cannot be read ({error}): encode again") from None
            if table.num_rows != shard["num_samples"]:
                raise ValueError(
                    f"{folder / shard['file']} has {table.num_rows} rows, the manifest says {shard['num_samples']}"
                )
            sizes.append(np.stack([table[f"size_{axis}"].to_numpy() for axis in range(self.layout.ndim)], 1))
            for index, rows in enumerate(self._levels):
                column = table[f"level_{index}"].combine_chunks()
                values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
                check_range(
                    torch.from_numpy(values.astype(np.int64)),
                    self.layout.levels[index].codebook_size,
                    f"{shard['file']} level {index}",
                )
                rows += [values[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
            for name in table.column_names:
                if not name.startswith(("level_", "size_")):
                    self.columns.setdefault(name, []).extend(table[name].to_pylist())
        self.sizes = np.concatenate(sizes).astype(np.int64)

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

    def groups(self, by_grid: bool = True) -> list[np.ndarray]:
        """Sample numbers grouped by grid, because the samples of a batch must share one; with `by_grid` false, one group."""
        if not by_grid:
            return [np.arange(len(self))]
        padded = np.array([self.layout.padded(size) for size in self.sizes.tolist()])
        _, inverse = np.unique(padded, axis=0, return_inverse=True)
        return [np.flatnonzero(inverse.reshape(-1) == value) for value in range(inverse.max() + 1)]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a code cache.

    Raises:
        ValueError: there is none, or it is of a newer format.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} is no code cache (it has no {MANIFEST}): make one with examples/encode_dataset.py")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("vqtok_format", 0) > FORMAT:
        raise ValueError(
            f"{path} has vqtok_format {manifest['vqtok_format']}, this vqtok knows {FORMAT}: upgrade vqtok"
        )
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


def _row(sample: Codes, extra: dict[str, Any]) -> dict[str, Any]:
    row = {f"level_{i}": codes[0].reshape(-1).cpu().numpy() for i, codes in enumerate(sample.levels)}
    row |= {f"size_{axis}": n for axis, n in enumerate(sample.sizes[0].tolist())}
    return row | extra


def _write_shard(folder: Path, number: int, rows: list[dict[str, Any]], layout: CodeLayout) -> dict[str, Any]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    columns: dict[str, Any] = {}
    for name in rows[0]:
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
