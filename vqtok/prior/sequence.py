"""The order of codes in a sequence, as data: pure functions with exact inverses.

An order is a table over positions: which level, which codebook, which place of the grid, and at which step each code is
predicted. Everything about order is in the table; the model, training, scoring and sampling only read it.

Axis letters: B batch, Q streams of a level (codebooks, or factors of them), A grid axes, L condition tokens, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]  # (Q, *grid) of each level, coarse to fine


@dataclass(frozen=True, eq=False)
class Run:
    """The positions of one stream, which one matrix product predicts together.

    Attributes:
        level: index of the level, 0 the coarsest.
        codebook: index of the stream in its level.
        positions: where they are; a slice wherever they are evenly spaced, so that nothing is gathered.
    """

    level: int
    codebook: int
    positions: slice | Tensor


@dataclass(frozen=True, eq=False)
class OrderTable:
    """One row per position of the codes of one sample.

    Attributes:
        level_P: int64, index of the level, 0 the coarsest.
        codebook_P: int64, index of the stream in its level.
        coord_PA: int64, place in the level's own grid: row and column, or time.
        step_P: int64, never falling; positions of one step are predicted together.
        index_P: int64, where the code lies when all levels `(Q, *grid)` are flattened one after another.
        shapes: `(Q, *grid)` of each level.
        runs: the positions of each stream.
        from_runs_P: int64, where each position is when the runs are laid one after another.
    """

    level_P: Tensor
    codebook_P: Tensor
    coord_PA: Tensor
    step_P: Tensor
    index_P: Tensor
    from_runs_P: Tensor
    shapes: Shapes
    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return len(self.level_P)


@dataclass(frozen=True, eq=False)
class Places:
    """Rows of the position tables for `[begin, one size token per axis, codes in order, end]`.

    Coordinates are in units of the finest grid, so that a code and its coarse parent share them: the code at row r of a level
    whose cells cover `ratio` finest cells stands at row r * ratio. Tokens that are no codes have the rows `num_levels` and `extent`.

    Attributes:
        level_P: int64 in [0, num_levels].
        codebook_P: int64; for a size token the axis that it announces.
        coord_PA: int64 in [0, extent].
    """

    level_P: Tensor
    codebook_P: Tensor
    coord_PA: Tensor


def _flat(shapes: Shapes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Level after level, each in raster order, all codebooks of a place before the next place; one code per step."""
    levels, codebooks, coords = [], [], []
    for level, (streams, *grid) in enumerate(shapes):
        places = math.prod(grid)
        coord_NA = torch.stack(torch.meshgrid([torch.arange(n) for n in grid], indexing="ij"), -1).reshape(
            places, len(grid)
        )
        levels.append(torch.full((places * streams,), level))
        codebooks.append(torch.arange(streams).repeat(places))
        coords.append(coord_NA.repeat_interleave(streams, 0))
    level_P = torch.cat(levels)
    return level_P, torch.cat(codebooks), torch.cat(coords), torch.arange(len(level_P))


ORDERS: dict[str, Callable[[Shapes], tuple[Tensor, Tensor, Tensor, Tensor]]] = {"flat": _flat}


@lru_cache(maxsize=256)
def order_table(shapes: Shapes, order: str = "flat", device: torch.device | None = None) -> OrderTable:
    """Return the table of an order for levels of these shapes `(Q, *grid)`, coarse to fine.

    Example:
        >>> table = order_table(((1, 1, 1), (2, 1, 2)))
        >>> [tensor.tolist() for tensor in (table.level_P, table.codebook_P, table.coord_PA)]
        [[0, 1, 1, 1, 1], [0, 0, 1, 0, 1], [[0, 0], [0, 0], [0, 0], [0, 1], [0, 1]]]

    Raises:
        ValueError: an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"no order {order!r}: there is {', '.join(ORDERS)}")
    # The tables are kept and later used in training, which tensors made in inference mode cannot be.
    with torch.inference_mode(False):
        level_P, codebook_P, coord_PA, step_P = ORDERS[order](shapes)
        index_P = torch.empty_like(level_P)
        base = 0
        for level, (streams, *grid) in enumerate(shapes):
            here = (level_P == level).nonzero()[:, 0]
            weights = torch.tensor([math.prod(grid[axis + 1 :]) for axis in range(len(grid))])
            index_P[here] = base + codebook_P[here] * math.prod(grid) + (coord_PA[here] * weights).sum(1)
            base += streams * math.prod(grid)
        names = [(level, codebook) for level, (streams, *_) in enumerate(shapes) for codebook in range(streams)]
        where = [((level_P == level) & (codebook_P == codebook)).nonzero()[:, 0] for level, codebook in names]
        runs = tuple(Run(*name, _as_slice(here, device)) for name, here in zip(names, where, strict=True))
        from_runs_P = torch.cat(where).argsort()
        columns = (level_P, codebook_P, coord_PA, step_P, index_P, from_runs_P)
        level_P, codebook_P, coord_PA, step_P, index_P, from_runs_P = (tensor.to(device) for tensor in columns)
    return OrderTable(level_P, codebook_P, coord_PA, step_P, index_P, from_runs_P, shapes, runs)


def flatten(levels: Sequence[Tensor], table: OrderTable) -> Tensor:
    """Return values `(B, P)` in the table's order from levels `(B, Q, *grid)`: codes, ids, nats, anything.

    Example:
        >>> table = order_table(((1, 1), (1, 2)))
        >>> flatten([torch.tensor([[[7]]]), torch.tensor([[[8, 9]]])], table)
        tensor([[7, 8, 9]])

    Raises:
        ValueError: levels of other shapes than the table's.
    """
    shapes = tuple(tuple(values.shape[1:]) for values in levels)
    if shapes != table.shapes:
        raise ValueError(f"levels have the shapes {shapes}, the order was made for {table.shapes}")
    return torch.cat([values.flatten(1) for values in levels], 1)[:, table.index_P]


def unflatten(values_BP: Tensor, table: OrderTable) -> tuple[Tensor, ...]:
    """Return levels `(B, Q, *grid)` from values in the table's order: the exact inverse of `flatten`.

    Raises:
        ValueError: another number of positions than the table's.
    """
    if values_BP.ndim != 2 or values_BP.shape[1] != len(table):
        raise ValueError(f"values must have shape (B, {len(table)}), got {tuple(values_BP.shape)}")
    storage_BP = torch.empty_like(values_BP)
    storage_BP[:, table.index_P] = values_BP
    parts = storage_BP.split([math.prod(shape) for shape in table.shapes], 1)
    return tuple(part.unflatten(1, shape) for part, shape in zip(parts, table.shapes, strict=True))


@lru_cache(maxsize=256)
def places(
    shapes: Shapes, ratios: tuple[int, ...], extent: int, order: str = "flat", device: torch.device | None = None
) -> Places:
    """Return the rows of the position tables for a sequence of these levels.

    Args:
        shapes: `(Q, *grid)` of each level.
        ratios: how many cells of the finest grid one cell of each level covers along an axis.
        extent: cells of the largest finest grid along an axis; the row that stands for no place.
    """
    table, num_levels, axes = order_table(shapes, order), len(shapes), len(shapes[0]) - 1
    with torch.inference_mode(False):
        nowhere_PA = torch.full((1 + axes, axes), extent)
        levels = [torch.full((1 + axes,), num_levels), table.level_P, torch.tensor([num_levels])]
        codebooks = [torch.tensor([0, *range(axes)]), table.codebook_P, torch.tensor([0])]
        coords = [nowhere_PA, table.coord_PA * torch.tensor(ratios)[table.level_P, None], nowhere_PA[:1]]
        return Places(*(torch.cat(parts).to(device) for parts in (levels, codebooks, coords)))


def pad_conditions(conditions: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and mask `(B, L)`, padded on the LEFT to the longest condition, so that all codes begin in one column.

    Example:
        >>> pad_conditions([[5, 6, 7], [8]])
        (tensor([[5, 6, 7],
                [0, 0, 8]]), tensor([[ True,  True,  True],
                [False, False,  True]]))
    """
    longest = max(len(ids) for ids in conditions)
    ids_BL = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in conditions], dtype=torch.int64)
    lengths_B = torch.tensor([len(ids) for ids in conditions])
    return ids_BL, torch.arange(longest) >= longest - lengths_B[:, None]


def replace_conditions(ids_BL: Tensor, mask_BL: Tensor, dropped_B: Tensor, null_id: int) -> tuple[Tensor, Tensor]:
    """Return the conditions with those of the rows `dropped_B` replaced by the one token `null_id`, left-padded."""
    alone_L = torch.arange(ids_BL.shape[1], device=ids_BL.device) == ids_BL.shape[1] - 1
    return (
        torch.where(dropped_B[:, None], null_id, ids_BL),
        torch.where(dropped_B[:, None], alone_L, mask_BL),
    )


def _as_slice(positions_N: Tensor, device: torch.device | None) -> slice | Tensor:
    first, last = int(positions_N[0]), int(positions_N[-1])
    step = int(positions_N[1]) - first if len(positions_N) > 1 else 1
    even = torch.arange(first, last + 1, step)
    return slice(first, last + 1, step) if torch.equal(even, positions_N) else positions_N.to(device)
