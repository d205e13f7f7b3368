"""The same table and the same latents through other people's quantizers."""

import pytest
import torch
from vector_quantize_pytorch import VectorQuantize

from vqtok.quantizers import Codebook, VectorQuantizer, update_codebooks

pytestmark = pytest.mark.parity


def pair(**options):
    """Ours and vector-quantize-pytorch's, with one table, EMA counts of one, and nothing else that moves codes."""
    theirs = VectorQuantize(8, codebook_size=32, decay=0.99, rotation_trick=False, commitment_weight=1.0, **options)
    ours = VectorQuantizer(8, 32, revival_threshold=0.0)
    with torch.no_grad():
        ours.codebook.embedding.copy_(theirs._codebook.embed[0])
        theirs._codebook.embed_avg.copy_(theirs._codebook.embed)
        theirs._codebook.cluster_size.fill_(1)
    return ours, theirs


def test_codes_values_commitment_and_gradient_of_vector_quantize_pytorch():
    ours, theirs = pair()
    z = torch.randn(4, 25, 8)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = ours.train()(a)
    quantized, codes, loss = theirs.train()(b)
    assert torch.equal(out.codes[:, 0], codes)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.losses["commitment_loss"], loss.squeeze())
    (out.quantized.square().sum() + out.losses["commitment_loss"]).backward()
    (quantized.square().sum() + loss.sum()).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_the_ema_of_vector_quantize_pytorch_wherever_a_code_was_hit():
    """Theirs smooths counts by 1e-5 (Laplace) and keeps sums; ours keeps the ratio, so codes without a hit stay exactly."""
    ours, theirs = pair(eps=1e-12)
    before = ours.codebook.embedding.clone()
    z = torch.randn(4, 4, 8)  # fewer latents than codes
    codes = ours.train()(z).codes
    theirs.train()(z)
    update_codebooks([ours.codebook])
    hit = torch.bincount(codes.flatten(), minlength=32) > 0
    assert 0 < int(hit.sum()) < 32
    torch.testing.assert_close(ours.codebook.embedding[hit], theirs._codebook.embed[0][hit], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.codebook.counts, theirs._codebook.cluster_size[0])
    assert torch.equal(ours.codebook.embedding[~hit], before[~hit])


def test_the_codebook_of_transformers_encodec():
    from transformers import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook

    theirs = EncodecEuclideanCodebook(EncodecConfig(codebook_size=64, codebook_dim=16))
    ours = Codebook(64, 16)
    theirs.embed.copy_(torch.randn(64, 16))
    ours.embedding.copy_(theirs.embed)
    z = torch.randn(3, 50, 16)
    codes = ours.encode(z)
    assert torch.equal(codes, theirs.encode(z))
    assert torch.equal(ours(codes), theirs.decode(codes))
