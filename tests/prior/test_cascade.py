"""Cascades: stages that draw and score as one."""

import pytest
import torch

from tests.prior.test_orders import CONDITIONS, SCALES, TWO, same
from vqtok.codes import Codes
from vqtok.prior import CodeCascade, Known


def cascade_of(make_prior, layout=TWO, stages=({"num_levels": 1}, {"first_level": 1}), **fields):
    return CodeCascade([make_prior(layout, scale=3.0, **fields, **stage) for stage in stages])


def test_a_cascade_draws_level_after_level_alone_and_in_any_batch(make_prior):
    for layout, stages in (
        (TWO, ({"num_levels": 1}, {"first_level": 1})),
        (SCALES, ({"num_levels": 1}, {"first_level": 1, "num_levels": 1}, {"first_level": 2, "window": 9})),
        (SCALES, ({"num_levels": 2}, {"first_level": 2, "condition": "none", "text_size": 0})),
    ):
        cascade = cascade_of(make_prior, layout, stages)
        settings = {"sizes": (16, 32), "num_samples": 2, "seed": 3, "guidance_scale": 2.0}
        codes = cascade.sample_codes(CONDITIONS, **settings)
        assert len(codes) == 6 and len(codes.levels) == len(layout["levels"])
        assert same(codes, cascade.sample_codes(CONDITIONS, **settings, batch_size=1))
        assert same(codes[:2], cascade.sample_codes(CONDITIONS[:1], **settings))
        top = cascade.stages[0].sample_codes(CONDITIONS, **settings)
        assert all(torch.equal(a, b) for a, b in zip(top.levels, codes.levels, strict=False))
        drawn = cascade.sample_codes(CONDITIONS, seed=3)
        assert len(drawn.levels) == len(layout["levels"])


def test_a_cascades_score_is_the_sum_of_its_stages(make_prior, random_codes):
    cascade = cascade_of(make_prior)
    layout = cascade.vocabulary.layout
    codes = Codes(random_codes(TWO, 3, (2, 1)), [[16, 8]] * 3, layout)
    scores, parts = cascade.score(codes, CONDITIONS), [stage.score(codes, CONDITIONS) for stage in cascade.stages]
    assert torch.allclose(scores.nats, parts[0].nats + parts[1].nats)
    assert torch.allclose(scores.bits_per_unit, parts[0].bits_per_unit + parts[1].bits_per_unit)
    assert scores.nats_per_code.shape == (3, 2) and [m.shape for m in scores.maps] == [c.shape for c in codes.levels]


def test_what_a_later_stage_refuses_is_refused_before_the_first_draws(make_prior, monkeypatch):
    cascade = cascade_of(make_prior)
    monkeypatch.setattr(type(cascade.stages[0]), "_draw_codes", lambda *args: pytest.fail("it has begun"))
    cascade.stages[1].config.backbone_config.max_position_embeddings = 24
    with pytest.raises(ValueError, match="longer than the backbone's"):
        cascade.sample_codes(CONDITIONS, sizes=(32, 32), seed=0)
    cascade.stages[1].config.condition_dropout = 0
    with pytest.raises(ValueError, match="condition_dropout 0"):
        cascade.sample_codes(CONDITIONS, sizes=(8, 8), seed=0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="at least one stage"):
        CodeCascade([])


def test_labels_may_be_a_tensor(make_prior):
    fields = {"condition": "class", "text_size": 10}
    cascade = cascade_of(make_prior, **fields)
    one, other = (cascade.sample_codes(labels, sizes=(8, 8), seed=0) for labels in (torch.tensor([3, 7]), [3, 7]))
    assert same(one, other)


@pytest.mark.parametrize("levels", [1, 2])
def test_known_codes_of_every_level_stay(make_prior, random_codes, levels):
    cascade = cascade_of(make_prior)
    layout = cascade.vocabulary.layout
    known = Codes(random_codes(TWO, 1, (2, 2))[:levels], [[16, 16]], layout)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    drawn = cascade.sample_codes(CONDITIONS, num_samples=2, seed=0, known=Known.where(known, mask))
    assert len(drawn) == 6
    for i in range(levels):
        rows = drawn.levels[i].shape[2] // 2
        assert torch.equal(drawn.levels[i][:, :, :rows], known.levels[i][:, :, :rows].expand(6, -1, -1, -1))
    assert len({tuple(one.levels[1].flatten().tolist()) for one in drawn}) == 6
    smaller = Codes(random_codes(TWO, 3, (1, 1))[:levels], [[8, 8]] * 3, layout)
    larger = cascade.sample_codes(CONDITIONS, sizes=(16, 16), seed=0, known=smaller)
    assert all(torch.equal(larger.levels[i][:, :, : i + 1, : i + 1], smaller.levels[i]) for i in range(levels))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (({"first_level": 1},), "predicts levels from 1 on, but 0 comes next"),
        (({}, {"first_level": 1}), "predicts levels from 1 on, but 2 comes next"),
        (({"num_levels": 1}, {"first_level": 1, "text_size": 7}), "train it with the same text tokenizer"),
        (({"num_levels": 1}, {"first_level": 1, "fingerprint": "sha256:" + "1" * 64}), "codes of one tokenizer"),
    ],
)
def test_stages_that_do_not_belong_together_are_refused(make_prior, stages, message):
    with pytest.raises(ValueError, match=message):
        CodeCascade([make_prior(TWO, **stage) for stage in stages])
