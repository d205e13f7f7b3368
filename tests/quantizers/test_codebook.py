"""The life of one codebook: initialisation, EMA, revival, freezing, the update protocol."""

import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import reference
from vqtok.quantizers import Codebook, VectorQuantizer, collective, k_means, nearest_code, update_all
from vqtok.quantizers.kmeans import commonest


def step(codebook: Codebook, *batches: torch.Tensor) -> None:
    """One training step: a pass over each batch, then the update."""
    for z in batches:
        codebook.accumulate(z, codebook.encode(z))
    update_all([codebook])


def state(codebook: Codebook) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in codebook.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


# -- the moving average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_ema_follows_the_written_formula(decay, offset):
    codebook = Codebook(12, 5, decay=decay, revival_threshold=0)
    codebook.embedding += offset
    table, counts = codebook.embedding.double(), codebook.counts.double()
    for _ in range(5):
        z = torch.randn(40, 5) + offset
        codes = reference.nearest_code(z, codebook.embedding)
        if decay:
            table, counts = reference.ema_step(table, counts, z, codes, decay)
        else:  # the formula divides by zero where a code has no hit: such a code stays
            hit = torch.bincount(codes, minlength=12) > 0
            new, counts = reference.ema_step(table, counts, z, codes, decay)
            table = torch.where(hit[:, None], new, table)
        step(codebook, z)
        torch.testing.assert_close(codebook.embedding.double(), table, rtol=2e-7, atol=2e-6)
        torch.testing.assert_close(codebook.counts.double(), counts, rtol=1e-6, atol=0)


def test_on_the_sphere_the_average_is_brought_back_to_it():
    codebook = Codebook(12, 5, metric="cosine", decay=0.9, revival_threshold=0)
    codebook.initialise(codebook.prepare(torch.randn(100, 5)))
    table, counts = codebook.embedding.double(), codebook.counts.double()
    for _ in range(5):
        z = codebook.prepare(torch.randn(40, 5) * 7)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(40))
        codes = reference.nearest_code(z, codebook.table)
        table, counts = reference.ema_step(table, counts, z, codes, 0.9)
        table = table / table.norm(dim=1, keepdim=True)
        step(codebook, z)
        torch.testing.assert_close(codebook.embedding.double(), table, rtol=1e-6, atol=1e-6)


def test_on_the_sphere_every_row_is_of_unit_length_whoever_moved_it():
    ones = torch.ones(24)
    for rule in ("ema", "gradient"):
        codebook = Codebook(24, 4, rule, "cosine", decay=0.0)
        torch.testing.assert_close(codebook.table.norm(dim=1), ones)
        codebook.initialise(codebook.prepare(torch.randn(200, 4)))
        torch.testing.assert_close(codebook.embedding.detach().norm(dim=1), ones)
        step(codebook, codebook.prepare(torch.randn(30, 4) - 3))
        assert codebook.num_revived > 0
        codebook.embedding.data.mul_(5)  # as an optimizer does
        torch.testing.assert_close(codebook.table.norm(dim=1), ones)
        assert codebook(torch.arange(24)).equal(codebook.table)


def test_unused_codes_stay_bit_for_bit():
    """Counts that begin at zero beside sums that begin at the codes would make an unused code 1e5 times too long."""
    codebook = Codebook(8, 4, decay=0.9, revival_threshold=0)
    codebook.embedding[4:] += 1e4
    before = codebook.embedding.clone()
    for _ in range(2500):  # their counts go through the subnormal numbers to zero
        step(codebook, torch.randn(16, 4))
    assert codebook.counts[4:].max() < 1e-37
    assert codebook.embedding[4:].equal(before[4:])
    assert not codebook.embedding[:4].equal(before[:4])
    # And one that comes back into use follows the data, whatever its count had become.
    codebook.accumulate(before[4:5] + 3, torch.tensor([4]))
    update_all([codebook])
    torch.testing.assert_close(codebook.embedding[4], before[4] + 3)


def test_a_pass_alone_changes_nothing():
    codebook = Codebook(8, 4)
    before = state(codebook)
    z = torch.randn(50, 4)
    codebook.accumulate(z, codebook.encode(z))
    assert equal(state(codebook), before)
    update_all([codebook])
    assert not equal(state(codebook), before)


def test_accumulation_equals_the_large_batch():
    """Also in which latents are revived: the choice hangs on the latents, not on how they came."""
    large = Codebook(64, 6, decay=0.5, revival_threshold=0.9, reservoir_size=16)
    small = Codebook(64, 6, decay=0.5, revival_threshold=0.9, reservoir_size=16)
    small.load_state_dict(large.state_dict())
    for _ in range(4):
        z = torch.randn(400, 6).round(decimals=1)
        step(large, z)
        step(small, *z.split([10, 190, 1, 199]))
        assert small.counts.equal(large.counts)
        torch.testing.assert_close(small.embedding, large.embedding, rtol=1e-6, atol=1e-6)
        revived = [any(row.equal(latent) for latent in z) for row in large.embedding]
        assert 0 < sum(revived) <= 16, "nothing was revived: the test shows nothing"
    assert int(large.updates) == 4


def test_updates_in_an_order_of_the_latents():
    """A permutation of the batch is the same batch."""
    first, second = (Codebook(32, 3, revival_threshold=0.9, decay=0.0) for _ in range(2))
    second.load_state_dict(first.state_dict())
    z = torch.randn(300, 3)
    step(first, z)
    step(second, z[torch.randperm(300)])
    assert second.counts.equal(first.counts)
    torch.testing.assert_close(second.embedding, first.embedding, rtol=1e-6, atol=1e-6)


def test_latents_of_any_shape_and_dtype():
    flat, grid = Codebook(8, 4), Codebook(8, 4)
    grid.load_state_dict(flat.state_dict())
    z = torch.randn(24, 4).bfloat16()
    step(flat, z)
    step(grid, z.view(2, 3, 4, 4))
    assert equal(state(flat), state(grid))


# -- revival


def test_a_dead_code_moves_into_the_data_at_once_and_stays():
    """The average must not be written over the revived row, as it is in a well-known codec: 100.0 became 99.0."""
    codebook = Codebook(4, 3, decay=0.9)
    codebook.embedding[3] = 100.0
    codebook.counts[3] = 0
    z = torch.randn(200, 3)
    step(codebook, z)
    assert (z == codebook.embedding[3]).all(1).any(), "not a latent of the batch"
    assert codebook.counts[3] > 0.05 * codebook.counts.mean()
    for _ in range(20):
        step(codebook, torch.randn(200, 3))
        assert codebook.embedding[3].abs().max() < 5
    assert (codebook.encode(torch.randn(500, 3)) == 3).any()


@pytest.mark.parametrize("rule", ["ema", "gradient"])
def test_a_codebook_far_from_the_data_comes_to_use_by_itself(rule):
    codebook = Codebook(16, 2, decay=0.9, update=rule)
    codebook.embedding.data += torch.tensor([50.0, 0.0])
    for _ in range(60):
        step(codebook, torch.randn(256, 2))
    assert codebook.encode(torch.randn(2000, 2)).unique().numel() == 16


@pytest.mark.parametrize("repeat", [1, 7, 300])
def test_the_threshold_is_a_share_of_uniform_use_whatever_the_batch(repeat):
    """With 4 codes uniform is 25 of 100 hits: 1 hit is 4 % of it, dead below the threshold of 5 %; 2 hits are 8 %, alive."""
    codebook = Codebook(4, 1, decay=0.0, revival_threshold=0.05)
    codebook.embedding.copy_(torch.tensor([[0.0], [10.0], [20.0], [30.0]]))
    z = torch.tensor([0.0] * 60 + [10.0] * 37 + [20.0] * 2 + [30.0])[:, None].repeat(repeat, 1) + 0.25
    step(codebook, z)
    assert codebook.embedding[:3, 0].tolist() == [0.25, 10.25, 20.25]
    assert codebook.num_revived == 1 and codebook.embedding[3] in z
    assert codebook.counts.tolist() == [60 * repeat, 37 * repeat, 2 * repeat, 25 * repeat]


def test_no_threshold_no_revival():
    codebook = Codebook(4, 3, decay=0.0, revival_threshold=0)
    codebook.embedding[3] = 100.0
    for _ in range(5):
        step(codebook, torch.randn(50, 3))
    assert codebook.embedding[3].tolist() == [100.0] * 3 and codebook.counts[3] == 0


def test_equal_latents_count_once_in_the_reservoir():
    """A picture is mostly background: with 990 equal latents of 1000, chance alone would revive codes onto the background."""
    codebook = Codebook(12, 2, decay=0.0, reservoir_size=11)
    for _ in range(10):  # every update draws another order of the latents
        codebook.embedding.copy_(torch.randn(12, 2) + 100)
        rare, background = torch.randn(10, 2), torch.tensor([0.5, 0.0])
        z = torch.cat(
            [background.repeat(495, 1), rare, (background * torch.tensor([1, -1])).repeat(495, 1)]
        )  # 0.0, -0.0
        codebook.accumulate(z, torch.zeros(1000, dtype=torch.int64))
        update_all([codebook])
        revived = {tuple(row) for row in codebook.embedding[1:].tolist()}
        assert revived == {(0.5, 0.0), *(tuple(row) for row in rare.tolist())}


def test_fewer_latents_than_dead_codes_revive_the_least_used():
    codebook = Codebook(8, 2, decay=0.0)
    codebook.embedding.copy_(torch.arange(8.0)[:, None] + 1000)
    before = codebook.embedding.clone()
    z = torch.randn(3, 2)
    codebook.counts[:] = 0
    codebook.accumulate(z, torch.zeros(3, dtype=torch.int64))
    update_all([codebook])
    changed = [k for k in range(1, 8) if not codebook.embedding[k].equal(before[k])]
    assert changed == [1, 2, 3]
    assert sorted(codebook.embedding[1:4].tolist()) == sorted(z.tolist())


def test_the_choice_of_revived_latents_changes_with_the_updates():
    codebook = Codebook(2, 3, decay=0.0)
    z = torch.randn(500, 3)
    chosen = set()
    for _ in range(10):
        codebook.embedding.copy_(torch.tensor([[0.0] * 3, [100.0] * 3]))
        step(codebook, z)
        chosen.add(tuple(codebook.embedding[1].tolist()))
    assert len(chosen) > 5


# -- what never changes a codebook


@pytest.mark.parametrize("rule", ["ema", "gradient"])
def test_frozen_never_changes(rule):
    codebook = Codebook(8, 4, decay=0.5, update=rule)
    codebook.accumulate(torch.randn(20, 4), torch.zeros(20, dtype=torch.int64))
    codebook.freeze()
    codebook.train()
    before = state(codebook)
    for _ in range(3):
        step(codebook, torch.randn(20, 4))
    assert equal(state(codebook), before)
    assert not any(parameter.requires_grad for parameter in codebook.parameters())
    codebook.freeze(False)
    step(codebook, torch.randn(20, 4))
    assert not equal(state(codebook), before), "what was seen before the freeze is forgotten, what comes after counts"


def test_frozen_codebooks_beside_others():
    frozen, free = Codebook(8, 4), Codebook(8, 4)
    frozen.freeze()
    before = state(frozen), state(free)
    for codebook in (frozen, free):
        z = torch.randn(30, 4)
        codebook.accumulate(z, codebook.encode(z))
    update_all([frozen, free])
    assert equal(state(frozen), before[0]) and not equal(state(free), before[1])


def test_many_passes_without_an_update_are_told_once(monkeypatch):
    monkeypatch.setattr(collective, "_PASSES_BEFORE_WARNING", 3)
    quantizer, z = VectorQuantizer(2, codebook_size=4).train(), torch.randn(1, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):  # never three without an update
            quantizer(z)
            quantizer(z)
            quantizer.encode(z)
            quantizer.update()
        quantizer(z)
        quantizer(z)
    with pytest.warns(UserWarning, match=r"quantizer.update\(\) .*update_codebooks\(\)"):
        quantizer(z)
    quantizer.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):  # a frozen one waits for no update
            quantizer(z)


# -- precision


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "to"])
def test_fp32_always(move):
    codebook = Codebook(16, 4)
    z = torch.randn(100, 4)
    step(codebook, z)
    before, codes = state(codebook), codebook.encode(z)
    wrapped = torch.nn.Sequential(torch.nn.Linear(4, 4), codebook)
    wrapped.to(dtype=torch.bfloat16) if move == "to" else getattr(wrapped, move)()
    assert wrapped[0].weight.dtype != torch.float32
    assert equal(state(codebook), before) and codebook.encode(z).equal(codes)
    assert codebook(codes).dtype == torch.float32
    step(codebook, z)
    # Nothing is remembered beside the table: other values answer at once.
    other = Codebook(16, 4)
    codebook.load_state_dict(other.state_dict())
    assert codebook(codes).equal(other.embedding[codes]) and codebook.encode(z).equal(other.encode(z))


def test_an_ema_table_is_no_parameter():
    assert list(Codebook(4, 2).parameters()) == []
    assert [name for name, _ in Codebook(4, 2, update="gradient").named_parameters()] == ["embedding"]


# -- initialisation


def test_k_means_steps_are_means_of_the_nearest():
    z = torch.randn(200, 3) + 100
    for iterations in (1, 2, 5):
        before, after = (k_means(z, 8, iterations=n) for n in (iterations - 1, iterations))
        torch.testing.assert_close(after.double(), reference.k_means_step(z, before), rtol=0, atol=1e-5)


def test_k_means_finds_planted_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    z = (centres[:, None] + 0.1 * torch.randn(3, 50, 2)).flatten(0, 1)
    found = k_means(z, 3, iterations=20)
    assert nearest_code(centres, found).unique().numel() == 3
    assert (found[nearest_code(centres, found)] - centres).norm(dim=1).max() < 0.1


def test_the_commonest_rows_however_a_convolution_rounds_them():
    rows, counts = torch.randn(6, 3), torch.tensor([9, 2, 7, 5, 3, 4])
    z = rows.repeat_interleave(counts, 0)[torch.randperm(30)]
    z = z * (1 + 1e-7 * torch.randn_like(z))
    for size, kept in ((3, [0, 2, 3]), (6, [0, 2, 3, 5, 4, 1])):
        assert (commonest(z, size) - rows[kept]).abs().max() < 1e-5
    with pytest.warns(UserWarning, match="only 6 distinct latents for 8 codes"):
        assert commonest(z, 8).unique(dim=0).shape[0] == 8
    with pytest.raises(ValueError, match="NaN"):
        commonest(z.log(), 3)


@given(seed=st.integers(0, 10_000), width=st.integers(1, 5), number=st.integers(1, 6))
def test_the_commonest_of_many_rows_of_few_values(seed, width, number):
    """Beside counting in Python, with rows that differ in one place by one step."""
    z = torch.randint(-2, 3, (300, width), generator=torch.Generator().manual_seed(seed))
    counts = Counter(map(tuple, z.tolist()))  # which keeps the order of equally common ones
    number = min(number, len(counts))
    assert commonest(z.float(), number).tolist() == [list(row) for row, _ in counts.most_common(number)]


def test_k_means_fills_empty_clusters():
    """Among 400 sets of heavy-tailed points some clusters run empty on the way; no code is left without rows."""
    for seed in range(400):
        z = torch.randn(30, 2, generator=torch.Generator().manual_seed(seed)) ** 3
        assert nearest_code(z, k_means(z, 10)).unique().numel() == 10


@pytest.mark.parametrize("rule", ["ema", "gradient"])
def test_initialise_sets_the_table_once_and_for_all(rule):
    codebook, z = Codebook(16, 4, update=rule), torch.randn(300, 4) * 5 + 20
    assert not codebook.initialised
    step(codebook, z)
    codebook.accumulate(z, codebook.encode(z))
    codebook.initialise(z)
    assert codebook.initialised and codebook.counts.equal(torch.ones(16))
    assert codebook.embedding.equal(k_means(z, 16)) and codebook.encode(z).unique().numel() == 16
    # What was accumulated for the old table is dropped, and k-means leaves the average where the second step needs it.
    table = codebook.embedding.detach().clone()
    update_all([codebook])
    assert codebook.embedding.equal(table)
    step(codebook, z)
    assert codebook.encode(z).unique().numel() == 16


@pytest.mark.parametrize("num_rows", [1, 3, 15])
def test_fewer_distinct_latents_than_codes_are_told(num_rows):
    distinct = torch.randn(num_rows, 4)
    codebook = Codebook(16, 4)
    with pytest.warns(UserWarning, match=f"only {num_rows} distinct latents for 16 codes"):
        codebook.initialise(distinct.repeat(50, 1))
    assert codebook.embedding.isfinite().all() and codebook.embedding.unique(dim=0).shape[0] == 16
    assert (codebook(codebook.encode(distinct)) == distinct).all(), "each latent has a code of its own"


@pytest.mark.parametrize("num_rows", [3, 100])
def test_initialising_from_nothing_or_from_nan_is_refused(num_rows):
    codebook, bad = Codebook(8, 4), torch.randn(num_rows, 4)
    before = state(codebook)
    bad[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        codebook.initialise(bad)
    with pytest.raises(ValueError, match="at least one"):
        codebook.initialise(bad[:0])
    assert equal(state(codebook), before)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"codebook_size": 0}, "K=0"),
        ({"dim": 0}, "D=0"),
        ({"update": "adam"}, "'adam'"),
        ({"decay": 1.0}, "1.0"),
        ({"decay": -0.1}, "-0.1"),
        ({"revival_threshold": 1.5}, "1.5"),
        ({"metric": "l2"}, "euclidean, cosine, inner_product, got 'l2'"),
        ({"metric": "inner_product"}, "needs update='gradient'"),
    ],
)
def test_impossible_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Codebook(**{"codebook_size": 4, "dim": 2, **arguments})


def test_one_code():
    codebook = Codebook(1, 3, decay=0.0)
    z = torch.randn(10, 3)
    step(codebook, z)
    torch.testing.assert_close(codebook.embedding[0], z.mean(0))
    codebook.initialise(z)
    torch.testing.assert_close(codebook.embedding[0], z.mean(0))
    assert codebook.encode(z).tolist() == [0] * 10
