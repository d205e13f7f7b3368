"""The masked prior: what a token sees, what masks there are, that its likelihood is one, and what is drawn in which pass."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

import vqtok.auto  # noqa: F401 (registers the classes with transformers)
from vqtok.codes import Codes
from vqtok.prior import CodePriorConfig, MaskedCodePriorConfig, MaskedCodePriorModel
from vqtok.prior.masking import (
    masked_after,
    masked_per_codebook,
    random_masks,
    reveal_order,
    split_passes,
)
from vqtok.prior.sampling import uniforms
from vqtok.prior.stepping import Prompt
from vqtok.prior.unmasking import MaskedSettings, Unmasking, level_slices

from .conftest import BACKBONES, TWO_LEVELS, layout

ONE = layout((8, 1, 13))
THREE = layout((16, 1, 5), (8, 1, 5), (4, 1, 5))
RESIDUAL = layout((8, 2, 6), (4, 3, 6))
AUDIO = layout((640, 1, 9), (320, 3, 9), ndim=1)
LARGE = layout((8, 1, 1 << 17))
LAYOUTS = {"one": ONE, "two": TWO_LEVELS, "three": THREE, "residual": RESIDUAL, "audio": AUDIO, "large": LARGE}
GRIDS = {"audio": (3,), "large": (2, 2), "three": (1, 2)}


def as_codes(prior, levels, sizes=None):
    """`Codes` of whole cells."""
    made = prior.vocabulary.layout
    size = [n * made.stride for n in levels[0].shape[2:]]
    return Codes(tuple(levels), torch.tensor(sizes or [size] * len(levels[0])), made)


# -- schedules and masks


@given(st.integers(1, 40), st.integers(1, 6))
def test_passes_are_split_wholly(num_passes, num_levels):
    if num_passes < num_levels:
        with pytest.raises(ValueError, match="each takes at least one"):
            split_passes(num_passes, num_levels)
        return
    passes = split_passes(num_passes, num_levels)
    assert sum(passes) == num_passes and len(passes) == num_levels
    assert passes[0] >= 1 and set(passes[:-1]) <= {passes[0]} and 0 <= passes[-1] - passes[0] < num_levels


@given(st.integers(0, 3000), st.integers(1, 30))
def test_the_cosine_schedule_falls_to_nothing(count, passes):
    left = [masked_after(count, done, passes) for done in range(passes + 1)]
    assert left[0] == count and left[-1] == 0 and left == sorted(left, reverse=True)
    assert count == 0 or left[1] < count, "the first pass reveals something"
    for done, found in enumerate(left[:-1]):
        assert found <= count * math.cos(math.pi * done / passes / 2) < found + 1


@given(st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(1, 9))
def test_coarser_codebooks_are_finished_first(free, passes):
    left = masked_per_codebook(torch.tensor(free), passes).tolist()
    assert left[0] == free and left[-1] == [[0] * 3] * len(free)
    for row, before in itertools.product(range(len(free)), range(passes + 1)):
        assert sum(left[before][row]) == masked_after(sum(free[row]), before, passes)
        for finer in (1, 2):
            if left[before][row][finer] < free[row][finer]:
                assert left[before][row][:finer] == [0] * finer


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
def test_training_masks_are_those_of_decoding(codebooks, places, seed):
    torch.manual_seed(seed)
    codebook_N = torch.arange(codebooks).repeat(places)
    ratio_B = torch.rand(50)
    masks = random_masks(codebook_N, ratio_B, torch.rand(50, len(codebook_N)))
    assert masks.sum(1).min() >= 1
    for ratio, mask in zip(ratio_B.tolist(), masks, strict=True):
        wanted = max(1, math.ceil(len(codebook_N) * math.cos(ratio * math.pi / 2) - 1e-5))
        assert abs(int(mask.sum()) - wanted) <= 1
        known, hidden = codebook_N[~mask], codebook_N[mask]
        assert not len(known) or known.max() <= hidden.min(), "a finer codebook is known after the coarser ones"


def test_orders_are_uniform():
    numbers = torch.rand(6000, 3, generator=torch.Generator().manual_seed(0))
    orders = reveal_order(torch.zeros(3, dtype=torch.int64), numbers)
    shares = torch.bincount(orders @ torch.tensor([9, 3, 1]), minlength=27).float() / 6000
    assert ((shares[shares > 0] - 1 / 6).abs() < 0.02).all() and int((shares > 0).sum()) == 6
    assert reveal_order(torch.tensor([1, 0, 1, 0]), torch.rand(9, 4))[:, :2].remainder(2).min() == 1


# -- the network


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_and_decoding_see_the_same(make_masked, random_codes, monkeypatch, name, backbone):
    """The one pass of training and the passes of decoding, level by level with a cache, give the same nats of masked codes."""
    prior = make_masked(LAYOUTS[name], backbone)
    codes = random_codes(LAYOUTS[name], 3, GRIDS.get(name, (2, 3)))
    ids = torch.tensor([[0, 3, 1], [4, 2, 6], [0, 0, 5]])
    prompt = Prompt(prior.get_input_embeddings()(ids), ids > 0, guided=False)
    nats, masked, size_nats, table = prior._masked_nats(codes, prompt)
    assert masked.any() and not masked.all() and bool((nats[~masked] == 0).all()) and bool((nats[masked] > 0).all())
    ids_BP, _ = prior._flat(codes)
    with torch.no_grad():
        passes = Unmasking(prior, table, prompt, prior._prefix(codes[0].shape[2:]), ())
        wanted = torch.zeros_like(nats)
        for here in level_slices(table):
            hidden = passes.hidden(here, ids_BP[:, here], masked[:, here])
            for at in range(here.start, here.stop):
                stream = prior._own_stream(int(table.level_P[at]), int(table.codebook_P[at]))
                wanted[:, at] = prior._stream_nats(hidden[:, at - here.start, None], ids_BP[:, at, None], *stream)[:, 0]
            passes.finish(here, ids_BP[:, here])
    assert torch.allclose(nats, wanted * masked, atol=1e-4)
    again = prior._size_nats(passes.prompt_BTM, prior._prefix(codes[0].shape[2:]))
    assert torch.allclose(size_nats, again, atol=1e-5) and size_nats.shape == (3, prior.vocabulary.layout.ndim)


def test_a_masked_code_is_not_seen_by_its_level_or_itself_but_by_finer_levels(make_masked, random_codes):
    prior, codes = make_masked(THREE), random_codes(THREE, 1, (1, 2))
    prompt = prior._conditions([[3, 1]], MaskedSettings())

    def nats(levels):
        torch.manual_seed(0)
        return prior._masked_nats(levels, prompt)

    before, masked, _, table = nats(codes)
    ids, _ = prior._flat(codes)
    for at in range(len(table)):
        level, (row, column) = int(table.level_P[at]), table.coord_PA[at].tolist()
        changed = [values.clone() for values in codes]
        changed[level][0, 0, row, column] = (changed[level][0, 0, row, column] + 1) % 5
        after = nats(changed)[0]
        other = masked[0].clone()
        other[at] = False
        own = table.level_P == level
        moved = (after - before)[0].abs() > 1e-6
        assert not moved[table.level_P < level].any()
        assert bool(moved[own & other].any()) != bool(masked[0, at]) or not (own & other).any()
        assert moved[(table.level_P > level) & other].all()
        if masked[0, at]:
            size = prior._own_stream(level, 0)[1]
            assert size == 5 and moved[at]


@pytest.mark.parametrize("grid", [(1, 1), (2, 1)])
def test_the_probabilities_of_all_codes_sum_to_one(make_masked, grid):
    """The chain rule over groups: whatever the number of passes and the order, it is a distribution over codes."""
    levels = layout((8, 2, 2), (4, 1, 2)) if grid == (1, 1) else layout((8, 3, 3))
    prior = make_masked(levels, scale=9.0)
    spans = [range(level["codebook_size"]) for level in levels["levels"] for _ in range(level["num_codebooks"])]
    counts = [
        math.prod(grid) * (8 // level["stride"]) ** 2
        for level in levels["levels"]
        for _ in range(level["num_codebooks"])
    ]
    every = torch.tensor(
        list(itertools.product(*(span for s, n in zip(spans, counts, strict=True) for span in [s] * n)))
    )
    made, at = [], 0
    for level in levels["levels"]:
        shape = (level["num_codebooks"], *(n * 8 // level["stride"] for n in grid))
        made.append(every[:, at : at + math.prod(shape)].view(-1, *shape))
        at += math.prod(shape)
    codes = as_codes(prior, made)
    for passes in (3, 6):
        scores = []
        for seed in range(4):
            # Every sample in the order of the first, so that they are outcomes of one process.
            fixed = uniforms(seed, 0, every.shape[1])
            prompt = prior._conditions([[3]] * len(every), MaskedSettings())
            with torch.no_grad():
                ids, table = prior._flat(codes.levels)
                passes_over = Unmasking(prior, table, prompt, prior._prefix(grid), ())
                scores.append(passes_over.nats(ids, fixed.expand(len(every), -1), passes).double().sum(1))
        assert [float((-nats).exp().sum()) for nats in scores] == pytest.approx([1] * 4, abs=1e-4)
        assert not all(torch.allclose(nats, scores[0]) for nats in scores), "another order, another process"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prior_that_knows_nothing_scores_ln_k(make_masked, random_codes, name):
    prior = make_masked(LAYOUTS[name])
    torch.nn.init.zeros_(prior.lm_head.weight)
    codes = as_codes(prior, random_codes(LAYOUTS[name], 2, GRIDS.get(name, (2, 3))))
    scores = prior.score(codes, [[1], [2, 3]])
    ln_k = torch.tensor([math.log(level["codebook_size"]) for level in LAYOUTS[name]["levels"]])
    assert torch.allclose(scores.nats_per_code, ln_k.expand(2, -1))
    assert torch.allclose(scores.nats, sum(m.flatten(1).sum(1) for m in scores.maps))
    assert [m.shape for m in scores.maps] == [v.shape for v in codes.levels]
    if name != "large":  # whose two factors are not masked equally often in one batch
        assert torch.allclose(prior.train()(codes.levels).nats_per_code, ln_k)


def test_scores_depend_on_seed_groups_and_condition_but_not_on_the_batch(make_masked, random_codes):
    prior = make_masked(TWO_LEVELS)
    codes, conditions = as_codes(prior, random_codes(TWO_LEVELS, 5, (2, 3))), [[3], [1, 4, 1, 5], [2, 6], [7], [8]]
    scores = prior.score(codes, conditions)
    assert torch.allclose(scores.nats, prior.score(codes, conditions, batch_size=2).nats, atol=1e-4)
    assert torch.allclose(scores.nats[:3], prior.score(codes[:3], conditions[:3]).nats, atol=1e-4)
    for other in ({"seed": 1}, {"num_passes": 5}, {"num_passes": [1, 1]}, {"condition": None}):
        assert not torch.allclose(scores.nats, prior.score(codes, **{"condition": conditions, **other}).nats, atol=0.1)
    mixed = Codes.cat([codes, as_codes(prior, random_codes(TWO_LEVELS, 2, (1, 1)))])
    assert torch.allclose(prior.score(mixed, [*conditions, [1], [2]]).nats[:5], scores.nats, atol=1e-4)
    swapped = Codes((codes.levels[0].roll(1, 0), codes.levels[1]), codes.sizes, codes.layout)
    moved = prior.score(swapped, conditions).nats_per_code[:, 1] - scores.nats_per_code[:, 1]
    assert (moved.abs() > 1e-3).all(), "coarse codes are heard"


def test_evaluation_is_the_score_and_training_masks_anew(make_masked, random_codes):
    prior, codes = make_masked(TWO_LEVELS), random_codes(TWO_LEVELS, 4, (2, 3))
    scores, output = prior.score(as_codes(prior, codes)), prior(codes)
    assert torch.allclose(output.nats_per_code, scores.nats_per_code.mean(0), atol=1e-5)
    assert torch.equal(prior(codes).loss, output.loss) and not output.loss.requires_grad
    prior.train()
    torch.manual_seed(0)
    one, other = prior(codes), prior(codes)
    torch.manual_seed(0)
    assert torch.equal(prior(codes).loss, one.loss) and not torch.equal(one.loss, other.loss)
    assert one.loss.dtype == torch.float32 and one.loss.ndim == 0 and one.nats_per_code.shape == (2,)


def test_it_learns_a_tiny_set_with_its_coarse_codes(make_masked, random_codes):
    prior = make_masked(TWO_LEVELS, scale=1.0, condition_dropout=0.3).train()
    codes = random_codes(TWO_LEVELS, 4, (2, 2))
    ids = torch.tensor([[1], [2], [3], [4]])
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2, weight_decay=0.0)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=400)
    for _ in range(400):
        optimizer.zero_grad()
        prior(codes, condition_ids=ids).loss.backward()
        optimizer.step()
        slower.step()
    prior.eval()
    right = prior.score(as_codes(prior, codes), ids.tolist())
    assert (right.nats_per_code < 0.3).all()
    for passes in (2, 8):
        drawn = prior.sample_codes(ids.tolist(), sizes=(16, 16), temperature=0, num_passes=passes)
        assert all(torch.equal(a, b) for a, b in zip(drawn.levels, codes, strict=True))
    null, wrong = prior.score(as_codes(prior, codes)), prior.score(as_codes(prior, (codes[0].roll(1, 0), codes[1])))
    assert (wrong.nats_per_code[:, 1] > 1 + null.nats_per_code[:, 1]).all(), "wrong coarse codes raise the fine loss"
    assert (null.nats > right.nats + 0.5).all()


def test_every_parameter_gets_a_gradient_also_in_bf16(make_masked, random_codes):
    prior, codes = make_masked(RESIDUAL, scale=1.0).train(), random_codes(RESIDUAL, 3, (2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        mixed = prior(codes, condition_ids=torch.tensor([[1], [2], [3]])).loss
    mixed.backward()
    assert [name for name, value in prior.named_parameters() if value.grad is None] == []
    torch.manual_seed(0)
    plain = prior(codes, condition_ids=torch.tensor([[1], [2], [3]])).loss
    assert plain.item() == pytest.approx(mixed.item(), abs=0.02)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_back_ends_agree(make_masked, random_codes, attention):
    prior, codes = make_masked(TWO_LEVELS).train(), random_codes(TWO_LEVELS, 2, (2, 2))
    prior.config.condition_dropout = 0.0
    ids, mask = torch.tensor([[0, 0, 3], [4, 5, 6]]), torch.tensor([[False, False, True], [True] * 3])
    losses = []
    for name in (attention, "sdpa"):
        prior.set_attn_implementation(name)
        torch.manual_seed(0)
        losses.append(prior(codes, condition_ids=ids, condition_mask=mask).loss)
    assert torch.allclose(*losses, atol=1e-5)
    other = torch.where(mask, ids, 9)
    torch.manual_seed(0)
    assert torch.allclose(prior(codes, condition_ids=other, condition_mask=mask).loss, losses[0], atol=1e-6)


# -- configuration


def test_a_masked_prior_has_one_order(make_prior):
    fields = {"layout": TWO_LEVELS, "backbone_config": {"model_type": "llama", **BACKBONES["llama"]}}
    assert MaskedCodePriorConfig(**fields).order == "parallel"
    for order in ("flat", "next_scale"):
        with pytest.raises(ValueError, match="order must be 'parallel'"):
            MaskedCodePriorConfig(**fields, order=order)
    with pytest.raises(ValueError, match="order must be 'flat'"):
        CodePriorConfig(**fields, order="parallel")
    with pytest.raises(ValueError, match="window"):
        MaskedCodePriorConfig(**fields, window=8)
    with pytest.raises(ValueError, match="end by themselves"):
        MaskedCodePriorConfig(**{**fields, "layout": AUDIO}, stops=True)


def test_save_and_load_keeps_everything(make_masked, tmp_path):
    prior = make_masked(TWO_LEVELS)
    prior.generation_config.num_passes, prior.generation_config.choice_temperature = [3, 5], 2.5
    prior.save_pretrained(tmp_path)
    again = MaskedCodePriorModel.from_pretrained(tmp_path)
    assert again.generation_config.num_passes == [3, 5] and again.generation_config.choice_temperature == 2.5
    assert type(AutoModel.from_pretrained(tmp_path)) is MaskedCodePriorModel
    for name, value in prior.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    one, two = (each.sample_codes([[3]], sizes=(16, 16), seed=1) for each in (prior, again.eval()))
    assert all(torch.equal(a, b) for a, b in zip(one.levels, two.levels, strict=True))
    with pytest.raises(ValueError, match="order 'parallel': use sample_codes"):
        again.generate(torch.tensor([[3]]))


def test_fresh_weights_are_small(make_masked):
    prior = make_masked(TWO_LEVELS, scale=1.0)
    assert 0.01 < prior.mask_embed.weight.std().item() < 0.04
