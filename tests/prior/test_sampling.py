"""Drawing: numbers per sample, filters, guidance, caches, and the way through transformers' generate."""

import math

import pytest
import torch

from vqtok.prior import stepping
from vqtok.prior.sampling import SamplingSettings, draw, filter_logits, guide, uniforms

TWO = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 1, "codebook_size": k} for s, k in ((8, 11), (4, 7))]}
RESIDUAL = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 2, "codebook_size": 6} for s in (8, 4)]}
AUDIO = {"ndim": 1, "levels": [{"stride": s, "num_codebooks": q, "codebook_size": 9} for s, q in ((640, 1), (320, 3))]}
LARGE = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 1 << 17}]}
CONDITIONS = [[3], [1, 4, 1, 5, 9], [2, 6]]


def same(a, b):
    """Whether two `Codes` hold the same integers and sizes."""
    equal = len(a.levels) == len(b.levels) and all(torch.equal(x, y) for x, y in zip(a.levels, b.levels, strict=True))
    return equal and torch.equal(a.sizes, b.sizes)


# -- pure functions


RECORDED = {(0, 0): [0.014067035665647709, 0.2577672456246177], (3, 5): [0.24541119652384558, 0.9790942128425377]}


def test_uniforms_belong_to_seed_and_sample():
    numbers = torch.stack([uniforms(seed, i, 100) for seed in range(30) for i in range(30)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(numbers[:, 0].unique()) == 900, "no two samples share their numbers"
    assert abs(float(numbers.mean()) - 0.5) < 0.01 and abs(float(numbers.var()) - 1 / 12) < 0.005
    correlation = torch.corrcoef(numbers[:30])
    assert (correlation - torch.eye(30)).abs().max() < 0.5, "neighbouring samples are unrelated"
    assert torch.equal(uniforms(7, 1, 3), uniforms(7, 1, 9)[:3])
    # Fixed for ever: a change here changes every published sample.
    for (seed, index), wanted in RECORDED.items():
        assert uniforms(seed, index, 2).tolist() == wanted
    assert not torch.equal(uniforms(1 << 32, 0, 4), uniforms(0, 0, 4)), "all bits of the seed count"


def test_draw_follows_the_probabilities_and_never_takes_what_is_impossible():
    logits = torch.tensor([0.0, 2.0, -math.inf, 1.0, -math.inf])
    numbers = torch.cat([torch.arange(2000, dtype=torch.float64) / 2000, torch.tensor([1 - 2.0**-53])])
    codes = draw(logits.expand(2001, -1), numbers, SamplingSettings())
    counts = torch.bincount(codes, minlength=5) / 2001
    assert torch.allclose(counts, logits.softmax(0), atol=2e-3)
    assert codes[0] == 0 and codes[-1] == 3
    first = draw(torch.tensor([[-math.inf, 0.0]]), torch.zeros(1, dtype=torch.float64), SamplingSettings())
    assert first.tolist() == [1]


def test_draw_decides_each_row_alone():
    generator = torch.Generator().manual_seed(0)
    logits, numbers = torch.randn(50, 40, generator=generator), torch.rand(50, generator=generator).double()
    settings = SamplingSettings(top_k=9, top_p=0.8, temperature=0.7)
    alone = torch.cat([draw(logits[i : i + 1], numbers[i : i + 1], settings) for i in range(50)])
    assert torch.equal(draw(logits, numbers, settings), alone)


def slow_filter(row, temperature, top_k, top_p):
    """The same filters for one row, in plain Python and float64."""
    row = [value / temperature for value in row]
    kept = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or len(row)]
    total = sum(math.exp(row[i]) for i in kept)
    out, mass = set(), 0.0
    for i in kept:
        if mass < top_p or not out:
            out.add(i)
        mass += math.exp(row[i]) / total
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.5, 7, 1.0), (2.0, None, 0.6), (1.3, 9, 0.5), (1, 1, 1)]
)
def test_filters_match_the_slow_twin(temperature, top_k, top_p):
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(3)) * 2
    kept = torch.isfinite(filter_logits(logits, temperature, top_k, top_p))
    for row, mask in zip(logits.tolist(), kept, strict=True):
        assert set(mask.nonzero()[:, 0].tolist()) == slow_filter(row, temperature, top_k, top_p)


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert torch.isfinite(filter_logits(logits, top_p=0.5)).tolist() == [[True, False, False, False]]
    assert torch.isfinite(filter_logits(logits, top_p=0.51)).tolist() == [[True, True, False, False]]
    # top-p counts what top-k left: 0.5 and 0.25 become 2/3 and 1/3
    assert torch.isfinite(filter_logits(logits, top_k=2, top_p=0.6)).tolist() == [[True, False, False, False]]
    assert (
        torch.isfinite(filter_logits(logits, temperature=1e-30)).all()
        and not filter_logits(logits, 1e-30).isnan().any()
    )


def test_guide_is_u_plus_s_times_the_difference():
    c, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 3.0]])
    assert guide(c, u, 3.0).tolist() == [[2.0, 0.0]]
    assert torch.equal(guide(c, u, 0.0), u)


# -- models


@pytest.mark.parametrize("layout", [TWO, RESIDUAL, AUDIO, LARGE], ids=["two", "residual", "audio", "large"])
def test_samples_do_not_depend_on_their_batch(make_prior, layout):
    prior = make_prior(layout)
    size = (1900,) if layout is AUDIO else (15, 16)
    settings = {"guidance_scale": 2.0, "top_p": 0.95, "seed": 11}
    together = prior.sample_codes(CONDITIONS, sizes=size, num_samples=2, **settings)
    assert len(together) == 6 and together.sizes.tolist() == [list(size)] * 6
    assert same(together, prior.sample_codes(CONDITIONS, sizes=size, num_samples=2, batch_size=1, **settings))
    assert same(together, prior.sample_codes(CONDITIONS, sizes=size, num_samples=2, batch_size=4, **settings))
    assert same(together[:2], prior.sample_codes(CONDITIONS[:1], sizes=size, num_samples=2, **settings))
    assert len({tuple(level.flatten().tolist()) for one in together for level in one.levels[-1:]}) == 6, (
        "six different ones"
    )


def test_seed_guidance_and_condition_decide(make_prior):
    prior = make_prior(TWO)

    def sample(condition=CONDITIONS, seed=3, **settings):
        return prior.sample_codes(condition, sizes=(16, 16), seed=seed, **settings)

    assert same(sample(), sample())
    assert not same(sample(), sample(seed=4))
    assert same(sample(), sample(guidance_scale=1.0)) and same(sample(), sample(guidance_scale=1))
    assert not same(sample(), sample(guidance_scale=3.0))
    assert not same(sample(), sample(condition=[None] * 3)), "the condition is heard"
    assert same(sample(guidance_scale=0.0), sample(condition=[None] * 3)), "scale 0 is unconditional"
    assert same(sample(condition=[None] * 3, guidance_scale=5.0), sample(condition=[None] * 3))
    assert same(sample(top_k=1), sample(temperature=0))
    torch.manual_seed(5)
    one = sample(seed=None)
    assert not same(one, sample(seed=None))
    torch.manual_seed(5)
    assert same(one, sample(seed=None))


def test_guidance_of_one_runs_no_second_half(make_prior, watch_passes):
    prior, shapes = make_prior(TWO), watch_passes()
    prior.sample_codes(CONDITIONS, sizes=(8, 8), seed=0)
    assert {rows for rows, _ in shapes} == {3} and len(shapes) == 1 + 4, (
        "one pass for the prompt, one for every further code"
    )
    shapes.clear()
    prior.sample_codes(CONDITIONS, sizes=(8, 8), seed=0, guidance_scale=2)
    assert {rows for rows, _ in shapes} == {6} and len(shapes) == 1 + 4, "both halves in one batch"


@pytest.mark.parametrize("layout", [TWO, RESIDUAL, LARGE], ids=["two", "residual", "large"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "qwen3", "mistral"])
def test_scoring_finds_the_nats_collected_while_sampling(make_prior, monkeypatch, layout, backbone):
    prior, nats = make_prior(layout, backbone), []

    def watched(logits, numbers, settings):
        codes = draw(logits, numbers, settings)
        nats.append(-logits.log_softmax(1).gather(1, codes[:, None])[:, 0])
        return codes

    monkeypatch.setattr(stepping, "draw", watched)
    codes = prior.sample_codes(CONDITIONS, sizes=(16, 8), seed=2)
    scores = prior.score(codes, CONDITIONS)
    assert torch.allclose(torch.stack(nats).sum(0), scores.nats, atol=1e-3)
    assert (prior.score(codes).nats - scores.nats).abs().max() > 1e-2, "null and condition differ"
    assert torch.allclose(sum(m.flatten(1).sum(1) for m in scores.maps), scores.nats, atol=1e-4)


def test_sizes_are_announced_drawn_and_given(make_prior):
    prior = make_prior(TWO)
    drawn = prior.sample_codes(CONDITIONS, num_samples=6, seed=1, temperature=3.0)
    assert len(drawn) == 18 and len(drawn.sizes.unique(dim=0)) > 3
    assert (drawn.sizes % 8 == 0).all() and (drawn.sizes <= 32).all()
    assert same(drawn, prior.sample_codes(CONDITIONS, num_samples=6, seed=1, temperature=3.0, batch_size=5))
    # Given the very sizes that were drawn, the codes are the same ones: numbers for sizes are never used for codes.
    one_each = prior.sample_codes(CONDITIONS, seed=1, temperature=3.0)
    assert len(one_each.sizes.unique(dim=0)) > 1
    again = prior.sample_codes(CONDITIONS, sizes=one_each.sizes.tolist(), seed=1, temperature=3.0)
    assert same(one_each, again)
    sizes = [[8, 8], [16, 24], [32, 8], [7, 5]]
    mixed = prior.sample_codes([*CONDITIONS, [7]], sizes=sizes, seed=0)
    assert mixed.sizes.tolist() == sizes
    assert [tuple(one.levels[0].shape[2:]) for one in mixed] == [(1, 1), (2, 3), (4, 1), (1, 1)]


def test_the_first_numbers_of_a_sample_are_for_its_size(make_prior, monkeypatch):
    prior, numbers = make_prior(TWO), []
    monkeypatch.setattr(stepping, "draw", lambda logits, u, settings: numbers.append(u) or draw(logits, u, settings))
    prior.sample_codes(CONDITIONS, sizes=(8, 8), seed=4)
    given = torch.stack(numbers, 1)
    numbers.clear()
    prior.sample_codes(CONDITIONS, seed=4, batch_size=1)
    wanted = torch.stack([uniforms(4, i, 7) for i in range(3)])
    assert torch.equal(given, wanted[:, 2:])
    assert torch.equal(torch.stack([torch.cat(numbers[at : at + 2]) for at in (0, 2, 4)]), wanted[:, :2])


@pytest.mark.parametrize("backbone", ["llama", "gpt2", "qwen3", "mistral"])
@pytest.mark.parametrize("layout", [TWO, RESIDUAL], ids=["two", "residual"])
def test_generate_of_transformers_is_greedy_sampling(make_prior, layout, backbone):
    prior = make_prior(layout, backbone)
    vocabulary, condition = prior.vocabulary, [3, 1, 4]
    wanted = prior.sample_codes([condition], temperature=0)
    begin = vocabulary.special_id("begin")
    ids = prior.generate(torch.tensor([[*condition, begin]]), do_sample=False)[0].tolist()
    grid = [token - vocabulary.size_offset + 1 for token in ids[4:6]]
    assert [n * 8 for n in grid] == wanted.sizes[0].tolist()
    levels = [level[0].movedim(0, -1).flatten() for level in vocabulary.to_ids(wanted.levels)]
    assert ids[6:] == [*torch.cat(levels).tolist(), prior.null_id], "and null ends it"
    assert prior.generate(torch.tensor([condition]), do_sample=False)[0].tolist() == ids, "begin may be left to it"


def test_generate_takes_a_padded_batch_of_prompts(make_prior):
    prior = make_prior(TWO)
    begin, offset = prior.vocabulary.special_id("begin"), prior.vocabulary.size_offset
    rows = [[0, 0, 3], [1, 4, 1]]
    ids = torch.tensor([[*row, begin, offset + 1, offset] for row in rows])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    out = prior.generate(ids, attention_mask=mask, do_sample=False)
    wanted = prior.sample_codes([[3], [1, 4, 1]], sizes=(16, 8), temperature=0)
    levels = torch.cat([level.flatten(1) for level in prior.vocabulary.to_ids(wanted.levels)], 1)
    assert torch.equal(out[:, 6:-1], levels)
    uncached = prior.generate(ids, attention_mask=mask, do_sample=False, use_cache=False)
    assert torch.equal(out, uncached)
    torch.manual_seed(0)
    sampled = prior.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (6, 17) and all(
        prior.vocabulary.locate(int(i))[:2] == ("code", 1) for i in sampled[:, 8:16].flatten()
    )


def test_generate_refuses_guidance_and_torn_histories(make_prior):
    prior = make_prior(TWO)
    prior.generation_config.guidance_scale = 3.0
    with pytest.raises(ValueError, match=r"guidance_scale 3\.0.*sample_codes"):
        prior.generate(torch.tensor([[3]]))
    assert prior.generate(torch.tensor([[3]]), guidance_scale=1, do_sample=False).shape[0] == 1
    begin = prior.vocabulary.special_id("begin")
    with pytest.raises(ValueError, match="columns"):
        prior(input_ids=torch.tensor([[3, begin], [begin, 30]]))
    with pytest.raises(ValueError, match="history_ids"):
        cache = prior(input_ids=torch.tensor([[3, begin]]), use_cache=True).past_key_values
        prior(input_ids=torch.tensor([[30]]), past_key_values=cache)
    with pytest.raises(ValueError, match="max_grid 4"):
        prior(input_ids=torch.tensor([[3, begin, 3]]))


def test_defaults_come_from_the_generation_config(make_prior):
    prior = make_prior(TWO)
    explicit = prior.sample_codes(
        CONDITIONS, sizes=(16, 16), seed=0, guidance_scale=2.0, temperature=0.8, top_k=3, top_p=0.9
    )
    for name, value in {"guidance_scale": 2.0, "temperature": 0.8, "top_k": 3, "top_p": 0.9}.items():
        setattr(prior.generation_config, name, value)
    assert same(explicit, prior.sample_codes(CONDITIONS, sizes=(16, 16), seed=0))
    assert not same(explicit, prior.sample_codes(CONDITIONS, sizes=(16, 16), seed=0, top_k=11))


def test_sampling_in_train_mode_is_sampling_in_eval_mode(make_prior):
    prior = make_prior(TWO, "gpt2", condition_dropout=0.9)
    wanted = prior.sample_codes(CONDITIONS, sizes=(16, 16), seed=0)
    prior.train()
    assert same(wanted, prior.sample_codes(CONDITIONS, sizes=(16, 16), seed=0)) and prior.training


def test_classes_and_no_condition(make_prior):
    by_class = make_prior(TWO, condition="class", text_size=10)
    codes = by_class.sample_codes(torch.tensor([3, 7]), sizes=(8, 8), num_samples=2, guidance_scale=2, seed=0)
    assert same(codes, by_class.sample_codes([3, 7], sizes=(8, 8), num_samples=2, guidance_scale=2, seed=0))
    without = make_prior(TWO, condition="none", text_size=0)
    assert len(without.sample_codes(num_samples=3, sizes=(8, 8), seed=0)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature .* got -1"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"top_k": 0}, "top_k .* got 0"),
        ({"top_k": 2.5}, "top_k .* got 2.5"),
        ({"top_p": 0.0}, r"top_p .* got 0\.0"),
        ({"top_p": 1.5}, r"top_p .* got 1\.5"),
        ({"guidance_scale": -2}, "guidance_scale .* got -2"),
        ({"guidance_scale": "3"}, "guidance_scale .* got '3'"),
        ({"seed": -1}, "seed .* got -1"),
        ({"seed": 1.0}, r"seed .* got 1\.0"),
        ({"num_samples": 0}, "num_samples .* got 0"),
        ({"batch_size": 0}, "batch_size .* got 0"),
        ({"sizes": (8,)}, "2 axes"),
        ({"sizes": (8, 0)}, "at least 1"),
        ({"sizes": (8, 40)}, "max_grid 4"),
        ({"sizes": (8.5, 8)}, "whole numbers"),
        ({"sizes": [[8, 8], [8, 8]]}, "2 sizes for 1 conditions"),
        ({"condition": [[1] * 9]}, "takes 1 to 8 tokens"),
        ({"condition": [[]]}, "a condition of 0 ids"),
        ({"condition": [[20]]}, r"condition id 20 is outside \[0, 20\)"),
        ({"condition": []}, "0 conditions given: give at least one"),
        ({"condition": "a red three"}, "put it in a list"),
        ({"condition": ["a red three"]}, "ids"),
        ({"condition": [["a"]]}, "whole numbers"),
        ({"condition": [1.5]}, "whole numbers"),
        ({"condition": [True]}, "whole numbers"),
        ({"sizes": 16}, "2 axes"),
        ({"sizes": [[8, 8], 8]}, "2 sizes for 1"),
        ({"guidance_schedule": "steep"}, "guidance_schedule must be one of .* got 'steep'"),
    ],
)
def test_bad_arguments_are_named(make_prior, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_prior(TWO).sample_codes(**{"condition": [[3]], "sizes": (8, 8), **arguments})


def test_guidance_needs_something_to_guide_from(make_prior):
    with pytest.raises(ValueError, match="made without"):
        make_prior(TWO, condition="none", text_size=0).sample_codes(sizes=(8, 8), guidance_scale=2.0)
    never_dropped = make_prior(TWO, condition_dropout=0.0)
    with pytest.raises(ValueError, match="condition_dropout 0"):
        never_dropped.sample_codes([[3]], sizes=(8, 8), guidance_scale=2.0)
    with pytest.raises(ValueError, match="knows no null condition"):
        never_dropped.sample_codes(sizes=(8, 8))
    assert len(never_dropped.sample_codes([[3]], sizes=(8, 8))) == 1


def test_a_diverged_prior_says_so(make_prior):
    prior = make_prior(TWO)
    torch.nn.init.constant_(prior.place_embed.level.weight, float("nan"))
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="not finite"):
            prior.sample_codes(CONDITIONS, sizes=(16, 16), temperature=temperature)
