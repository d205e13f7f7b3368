"""The same weights and latents through vector-quantize-pytorch: quantizers with a table. Where we differ: docs/differences.md.

Tolerances are those of `assert_close` for fp32 (1.3e-6 relative, 1e-5 absolute) wherever none is given.
"""

import pytest
import torch
from torch import nn
from vector_quantize_pytorch import ResidualVQ, VectorQuantize
from vector_quantize_pytorch import SimVQ as TheirSimVQ

from vqtok.quantizers import ProductQuantizer, ResidualQuantizer, SimVQ, VectorQuantizer

pytestmark = pytest.mark.parity

DIM, SIZE = 8, 32
PLAIN = {"decay": 0.99, "rotation_trick": False, "commitment_weight": 1.0}
STILL = {"codebook_size": SIZE, "revival_threshold": 0.0, "commitment_weight": 1.0}  # nothing but the EMA moves codes


@torch.no_grad()
def copy_table(ours, theirs):
    """Their table in ours, and their sums at the table's rows, for counts of one."""
    codebook = theirs._codebook
    ours.codebook.embedding.copy_(codebook.embed[0])
    codebook.embed_avg.copy_(codebook.embed)
    codebook.cluster_size.fill_(1)


@torch.no_grad()
def copy_projections(ours, theirs):
    ours.project_in.load_state_dict(theirs.project_in.state_dict())
    ours.project_out.load_state_dict(theirs.project_out.state_dict())


def pair(dim=DIM, their_options=(), **options):
    theirs = VectorQuantize(dim, codebook_size=SIZE, **{**PLAIN, **dict(their_options)})
    ours = VectorQuantizer(dim, **{**STILL, **options})
    copy_table(ours, theirs)
    if theirs.has_projections:
        copy_projections(ours, theirs)
    return ours, theirs


def twice(*shape):
    """Equal latents of two graphs, and a weight for the outputs so that no gradient is uniform."""
    z = torch.randn(*shape)
    return z.clone().requires_grad_(), z.clone().requires_grad_(), torch.randn(*shape)


VARIANTS = {
    "euclidean": ({}, {}),
    "cosine": ({"use_cosine_sim": True}, {"metric": "cosine"}),
    "rotation": ({"rotation_trick": True}, {"gradient": "rotation"}),
    "projected": ({"codebook_dim": 4}, {"codebook_dim": 4}),
    "projected cosine": ({"codebook_dim": 4, "use_cosine_sim": True}, {"codebook_dim": 4, "metric": "cosine"}),
    "projected rotation": ({"codebook_dim": 4, "rotation_trick": True}, {"codebook_dim": 4, "gradient": "rotation"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_pass(name):
    """Codes, values, commitment, and the gradients to latents and projections."""
    theirs_with, ours_with = VARIANTS[name]
    ours, theirs = pair(their_options=theirs_with, **ours_with)
    a, b, weight = twice(4, 25, DIM)
    out = ours.train()(a)
    quantized, codes, loss = theirs.train()(b)
    assert torch.equal(out.codes[:, 0], codes)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.losses["commitment_loss"], loss.squeeze())
    torch.testing.assert_close(out.loss, loss.squeeze())
    ((out.quantized * weight).sum() + 100 * out.loss).backward()
    ((quantized * weight).sum() + 100 * loss).backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert a.grad.abs().max() > 0.1
    if "projected" in name:
        for mine, other in ((ours.project_in, theirs.project_in), (ours.project_out, theirs.project_out)):
            torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-5, atol=1e-4)  # sums of 100 terms
            torch.testing.assert_close(mine.bias.grad, other.bias.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_eval_and_from_codes(name):
    theirs_with, ours_with = VARIANTS[name]
    ours, theirs = pair(their_options=theirs_with, **ours_with)
    z = torch.randn(4, 25, DIM)
    out = ours.eval()(z)
    quantized, codes, _ = theirs.eval()(z)
    assert torch.equal(out.codes[:, 0], codes)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(ours.embed_codes(codes[:, None]), theirs.get_output_from_indices(codes))


def test_the_ema_of_ten_steps():
    """With their smoothing of counts (eps) out of the way; see docs/differences.md for what it does to unused codes."""
    ours, theirs = pair(their_options={"eps": 1e-12})
    before = ours.codebook.embedding.clone()
    all_hits = torch.zeros(SIZE, dtype=torch.int64)
    for _ in range(10):
        z = torch.randn(1, 6, DIM)
        codes = ours.train()(z).codes
        assert torch.equal(codes[:, 0], theirs.train()(z)[1])
        ours.update()
        all_hits += torch.bincount(codes.flatten(), minlength=SIZE)
        torch.testing.assert_close(ours.codebook.embedding, theirs._codebook.embed[0])
        torch.testing.assert_close(ours.codebook.counts, theirs._codebook.cluster_size[0])
    unused = all_hits == 0
    assert 0 < int(unused.sum()) < SIZE
    assert torch.equal(ours.codebook.embedding[unused], before[unused])  # to the bit; theirs by rounding
    assert (ours.codebook.embedding[~unused] - before[~unused]).abs().max() > 1e-3


def test_the_cosine_ema_of_one_step():
    """Of one: afterwards theirs averages sums that shrink, ours starts from unit rows again (docs/differences.md)."""
    ours, theirs = pair(their_options={"use_cosine_sim": True, "eps": 1e-12}, metric="cosine")
    before = ours.codebook.embedding.clone()
    z = torch.randn(4, 25, DIM)
    ours.train()(z)
    theirs.train()(z)
    ours.update()
    torch.testing.assert_close(ours.codebook.embedding, theirs._codebook.embed[0])
    assert (ours.codebook.embedding - before).abs().max() > 1e-3


@pytest.mark.parametrize("rotation", [False, True])
def test_a_learnable_codebook(rotation):
    """Theirs has one error with both gradients, so ours equals it where both weights are one, with twice the value."""
    ours, theirs = pair(
        their_options={"learnable_codebook": True, "ema_update": False, "rotation_trick": rotation},
        update="gradient",
        gradient="rotation" if rotation else "straight_through",
    )
    a, b, weight = twice(4, 25, DIM)
    out = ours.train()(a)
    quantized, codes, loss = theirs.train()(b)
    assert torch.equal(out.codes[:, 0], codes)
    torch.testing.assert_close(out.quantized, quantized)
    for value in out.losses.values():
        torch.testing.assert_close(value, loss.squeeze())
    ((out.quantized * weight).sum() + 100 * out.loss).backward()
    ((quantized * weight).sum() + 100 * loss).backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.codebook.embedding.grad, theirs._codebook.embed.grad[0])
    assert ours.codebook.embedding.grad.abs().max() > 0.1


def test_heads_with_tables_of_their_own_are_a_product():
    theirs = VectorQuantize(DIM, codebook_size=SIZE, heads=2, codebook_dim=4, separate_codebook_per_head=True, **PLAIN)
    ours = ProductQuantizer(DIM, num_codebooks=2, layer={"type": "vector", **STILL})
    for layer, table in zip(ours.layers, theirs._codebook.embed, strict=True):
        layer.codebook.embedding.copy_(table)
    a, b, weight = twice(4, 25, DIM)
    out = ours.train()(a)
    quantized, codes, loss = theirs.train()(b, freeze_codebook=True)
    assert torch.equal(out.codes, codes.movedim(-1, 1))
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.loss, loss.squeeze())
    ((out.quantized * weight).sum() + 100 * out.loss).backward()
    ((quantized * weight).sum() + 100 * loss).backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.embed_codes(out.codes), theirs.get_output_from_indices(codes))


def residual_pair(depth=4, **their_options):
    theirs = ResidualVQ(dim=DIM, num_quantizers=depth, codebook_size=SIZE, **{**PLAIN, **their_options})
    ours = ResidualQuantizer(DIM, num_codebooks=depth, layer={"type": "vector", **STILL})
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        copy_table(mine, other)
    return ours, theirs


def test_residual_codes_values_and_commitment():
    """Their loss is one number per codebook, ours the mean. Of the sum, theirs has a gradient of its own by default."""
    ours, theirs = residual_pair()
    a, b, _ = twice(4, 25, DIM)
    out = ours.train()(a)
    quantized, codes, losses = theirs.train()(b)
    assert torch.equal(out.codes, codes.movedim(-1, 1))
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.loss, losses.mean())
    (100 * out.loss).backward()
    (100 * losses.mean()).backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert a.grad.abs().max() > 0.1


def test_residual_gradient_of_the_sum():
    """The identity: theirs where `quant_grad_frac` is one (then its commitments do not reach the encoder), ours always."""
    ours, theirs = residual_pair(quant_grad_frac=1.0)
    a, b, weight = twice(4, 25, DIM)
    (ours.train()(a).quantized * weight).sum().backward()
    (theirs.train()(b)[0] * weight).sum().backward()
    assert torch.equal(a.grad, weight)
    torch.testing.assert_close(b.grad, weight)


def test_residual_eval_and_ema():
    ours, theirs = residual_pair(eps=1e-12)
    z = torch.randn(4, 25, DIM)
    out, (quantized, codes, _) = ours.eval()(z), theirs.eval()(z)
    assert torch.equal(out.codes, codes.movedim(-1, 1))
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(ours.embed_codes(out.codes), theirs.get_output_from_indices(codes))
    for _ in range(3):
        z = torch.randn(4, 25, DIM)
        ours.train()(z)
        theirs.train()(z)
        ours.update()
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(mine.codebook.embedding, other._codebook.embed[0])


def sim_pair(rotation, bias):
    theirs = TheirSimVQ(
        DIM, codebook_size=SIZE, rotation_trick=rotation, codebook_transform=nn.Linear(DIM, DIM, bias=bias)
    )
    ours = SimVQ(DIM, codebook_size=SIZE, gradient="rotation" if rotation else "straight_through")
    with torch.no_grad():
        ours.frozen_codes.copy_(theirs.frozen_codebook)
        ours.code_map.copy_(theirs.code_transform.weight)
        if bias:
            ours.code_bias.copy_(theirs.code_transform.bias)
    return ours, theirs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
def test_sim_vq(rotation, bias):
    """Also the weights: theirs and ours are 0.25 for the commitment and 1 for the map."""
    ours, theirs = sim_pair(rotation, bias)
    a, b, weight = twice(4, 25, DIM)
    out = ours.train()(a)
    quantized, codes, loss = theirs.train()(b)
    assert torch.equal(out.codes[:, 0], codes)
    torch.testing.assert_close(ours.table, theirs.codebook)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.loss, loss)
    ((out.quantized * weight).sum() + 100 * out.loss).backward()
    ((quantized * weight).sum() + 100 * loss).backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.code_map.grad, theirs.code_transform.weight.grad)
    if bias:
        torch.testing.assert_close(ours.code_bias.grad, theirs.code_transform.bias.grad)
    torch.testing.assert_close(ours.eval()(a).quantized, theirs.eval()(b)[0])
    torch.testing.assert_close(ours.embed_codes(codes[:, None]), theirs.indices_to_codes(codes))
