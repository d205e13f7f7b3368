"""LFQ and BSQ: bits, corners, and an entropy loss that never sees all codes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from vqtok.quantizers import BSQ, LFQ

both = pytest.mark.parametrize("kind", [LFQ, BSQ])


def corners(bits: int) -> Tensor:
    """All rows of -1 and 1 in float64, in the order of the codes, from their text in base two."""
    return torch.tensor([[2.0 * int(b) - 1 for b in f"{k:0{bits}b}"] for k in range(2**bits)], dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 61), data=st.data())
def test_bits_of_codes_and_back(bits, data):
    quantizer = LFQ(bits, bits=bits, entropy_weight=0)
    chosen = [0, 2**bits - 1, *data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=9))]
    codes = torch.tensor(chosen)
    found = quantizer.bits(codes)
    assert ["".join(map(str, row)) for row in found.tolist()] == [f"{code:0{bits}b}" for code in chosen]
    assert quantizer.codes(found).tolist() == chosen
    rows = quantizer.embed_codes(codes[None, None])[0]
    assert rows.equal((2 * found - 1).float()) and rows.dtype == torch.float32
    assert quantizer.eval()(rows).codes[:, 0].tolist() == chosen


@both
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_all_codes_of_small_codebooks(kind, bits):
    quantizer = kind(bits, bits=bits).eval()
    codes = torch.arange(2**bits)[None, None]
    rows = quantizer.embed_codes(codes)[0]
    size = 1 if kind is LFQ else bits**-0.5
    torch.testing.assert_close(rows.double(), corners(bits) * size, rtol=1e-6, atol=0)
    if kind is BSQ:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2**bits))
    # The rows are their own codes, and the nearest rows of latents are found by brute force.
    assert quantizer(rows[None]).codes[0, 0].equal(codes[0, 0])
    z = torch.randn(1, 40, bits)
    assert quantizer(z).codes[0, 0].equal(reference.nearest_code(z[0], rows))


@both
def test_a_codebook_of_2_to_the_61(kind):
    """Training too, entropy loss and all: nothing is as large as the codebook."""
    quantizer = kind(61, bits=61, entropy_group_bits=10).train()
    z = torch.randn(2, 3, 61).requires_grad_()
    out = quantizer(z)
    (out.quantized.sum() + out.loss).backward()
    quantizer.update()
    assert out.codes.max() > 2**56 and out.codes.min() >= 0 and z.grad.isfinite().all()
    assert quantizer.embed_codes(out.codes).sign().equal(z.detach().sign())
    assert quantizer.state_dict() == {}


def test_zero_is_no_bit_and_huge_latents_are_one():
    quantizer = LFQ(4, bits=4).eval()
    z = torch.tensor([[0.0, -0.0, 1e-45, -1e-45], [1e30, -1e30, 3e38, -3e38]])
    assert quantizer(z).codes[:, 0].tolist() == [0b0010, 0b1010]
    assert BSQ(4, bits=4).eval()(torch.zeros(1, 4)).codes.tolist() == [[0]]


def test_bsq_normalises_what_it_compares():
    """The length of a latent changes neither its code nor its commitment; LFQ's commitment it does."""
    z = torch.randn(3, 5, 6)
    for kind, same in ((BSQ, True), (LFQ, False)):
        quantizer = kind(6, bits=6).train()
        one, other = quantizer(z), quantizer(100 * z)
        assert one.codes.equal(other.codes)
        first, second = (float(out.losses["commitment_loss"]) for out in (one, other))
        assert (first == pytest.approx(second, rel=1e-4)) == same
    unit = z.double() / z.double().norm(dim=-1, keepdim=True)
    wanted = (unit - z.double().sign() / 6**0.5).square().mean()
    assert float(BSQ(6, bits=6).train()(z).losses["commitment_loss"]) == pytest.approx(float(wanted), rel=1e-5)


@both
def test_gradient_through_the_sign(kind):
    quantizer, z = kind(6, bits=6, entropy_weight=0).train(), torch.randn(4, 6).requires_grad_()
    above = torch.randn(4, 6)
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, quantizer.embed_codes(out.codes), rtol=1e-6, atol=1e-6)
    (out.quantized * above).sum().backward()
    exact = z.detach().double().requires_grad_()
    passed = exact if kind is LFQ else exact / exact.norm(dim=1, keepdim=True)
    (passed * above.double()).sum().backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def full_logits(kind: type, z: Tensor, bits: int, temperature: float) -> Tensor:
    """-|z / corner - row / corner|^2 / temperature against the table of all codes, for autograd in float64."""
    size = 1.0 if kind is LFQ else bits**-0.5
    y = z if kind is LFQ else z / z.norm(dim=-1, keepdim=True)
    return -((y / size)[:, None] - corners(bits)).square().sum(2) / temperature


@both
@pytest.mark.parametrize("group_bits", [1, 2, 3, 6, 16])
@pytest.mark.parametrize("temperature", [0.5, 3])
def test_the_entropy_of_single_latents_is_that_of_the_full_table(kind, group_bits, temperature):
    """Exactly, whatever the groups, because the bits of one latent are independent. Diversity is exact for one group only."""
    bits = 6
    quantizer = kind(
        bits, bits=bits, entropy_weight=1.0, entropy_temperature=temperature, entropy_group_bits=group_bits
    ).train()
    z = torch.randn(40, bits)
    z[:, 1] = z[:, 0] + 0.1 * z[:, 1]  # bits that go together: groups cannot see that across their border
    given, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = quantizer(given).losses["entropy_loss"]
    loss.backward()
    logits = full_logits(kind, exact, bits, temperature)
    textbook = reference.entropy_penalty(logits)
    textbook.backward()
    p = logits.detach().softmax(1)
    single = float(-(p * p.log()).sum(1).mean())
    diversity, joint = single - loss.item(), single - textbook.item()
    if group_bits >= bits:
        assert diversity == pytest.approx(joint, abs=1e-4)
        torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)
    else:
        assert joint - 1e-4 <= diversity <= bits * math.log(2) + 1e-4
        assert group_bits > 1 or diversity > joint + 0.01, "an upper bound that is not tight where bits go together"
    # The entropy of the groups' own mean use, added up: with the term of single latents it makes the loss.
    marginal = 0.0
    for first in range(0, bits, group_bits):
        size = min(group_bits, bits - first)
        codes = torch.arange(2**bits) >> (bits - first - size) & (2**size - 1)
        use = torch.zeros(2**size, dtype=torch.float64).index_add_(0, codes, p.mean(0))
        marginal -= float((use * use.log()).sum())
    assert diversity == pytest.approx(marginal, abs=1e-4)


def test_groups_take_their_own_bits():
    """A group whose latents are all alike has no gradient, whatever the others do."""
    quantizer = LFQ(5, bits=5, entropy_group_bits=2, commitment_weight=0, entropy_weight=1.0).train()
    z = torch.randn(30, 5)
    z[:, 2:4] = 0
    z.requires_grad_()
    quantizer(z).loss.backward()
    assert z.grad[:, 2:4].abs().max() < 1e-7
    assert (z.grad[:, [0, 1, 4]].abs().sum(0) > 0).all()


@pytest.mark.parametrize("weight", [0, 0.1])
def test_nothing_is_kept(weight):
    quantizer = LFQ(8, bits=8, entropy_weight=weight).train()
    losses = quantizer(torch.randn(2, 8)).losses
    assert set(losses) == ({"commitment_loss", "entropy_loss"} if weight else {"commitment_loss"})
    assert quantizer.state_dict() == {} and quantizer.accumulators == []


@both
def test_the_entropy_loss_keeps_all_codes_in_use(kind):
    """Latents that all begin in few corners spread over most of them."""
    bits = 4
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, bits), torch.randn(256, 8)
    with torch.no_grad():
        layer.bias += 1.5
    quantizer = kind(bits, bits=bits, entropy_weight=1.0, commitment_weight=0.1).train()
    used = quantizer.encode(layer(x)).codes.unique().numel()
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(layer(x)).loss.backward()
        optimizer.step()
        quantizer.update()
    counts = torch.bincount(quantizer.encode(layer(x)).codes.flatten(), minlength=2**bits)
    assert used < 8 and (counts > 1).sum() == 16
