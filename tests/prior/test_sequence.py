"""The order of codes against a slow obvious twin, and its exact inverse on random shapes."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqtok.prior.sequence import (
    ORDERS,
    PARALLEL,
    Windows,
    check_order,
    flatten,
    order_table,
    pad_conditions,
    pad_features,
    replace_conditions,
    unflatten,
)  # fmt: skip


def slow_places(shapes, time_major):
    """(level, place) in order, by plain loops: level after level, or all levels of a coarse frame before the next frame."""
    if not time_major:
        return [(level, at) for level, (_, *grid) in enumerate(shapes) for at in itertools.product(*map(range, grid))]
    out = []
    for frame in range(shapes[0][1]):
        for level, (_, length) in enumerate(shapes):
            ratio = length // shapes[0][1]
            out += [(level, (frame * ratio + i,)) for i in range(ratio)]
    return out


def slow_order(shapes, order, time_major=False):
    """(step, level, codebook, place) of every code, in the order of the definition."""
    rows, places = [], slow_places(shapes, time_major)
    for index, (level, at) in enumerate(places):
        for q in range(shapes[level][0]):
            if order == "flat":
                step = len(rows)
            elif order == "depth":
                step = index
            elif order == "next_scale":
                step = level
            elif order == "parallel":
                step = 0
            else:  # delay: codebook q of place n is predicted q steps after codebook 0 of it; levels follow each other
                step = index + q + sum(shapes[before][0] - 1 for before in range(level))
            rows.append((step, level, q, at))
    if order == "delay":
        return sorted(rows, key=lambda row: (row[0], row[2]))
    return sorted(rows, key=lambda row: row[0])


def slow_units(shapes, order, rows):
    """For each unit (what it predicts, what it is made of), as sets of (level, codebook, place)."""
    steps = [{row[1:] for row in rows if row[0] == step} for step in range(rows[-1][0] + 1)]
    if order in ("flat", "delay", "depth"):
        return [(step, steps[index - 1] if index else set()) for index, step in enumerate(steps)]
    if order == "parallel":
        return [({row[1:]}, {row[1:]}) for row in rows]
    units = []
    for _, level, q, at in rows:
        parents = set()
        for coarser in range(level):
            ratio = [fine // coarse for fine, coarse in zip(shapes[level][1:], shapes[coarser][1:], strict=True)]
            place = tuple(n // r for n, r in zip(at, ratio, strict=True))
            parents |= {(coarser, p, place) for p in range(shapes[coarser][0])}
        units.append(({(level, q, at)}, parents))
    return units


@st.composite
def levels_of_codes(draw):
    ndim, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    grid = [draw(st.integers(1, 3)) for _ in range(ndim)]
    ratios = sorted(draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3)))
    shapes = [(batch, draw(st.integers(1, 3)), *(n * ratio for n in grid)) for ratio in ratios]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return [torch.randint(1000, shape, generator=generator) for shape in shapes]


def orders_of(shapes):
    """Every order that these shapes can have."""
    axes, streams = len(shapes[0]) - 1, [shape[0] for shape in shapes]
    found = []
    for order, time_major in itertools.product((*ORDERS, PARALLEL), (False, True)):
        with contextlib.suppress(ValueError):
            check_order(order, streams, axes, time_major)
            found.append((order, time_major))
    return found


@settings(max_examples=80, deadline=None)
@given(levels_of_codes())
def test_every_order_is_its_slow_twin(levels):
    shapes = tuple(tuple(values.shape[1:]) for values in levels)
    for order, time_major in orders_of(shapes):
        table = order_table(shapes, order, time_major)
        rows = slow_order(shapes, order, time_major)
        columns = zip(table.step_P.tolist(), table.level_P.tolist(), table.codebook_P.tolist(), strict=True)
        found = [(*row, tuple(at)) for row, at in zip(columns, table.coord_PA.tolist(), strict=True)]
        assert found == rows, (order, time_major)
        names = [row[1:] for row in rows]
        units = slow_units(shapes, order, rows)
        assert len(units) == len(table.step_U) == len(table.sources_US)
        for unit, (targets, sources) in enumerate(units):
            assert {names[p] for p in (table.unit_P == unit).nonzero()[:, 0].tolist()} == targets
            there = [p for p in table.sources_US[unit].tolist() if p < len(table)]
            assert {names[p] for p in there} == sources and len(there) == len(sources)


@settings(max_examples=60, deadline=None)
@given(levels_of_codes())
def test_flatten_takes_codes_in_the_order_and_unflatten_is_its_inverse(levels):
    shapes = tuple(tuple(values.shape[1:]) for values in levels)
    for order, time_major in orders_of(shapes):
        table = order_table(shapes, order, time_major)
        values_BP = flatten(levels, table)
        for p, (_, level, q, at) in enumerate(slow_order(shapes, order, time_major)):
            assert torch.equal(values_BP[:, p], levels[level][(slice(None), q, *at)])
        back = unflatten(values_BP, table)
        assert all(torch.equal(a, b) for a, b in zip(levels, back, strict=True))
        again = flatten(unflatten(values_BP.flip(0), table), table)
        assert torch.equal(again, values_BP.flip(0))
        assert sorted(table.index_P.tolist()) == list(range(len(table)))


@settings(max_examples=40, deadline=None)
@given(levels_of_codes())
def test_a_unit_is_made_of_earlier_steps_and_steps_cover_everything_once(levels):
    shapes = tuple(tuple(values.shape[1:]) for values in levels)
    for order, time_major in orders_of(shapes):
        table = order_table(shapes, order, time_major)
        step_P = torch.cat([table.step_P, torch.tensor([-1])])
        if order != PARALLEL:
            assert (step_P[table.sources_US] < table.step_U[:, None]).all()
        assert (table.step_P.diff() >= 0).all() and (table.step_U.diff() >= 0).all()
        positions, units = torch.arange(len(table)), torch.arange(len(table.step_U))
        assert torch.equal(torch.cat([positions[step.positions] for step in table.steps]), positions)
        assert torch.equal(torch.cat([units[step.units] for step in table.steps]), units)
        for step in table.steps:
            inside = torch.cat([positions[run.positions] for run in step.runs])
            assert sorted(inside.tolist()) == positions[step.positions].tolist()
            for run in step.runs:
                here = positions[run.positions]
                assert (table.level_P[here] == run.level).all() and (table.codebook_P[here] == run.codebook).all()
                assert torch.equal(units[step.units][run.units].expand(len(here)), table.unit_P[here])
            assert step.has_gaps == bool((table.sources_US[step.units] == len(table)).any())
            if time_major and step.frame is not None:
                first = step.runs[0]
                assert (first.level, first.codebook) == (0, 0)
                assert table.coord_PA[positions[first.positions], 0].tolist() == [step.frame]
        if time_major:
            assert [step.frame for step in table.steps if step.frame is not None] == list(range(shapes[0][1]))


def test_frame_by_frame_nothing_depends_on_the_length():
    """What a unit of a time series is does not change when the series goes on, so that a shorter one is its beginning."""
    for order, streams in (("flat", (1, 2)), ("depth", (1, 2)), ("delay", (3,))):
        short, long = (
            order_table(tuple((q, n * 2**level) for level, q in enumerate(streams)), order, True) for n in (3, 5)
        )
        kept = len(short.step_U) - (2 if order == "delay" else 0)  # the last delayed steps lack later places
        most = int((short.unit_P < kept).sum())
        for name in ("level_P", "codebook_P", "coord_PA", "step_P", "frame_P"):
            assert torch.equal(getattr(short, name)[:most], getattr(long, name)[:most]), (order, name)


@settings(max_examples=60, deadline=None)
@given(levels_of_codes())
def test_runs_cover_every_position_once_with_slices(levels):
    table = order_table(tuple(tuple(values.shape[1:]) for values in levels))
    positions = torch.arange(len(table))
    parts = [positions[run.positions] for run in table.runs]
    assert torch.equal(torch.cat(parts)[table.from_runs_P], positions)
    for run, part in zip(table.runs, parts, strict=True):
        assert isinstance(run.positions, slice), "the flat order needs no gathering"
        assert (table.level_P[part] == run.level).all() and (table.codebook_P[part] == run.codebook).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.integers(1, 40), st.data())
def test_windows_predict_every_unit_once_with_enough_before_it(length, units, data):
    hop = data.draw(st.integers(1, length - 1))
    windows = Windows(length, hop)
    starts = windows.starts(units)
    predicted = [[unit for unit in range(units) if windows.of_unit(unit) == start] for start in starts]
    assert sorted(itertools.chain(*predicted)) == list(range(units)) and all(predicted)
    for start, mine in zip(starts, predicted, strict=True):
        assert start % hop == 0 and start <= mine[0] and mine[-1] < start + length
        assert start == 0 or mine[0] - start >= length - hop


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        table = order_table(((1, 3, 5),))
    weight = torch.ones(15, 2, requires_grad=True)
    torch.nn.functional.embedding(table.index_P, weight).sum().backward()
    assert weight.grad.sum() == 30


def test_conditions_are_padded_left_and_replaced_whole():
    ids, mask = pad_conditions([[5, 6, 7], [8]])
    vectors = torch.stack([ids, -ids], 2)
    new, new_mask = replace_conditions(vectors, mask, torch.tensor([True, False]), torch.tensor([99, 77]))
    assert new.tolist() == [[[99, 77]] * 3, [[0, 0], [0, 0], [8, -8]]]
    assert new_mask.tolist() == [[False, False, True], [False, False, True]]
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]], "the caller's tensors stay"
    features, mask = pad_features([torch.ones(1, 2), None, torch.full((3, 2), 7.0)], 2)
    assert features[..., 1].tolist() == [[0, 0, 1], [0, 0, 0], [7, 7, 7]]
    assert mask.tolist() == [[False, False, True], [False] * 3, [True] * 3]
    assert pad_features([None], 4)[0].shape == (1, 1, 4), "a batch without a condition has room for the null one"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no order 'zigzag'"):
        order_table(((1, 2, 2),), "zigzag")
    for order, shapes, time_major, message in (
        ("delay", ((1, 4), (1, 8)), False, "for residual codebooks"),
        ("depth", ((1, 2, 2),), False, "for residual codebooks"),
        ("next_scale", ((2, 4),), False, "only one"),
        ("flat", ((1, 2, 2),), True, "not 2 axes"),
        ("next_scale", ((1, 2), (1, 4)), True, "in the order 'next_scale'"),
        ("delay", ((2, 2), (2, 4)), True, "takes one level"),
    ):
        with pytest.raises(ValueError, match=message):
            order_table(shapes, order, time_major)
    table = order_table(((1, 2, 2),))
    with pytest.raises(ValueError, match=r"\(\(1, 2, 3\),\)"):
        flatten([torch.zeros(1, 1, 2, 3)], table)
    with pytest.raises(ValueError, match=r"\(B, 4\)"):
        unflatten(torch.zeros(1, 5), table)
