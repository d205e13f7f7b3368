"""The order of codes in a sequence, as data: pure functions with exact inverses.

An order is a table over positions (codes) and units (input vectors of the transformer). It says which level, codebook and place
each position is, which unit predicts it, which codes are summed into the input of each unit, and which units are computed
together in one step. Everything about order is in the table; the model, training, scoring and sampling only read it.

    order        a unit predicts                     from the codes of          steps
    flat         one code                            the code before            one per code
    delay        codebook q of place t - q, all q    the unit before            places + Q - 1 of each level
    depth        the Q codes of a place (by a small  the place before           one per place
                 net over q)
    next_scale   the codes of one place, with all    its parents in all         one per level
                 other places of the level           coarser levels
    parallel     the codes of one place, with all    itself, where visible      one (masked decoding repeats it)

Sources: flat and time-major as in VALL-E and SNAC's users; delay: MusicGen (Copet et al. 2023, section 2.2); depth: RQ-Transformer (Lee et
al. 2022); next scale: VAR (Tian et al. 2024); parallel: MaskGIT (Chang et al. 2022).

Axis letters: B batch, Q streams of a level (codebooks, or factors of them), A grid axes, N places, P positions, U units, S sources
of a unit, L condition tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]  # (Q, *grid) of each level, coarse to fine

# In the first three a unit follows the codes that it is made of; in the others it stands at the place that it predicts.
SHIFTED = ("flat", "delay", "depth")
ORDERS = (*SHIFTED, "next_scale")
PARALLEL = "parallel"


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
class StepRun(Run):
    """The positions of one stream in one step.

    Attributes:
        units: the units that predict them, counted from the first of the step.
    """

    units: slice | Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """What one pass of sampling predicts.

    Attributes:
        number: of the step.
        units, positions: slices of the table's.
        runs: the positions of each stream.
        frame: the coarse frame of a time series that begins here, None elsewhere.
        has_gaps: whether units of the step have fewer sources than the table has room for.
    """

    number: int
    units: slice
    positions: slice
    runs: tuple[StepRun, ...]
    frame: int | None
    has_gaps: bool


@dataclass(frozen=True, eq=False)
class OrderTable:
    """One row per position of the codes of one sample, in the order in which they are predicted, and one per unit.

    Attributes:
        level_P: int64, index of the level, 0 the coarsest.
        codebook_P: int64, index of the stream in its level.
        coord_PA: int64, place in the level's own grid: row and column, or time.
        step_P: int64, never falling; positions of one step are predicted together.
        frame_P: int64, the cell of the coarsest grid (of its first axis) that each position lies in.
        index_P: int64, where the code lies when all levels `(Q, *grid)` are flattened one after another.
        unit_P: int64, the unit that predicts each position.
        sources_US: int64, the positions whose codes make the input of each unit; P where there are fewer.
        step_U: int64, the step of each unit; a unit sees the units of its own and of earlier steps.
        shifted: whether units follow the codes that they are made of. Unit 0 is then the last token before the codes.
        shapes: `(Q, *grid)` of each level.
        runs: the positions of each stream.
        from_runs_P: int64, where each position is when the runs are laid one after another.
    """

    level_P: Tensor
    codebook_P: Tensor
    coord_PA: Tensor
    step_P: Tensor
    frame_P: Tensor
    index_P: Tensor
    unit_P: Tensor
    sources_US: Tensor
    step_U: Tensor
    from_runs_P: Tensor
    shifted: bool
    shapes: Shapes
    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return len(self.level_P)

    @cached_property
    def has_gaps(self) -> bool:
        """Whether units, but for unit 0 of a shifted order, have fewer sources than there is room for."""
        return bool((self.sources_US[int(self.shifted) :] == len(self)).any())

    @cached_property
    def frame_starts(self) -> Tensor:
        """int64 `(frames,)`, the unit that predicts the first code of each coarse frame of a time series, laid out frame by frame."""
        return self.unit_P[(self.level_P == 0) & (self.codebook_P == 0)]

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """What each pass of sampling predicts. Training does without, so it is made when it is first asked for."""
        with torch.inference_mode(False):
            return _split_steps(self)


@lru_cache(maxsize=256)
def order_table(
    shapes: Shapes, order: str = "flat", time_major: bool = False, device: torch.device | None = None
) -> OrderTable:
    """Return the table of an order for levels of these shapes `(Q, *grid)`, coarse to fine.

    Args:
        shapes: of all levels that are predicted.
        order: one of `ORDERS`, or `PARALLEL`.
        time_major: interleave the levels of a time series, coarse frame by coarse frame, instead of level after level. What stands at
            a position then does not depend on the length.

    Example:
        >>> table = order_table(((1, 1, 1), (2, 1, 2)))
        >>> [tensor.tolist() for tensor in (table.level_P, table.codebook_P, table.coord_PA)]
        [[0, 1, 1, 1, 1], [0, 0, 1, 0, 1], [[0, 0], [0, 0], [0, 0], [0, 1], [0, 1]]]
        >>> table = order_table(((3, 4),), "delay")
        >>> [list(zip(table.codebook_P.tolist(), table.coord_PA[:, 0].tolist()))[a:b] for a, b in ((0, 1), (1, 3), (3, 6))]
        [[(0, 0)], [(0, 1), (1, 0)], [(0, 2), (1, 1), (2, 0)]]

    Raises:
        ValueError: an order that these shapes cannot have; see `check_order`.
    """
    check_order(order, tuple(shape[0] for shape in shapes), len(shapes[0]) - 1, time_major)
    # The tables are kept and later used in training, which tensors made in inference mode cannot be.
    with torch.inference_mode(False):
        level_P, codebook_P, coord_PA, place_P = _positions(shapes, time_major)
        step_P = _steps(order, shapes, level_P, codebook_P, place_P)
        # Of a delayed step codebook 0 comes first, so that what begins a frame is found at the front.
        within_P = codebook_P if order == "delay" else torch.zeros_like(codebook_P)
        by_step = (step_P * (int(codebook_P.max()) + 1) + within_P).argsort(stable=True)
        level_P, codebook_P, coord_PA, step_P = (x[by_step] for x in (level_P, codebook_P, coord_PA, step_P))
        index_P = _storage_index(shapes, level_P, codebook_P, coord_PA)
        shifted = order in SHIFTED
        unit_P = step_P if shifted else torch.arange(len(level_P))
        step_U = torch.arange(int(step_P[-1]) + 1) if shifted else step_P
        if shifted:
            sources_US = _before(step_P)
        elif order == PARALLEL:
            sources_US = unit_P[:, None]
        else:
            sources_US = _parents(shapes, level_P, coord_PA, index_P)
        first_axis = torch.tensor([shape[1] // shapes[0][1] for shape in shapes])
        frame_P = coord_PA[:, 0] // first_axis[level_P]
        names = [(level, codebook) for level, (streams, *_) in enumerate(shapes) for codebook in range(streams)]
        where = [((level_P == level) & (codebook_P == codebook)).nonzero()[:, 0] for level, codebook in names]
        runs = tuple(Run(*name, as_slice(here, device)) for name, here in zip(names, where, strict=True))
        from_runs_P = torch.cat(where).argsort()
        columns = (level_P, codebook_P, coord_PA, step_P, frame_P, index_P, unit_P, sources_US, step_U, from_runs_P)
        level_P, codebook_P, coord_PA, step_P, frame_P, index_P, unit_P, sources_US, step_U, from_runs_P = (
            tensor.to(device) for tensor in columns
        )
        return OrderTable(
            level_P, codebook_P, coord_PA, step_P, frame_P, index_P, unit_P, sources_US, step_U, from_runs_P, shifted, shapes, runs,
        )  # fmt: skip


def check_order(order: str, streams: Sequence[int], ndim: int, time_major: bool = False) -> None:
    """Refuse an order that codes of this form cannot have.

    Args:
        streams: Q of each level.
        ndim: grid axes.

    Raises:
        ValueError: an unknown order, or one that needs residual codebooks, several levels, or a time series.
    """
    if order not in (*ORDERS, PARALLEL):
        raise ValueError(f"no order {order!r}: there is {', '.join(ORDERS)}")
    if order in ("delay", "depth") and max(streams) == 1:
        raise ValueError(f"order {order!r} is for residual codebooks, and every level here has one: use 'flat'")
    if order == "next_scale" and len(streams) == 1:
        raise ValueError("order 'next_scale' predicts level after level, and here is only one: use 'flat'")
    if time_major and (ndim != 1 or order not in SHIFTED):
        raise ValueError(
            f"only time series in the orders {', '.join(SHIFTED)} can be laid out frame by frame and end by themselves, "
            f"not {ndim} axes in the order {order!r}"
        )
    if time_major and order == "delay" and len(streams) > 1:
        raise ValueError("order 'delay' frame by frame takes one level: use 'depth' or 'flat' for several")


def _positions(shapes: Shapes, time_major: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Level, codebook, coordinates and place number of every position, all codebooks of a place before the next place."""
    levels, coords = [], []
    for level, (_, *grid) in enumerate(shapes):
        coord_NA = torch.stack(torch.meshgrid([torch.arange(n) for n in grid], indexing="ij"), -1).reshape(
            -1, len(grid)
        )
        coords.append(coord_NA)
        levels.append(torch.full((len(coord_NA),), level))
    level_N, coord_NA = torch.cat(levels), torch.cat(coords)
    if time_major:
        per_frame = torch.tensor([shape[1] // shapes[0][1] for shape in shapes])
        frame_first = (coord_NA[:, 0] // per_frame[level_N]).argsort(stable=True)
        level_N, coord_NA = level_N[frame_first], coord_NA[frame_first]
    streams_N = torch.tensor([shape[0] for shape in shapes])[level_N]
    place_P = torch.arange(len(level_N)).repeat_interleave(streams_N)
    codebook_P = torch.arange(len(place_P)) - (streams_N.cumsum(0) - streams_N)[place_P]
    return level_N[place_P], codebook_P, coord_NA[place_P], place_P


def _steps(order: str, shapes: Shapes, level_P: Tensor, codebook_P: Tensor, place_P: Tensor) -> Tensor:
    if order == "flat":
        return torch.arange(len(level_P))
    if order == "depth":
        return place_P
    if order == "delay":
        # Each level needs Q - 1 more steps than places, and the next one begins after them.
        extra = torch.tensor([0, *(shape[0] - 1 for shape in shapes)]).cumsum(0)
        return place_P + codebook_P + extra[level_P]
    return level_P.clone() if order == "next_scale" else torch.zeros_like(level_P)


def _storage_index(shapes: Shapes, level_P: Tensor, codebook_P: Tensor, coord_PA: Tensor) -> Tensor:
    index_P, base = torch.empty_like(level_P), 0
    for level, (streams, *grid) in enumerate(shapes):
        here = level_P == level
        weights = torch.tensor([math.prod(grid[axis + 1 :]) for axis in range(len(grid))])
        index_P[here] = base + codebook_P[here] * math.prod(grid) + (coord_PA[here] * weights).sum(1)
        base += streams * math.prod(grid)
    return index_P


def _before(step_P: Tensor) -> Tensor:
    """The positions of the step before each unit, `(U, S)`."""
    counts_U = torch.bincount(step_P)
    first_U = counts_U.cumsum(0) - counts_U
    column_S = torch.arange(int(counts_U.max()))
    sources_US = torch.where(column_S < counts_U[:, None], first_U[:, None] + column_S, len(step_P))
    return torch.cat([torch.full_like(sources_US[:1], len(step_P)), sources_US[:-1]])


def _parents(shapes: Shapes, level_P: Tensor, coord_PA: Tensor, index_P: Tensor) -> Tensor:
    """For each position the positions of the cells of all coarser levels that it lies in, all their codebooks, `(P, S)`."""
    num = len(level_P)
    position_of_index = torch.empty_like(index_P)
    position_of_index[index_P] = torch.arange(num)
    columns = []
    for level, (streams, *grid) in enumerate(shapes[:-1]):
        ratios = torch.tensor([[other[1 + a] // grid[a] for a in range(len(grid))] for other in shapes])
        parent_PA = torch.where((level_P > level)[:, None], coord_PA // ratios[level_P].clamp(min=1), 0)
        for codebook in range(streams):
            wanted = _storage_index(
                shapes, torch.full_like(level_P, level), torch.full_like(level_P, codebook), parent_PA
            )
            columns.append(torch.where(level_P > level, position_of_index[wanted], num))
    return torch.stack(columns, 1)


def _split_steps(table: OrderTable) -> tuple[Step, ...]:
    device, num = table.level_P.device, len(table)
    columns = (
        table.level_P,
        table.codebook_P,
        table.step_P,
        table.unit_P,
        table.step_U,
        table.frame_P,
        table.sources_US,
    )
    level_P, codebook_P, step_P, unit_P, step_U, frame_P, sources_US = (column.cpu() for column in columns)
    position_ends = torch.bincount(step_P).cumsum(0).tolist()
    unit_ends = torch.bincount(step_U).cumsum(0).tolist()
    gaps_U = (sources_US == num).any(1).tolist()
    names, frames = list(zip(level_P.tolist(), codebook_P.tolist(), strict=True)), frame_P.tolist()
    unit_of: list[int] = unit_P.tolist()
    steps: list[Step] = []
    first = first_unit = 0
    for end, unit_end in zip(position_ends, unit_ends, strict=True):
        groups: dict[tuple[int, int], list[int]] = {}
        for position in range(first, end):
            groups.setdefault(names[position], []).append(position)
        runs = tuple(
            StepRun(
                *name,
                as_slice(torch.tensor(here), device),
                as_slice(torch.tensor([unit_of[at] - first_unit for at in here]), device),
            )
            for name, here in groups.items()
        )
        # Level 0, codebook 0 comes first in its frame.
        starts = [frames[position] for position in range(first, end) if names[position] == (0, 0)]
        frame, gaps = starts[0] if starts else None, any(gaps_U[first_unit:unit_end])
        steps.append(Step(len(steps), slice(first_unit, unit_end), slice(first, end), runs, frame, gaps))
        first, first_unit = end, unit_end
    return tuple(steps)


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


@dataclass(frozen=True)
class Windows:
    """Windows over the units of a sequence that is longer than the context: each of `length` units, starting `hop` apart.

    A unit is predicted in the first window that holds it, so that it has at least `length - hop` units before it, or all of them.

    Example:
        >>> windows = Windows(length=4, hop=2)
        >>> [windows.of_unit(unit) for unit in range(9)], windows.starts(9)
        ([0, 0, 0, 0, 2, 2, 4, 4, 6], [0, 2, 4, 6])
    """

    length: int
    hop: int

    def of_unit(self, unit: int) -> int:
        """The first unit of the window that predicts `unit`."""
        return 0 if unit < self.length else -(-(unit - self.length + 1) // self.hop) * self.hop

    def starts(self, units: int) -> list[int]:
        """The first units of all windows of a sequence."""
        return list(range(0, self.of_unit(units - 1) + 1, self.hop))


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


def pad_features(rows: Sequence[Tensor | None], width: int) -> tuple[Tensor, Tensor]:
    """Return float32 features `(B, L, width)` and mask `(B, L)` as `pad_conditions` does, of rows `(L, width)` or None."""
    lengths = [0 if row is None else len(row) for row in rows]
    longest = max(1, *lengths)
    features_BLD = torch.zeros(len(rows), longest, width)
    for row, length, out_LD in zip(rows, lengths, features_BLD, strict=True):
        if row is not None:
            out_LD[longest - length :] = row
    return features_BLD, torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]


def replace_conditions(x_BLM: Tensor, mask_BL: Tensor, dropped_B: Tensor, null_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the conditions with those of the rows `dropped_B` replaced by the one vector `null_M`, left-padded."""
    alone_L = torch.arange(mask_BL.shape[1], device=mask_BL.device) == mask_BL.shape[1] - 1
    x_BLM = torch.where(dropped_B[:, None, None], null_M.to(x_BLM.dtype), x_BLM)
    return x_BLM, torch.where(dropped_B[:, None], alone_L, mask_BL)


def as_slice(positions_N: Tensor, device: torch.device | None) -> slice | Tensor:
    """Evenly spaced numbers as a slice, others as they are."""
    first, last = int(positions_N[0]), int(positions_N[-1])
    step = int(positions_N[1]) - first if len(positions_N) > 1 else 1
    even = torch.arange(first, last + 1, step)
    return slice(first, last + 1, step) if torch.equal(even, positions_N) else positions_N.to(device)
