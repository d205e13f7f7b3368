"""Data order: a function of (seed, step), the same for any number of processes and any start."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqtok.training import StepSampler, step_loader


def _batches(**options):
    return [
        list(b)
        for b in StepSampler(**{"groups": [np.arange(10)], "batch_size": 4, "num_steps": 12, "seed": 3, **options})
    ]


def test_every_epoch_visits_every_sample_once_in_a_new_order():
    draws = [d for batch in _batches(batch_size=5) for d in batch]
    epochs = [[d % 10 for d in draws[i : i + 10]] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(set(draws)) == 60  # a draw names one visit, so augmentation differs between epochs


def test_starting_in_the_middle_gives_the_rest_of_the_same_run():
    assert _batches(start=7) == _batches()[7:]


def test_processes_and_parts_cut_the_same_global_batch():
    whole = _batches(batch_size=8)
    cut = [_batches(batch_size=8, rank=rank, world_size=2, parts=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        mine = [draw for rank in range(2) for part in cut[rank][2 * step : 2 * step + 2] for draw in part]
        assert sorted(mine) == sorted(batch)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 99), st.integers(1, 6))
def test_a_batch_comes_from_one_group_and_groups_take_turns_fairly(sizes, seed, batch_size):
    edges = np.cumsum([0, *sizes])
    groups = [np.arange(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    batches = _batches(groups=groups, batch_size=batch_size, num_steps=50, seed=seed)
    assert len(batches) == 50
    for batch in batches:
        owners = {int(np.searchsorted(edges, draw % edges[-1], side="right")) for draw in batch}
        assert len(owners) == 1


def test_a_batch_that_cannot_be_cut_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="multiple of 6"):
        _batches(batch_size=4, world_size=2, parts=3)


def test_only_a_dataset_that_knows_draws_gets_them():
    class Plain:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return index

    class Draws(Plain):
        takes_draws = True

    sampler = StepSampler([np.arange(10)], 5, 6, 0)
    plain = [draw for batch in step_loader(Plain(), list, sampler) for draw in batch]
    drawn = [draw for batch in step_loader(Draws(), list, sampler) for draw in batch]
    assert max(plain) == 9 and max(drawn) > 9
    assert [draw % 10 for draw in drawn] == plain
