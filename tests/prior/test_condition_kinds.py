"""Every kind of condition in every order: batches, null conditions, guidance, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqtok.codes import CodeLayout, Codes
from vqtok.prior import CodePriorConfig
from vqtok.prior.condition_codes import code_ids, codes_of_ids, condition_length
from vqtok.prior.sequence import pad_conditions, pad_features
from vqtok.vocabulary import CodeVocabulary

TWO = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 1, "codebook_size": k} for s, k in ((8, 11), (4, 7))]}
RESIDUAL = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 2, "codebook_size": 6} for s in (8, 4)]}
OTHER = {"ndim": 1, "levels": [{"stride": s, "num_codebooks": q, "codebook_size": 9} for s, q in ((4, 1), (2, 2))]}
ORDERS = {"flat": TWO, "delay": RESIDUAL, "depth": RESIDUAL, "next_scale": TWO}
KINDS = {
    "text": {},
    "class": {"text_size": 5},
    "features": {"text_size": 0, "feature_size": 12},
    "codes": {"text_size": 0, "max_text_length": 16, "condition_layout": OTHER, "condition_fingerprint": "a" * 64},
    "none": {"text_size": 0},
}


def other_codes(*frames, fingerprint="a" * 64, seed=0):
    """One sample of `OTHER` for each number of coarse frames."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in frames:
        levels = (
            torch.randint(9, (1, 1, count), generator=generator),
            torch.randint(9, (1, 2, 2 * count), generator=generator),
        )
        parts.append(Codes(levels, [[4 * count]], CodeLayout.from_dict(OTHER), fingerprint))
    return parts


def conditions(kind):
    """Conditions of different length, a null one among them."""
    generator = torch.Generator().manual_seed(0)
    return {
        "text": [[3], None, [1, 4, 1, 5, 9], [2, 6]],
        "class": [3, None, 0, 4],
        "features": [torch.randn(3, 12, generator=generator), None, *(torch.randn(n, 12) for n in (8, 1))],
        "codes": [*other_codes(2), None, *other_codes(3, 1, seed=1)],
        "none": [None] * 4,
    }[kind]


def same(a, b):
    return torch.equal(a.sizes, b.sizes) and all(torch.equal(x, y) for x, y in zip(a.levels, b.levels, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_prompts_draws_what_each_draws_alone(make_prior, kind, order):
    prior = make_prior(ORDERS[order], order=order, condition=kind, **KINDS[kind])
    rows, options = conditions(kind), {"sizes": (16, 16), "guidance_scale": 1.5 if kind != "none" else 1.0}
    whole = prior.sample_codes(rows, seed=5, **options)
    for count in (1, 2, 3):
        assert same(prior.sample_codes(rows, seed=5, batch_size=count, **options), whole)
    # Sample i has the numbers of i: alone, it is the last of a batch whose others differ.
    for index, row in enumerate(rows):
        beside = prior.sample_codes([None] * index + [row], seed=5, **options)
        assert same(beside[[index]], whole[[index]])
    if kind != "none":
        longest = [rows[2]] * len(rows)
        assert not same(prior.sample_codes(longest, seed=5, **options), whole), "the condition matters"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_batch_are_those_of_each_alone(make_prior, random_codes, kind, order):
    layout = ORDERS[order]
    prior = make_prior(layout, order=order, condition=kind, **KINDS[kind])
    codes = Codes(random_codes(layout, 4, (2, 2)), [[16, 16]] * 4, CodeLayout.from_dict(layout))
    rows = conditions(kind)
    nats = prior.score(codes, rows).nats
    alone = torch.cat([prior.score(codes[[i]], [rows[i]]).nats for i in range(4)])
    assert (nats - alone).abs().max() < 1e-5 * nats.max()
    assert (kind == "none") == torch.allclose(prior.score(codes, None).nats, nats, rtol=1e-3)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_lengths_in_one_batch(make_prior_once, data):
    kind = data.draw(st.sampled_from(["text", "features", "codes"]))
    order = data.draw(st.sampled_from(sorted(ORDERS)))
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=4))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    make = {
        "text": lambda n: torch.randint(20, (n,), generator=generator).tolist(),
        "features": lambda n: torch.randn(n, 12, generator=generator),
        "codes": lambda n: other_codes(n, seed=seed)[0],
    }[kind]
    rows = [make(n) if n else None for n in lengths]
    prior = make_prior_once(kind, order)
    options = {"sizes": (8, 16), "seed": seed, "guidance_scale": 2.0, "guidance_schedule": "cosine"}
    assert same(prior.sample_codes(rows, **options), prior.sample_codes(rows, batch_size=1, **options))


@pytest.fixture(scope="module")
def make_prior_once(make_prior):
    priors = {}

    def make(kind, order):
        if (kind, order) not in priors:
            priors[kind, order] = make_prior(ORDERS[order], order=order, condition=kind, **KINDS[kind])
        return priors[kind, order]

    return make


@pytest.mark.parametrize("kind", ["text", "features", "codes"])
def test_training_reads_what_sampling_reads(make_prior, random_codes, kind):
    """The loss of a padded batch is what `score` says of conditions given as rows."""
    prior = make_prior(condition=kind, **KINDS[kind])
    levels = random_codes(TWO, 4, (2, 2))
    codes, rows = Codes(levels, [[16, 16]] * 4, CodeLayout.from_dict(TWO)), conditions(kind)
    if kind == "features":
        features, mask = pad_features(rows, 12)
        output = prior(codes=levels, condition_features=features, condition_mask=mask)
    else:
        ids = rows
        if kind == "codes":
            vocabulary = prior.config.condition_vocabulary
            ids = [row and code_ids([level[0] for level in row.levels], vocabulary) for row in rows]
        padded, mask = pad_conditions([row or [] for row in ids])
        output = prior(codes=levels, condition_ids=padded, condition_mask=mask)
    assert torch.allclose(output.nats_per_code, prior.score(codes, rows).nats_per_code.mean(0), atol=1e-5)
    assert output.text_loss is None


def test_dropped_features_are_the_null_condition(make_prior, random_codes):
    prior = make_prior(condition="features", condition_dropout=0.999999, **KINDS["features"]).train()
    codes, features = random_codes(TWO, 3, (2, 2)), torch.randn(3, 5, 12)
    loss = prior(codes=codes, condition_features=features).loss
    assert torch.allclose(loss, prior(codes=codes).loss, atol=1e-5)
    loss.backward()
    null = prior.get_input_embeddings().weight.grad[prior.null_id]
    assert null.abs().max() > 0 and prior.feature_proj.weight.grad.abs().max() == 0


def test_features_train_their_projection_and_their_scale_does_not_matter(make_prior, random_codes):
    prior = make_prior(condition="features", **KINDS["features"])
    codes, features = random_codes(TWO, 3, (2, 2)), torch.randn(3, 5, 12)
    loss = prior(codes=codes, condition_features=features).loss
    loss.backward()
    assert prior.feature_proj.weight.grad.abs().max() > 0
    assert torch.allclose(prior(codes=codes, condition_features=100 * features).loss, loss, atol=1e-4)


# -- codes as ids


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ids_of_codes_are_exact(data):
    ndim = data.draw(st.integers(1, 2))
    sizes = st.sampled_from([1, 2, 300, 1 << 17])
    stride = 1 << data.draw(st.integers(0, 2))
    levels, strides = [], [stride] if data.draw(st.booleans()) else [2 * stride, stride]
    for each in strides:
        levels.append(
            {"stride": each, "num_codebooks": data.draw(st.integers(1, 3)), "codebook_size": data.draw(sizes)}
        )
    layout = CodeLayout.from_dict({"ndim": ndim, "levels": levels})
    grid = [data.draw(st.integers(1, 3)) for _ in range(ndim)]
    size = [n * layout.stride for n in grid]
    codes = tuple(
        torch.randint(level.codebook_size, (level.num_codebooks, *grid))
        for level, grid in zip(layout.levels, layout.grids(size), strict=True)
    )
    vocabulary = CodeVocabulary(layout, 0, 100, 1)
    ids = code_ids(codes, vocabulary)
    assert len(ids) == condition_length(layout, size) and min(ids) >= 2 and max(ids) < vocabulary.size
    back = codes_of_ids(ids, vocabulary)
    assert all(torch.equal(a, b) for a, b in zip(codes, back, strict=True))


def test_ids_of_codes_by_hand():
    vocabulary = CodeVocabulary(CodeLayout.from_dict(OTHER), 0, 16, 1)
    codes = (torch.tensor([[7]]), torch.tensor([[0, 1], [2, 3]]))
    first, second, third = 2 + 16, 2 + 16 + 9, 2 + 16 + 18
    assert code_ids(codes, vocabulary) == [2, first + 7, second, third + 2, second + 1, third + 3]
    config = CodePriorConfig(layout=TWO, condition="codes", condition_layout=OTHER, max_text_length=16)
    assert config.text_size == 2 + 16 + 27 == vocabulary.size and config.prefix_length == 16
    assert CodePriorConfig.from_dict(config.to_dict()).text_size == config.text_size


def test_grids_of_equally_many_codes_differ():
    layout = CodeLayout.from_dict({"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 5}]})
    vocabulary = CodeVocabulary(layout, 0, 9, 1)
    assert code_ids((torch.zeros(1, 1, 4).long(),), vocabulary) != code_ids((torch.zeros(1, 2, 2).long(),), vocabulary)


# -- schedules


@pytest.mark.parametrize("order", ORDERS)
def test_schedules_of_guidance(make_prior, order):
    prior = make_prior(ORDERS[order], order=order)
    options = {"condition": [[3], [1, 4]], "sizes": (16, 16), "seed": 2, "num_samples": 4, "guidance_scale": 3.0}
    constant = prior.sample_codes(**options)
    assert same(prior.sample_codes(guidance_schedule="constant", **options), constant)
    linear = prior.sample_codes(guidance_schedule="linear", **options)
    cosine = prior.sample_codes(guidance_schedule="cosine", **options)
    two_steps = order == "next_scale"  # begin and end are the same for both
    assert not same(linear, constant) and same(cosine, linear) == two_steps
    prior.generation_config.guidance_schedule = "linear"
    assert same(prior.sample_codes(**options), linear), "a stored one is the default"
    with pytest.raises(ValueError, match="guidance_schedule must be .* got 'square'"):
        prior.sample_codes(guidance_schedule="square", **options)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("side", [8, 24])
def test_schedules_end_at_the_scale(make_prior, monkeypatch, schedule, side):
    """At the last step, of many or of one."""
    from vqtok.prior import stepping

    seen = []
    true = stepping.guide
    monkeypatch.setattr(stepping, "guide", lambda c, u, scale: seen.append(scale) or true(c, u, scale))
    prior = make_prior({"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 5}]})
    prior.sample_codes([[3]], sizes=(side, side), guidance_scale=4.0, guidance_schedule=schedule)
    codes = (side // 8) ** 2
    assert len(seen) == codes and seen[-1] == 4.0
    progress = [index / max(1, codes - 1) for index in range(codes)]
    wanted = {
        "constant": [1.0] * codes,
        "linear": progress,
        "cosine": [math.sin(p * math.pi / 2) ** 2 for p in progress],
    }
    if codes > 1:
        assert seen == pytest.approx([1 + 3 * way for way in wanted[schedule]])


# -- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"condition": "sound"}, "'text', 'class', 'features', 'codes', 'none'"),
        ({"condition": "features"}, "feature_size must be the width"),
        ({"condition": "features", "feature_size": 3, "text_size": 4}, "text_size must be 0"),
        ({"condition": "text", "text_size": 4, "feature_size": 3}, "feature_size must be 0"),
        ({"condition": "codes"}, "condition_layout must be the dict"),
        ({"condition": "codes", "condition_layout": OTHER, "text_size": 7}, "text_size must be 93"),
        ({"condition": "none", "condition_layout": OTHER}, "condition_layout must be None"),
        ({"condition": "class", "text_size": 4, "condition_fingerprint": "x"}, "condition_fingerprint must be None"),
        (
            {"condition": "text", "text_size": 4, "text_loss_weight": 1.0},
            r"text_loss_weight must be a share .* \[0, 1\)",
        ),
        ({"condition": "class", "text_size": 4, "text_loss_weight": 0.1}, "text_loss_weight must be 0 without"),
    ],
)
def test_bad_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CodePriorConfig(layout=TWO, **fields)


def test_bad_conditions_are_named_before_any_work(make_prior, random_codes, monkeypatch):
    reading, codes = make_prior(condition="features", **KINDS["features"]), random_codes(TWO, 2, (2, 2))
    monkeypatch.setattr(reading.backbone, "forward", lambda **_: pytest.fail("work was done"))
    for bad, message in [
        ([torch.zeros(3, 11)], "feature_size=12.*got torch.float32 .*11"),
        ([torch.zeros(3, 12, dtype=torch.int64)], "must be float"),
        ([torch.zeros(12)], "must be float"),
        ([torch.zeros(9, 12)], "features of 9 tokens do not fit: this prior takes 1 to 8"),
        ([torch.zeros(0, 12)], "features of 0 tokens"),
        ([torch.full((1, 12), math.nan)], "not finite"),
        ([[3, 4]], "conditions are features"),
        (["a red three"], "conditions are features"),
    ]:
        with pytest.raises(ValueError, match=message):
            reading.sample_codes(bad, sizes=(16, 16))
    with pytest.raises(ValueError, match="not ids"):
        reading(codes=codes, condition_ids=torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match="B=2"):
        reading(codes=codes, condition_features=torch.zeros(1, 3, 12))
    with pytest.raises(ValueError, match="padded on the left"):
        reading(codes=codes, condition_features=torch.zeros(2, 2, 12), condition_mask=torch.tensor([[1, 0]] * 2))
    with pytest.raises(ValueError, match="use sample_codes"):
        reading.generate(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="condition 'text' and takes no condition_features"):
        make_prior()(codes=codes, condition_features=torch.zeros(2, 3, 12))
    with pytest.raises(ValueError, match="not both"):
        make_prior()(codes=codes, condition_ids=torch.tensor([[1]] * 2), condition_features=torch.zeros(2, 3, 12))


def test_bad_codes_as_conditions_are_named(make_prior):
    prior = make_prior(condition="codes", **KINDS["codes"])
    good = other_codes(2)[0]
    with pytest.raises(ValueError, match=f"{'b' * 64}.*{'a' * 64}"):
        prior.sample_codes(other_codes(2, fingerprint="b" * 64), sizes=(16, 16))
    layout = CodeLayout.from_dict(TWO)
    with pytest.raises(ValueError, match="codes of the condition have the layout"):
        wrong = Codes((torch.zeros(1, 1, 1, 1).long(), torch.zeros(1, 1, 2, 2).long()), [[8, 8]], layout)
        prior.sample_codes(wrong, sizes=(16, 16))
    with pytest.raises(ValueError, match="all levels with all codebooks"):
        prior.sample_codes(Codes(good.levels[:1], good.sizes, good.layout), sizes=(16, 16))
    with pytest.raises(ValueError, match="condition 0 of size .* makes 21 ids, this prior takes at most 16"):
        prior.sample_codes(other_codes(4), sizes=(16, 16))
    with pytest.raises(ValueError, match="one sample per entry"):
        prior.sample_codes([Codes.cat([good, good])], sizes=(16, 16))
    assert len(prior.sample_codes(Codes.cat([good, good]), sizes=(16, 16))) == 2
    never = make_prior(condition="codes", condition_dropout=0, **KINDS["codes"])
    with pytest.raises(ValueError, match="guidance_scale 2 needs the null condition"):
        never.sample_codes(good, sizes=(16, 16), guidance_scale=2)
    with pytest.raises(ValueError, match="knows no null condition"):
        never.sample_codes([good, None], sizes=(16, 16))
