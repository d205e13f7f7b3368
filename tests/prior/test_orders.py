"""Every order: against the slow twin, alone and in batches, while sampling and while scoring, with windows, ends and given levels."""

import itertools
import math

import pytest
import torch
from torch import nn

from tests.prior.slow_prior import slow_nats
from vqtok.codes import Codes
from vqtok.prior import Known, stepping
from vqtok.prior.sampling import draw

TWO = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 1, "codebook_size": k} for s, k in ((8, 11), (4, 7))]}
RESIDUAL = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": q, "codebook_size": 6} for s, q in ((8, 2), (4, 3))]}
AUDIO = {"ndim": 1, "levels": [{"stride": 320, "num_codebooks": 3, "codebook_size": 9}]}
RATES = {"ndim": 1, "levels": [{"stride": s, "num_codebooks": q, "codebook_size": 9} for s, q in ((640, 1), (320, 2))]}
LARGE = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 1 << 17}]}
SCALES = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 1, "codebook_size": 8} for s in (16, 8, 4)]}
CONDITIONS = [[3], [1, 4, 1, 5, 9], [2, 6]]
# name: layout, fields of the config, size
CASES = {
    "flat": (TWO, {}, (16, 8)),
    "delay": (RESIDUAL, {"order": "delay"}, (16, 8)),
    "delay of factors": (LARGE, {"order": "delay"}, (16, 16)),
    "depth": (RESIDUAL, {"order": "depth"}, (8, 16)),
    "depth over audio": (RATES, {"order": "depth"}, (1900,)),
    "next scale": (SCALES, {"order": "next_scale"}, (16, 32)),
    "next scale, residual": (RESIDUAL, {"order": "next_scale"}, (16, 8)),
    "top": (TWO, {"num_levels": 1}, (16, 24)),
    "bottom": (TWO, {"first_level": 1}, (16, 24)),
    "bottom by depth": (RESIDUAL, {"first_level": 1, "order": "depth"}, (8, 16)),
    "middle by delay": (RATES, {"first_level": 1, "order": "delay"}, (1900,)),
    "two of three": (SCALES, {"first_level": 1, "order": "next_scale"}, (16, 32)),
    "windows": (TWO, {"window": 6}, (16, 16)),
    "windows by delay": (AUDIO, {"order": "delay", "window": 4}, (3200,)),
    "windows by depth": (RESIDUAL, {"order": "depth", "window": 4}, (16, 16)),
    "windows below": (TWO, {"first_level": 1, "window": 5}, (16, 16)),
}
ENDING = {
    "frames": (RATES, {"stops": True}),
    "one level": (AUDIO, {"stops": True}),
    "delay": (AUDIO, {"stops": True, "order": "delay"}),
    "depth": (RATES, {"stops": True, "order": "depth"}),
    "windows": (AUDIO, {"stops": True, "window": 5}),
}


def same(a, b):
    equal = len(a.levels) == len(b.levels) and all(torch.equal(x, y) for x, y in zip(a.levels, b.levels, strict=True))
    return equal and torch.equal(a.sizes, b.sizes)


def make(make_prior, case, scale=3.0, **more):
    layout, fields, *_ = {**CASES, **{f"ends: {name}": value for name, value in ENDING.items()}}[case]
    fields = {"max_grid": 10 if layout["ndim"] == 1 else 4, **fields, **more}
    prior = make_prior(layout, scale=scale, **fields)
    for module in getattr(
        prior, "conditioner", nn.Module()
    ).modules():  # blocks start as the identity, which hides mistakes
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
    if hasattr(prior, "end_head"):
        nn.init.constant_(prior.end_head.bias, -1.0)
    return prior


def coarse_of(prior, random_codes, size, batch=1, seed=5):
    """Given levels for a finer stage: None for others."""
    layout = prior.vocabulary.layout
    if not prior.config.first_level:
        return None
    grid = layout.grids(size)[0]
    levels = random_codes(prior.config.layout, batch, grid, seed)[: prior.config.first_level]
    return Codes(levels, [list(size)] * batch, layout)


def windows_of(prior, units):
    windows = prior._windows
    return [None] if windows is None else [(start, start + windows.length) for start in windows.starts(units)]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_scores_are_those_of_the_slow_twin(make_prior, random_codes, case):
    prior, size = make(make_prior, case), CASES[case][2]
    layout = prior.vocabulary.layout
    levels = random_codes(prior.config.layout, 2, layout.grids(size)[0])
    codes, conditions = Codes(levels, [list(size)] * 2, layout), [[3], [1, 4, 1]]
    scores = prior.score(codes, conditions)
    own = prior.config.own_levels
    assert len(scores.maps) == len(levels[own]) and scores.nats_per_code.shape == (2, len(levels[own]))
    for sample in range(2):
        one = [level[sample : sample + 1] for level in levels]
        table = prior._table(prior._shapes(layout.grids(size)))
        wanted = {}
        for window in windows_of(prior, len(table.step_U)):
            found = slow_nats(prior, one, conditions[sample], window=window)[0]
            wanted = {**found, **wanted}  # what an earlier window predicted stays
        factors = [shape[0] // level.shape[1] for shape, level in zip(table.shapes, levels[own], strict=True)]
        for level, nats in enumerate(scores.maps):
            for q, at in itertools.product(range(nats.shape[1]), itertools.product(*map(range, nats.shape[2:]))):
                slow = sum(wanted[level, q * factors[level] + f, at] for f in range(factors[level]))
                assert math.isclose(float(nats[(sample, q, *at)]), slow, abs_tol=2e-4), (case, level, q, at)
        assert len(wanted) == len(table)
        assert math.isclose(float(scores.nats[sample]), sum(wanted.values()), rel_tol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_mean_of_the_scores(make_prior, random_codes, case):
    prior, size = make(make_prior, case), CASES[case][2]
    layout = prior.vocabulary.layout
    levels = random_codes(prior.config.layout, 2, layout.grids(size)[0])
    output = prior(codes=levels, condition_ids=torch.tensor([[3, 1], [4, 1]]))
    scores = prior.score(Codes(levels, [list(size)] * 2, layout), [[3, 1], [4, 1]])
    assert torch.allclose(output.nats_per_code, scores.nats_per_code.mean(0), atol=1e-4)
    prior.train()
    torch.manual_seed(0)
    prior(codes=levels, condition_ids=torch.tensor([[3, 1], [4, 1]])).loss.backward()
    used = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Only tables of which no row was used: of axes and codebooks that nothing here has.
    assert used == [], "every part learns"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling_collects_what_scoring_finds_alone_and_in_any_batch(
    make_prior, random_codes, monkeypatch, case, guidance
):
    prior, size, nats = make(make_prior, case), CASES[case][2], []
    known = coarse_of(prior, random_codes, size, 3)

    def watched(logits, numbers, settings):
        codes = draw(logits, numbers, settings)
        nats.append(-logits.log_softmax(1).gather(1, codes[:, None])[:, 0].view(3, -1).sum(1))
        return codes

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "draw", watched)
        codes = prior.sample_codes(CONDITIONS, sizes=size, seed=2, guidance_scale=guidance, known=known)
    if guidance == 1:
        scored = Codes(
            [*codes.levels, *(random_codes(prior.config.layout, 3, prior.vocabulary.layout.grids(size)[0])[len(codes.levels):])],
            codes.sizes, codes.layout,
        )  # fmt: skip
        assert torch.allclose(torch.stack(nats).sum(0), prior.score(scored, CONDITIONS).nats, atol=1e-3)
        assert (prior.score(scored).nats - prior.score(scored, CONDITIONS).nats).abs().max() > 1e-2
    for i in range(3):
        alone = prior.sample_codes(
            CONDITIONS[: i + 1], sizes=size, seed=2, guidance_scale=guidance, batch_size=1,
            known=None if known is None else known[list(range(i + 1))],
        )  # fmt: skip
        assert same(alone[i], codes[i])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_no_unit_sees_what_it_predicts_or_what_comes_later(make_prior, random_codes, case):
    """Change one code: nothing of its own step or before it may change."""
    prior, size = make(make_prior, case), CASES[case][2]
    layout = prior.vocabulary.layout
    levels = random_codes(prior.config.layout, 1, layout.grids(size)[0])
    own = range(len(layout.levels))[prior.config.own_levels]
    table = prior._table(prior._shapes(layout.grids(size)))
    before = prior.score(Codes(levels, [list(size)], layout), [[3]]).maps
    changed_something = 0
    for level in own:
        where = (0, levels[level].shape[1] - 1, *[(n - 1) // 2 for n in levels[level].shape[2:]])
        other = [values.clone() for values in levels]
        other[level][where] = (other[level][where] + 1) % layout.levels[level].codebook_size
        after = prior.score(Codes(other, [list(size)], layout), [[3]]).maps
        factor = table.shapes[level - own[0]][0] // levels[level].shape[1]
        mine = (table.level_P == level - own[0]) & (table.codebook_P == where[1] * factor)
        mine &= (table.coord_PA == torch.tensor(where[2:])).all(1)
        step = int(table.step_P[mine])
        for at, (a, b) in enumerate(zip(before, after, strict=True)):
            for q, place in itertools.product(range(a.shape[1]), itertools.product(*map(range, a.shape[2:]))):
                if (at, q, place) == (level - own[0], where[1], where[2:]):
                    continue
                factors = table.shapes[at][0] // a.shape[1]
                those = (table.level_P == at) & (table.codebook_P // factors == q)
                those &= (table.coord_PA == torch.tensor(place)).all(1)
                if int(table.step_P[those].max()) <= step and prior.config.order != "depth":
                    assert a[(0, q, *place)] == b[(0, q, *place)]
                changed_something += int(a[(0, q, *place)] != b[(0, q, *place)])
    assert changed_something or case in ("top",), "and it does change later ones"


@pytest.mark.parametrize("case", CASES)
def test_a_prior_that_knows_nothing_scores_ln_k(make_prior, random_codes, case):
    prior, size = make(make_prior, case), CASES[case][2]
    nn.init.zeros_(prior.lm_head.weight)
    layout = prior.vocabulary.layout
    levels = random_codes(prior.config.layout, 2, layout.grids(size)[0])
    scores = prior.score(Codes(levels, [list(size)] * 2, layout), [[3], [4]])
    own = layout.levels[prior.config.own_levels]
    wanted = torch.tensor([math.log(level.codebook_size) for level in own])
    assert torch.allclose(scores.nats_per_code, wanted.expand(2, -1), rtol=1e-6)


@pytest.mark.parametrize("case", [name for name, (_, fields, _) in CASES.items() if fields.get("first_level")])
@torch.no_grad()
def test_given_levels_are_heard(make_prior, random_codes, case):
    prior, size = make(make_prior, case), CASES[case][2]
    layout = prior.vocabulary.layout
    levels = random_codes(prior.config.layout, 1, layout.grids(size)[0])
    right = prior.score(Codes(levels, [list(size)], layout), [[3]])
    wrong_levels = [(values + 1) % layout.levels[i].codebook_size if i < prior.config.first_level else values
                    for i, values in enumerate(levels)]  # fmt: skip
    wrong = prior.score(Codes(wrong_levels, [list(size)], layout), [[3]])
    assert (right.nats - wrong.nats).abs() > 1e-2
    known = coarse_of(prior, random_codes, size)
    drawn = prior.sample_codes([[3]], seed=0, known=known)
    assert all(torch.equal(a, b) for a, b in zip(drawn.levels, known.levels, strict=False))
    assert drawn.sizes.tolist() == [list(size)] and len(drawn.levels) == len(layout.levels)
    with pytest.raises(ValueError, match="pass them as known"):
        prior.sample_codes([[3]], sizes=size, seed=0)


# -- time series that end by themselves


@pytest.mark.parametrize("case", ENDING)
@torch.no_grad()
def test_series_of_different_length_in_a_batch_are_those_alone_and_the_slow_twins(make_prior, random_codes, case):
    prior = make(make_prior, f"ends: {case}")
    layout = prior.vocabulary.layout
    frames, conditions = [3, 6, 1], [[3, 1], [4, 1], [5, 9]]
    stride = layout.stride
    parts = [Codes(random_codes(prior.config.layout, 1, (n,), seed=n), [[n * stride - 5]], layout) for n in frames]
    together = Codes.cat(parts)
    ids = torch.tensor(conditions)
    output = prior(codes=together.levels, sizes=together.sizes, condition_ids=ids)
    sums, count, ends = 0.0, 0, 0
    scores = prior.score(together, conditions)
    for i, part in enumerate(parts):
        grids = prior._with_room(layout.grids(part.sizes[0].tolist()))
        table = prior._table(prior._shapes(grids))
        wanted, slow_ends = {}, {}
        for window in windows_of(prior, len(table.step_U)):
            nats, decided = slow_nats(prior, part.levels, conditions[i], frames[i], window)
            wanted = {**nats, **wanted}
            start = 0 if window is None else window[0]
            # Decisions of a window: those of the frames whose first unit it predicts.
            asked = [step.frame for step in table.steps if step.frame and step.frame <= frames[i]
                     and (window is None or (start == 0) * (step.number < window[1]) or window[0] <= step.number < window[1])]  # fmt: skip
            asked = [f for f in asked if window is None or start == 0 or first_unit(table, f) >= start]
            slow_ends = {**dict(zip(asked, decided, strict=True)), **slow_ends}
        assert math.isclose(float(scores.nats[i]), sum(wanted.values()), rel_tol=1e-4)
        for level, nats in enumerate(scores.maps):
            for q in range(nats.shape[1]):
                for t in range(nats.shape[2]):
                    inside = (level, q, (t,)) in wanted
                    assert math.isclose(float(nats[i, q, t]), wanted.get((level, q, (t,)), 0.0), abs_tol=2e-4)
                    assert inside or float(nats[i, q, t]) == 0.0
        assert sorted(slow_ends) == list(range(1, frames[i] + 1))
        sums += sum(wanted.values()) + sum(slow_ends.values())
        count += len(wanted)
        ends += len(slow_ends)
    if prior._windows is None:
        assert math.isclose(float(output.loss), sums / (count + ends), rel_tol=1e-4)


def first_unit(table, frame):
    return next(step.number for step in table.steps if step.frame == frame)


@pytest.mark.parametrize("case", ENDING)
def test_series_end_at_frames_and_do_not_depend_on_their_batch(make_prior, case):
    prior = make(make_prior, f"ends: {case}")
    stride = prior.vocabulary.layout.stride
    codes = prior.sample_codes(CONDITIONS, num_samples=4, seed=1)
    lengths = [size[0] for size in codes.sizes.tolist()]
    assert len(set(lengths)) > 2 and all(n % stride == 0 and n <= 10 * stride for n in lengths)
    alone = prior.sample_codes(CONDITIONS, num_samples=4, seed=1, batch_size=1)
    assert same(codes, alone)
    guided = prior.sample_codes(CONDITIONS, num_samples=4, seed=1, guidance_scale=2.0)
    assert same(guided, prior.sample_codes(CONDITIONS, num_samples=4, seed=1, guidance_scale=2.0, batch_size=5))
    short = prior.sample_codes(CONDITIONS, num_samples=4, seed=1, sizes=(3 * stride - 7,))
    assert max(size[0] for size in short.sizes.tolist()) == 3 * stride - 7
    # Those that had ended by then are the same ones.
    if prior.config.order != "delay":  # whose numbers are counted by step, and steps hold more in a longer table
        for a, b in zip(codes, short, strict=True):
            assert a.sizes[0, 0] >= 3 * stride - 7 or same(a, b)


@pytest.mark.parametrize("case", ENDING)
def test_ends_are_drawn_as_likely_as_they_are_said_to_be(make_prior, case):
    """With one probability everywhere, lengths are geometric; sampling agrees with what scoring says of an end."""
    prior = make(make_prior, f"ends: {case}")
    nn.init.zeros_(prior.end_head.weight)
    nn.init.constant_(prior.end_head.bias, math.log(0.25 / 0.75))
    codes = prior.sample_codes([[3]], num_samples=400, seed=0, batch_size=400)
    frames = codes.sizes[:, 0] // prior.vocabulary.layout.stride
    for n in (1, 2, 3):
        share = float((frames == n).float().mean())
        assert abs(share - 0.25 * 0.75 ** (n - 1)) < 0.07
    # As of codes: temperature 1/2 squares the odds, of 1 to 3; top_p and top_k leave the likelier of the two.
    cold = prior.sample_codes([[3]], num_samples=400, seed=0, batch_size=400, temperature=0.5)
    assert abs(float((cold.sizes[:, 0] == prior.vocabulary.layout.stride).float().mean()) - 0.1) < 0.05
    for only in ({"top_p": 0.7}, {"top_k": 1}, {"temperature": 0.0}):
        never = prior.sample_codes([[3]], num_samples=8, seed=0, **only)
        assert never.sizes.flatten().tolist() == [10 * prior.vocabulary.layout.stride] * 8
    nn.init.constant_(prior.end_head.bias, 50.0)
    assert prior.sample_codes([[3]], seed=0).sizes.tolist() == [[prior.vocabulary.layout.stride]]
    nn.init.constant_(prior.end_head.bias, -50.0)
    assert prior.sample_codes([[3]], seed=0).sizes.tolist() == [[10 * prior.vocabulary.layout.stride]]


# -- known codes


@pytest.mark.parametrize("case", [name for name in CASES if name != "top"])
def test_known_codes_stay_and_the_rest_is_drawn_given_them(make_prior, random_codes, case):
    prior, size = make(make_prior, case), CASES[case][2]
    layout = prior.vocabulary.layout
    levels = random_codes(prior.config.layout, 1, layout.grids(size)[0], seed=3)
    whole = Codes(levels, [list(size)], layout)
    again = prior.sample_codes([[3], [4]], seed=0, known=whole)
    assert all(torch.equal(a, b.expand(2, *b.shape[1:])) for a, b in zip(again.levels, levels, strict=True))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[: size[0] // 2] = True
    half = Known.where(whole, mask)
    drawn = prior.sample_codes([[3], [4]], num_samples=2, seed=0, known=half, guidance_scale=2.0)
    kept = 0
    for level, (values, keep) in enumerate(zip(drawn.levels, half.keep, strict=True)):
        for q in range(values.shape[1]):
            assert torch.equal(values[0, q][keep[0]], levels[level][0, q][keep[0]])
        kept += int(keep.sum())
    assert kept and not same(drawn[0], drawn[1])
    alone = prior.sample_codes([[3]], num_samples=2, seed=0, known=half, guidance_scale=2.0, batch_size=1)
    assert same(alone, drawn[:2])


def test_a_known_beginning_is_read_in_one_pass_and_equals_forcing_it(make_prior, watch_passes):
    prior = make(make_prior, "flat")
    whole = prior.sample_codes([[3]], sizes=(16, 8), seed=4)
    known, shapes = Codes(whole.levels[:1], whole.sizes, whole.layout), watch_passes()
    # The same numbers, the same codes before: the rest comes out the same.
    assert same(prior.sample_codes([[3]], seed=4, known=known), whole)
    lengths = [tokens for _, tokens in shapes]
    assert lengths[0] == 1 + 3 + 2 and set(lengths[1:]) == {1} and len(lengths) == 8


def test_a_series_is_continued(make_prior, random_codes):
    prior = make(make_prior, "ends: frames")
    layout = prior.vocabulary.layout
    known = Codes(random_codes(prior.config.layout, 1, (4,)), [[4 * 640]], layout)
    drawn = prior.sample_codes([[3]], num_samples=6, seed=0, known=known)
    assert (drawn.sizes >= 4 * 640).all() and len(drawn.sizes.unique()) > 1
    for sample in drawn:
        assert torch.equal(sample.levels[0][0, :, :4], known.levels[0][0])
        assert torch.equal(sample.levels[1][0, :, :8], known.levels[1][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("larger", "does not fit into"),
        ("count", "2 known samples for 3 conditions"),
        ("layout", "known codes have the layout"),
        ("fingerprint", "belong to the code space"),
        ("mask", "has the size of the media"),
        ("keep", "keep must be bool masks"),
    ],
)
def test_known_codes_that_do_not_fit_are_named(make_prior, random_codes, change, message):
    prior = make(make_prior, "flat", fingerprint="sha256:" + "0" * 64)
    layout, arguments = prior.vocabulary.layout, {"condition": CONDITIONS, "sizes": (8, 8), "seed": 0}
    codes = Codes(random_codes(TWO, 2, (2, 2)), [[16, 16]] * 2, layout)
    with pytest.raises(ValueError, match=message):
        if change == "count":
            known = codes
        elif change == "layout":
            other = make_prior(SCALES).vocabulary.layout
            known = Codes(random_codes(SCALES, 1, (1, 1)), [[16, 16]], other)
        elif change == "fingerprint":
            known = Codes(codes.levels, codes.sizes, layout, "sha256:" + "1" * 64)[:1]
        elif change == "mask":
            known = Known.where(codes, torch.ones(9, 9, dtype=torch.bool))
        elif change == "keep":
            known = Known(codes, (torch.ones(2, 2, 2, dtype=torch.bool),))
        else:
            known = codes[:1]
        prior.sample_codes(**arguments, known=known)


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        (TWO, {"order": "delay"}, "residual codebooks"),
        (AUDIO, {"order": "next_scale"}, "only one"),
        (TWO, {"stops": True}, "time series"),
        (RATES, {"stops": True, "order": "delay"}, "one level"),
        (TWO, {"order": "parallel"}, "order must be 'flat' or"),
        (TWO, {"first_level": 2}, "first_level must be from 0 to 1"),
        (TWO, {"first_level": 1, "num_levels": 2}, "num_levels must be from 1 to 1"),
        (TWO, {"num_levels": 0}, "num_levels must be from 1 to 2"),
        (TWO, {"window": 1}, "window must be from 2"),
        (SCALES, {"window": 4, "order": "next_scale"}, "window must be None in the order 'next_scale'"),
        (RATES, {"stops": True, "first_level": 1}, "stops must be false"),
        (RESIDUAL, {"order": "depth", "depth_layers": 0}, "depth_layers must be from 1"),
    ],
)
def test_orders_that_cannot_be_are_refused(make_prior, layout, fields, message):
    with pytest.raises(ValueError, match=message):
        make_prior(layout, **fields)


def test_a_sequence_longer_than_the_context_is_refused_before_any_work(make_prior, monkeypatch):
    prior, begun = make_prior(TWO, max_grid=32), []
    prior.config.backbone_config.max_position_embeddings = 64
    monkeypatch.setattr(type(prior), "_draw_codes", lambda *args: begun.append(args))
    with pytest.raises(ValueError, match="set `window`"):
        prior.sample_codes([[3], [4]], sizes=[(8, 8), (64, 64)], seed=0)
    assert not begun
    monkeypatch.undo()
    windowed = make_prior(TWO, max_grid=32, window=32)
    windowed.config.backbone_config.max_position_embeddings = 64
    assert len(windowed.sample_codes([[3]], sizes=(32, 32), seed=0)) == 1


@pytest.mark.parametrize("case", ["flat", "delay", "depth", "next scale", "bottom", "windows"])
def test_what_just_fits_fits(make_prior, random_codes, case):
    prior, size = make(make_prior, case), CASES[case][2]
    layout, backbone = prior.vocabulary.layout, prior.config.backbone_config
    known = coarse_of(prior, random_codes, size)
    codes = Codes(random_codes(prior.config.layout, 1, layout.grids(size)[0]), [list(size)], layout)

    def fits(most):
        backbone.max_position_embeddings = most
        try:
            prior.check_size(size)
        except ValueError:
            return False
        return True

    least = next(most for most in range(1, 200) if fits(most))
    assert fits(least)
    prior.sample_codes([[3] * 8], sizes=size, seed=0, known=known)
    prior.score(codes, [[3] * 8])
    backbone.max_position_embeddings = least - 1
    with pytest.raises(ValueError, match="longer than the backbone's"):
        prior.sample_codes([[3] * 8], sizes=size, seed=0, known=known)
    with pytest.raises(ValueError, match="longer than the backbone's"):
        prior.score(codes, [[3] * 8])


def test_a_part_of_a_series_before_its_first_end_trains_all_parameters(make_prior, random_codes):
    """DDP waits for all parameters, also where a window holds no beginning of a frame."""
    prior = make(make_prior, "ends: frames", window=4)
    codes = random_codes(RATES, 1, (9,))
    prior.train()
    for seed in range(12):
        torch.manual_seed(seed)
        prior.zero_grad()
        prior(codes=codes).loss.backward()
        assert prior.end_head.weight.grad is not None


def test_a_small_transformer_that_diverged_says_so(make_prior):
    prior = make(make_prior, "depth")
    nn.init.constant_(prior.depth.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        prior.sample_codes([[3]], sizes=(16, 8), seed=0)


@pytest.mark.parametrize("case", ["delay", "depth", "next scale", "bottom"])
def test_generate_is_for_the_flat_order(make_prior, case):
    with pytest.raises(ValueError, match="use sample_codes"):
        make(make_prior, case).generate(torch.tensor([[3]]))


@pytest.mark.parametrize("case", ["delay", "depth", "next scale", "bottom", "windows"])
@pytest.mark.parametrize("backbone", ["gpt2", "qwen3", "mistral"])
def test_other_backbones_sample_and_score_alike(make_prior, random_codes, monkeypatch, case, backbone):
    prior, size, nats = make(make_prior, case, backbone=backbone), CASES[case][2], []
    known = coarse_of(prior, random_codes, size, 3)

    def watched(logits, numbers, settings):
        codes = draw(logits, numbers, settings)
        nats.append(-logits.log_softmax(1).gather(1, codes[:, None])[:, 0].view(3, -1).sum(1))
        return codes

    monkeypatch.setattr(stepping, "draw", watched)
    codes = prior.sample_codes(CONDITIONS, sizes=size, seed=2, known=known)
    assert torch.allclose(torch.stack(nats).sum(0), prior.score(codes, CONDITIONS).nats, atol=2e-3)


@pytest.mark.parametrize("case", ["depth", "bottom", "ends: delay"])
def test_saved_priors_draw_the_same(make_prior, random_codes, case, tmp_path):
    prior = make(make_prior, case)
    size = None if case.startswith("ends") else CASES[case][2]
    known = None if size is None else coarse_of(prior, random_codes, size)
    codes = prior.sample_codes([[3]], sizes=size, seed=2, known=known)
    prior.save_pretrained(tmp_path)
    loaded = type(prior).from_pretrained(tmp_path)
    assert same(codes, loaded.sample_codes([[3]], sizes=size, seed=2, known=known))
