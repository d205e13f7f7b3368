"""Drawing from a masked prior: a slow twin, samples that depend on their seed alone, kept codes, and the number of passes."""

import math

import pytest
import torch

from vqtok.codes import Codes
from vqtok.prior import Known
from vqtok.prior import unmasking as unmasking_module
from vqtok.prior.masking import masked_after, split_passes
from vqtok.prior.network import attention_bias
from vqtok.prior.sampling import draw, guide, uniforms
from vqtok.prior.unmasking import MaskedSettings

from .conftest import TWO_LEVELS, layout

RESIDUAL = layout((8, 2, 6), (4, 3, 6))
AUDIO = layout((640, 1, 9), (320, 3, 9), ndim=1)
LARGE = layout((8, 1, 1 << 17))
LAYOUTS = {"two": TWO_LEVELS, "residual": RESIDUAL, "audio": AUDIO, "large": LARGE}
CONDITIONS = [[3], [1, 4, 1, 5, 9], [2, 6]]


def same(a, b):
    return torch.equal(a.sizes, b.sizes) and all(torch.equal(x, y) for x, y in zip(a.levels, b.levels, strict=True))


def slow_draw(prior, condition, size, seed, index, settings, kept=None):
    """One sample by the definition: the whole sequence through the backbone in every pass, one position after another."""
    grids = prior.vocabulary.layout.grids(size)
    table = prior._table(prior._shapes(grids))
    level_P, codebook_P = table.level_P.tolist(), table.codebook_P.tolist()
    counts = [level_P.count(level) for level in range(len(grids))]
    passes_of_level = split_passes(settings.num_passes, len(grids))
    axes, rows = prior.vocabulary.layout.ndim, max(passes_of_level)
    numbers = uniforms(seed, index, axes + rows * len(table))[axes:].view(rows, -1).tolist()
    noise = uniforms(seed, index, rows * len(table), 1 << 21).view(rows, -1).tolist()
    ids = [None] * len(table) if kept is None else list(kept)
    place_PM = prior._unit_vectors(table).unit_UM
    embed = prior.get_input_embeddings()

    def hidden(level, condition):
        vectors = prior._unit_vectors(table)
        prompt = prior._prompt(embed(torch.tensor([condition])), prior._prefix(grids[0]), vectors, None, False)
        inputs = [prior.mask_embed.weight[0] if token is None else embed.weight[token] for token in ids]
        end = sum(counts[: level + 1])
        x = torch.cat([prompt, (torch.stack(inputs) + place_PM)[None, :end]], 1)
        steps = torch.cat([torch.arange(-prompt.shape[1], 0), table.level_P[:end]])
        start = prior.config.prefix_length - len(condition)
        return prior._run(x, start, attention_bias(None, steps, x.dtype))[0, prompt.shape[1] :]

    done = 0
    for level, passes in enumerate(passes_of_level):
        free = [p for p, token in enumerate(ids) if token is None and level_P[p] == level]
        for at in range(passes):
            masked = [p for p in free if ids[p] is None]
            reveal = len(masked) - masked_after(len(free), at + 1, passes)
            scale = settings.scale_at((done + at) / (sum(passes_of_level) - 1))
            both = [hidden(level, condition)]
            if settings.guidance_scale != 1:
                both.append(hidden(level, [prior.null_id]))
            found = []
            for p in masked:
                offset, size_K = prior._own_stream(level, codebook_P[p])
                logits = [prior._logits(x[p][None], offset, size_K).float() for x in both]
                logits = guide(*logits, scale) if len(logits) == 2 else logits[0]
                code = int(draw(logits, torch.tensor([numbers[at][p]], dtype=torch.float64), settings))
                sure = float(logits.log_softmax(1)[0, code])
                if settings.temperature:
                    gumbel = -math.log(-math.log(noise[at][p]))
                    sure += settings.choice_temperature * (1 - (at + 1) / passes) * gumbel
                found.append((codebook_P[p], -sure, p, code + offset))
            for _, _, p, token in sorted(found)[:reveal]:
                ids[p] = token
        done += passes
    return ids


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_drawing_is_the_slow_twin(make_masked, random_codes, name, backbone):
    prior = make_masked(LAYOUTS[name], backbone)
    size = (1900,) if name == "audio" else (16, 24)
    settings = MaskedSettings(
        guidance_scale=1.5, top_p=0.9, num_passes=5, choice_temperature=1.3, guidance_schedule="linear"
    )
    prior.generation_config.guidance_schedule = "linear"
    given = {"guidance_scale": 1.5, "top_p": 0.9, "num_passes": 5, "choice_temperature": 1.3}
    grid = prior.vocabulary.layout.grids(size)[0]
    codes = Codes(random_codes(LAYOUTS[name], 3, grid), torch.tensor([size] * 3), prior.vocabulary.layout)
    keep = tuple(
        torch.rand(3, *v.shape[2:], generator=torch.Generator().manual_seed(i)) < 0.4
        for i, v in enumerate(codes.levels)
    )
    ids, table = prior._flat(codes.levels)
    for known in (None, Known(codes, keep)):
        drawn = prior.sample_codes(CONDITIONS, sizes=size, seed=4, known=known, **given)
        found, _ = prior._flat(drawn.levels)
        for index, condition in enumerate(CONDITIONS):
            kept = None
            if known is not None:
                _, forced = known.on_table(prior.vocabulary, table, 0, prior.device)
                kept = [
                    token if stays else None for token, stays in zip(ids[index].tolist(), forced[index], strict=True)
                ]
            with torch.no_grad():
                assert slow_draw(prior, condition, size, 4, index, settings, kept) == found[index].tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_do_not_depend_on_their_batch(make_masked, name):
    prior = make_masked(LAYOUTS[name])
    size = (1900,) if name == "audio" else (15, 16)
    given = {"guidance_scale": 2.0, "top_p": 0.95, "seed": 11, "num_samples": 2, "num_passes": 6}
    together = prior.sample_codes(CONDITIONS, sizes=size, **given)
    assert len(together) == 6 and together.sizes.tolist() == [list(size)] * 6
    for batch_size in (1, 4):
        assert same(together, prior.sample_codes(CONDITIONS, sizes=size, batch_size=batch_size, **given))
    assert same(together[:2], prior.sample_codes(CONDITIONS[:1], sizes=size, **given))
    assert len({tuple(one.levels[-1].flatten().tolist()) for one in together}) == 6, "six different ones"


def test_what_decides(make_masked):
    prior = make_masked(TWO_LEVELS)

    def sample(condition=CONDITIONS, seed=3, **settings):
        return prior.sample_codes(condition, sizes=(16, 16), seed=seed, **settings)

    assert (
        same(sample(), sample()) and same(sample(), sample(num_passes=12)) and same(sample(), sample(num_passes=[6, 6]))
    )
    for other in (
        {"seed": 4},
        {"guidance_scale": 3.0},
        {"condition": None},
        {"num_passes": 3},
        {"choice_temperature": 50.0},
    ):
        assert not all(
            torch.equal(a[:1], b[:1]) for a, b in zip(sample().levels, sample(**other).levels, strict=True)
        ), other
    assert same(sample(guidance_scale=0.0), sample(condition=[None] * 3)), "scale 0 is unconditional"
    assert same(sample(temperature=0), sample(temperature=0, seed=99)), "greedy needs no numbers"
    prior.generation_config.num_passes = [1, 2]
    assert same(sample(), sample(num_passes=[1, 2])) and not same(sample(), sample(num_passes=12))


def test_sizes_are_announced_and_drawn_as_by_every_prior(make_masked):
    prior = make_masked(TWO_LEVELS)
    drawn = prior.sample_codes(CONDITIONS, num_samples=3, seed=2)
    assert len({tuple(size) for size in drawn.sizes.tolist()}) > 1 and (drawn.sizes % 8 == 0).all()
    for index, one in enumerate(drawn):
        given = prior.sample_codes(CONDITIONS, num_samples=3, seed=2, sizes=one.sizes[0].tolist())
        assert same(given[index], one), "what is drawn does not depend on whether its size was given"


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_the_passes_are_as_many_as_asked(make_masked, monkeypatch, backbone):
    """Flat decoding of 256 codes takes 256 passes; 12 and a few to read what is known are more than 16 times fewer."""
    prior = make_masked(layout((4, 1, 7)), backbone, max_grid=16)
    passes = []
    decoder_for = unmasking_module.decoder_for

    def watched(*args):
        decoder = decoder_for(*args)
        call = type(decoder).__call__
        monkeypatch.setattr(
            type(decoder), "__call__", lambda self, x, *more: passes.append(x.shape) or call(self, x, *more)
        )
        return decoder

    monkeypatch.setattr(unmasking_module, "decoder_for", watched)
    drawn = prior.sample_codes([[3]], sizes=(64, 64), guidance_scale=2.0, num_passes=12, seed=0)
    assert drawn.levels[0].numel() == 256 and len(passes) == 13 and 256 / len(passes) >= 16
    assert [shape[0] for shape in passes] == [2] * 13, "both halves of guidance in one batch"
    assert [shape[1] for shape in passes[1:]] == [256] * 12 and passes[0][1] == 4, "the prompt is read once"


def test_passes_that_reveal_nothing_are_left_out(make_masked, random_codes, monkeypatch):
    prior, read = make_masked(TWO_LEVELS), []
    hidden = unmasking_module.Unmasking.hidden
    monkeypatch.setattr(
        unmasking_module.Unmasking, "hidden", lambda self, here, *more: read.append(here) or hidden(self, here, *more)
    )
    codes = Codes(random_codes(TWO_LEVELS, 1, (2, 2)), torch.tensor([[16, 16]]), prior.vocabulary.layout)
    assert same(prior.sample_codes([[3]], known=codes, seed=0), codes) and len(read) == 1, "level 0 is only read"
    keep = [torch.ones(1, *level.shape[2:], dtype=torch.bool) for level in codes.levels]
    keep[1][0, 3, 3] = False
    read.clear()
    drawn = prior.sample_codes([[3]], known=Known(codes, tuple(keep)), seed=0)
    assert len(read) == 2 and int((drawn.levels[1] != codes.levels[1]).sum()) <= 1


def test_kept_codes_stay_and_are_seen(make_masked, random_codes):
    prior = make_masked(TWO_LEVELS, scale=12.0)
    codes = Codes(random_codes(TWO_LEVELS, 2, (3, 3)), torch.tensor([[24, 24]] * 2), prior.vocabulary.layout)
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[:, :12] = True
    known = Known.where(codes, mask)
    drawn = prior.sample_codes(CONDITIONS[:2], known=known, seed=1)
    for level, (got, given) in enumerate(zip(drawn.levels, codes.levels, strict=True)):
        kept = known.keep[level][:, None].expand_as(got)
        assert torch.equal(got[kept], given[kept]) and not torch.equal(got[~kept], given[~kept])
    alone = prior.sample_codes(CONDITIONS[:1], known=known[[0]], seed=1)
    assert same(alone, drawn[:1])
    other = Codes((codes.levels[0], (codes.levels[1] + 1) % 7), codes.sizes, codes.layout)
    again = prior.sample_codes(CONDITIONS[:2], known=Known.where(other, mask), seed=1)
    assert torch.equal(again.levels[0], drawn.levels[0]), "coarse codes are drawn before finer ones are seen"
    free = ~known.keep[1][:, None]
    assert not torch.equal(again.levels[1][free], drawn.levels[1][free])
    whole = prior.sample_codes(CONDITIONS[:1], known=Codes(codes.levels[:1], codes.sizes, codes.layout)[[0]], seed=1)
    assert torch.equal(whole.levels[0], codes.levels[0][:1]), "coarse levels alone are kept too"
    larger = prior.sample_codes(CONDITIONS[:1], known=codes[[0]], sizes=(24, 32), seed=1)
    assert torch.equal(larger.levels[0][..., :3], codes.levels[0][:1]) and larger.levels[1].shape[-1] == 8


def test_a_finer_stage_is_given_its_coarse_codes(make_masked, random_codes):
    prior = make_masked(TWO_LEVELS, first_level=1)
    codes = Codes(random_codes(TWO_LEVELS, 2, (2, 2)), torch.tensor([[16, 16]] * 2), prior.vocabulary.layout)
    drawn = prior.sample_codes(CONDITIONS[:2], known=codes.prefix(1), seed=1, num_passes=4)
    assert torch.equal(drawn.levels[0], codes.levels[0]) and prior.score(codes).nats_per_code.shape == (2, 1)
    other = prior.sample_codes(
        CONDITIONS[:2], known=Codes((codes.levels[0].flip(0),), codes.sizes, codes.layout), seed=1
    )
    assert not torch.equal(other.levels[1], drawn.levels[1])
    prior.train()(codes.levels).loss.backward()
    assert [name for name, value in prior.named_parameters() if value.grad is None] == []


def test_with_a_very_warm_choice_drawing_is_the_process_that_is_scored(make_masked):
    """Two codes of a level: how often each pair is drawn is what the score says, averaged over the orders."""
    prior = make_masked(layout((8, 1, 2)), scale=9.0, max_grid=2)
    many = prior.sample_codes(
        [[3]] * 4000, sizes=(8, 16), seed=0, num_passes=2, choice_temperature=1e6, batch_size=4000
    )
    counts = torch.bincount(many.levels[0].flatten(1) @ torch.tensor([2, 1]), minlength=4).double() / 4000
    every = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).view(4, 1, 1, 2)
    p = torch.zeros(4, dtype=torch.float64)
    for seed in range(40):
        codes = Codes((every,), torch.tensor([[8, 16]] * 4), prior.vocabulary.layout)
        p += (-prior.score(codes, [[3]] * 4, num_passes=2, seed=seed).nats.double()).exp() / 40
    assert (counts - p).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_passes": 1}, "num_passes 1 is too few for 2 levels"),
        ({"num_passes": 0}, "num_passes must be"),
        ({"num_passes": [1, 2, 3]}, "names 3 levels, this prior predicts 2"),
        ({"num_passes": [4, 0]}, "num_passes must be"),
        ({"num_passes": True}, "num_passes must be"),
        ({"choice_temperature": -1}, "choice_temperature must be"),
        ({"choice_temperature": math.inf}, "choice_temperature must be"),
        ({"temperature": -1}, "temperature must be"),
        ({"sizes": (160, 8)}, "outside 1 to max_grid 4"),
    ],
)
def test_bad_arguments_are_named(make_masked, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_masked(TWO_LEVELS).sample_codes([[3]], **{"sizes": (16, 16), **arguments})


def test_a_diverged_prior_says_so(make_masked):
    prior = make_masked(TWO_LEVELS)
    with torch.no_grad():
        prior.backbone.layers[0].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        prior.sample_codes([[3]], sizes=(8, 8))
