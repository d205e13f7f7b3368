"""FSQ: digits, codes and levels, against numbers worked one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from vqtok.quantizers import FSQ

some_levels = st.lists(st.integers(2, 9), min_size=1, max_size=4).filter(lambda levels: math.prod(levels) <= 3000)
many_levels = st.lists(st.integers(2, 65_536), min_size=1, max_size=64).filter(lambda levels: math.prod(levels) < 2**62)


def build(levels, symmetric=True, **options) -> FSQ:
    return FSQ(options.pop("dim", len(levels)), scalar_levels=list(levels), symmetric=symmetric, **options)


@settings(max_examples=40, deadline=None)
@given(levels=some_levels, symmetric=st.booleans())
def test_all_codes_have_digits_of_their_own_and_come_back(levels, symmetric):
    quantizer = build(levels, symmetric).eval()
    codes = torch.arange(quantizer.config.size)
    digits = quantizer.digits(codes)
    assert digits.dtype == torch.int64 and quantizer.codes(digits).equal(codes)
    assert (digits >= 0).all() and (digits < torch.tensor(levels)).all()
    assert len(digits.unique(dim=0)) == len(codes) == math.prod(levels)
    assert [reference.mixed_radix(row, levels) for row in digits.tolist()] == codes.tolist()
    rows = quantizer.embed_codes(codes[None, None])[0]
    assert rows.abs().max() <= 1 and len(rows.unique(dim=0)) == len(codes)
    expected = [
        [reference.fsq_value(d, n, symmetric) for d, n in zip(row, levels, strict=True)] for row in digits.tolist()
    ]
    torch.testing.assert_close(rows.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    if symmetric:
        assert rows.amin(0).tolist() == [-1.0] * len(levels) and rows.amax(0).tolist() == [1.0] * len(levels)


@settings(max_examples=40, deadline=None)
@given(levels=many_levels, data=st.data())
def test_large_codebooks_are_exact_integers(levels, data):
    """Products of floats would lose the last digits beyond 2^24 or 2^53; no table of all codes could be made."""
    quantizer = build(levels).eval()
    size = math.prod(levels)
    assert quantizer.config.size == size
    chosen = [0, size - 1, *data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))]
    codes = torch.tensor(chosen)
    digits = quantizer.digits(codes)
    assert [reference.mixed_radix(row, levels) for row in digits.tolist()] == chosen
    assert quantizer.codes(digits).tolist() == chosen
    rows = quantizer.embed_codes(codes[None, None])
    assert rows.abs().max() <= 1 and rows[0, 0].tolist() == [-1.0] * len(levels)
    # Rows are found again from latents that tanh takes there; the outermost ones lie at infinity.
    latents = rows.clamp(-1 + 1e-6, 1 - 1e-6).double().atanh().float()
    if max(levels) <= 100:
        assert quantizer(latents).codes.flatten().tolist() == chosen


def test_a_codebook_of_2_to_the_61():
    quantizer = FSQ(61, scalar_levels=[2] * 61)
    z = torch.randn(2, 3, 61)
    for training in (True, False):
        out = quantizer.train(training)(z)
        assert out.codes.max() > 2**56 and out.codes.min() >= 0
        torch.testing.assert_close(out.quantized, z.sign(), rtol=0, atol=1e-6)
    assert sum(value.numel() for value in quantizer.state_dict().values()) == 0


def test_the_first_number_varies_fastest():
    """As in the paper's code, with basis (1, 8, 64): files of codes mean the same elsewhere."""
    quantizer = build([8, 8, 4])
    assert quantizer.digits(torch.tensor([1, 8, 64, 255])).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [7, 7, 3]]
    assert quantizer.codes(torch.tensor([[3, 0, 1]])).tolist() == [67]


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(st.integers(2, 40), min_size=1, max_size=3),
    symmetric=st.booleans(),
    numbers=st.lists(st.floats(-6, 6, width=32), min_size=3, max_size=3),
)
def test_rounding_is_that_of_numbers_worked_one_by_one(levels, symmetric, numbers):
    quantizer, numbers = build(levels, symmetric).eval(), numbers[: len(levels)]
    out = quantizer(torch.tensor([numbers]))
    digits = quantizer.digits(out.codes)[0, 0].tolist()
    for digit, number, level, value in zip(digits, numbers, levels, out.quantized[0].tolist(), strict=True):
        bounded = reference.fsq_bounded(number, level, symmetric)
        to_border = abs(bounded - math.floor(bounded) - 0.5)
        if to_border > 1e-4:
            assert digit == reference.fsq_digit(number, level, symmetric)
        else:  # a border: either side
            assert abs(digit - bounded) < 0.51
        assert value == pytest.approx(reference.fsq_value(digit, level, symmetric), abs=1e-6)


def test_levels_worked_by_hand():
    symmetric, paper = build([3, 4, 2]).eval(), build([3, 4, 2], symmetric=False).eval()
    codes = torch.arange(24)[None, None]
    assert sorted(set(symmetric.embed_codes(codes)[0, :, 0].tolist())) == [-1, 0, 1]
    assert sorted(set(symmetric.embed_codes(codes)[0, :, 1].tolist())) == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert sorted(set(symmetric.embed_codes(codes)[0, :, 2].tolist())) == [-1, 1]
    assert sorted(set(paper.embed_codes(codes)[0, :, 0].tolist())) == [-1, 0, 1]
    assert sorted(set(paper.embed_codes(codes)[0, :, 1].tolist())) == [-1, -0.5, 0, 0.5]
    assert sorted(set(paper.embed_codes(codes)[0, :, 2].tolist())) == [-1, 0]
    # tanh 0.3 = 0.29: between the levels -1/3 and 1/3 it is nearer to the upper one; of three it is nearer to 0.
    assert symmetric(torch.tensor([[0.3, 0.3, 0.3]])).quantized[0].tolist() == pytest.approx([0, 1 / 3, 1])
    # tanh 0.56 = 0.508 is beyond the border 0.5 between 0 and 1.
    assert symmetric(torch.tensor([[0.56, -0.56, -0.001]])).quantized[0].tolist() == pytest.approx([1, -1 / 3, -1])


def test_two_levels_of_the_symmetric_rule_are_the_sign():
    """The paper's rule puts the border at atanh(-0.5 / 0.5005) - far below zero: one level is hardly used."""
    z = torch.randn(4000, 1)
    z = z[z.abs() > 1e-6][:, None]
    assert build([2]).eval()(z).codes[:, 0].equal((z[:, 0] > 0).long())
    share = build([2], symmetric=False).eval()(z).codes.float().mean()
    assert share > 0.99 or share < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("extreme", [30.0, 1e4, 1e30, 3e38])
def test_saturated_latents_stay_in_range(symmetric, extreme):
    levels = [2, 3, 4, 5, 8, 255, 256, 65_535, 65_536]
    quantizer = build(levels, symmetric)
    z = torch.stack([torch.full((9,), extreme), torch.full((9,), -extreme)]).requires_grad_()
    for training in (True, False):
        out = quantizer.train(training)(z)
        digits = quantizer.digits(out.codes[:, 0])
        assert digits.tolist() == [[level - 1 for level in levels], [0] * 9]
        assert out.quantized.abs().max() <= 1 + 1e-6
    quantizer.train()(z).quantized.sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_levels_are_reached_in_order(symmetric):
    """A sweep of the latent goes up through all digits, one at a time."""
    for level in (2, 3, 4, 5, 6, 7, 8, 16, 33):
        quantizer = build([level], symmetric).eval()
        codes = quantizer(torch.linspace(-12, 12, 20_001)[:, None]).codes[:, 0]
        steps = codes.diff()
        assert codes[0] == 0 and codes[-1] == level - 1
        assert steps.min() == 0 and steps.max() == 1 and steps.sum() == level - 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_is_that_of_tanh(symmetric):
    """Straight through the rounding, not through the bound: saturated latents get none."""
    levels = [8, 5, 4]
    quantizer = build(levels, symmetric).train()
    z = (torch.randn(6, 3) * 0.7).requires_grad_()
    above = torch.randn(6, 3)
    out = quantizer(z)
    (out.quantized * above).sum().backward()
    for i in range(6):
        for j, level in enumerate(levels):
            number, step = z[i, j].item(), 1e-5
            slope = (
                reference.fsq_bounded(number + step, level, symmetric)
                - reference.fsq_bounded(number - step, level, symmetric)
            ) / (2 * step)
            scale = 2 / (level - 1) if symmetric else 1 / (level // 2)
            assert z.grad[i, j].item() == pytest.approx(slope * scale * above[i, j].item(), rel=1e-3, abs=1e-5)
    assert out.losses == {} and out.loss == 0


def test_projections_where_the_width_is_another():
    quantizer = build([5, 5], dim=7).train()
    z = torch.randn(2, 3, 7)
    out = quantizer(z)
    inner = quantizer.project_in(z)
    codes = build([5, 5]).eval()(inner.detach()).codes
    assert out.codes.equal(codes)
    rows = build([5, 5]).eval().embed_codes(codes)
    torch.testing.assert_close(out.quantized, quantizer.project_out(rows))
    out.quantized.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())
