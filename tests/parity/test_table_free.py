"""FSQ, LFQ and BSQ beside vector-quantize-pytorch: equal weights, equal latents. Where we differ: docs/differences.md.

Tolerances are those of `assert_close` for fp32 (1.3e-6 relative, 1e-5 absolute) wherever none is given.
"""

import math

import pytest
import torch
import vector_quantize_pytorch as peer

from vqtok.quantizers import BSQ, FSQ, LFQ

pytestmark = pytest.mark.parity

LEVELS = [[8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 6, 5], [8, 8, 8, 5, 5, 5], [3, 3], [4, 16, 64], [5], [6]]
WITH_TWO = [[2, 2, 2, 2], [2, 3, 4]]  # their rule of the paper refuses them
RULES = [(levels, False) for levels in LEVELS] + [(levels, True) for levels in LEVELS + WITH_TWO]


@torch.no_grad()
def copy_projections(ours, theirs):
    ours.project_in.load_state_dict(theirs.project_in.state_dict())
    ours.project_out.load_state_dict(theirs.project_out.state_dict())


@pytest.mark.parametrize(("levels", "symmetric"), RULES)
def test_fsq(levels, symmetric):
    """Codes, values, gradients, the inverse, in train and eval; latents from dense to far beyond the outermost level."""
    theirs, ours = (
        peer.FSQ(levels, preserve_symmetry=symmetric),
        FSQ(len(levels), scalar_levels=levels, symmetric=symmetric),
    )
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 30.0])[:, None, None]
    z = torch.cat([torch.randn(5, 200, len(levels)) * spread, torch.zeros(5, 1, len(levels))], 1)
    a, b, weight = z.clone().requires_grad_(), z.clone().requires_grad_(), torch.randn_like(z)
    out, (quantized, codes) = ours.train()(a), theirs.train()(b)
    assert torch.equal(out.codes[:, 0], codes.long())
    torch.testing.assert_close(out.quantized, quantized)
    (out.quantized * weight).sum().backward()
    (quantized * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert a.grad.abs().max() > 0.1
    with torch.no_grad():
        evaluated = ours.eval()(z)
        assert torch.equal(evaluated.codes, out.codes)
        torch.testing.assert_close(evaluated.quantized, theirs.eval()(z)[0])
    every = torch.arange(math.prod(levels))[None]
    assert torch.equal(ours.digits(every), theirs.indices_to_level_indices(every))
    torch.testing.assert_close(ours.embed_codes(every[:, None]), theirs.indices_to_codes(every))


@pytest.mark.parametrize("symmetric", [False, True])
def test_fsq_with_projections(symmetric):
    levels = [8, 5, 5]
    theirs = peer.FSQ(levels, dim=12, preserve_symmetry=symmetric)
    ours = FSQ(12, scalar_levels=levels, symmetric=symmetric)
    copy_projections(ours, theirs)
    z, weight = torch.randn(4, 25, 12) * 2, torch.randn(4, 25, 12)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    out, (quantized, codes) = ours.train()(a), theirs.train()(b)
    assert torch.equal(out.codes[:, 0], codes.long())
    torch.testing.assert_close(out.quantized, quantized)
    (out.quantized * weight).sum().backward()
    (quantized * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.project_in.weight.grad, theirs.project_in.weight.grad, rtol=1e-5, atol=1e-5)


# Their probabilities are softmax(2 tau z . c), where c are rows of length sqrt(bits) (LFQ) or 1 (BSQ). Ours are
# softmax(-|z - row|^2 / (corner^2 T)) = softmax(2 z . row / (corner^2 T)), where a row is corner * (+-1, ..., +-1): with a
# corner of 1 (LFQ) tau = 1 / T, with bits^-0.5 (BSQ) tau = bits / T.
BITS = 6
KINDS = {"lfq": (LFQ, False, 1.0), "bsq": (BSQ, True, float(BITS))}


def soft_assignments(z, spherical, tau):
    """Theirs, by definition, in float64."""
    bits = z.shape[-1]
    signs = 2.0 * ((torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1)) & 1).double() - 1
    z = z.detach().double().flatten(0, -2)
    if spherical:
        z, signs = torch.nn.functional.normalize(z, dim=-1), signs / math.sqrt(bits)
    return (2 * tau * z @ signs.T).softmax(1)


@pytest.mark.parametrize(
    "tau", [0.1, 0.3]
)  # soft enough that no probability is below 1e-5, where theirs clamps logarithms
@pytest.mark.parametrize("kind", KINDS)
def test_lfq_and_bsq_in_training(kind, tau):
    """Codes (their bit order: most significant first), values, commitment, both entropies, the weighted loss, gradients."""
    ours_class, spherical, scale = KINDS[kind]
    tau = tau * scale
    theirs = peer.LFQ(dim=BITS, spherical=spherical, commitment_loss_weight=0.25, entropy_loss_weight=0.1)
    ours = ours_class(
        BITS,
        bits=BITS,
        commitment_weight=0.25,
        entropy_weight=0.1,
        entropy_temperature=scale / tau,
        entropy_group_bits=BITS,
    )
    z, weight = torch.rand(4, 25, BITS) * 2 - 1, torch.randn(4, 25, BITS)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    p = soft_assignments(z, spherical, tau)
    assert p.min() > 1e-5
    out = ours.train()(a)
    (quantized, codes, loss), parts = theirs.train()(b, inv_temperature=tau, return_loss_breakdown=True)
    assert torch.equal(out.codes[:, 0], codes.long())
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.losses["commitment_loss"], parts.commitment)
    torch.testing.assert_close(out.losses["entropy_loss"], parts.per_sample_entropy - parts.batch_entropy)
    torch.testing.assert_close(out.loss, loss)
    for ours_term, their_term in (
        (1000 * out.losses["entropy_loss"], 1000 * (parts.per_sample_entropy - parts.batch_entropy)),
        (1000 * out.loss, 1000 * loss),
        ((out.quantized * weight).sum(), (quantized * weight).sum()),
    ):
        (mine,) = torch.autograd.grad(ours_term, a, retain_graph=True)
        (other,) = torch.autograd.grad(their_term, b, retain_graph=True)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)  # of numbers of about 1, from sums over 64 codes
        assert mine.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_lfq_and_bsq_in_eval_with_projections(kind):
    ours_class, spherical, _ = KINDS[kind]
    theirs, ours = peer.LFQ(dim=12, codebook_size=2**BITS, spherical=spherical), ours_class(12, bits=BITS)
    copy_projections(ours, theirs)
    z = torch.randn(4, 25, 12)
    out, (quantized, codes, _) = ours.eval()(z), theirs.eval()(z)
    assert torch.equal(out.codes[:, 0], codes.long())
    torch.testing.assert_close(out.quantized, quantized)
    every = torch.arange(2**BITS)[None]
    torch.testing.assert_close(ours.embed_codes(every[:, None]), theirs.indices_to_codes(every))
