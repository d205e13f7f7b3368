"""What FSQ and LFQ of vector-quantize-pytorch 1.32 do and what ours do, side by side: the proofs of docs/differences.md."""

import math

import pytest
import torch
import vector_quantize_pytorch as peer

from vqtok.quantizers import FSQ, LFQ, assignment_entropy

pytestmark = pytest.mark.parity


def test_fsq_of_the_papers_rule_leaves_its_codebook_with_many_levels():
    """The margin of 1e-3 is more than half a level beyond 1001 of them."""
    levels = [2049, 3]
    theirs, ours = peer.FSQ(levels), FSQ(2, scalar_levels=levels, symmetric=False)
    z = torch.full((1, 1, 2), 20.0)
    quantized, codes = theirs(z)
    assert int(codes) == theirs.codebook_size == 2049 * 3
    assert not torch.allclose(theirs.indices_to_codes(codes), quantized)
    out = ours.eval()(z)
    assert int(out.codes) == 2049 * 3 - 1
    assert torch.equal(ours.embed_codes(out.codes), out.quantized)
    assert out.quantized.tolist() == [[[1.0, 1.0]]]


def test_codes_of_fsq_beyond_the_integers_of_fp32():
    theirs, ours = peer.FSQ([32] * 6, return_indices=False), FSQ(6, scalar_levels=[32] * 6, symmetric=False).eval()
    z = torch.randn(1, 1000, 6)
    quantized = theirs.quantize(z)
    back = theirs.indices_to_codes(theirs.codes_to_indices(quantized))
    assert ((back - quantized).abs() > 1e-3).any(-1).float().mean() > 0.5
    out = ours(z)
    torch.testing.assert_close(out.quantized, quantized)
    assert torch.equal(ours.embed_codes(out.codes), out.quantized)


def test_two_levels_are_refused_by_default():
    with pytest.raises(AssertionError, match="preserve_symmetry"):
        peer.FSQ([2, 2])
    assert FSQ(2, scalar_levels=[2, 2]).eval()(torch.tensor([[[-1.0, 1.0]]])).quantized.tolist() == [[[-1.0, 1.0]]]


def test_tables_of_quantizers_without_a_table():
    """All codes of 16 bits and of [8, 8, 8, 5, 5, 5] as rows; ours holds the use of two groups of 8 bits."""
    held = {
        name: sum(buffer.numel() for buffer in module.buffers())
        for name, module in {
            "their LFQ": peer.LFQ(dim=16),
            "our LFQ": LFQ(16, bits=16),
            "their FSQ": peer.FSQ([8, 8, 8, 5, 5, 5]),
            "our FSQ": FSQ(6, scalar_levels=[8, 8, 8, 5, 5, 5]),
        }.items()
    }
    assert held["their LFQ"] > 16 * 2**16 and held["their FSQ"] > 6 * 64_000
    assert held["our LFQ"] < 1000 and held["our FSQ"] == 0


def test_fsq_cannot_be_built_without_memory():
    """As `from_pretrained` of transformers builds models."""
    with torch.device("meta"):
        with pytest.raises(RuntimeError, match="meta"):
            peer.FSQ([8, 5, 5, 5])
        late = FSQ(4, scalar_levels=[8, 5, 5, 5]).eval()
    z = torch.randn(1, 9, 4)
    assert torch.equal(late.to_empty(device="cpu")(z).codes, FSQ(4, scalar_levels=[8, 5, 5, 5]).eval()(z).codes)


# -- entropy losses


def test_the_entropy_of_use_ends_at_1e5_codes():
    """Their logarithm is clamped at 1e-5: where all codes are rarer, the term that spreads use has no gradient."""
    bits = 18
    theirs = peer.LFQ(dim=bits).train()
    corners = theirs.codebook
    b = (0.03 * torch.randn(1, 4, bits)).requires_grad_()
    batch_entropy = theirs(b, inv_temperature=1.0, return_loss_breakdown=True)[1].batch_entropy
    (their_gradient,) = torch.autograd.grad(batch_entropy, b)

    c = b.detach()[0].double().requires_grad_()
    use = (2 * c @ corners.double().T).softmax(1).mean(0)
    true = -(use * use.log()).sum()
    (true_gradient,) = torch.autograd.grad(true, c)
    assert use.max() < 1e-5

    a = b.detach()[0].requires_grad_()
    _, use = assignment_entropy(a, 2 * corners, torch.zeros(len(corners)))
    ours = -(use * use.detach().log()).sum()
    (our_gradient,) = torch.autograd.grad(ours, a)

    assert float(batch_entropy.detach()) == pytest.approx(math.log(1e5), abs=1e-3)
    assert float(true.detach()) == pytest.approx(float(ours.detach()), rel=1e-6)
    assert float(true.detach()) == pytest.approx(bits * math.log(2), abs=0.05)
    assert their_gradient.abs().max() < 1e-3 * true_gradient.abs().max()
    torch.testing.assert_close(
        our_gradient.double(), true_gradient, rtol=1e-3, atol=1e-7
    )  # numbers of 1e-2 from 2^18 terms
