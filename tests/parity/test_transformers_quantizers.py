"""The same weights and latents through the quantizers of transformers' codecs. Where we differ: docs/differences.md.

Those of EnCodec and Mimi cannot be trained there (tables are buffers, there are no losses), so only codes and values compare.
Tolerances are those of `assert_close` for fp32 (1.3e-6 relative, 1e-5 absolute) wherever none is given.
"""

import pytest
import torch
from transformers import DacConfig, EncodecConfig, MimiConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer, DacVectorQuantize
from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook, EncodecResidualVectorQuantizer
from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook, MimiResidualVectorQuantizer

from vqtok.quantizers import Codebook, ResidualQuantizer, VectorQuantizer

pytestmark = pytest.mark.parity

DIM, SIZE, DEPTH = 16, 64, 4


def residual(**layer):
    return ResidualQuantizer(DIM, num_codebooks=DEPTH, layer={"type": "vector", "codebook_size": SIZE, **layer})


def encodec_config():
    # 6 bits x 75 frames a second x 4 codebooks = 1.8 kbit/s
    return EncodecConfig(codebook_size=SIZE, codebook_dim=DIM, hidden_size=DIM, target_bandwidths=[1.8])


def mimi_config():
    return MimiConfig(
        codebook_size=SIZE,
        codebook_dim=DIM,
        hidden_size=DIM,
        vector_quantization_hidden_dimension=DIM,
        num_quantizers=DEPTH,
    )


def test_the_codebook_of_encodec():
    theirs, ours = EncodecEuclideanCodebook(encodec_config()), Codebook(SIZE, DIM)
    theirs.embed.copy_(torch.randn(SIZE, DIM))
    ours.embedding.copy_(theirs.embed)
    z = torch.randn(3, 50, DIM)
    codes = ours.encode(z)
    assert torch.equal(codes, theirs.encode(z))
    assert torch.equal(ours(codes), theirs.decode(codes))


def test_the_residual_quantizer_of_encodec():
    """Theirs has codes of (Q, B, t) and latents of (B, C, t)."""
    theirs, ours = EncodecResidualVectorQuantizer(encodec_config()), residual().eval()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        other.codebook.embed.copy_(torch.randn(SIZE, DIM))
        mine.codebook.embedding.copy_(other.codebook.embed)
    z = torch.randn(3, 50, DIM)
    out = ours(z)
    codes = theirs.encode(z.mT)
    assert torch.equal(out.codes, codes.movedim(0, 1))
    for depth in range(1, DEPTH + 1):
        assert torch.equal(ours.embed_codes(out.codes[:, :depth]), theirs.decode(codes[:depth]).mT)
    assert torch.equal(out.quantized, theirs.decode(codes).mT)


@torch.no_grad()
def fill_mimi(theirs, codebook):
    """Sums and usages there, their ratio here."""
    theirs.embed_sum.normal_()
    theirs.cluster_usage.uniform_(0.5, 20)
    codebook.embedding.copy_(theirs.embed_sum / theirs.cluster_usage[:, None])


def test_the_codebook_of_mimi():
    theirs, ours = MimiEuclideanCodebook(mimi_config()), Codebook(SIZE, DIM)
    fill_mimi(theirs, ours)
    z = torch.randn(3, 50, DIM)
    codes = ours.encode(z)
    assert torch.equal(codes, theirs.encode(z))
    assert torch.equal(ours(codes), theirs.decode(codes))


def test_the_residual_quantizer_of_mimi():
    """Theirs encodes to (Q, B, t) and decodes (B, Q, t)."""
    theirs, ours = MimiResidualVectorQuantizer(mimi_config()), residual().eval()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        fill_mimi(other.codebook, mine.codebook)
    z = torch.randn(3, 50, DIM)
    out = ours(z)
    assert torch.equal(out.codes, theirs.encode(z.mT).movedim(0, 1))
    assert torch.equal(out.quantized, theirs.decode(out.codes).mT)


# DAC looks codes up by direction and then returns rows and takes losses with the lengths they have. With rows of unit length
# the nearest row is the one of nearest direction, so our euclidean layer is theirs in everything; our cosine layer, which
# normalises the latents too, has their codes and values, and losses of its own (see test_differences_of_transformers.py).
DAC_DIM = 8


def dac_config(**options):
    return DacConfig(codebook_dim=DAC_DIM, codebook_size=SIZE, hidden_size=DIM, n_codebooks=DEPTH, **options)


@torch.no_grad()
def fill_dac(ours, theirs):
    """Rows of unit length on both sides; 1x1 convolutions of theirs are linear maps of ours."""
    rows = torch.nn.functional.normalize(torch.randn(SIZE, DAC_DIM), dim=-1)
    theirs.codebook.weight.copy_(rows)
    ours.codebook.embedding.copy_(rows)
    for mine, other in ((ours.project_in, theirs.in_proj), (ours.project_out, theirs.out_proj)):
        mine.weight.copy_(other.weight[:, :, 0])
        mine.bias.copy_(other.bias)


def check_gradients_of_dac(ours, theirs):
    for mine, other in ((ours.project_in, theirs.in_proj), (ours.project_out, theirs.out_proj)):
        # sums of 150 terms, weighted by up to 100
        torch.testing.assert_close(mine.weight.grad, other.weight.grad[:, :, 0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(mine.bias.grad, other.bias.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.codebook.embedding.grad, theirs.codebook.weight.grad, rtol=1e-5, atol=1e-5)
    assert ours.codebook.embedding.grad.abs().max() > 1e-3


def test_the_quantizer_of_dac():
    theirs = DacVectorQuantize(dac_config())
    ours = VectorQuantizer(DIM, codebook_size=SIZE, codebook_dim=DAC_DIM, update="gradient", revival_threshold=0.0)
    fill_dac(ours, theirs)
    z, weight = torch.randn(3, 50, DIM), torch.randn(3, 50, DIM)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = ours.train()(a)
    quantized, commitment, codebook, codes, _ = theirs.train()(b.mT)
    assert torch.equal(out.codes[:, 0], codes)
    torch.testing.assert_close(out.quantized, quantized.mT)
    torch.testing.assert_close(out.losses["commitment_loss"], commitment)
    torch.testing.assert_close(out.losses["codebook_loss"], codebook)
    ((out.quantized * weight).sum() + 100 * out.loss).backward()
    ((quantized.mT * weight).sum() + 100 * (0.25 * commitment + codebook)).backward()
    torch.testing.assert_close(a.grad, b.grad)
    check_gradients_of_dac(ours, theirs)


def dac_residual(metric, **options):
    theirs = DacResidualVectorQuantizer(dac_config(**options))
    ours = residual(codebook_dim=DAC_DIM, metric=metric, update="gradient", revival_threshold=0.0)
    for mine, other in zip(ours.layers, theirs.quantizers, strict=True):
        fill_dac(mine, other)
    return ours, theirs


def test_the_residual_quantizer_of_dac():
    """Theirs sums the losses of the codebooks (a number per sample, all equal), ours takes the mean."""
    ours, theirs = dac_residual("euclidean", quantizer_dropout=0.0)
    z, weight = torch.randn(3, 50, DIM), torch.randn(3, 50, DIM)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = ours.train()(a)
    quantized, codes, _, commitment, codebook = theirs.train()(b.mT)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.quantized, quantized.mT)
    torch.testing.assert_close(out.losses["commitment_loss"] * DEPTH, commitment.mean())
    torch.testing.assert_close(out.losses["codebook_loss"] * DEPTH, codebook.mean())
    ((out.quantized * weight).sum() + 100 * out.loss).backward()
    ((quantized.mT * weight).sum() + 100 / DEPTH * (0.25 * commitment + codebook).mean()).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours.layers, theirs.quantizers, strict=True):
        check_gradients_of_dac(mine, other)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_codes_and_values_of_dac_with_either_metric(metric):
    ours, theirs = dac_residual(metric)
    z = torch.randn(3, 50, DIM)
    with torch.no_grad():
        out = ours.eval()(z)
        quantized, codes, *_ = theirs.eval()(z.mT)
        assert torch.equal(out.codes, codes)
        torch.testing.assert_close(out.quantized, quantized.mT)
        for depth in range(1, DEPTH + 1):
            prefix = ours.embed_codes(out.codes[:, :depth])
            torch.testing.assert_close(prefix, theirs.from_codes(codes[:, :depth])[0].mT)
            torch.testing.assert_close(prefix, theirs(z.mT, n_quantizers=depth)[0].mT)
