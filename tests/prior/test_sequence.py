"""The order of codes against a slow obvious twin, and its exact inverse on random shapes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqtok.prior.sequence import (
    flatten,
    order_table,
    pad_conditions,
    pad_features,
    replace_conditions,
    unflatten,
)  # fmt: skip


def slow_flat(levels):
    """The flat order in plain loops and float64: level, then raster place, then codebook."""
    out = []
    for values in levels:
        rows = []
        for sample in values:
            streams, grid = sample.shape[0], sample.shape[1:]
            rows.append(
                [float(sample[(q, *place)]) for place in itertools.product(*map(range, grid)) for q in range(streams)]
            )
        out.append(torch.tensor(rows, dtype=torch.float64))
    return torch.cat(out, 1)


@st.composite
def levels_of_codes(draw):
    ndim, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    grid = [draw(st.integers(1, 3)) for _ in range(ndim)]
    ratios = sorted(draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3)))
    shapes = [(batch, draw(st.integers(1, 3)), *(n * ratio for n in grid)) for ratio in ratios]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return [torch.randint(1000, shape, generator=generator) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(levels_of_codes())
def test_flatten_is_the_slow_order_and_unflatten_its_inverse(levels):
    for order in ["flat"]:
        table = order_table(tuple(tuple(values.shape[1:]) for values in levels), order)
        values_BP = flatten(levels, table)
        if order == "flat":
            assert torch.equal(values_BP.double(), slow_flat(levels))
        back = unflatten(values_BP, table)
        assert all(torch.equal(a, b) for a, b in zip(levels, back, strict=True))
        again = flatten(unflatten(values_BP.flip(0), table), table)
        assert torch.equal(again, values_BP.flip(0))
        assert sorted(table.index_P.tolist()) == list(range(len(table)))
        assert (table.step_P.diff() >= 0).all()


@settings(max_examples=30, deadline=None)
@given(levels_of_codes())
def test_table_says_where_every_position_is(levels):
    table = order_table(tuple(tuple(values.shape[1:]) for values in levels))
    values_BP = flatten(levels, table)
    for p in range(len(table)):
        place = tuple(table.coord_PA[p].tolist())
        found = levels[table.level_P[p]][(slice(None), int(table.codebook_P[p]), *place)]
        assert torch.equal(found, values_BP[:, p])


@settings(max_examples=30, deadline=None)
@given(levels_of_codes())
def test_runs_cover_every_position_once_with_slices(levels):
    table = order_table(tuple(tuple(values.shape[1:]) for values in levels))
    positions = torch.arange(len(table))
    parts = [positions[run.positions] for run in table.runs]
    assert torch.equal(torch.cat(parts)[table.from_runs_P], positions)
    for run, part in zip(table.runs, parts, strict=True):
        assert isinstance(run.positions, slice), "the flat order needs no gathering"
        assert (table.level_P[part] == run.level).all() and (table.codebook_P[part] == run.codebook).all()


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
    table = order_table(((1, 2, 2),))
    with pytest.raises(ValueError, match=r"\(\(1, 2, 3\),\)"):
        flatten([torch.zeros(1, 1, 2, 3)], table)
    with pytest.raises(ValueError, match=r"\(B, 4\)"):
        unflatten(torch.zeros(1, 5), table)
