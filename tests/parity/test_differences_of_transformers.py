"""What the codecs of transformers 5.23 do and what ours does, executed side by side: the proofs of docs/differences.md."""

import pytest
import torch
from torch import nn
from transformers import DacConfig, EncodecConfig, MimiConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer, DacVectorQuantize
from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook, EncodecResidualVectorQuantizer
from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook, MimiResidualVectorQuantizer

from vqtok.quantizers import Codebook, ResidualQuantizer, VectorQuantizer

pytestmark = pytest.mark.parity

DIM, SIZE, DEPTH = 16, 64, 4
ENCODEC = EncodecConfig(codebook_size=SIZE, codebook_dim=DIM, hidden_size=DIM, target_bandwidths=[1.8])
MIMI = MimiConfig(
    codebook_size=SIZE,
    codebook_dim=DIM,
    hidden_size=DIM,
    vector_quantization_hidden_dimension=DIM,
    num_quantizers=DEPTH,
)


def dac_config(**options):
    return DacConfig(codebook_dim=8, codebook_size=SIZE, hidden_size=DIM, n_codebooks=DEPTH, **options)


def residual(**options):
    return ResidualQuantizer(DIM, num_codebooks=DEPTH, layer={"type": "vector", "codebook_size": SIZE}, **options)


def nearest_in_float64(z, table):
    return (z[:, None].double() - table.double()).square().sum(-1).argmin(1)


# -- which code


@pytest.mark.parametrize(("offset", "share"), [(100, 0.0), (1000, 0.2)])
def test_codes_of_latents_with_a_large_mean(offset, share):
    """The spread is 1. The expanded square in fp32 loses it (`cdist` expands too); float64 tells which code is nearest."""
    encodec, mimi, ours = EncodecEuclideanCodebook(ENCODEC), MimiEuclideanCodebook(MIMI), Codebook(SIZE, DIM)
    table, z = offset + torch.randn(SIZE, DIM), offset + torch.randn(5000, DIM)
    for where in (encodec.embed, mimi.embed_sum, ours.embedding):
        where.copy_(table)
    best = nearest_in_float64(z, table)
    wrong = [float((each.encode(z) != best).float().mean()) for each in (encodec, mimi, ours)]
    assert wrong[0] > share and wrong[1] > share
    assert wrong[2] == 0


def test_codes_of_a_model_in_bfloat16():
    """Its table is rounded and EnCodec also searches in bfloat16: the same latents get other codes than in fp32."""
    encodec, mimi, ours = EncodecEuclideanCodebook(ENCODEC), MimiEuclideanCodebook(MIMI), Codebook(SIZE, DIM)
    table, z = torch.randn(SIZE, DIM), torch.randn(2000, DIM).bfloat16()
    for where in (encodec.embed, mimi.embed_sum, ours.embedding):
        where.copy_(table)
    best = nearest_in_float64(z, table)
    wrong = [float((each.to(torch.bfloat16).encode(z) != best).float().mean()) for each in (encodec, mimi, ours)]
    assert wrong[0] > 0.001 and wrong[1] > 0.001
    assert wrong[2] == 0
    assert encodec.embed.dtype == torch.bfloat16 and ours.embedding.dtype == torch.float32


def test_codes_under_autocast():
    encodec, ours = EncodecEuclideanCodebook(ENCODEC), Codebook(SIZE, DIM)
    table, z = torch.randn(SIZE, DIM), torch.randn(2000, DIM)
    encodec.embed.copy_(table)
    ours.embedding.copy_(table)
    best = nearest_in_float64(z, table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (encodec.encode(z) != best).any()
        assert torch.equal(ours.encode(z), best)


def test_latents_that_are_not_numbers():
    z = torch.full((2, DIM), torch.nan)
    assert EncodecEuclideanCodebook(ENCODEC).encode(z).tolist() == [0, 0]
    assert MimiEuclideanCodebook(MIMI).encode(z).tolist() == [0, 0]
    with pytest.raises(ValueError, match="NaN"):
        Codebook(SIZE, DIM).encode(z)


def test_the_sign_of_the_squared_norm_in_dac():
    """It is added where it should be subtracted. All normalised rows have one norm, so only a row of zeros shows it."""
    theirs = DacVectorQuantize(dac_config())
    ours = VectorQuantizer(8, codebook_size=SIZE, metric="cosine", update="gradient")
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    with torch.no_grad():
        for table in (theirs.codebook.weight, ours.codebook.embedding):
            table.copy_(axes.repeat(SIZE // 16, 1))
            table[-1] = 0
    z = torch.ones(1, 1, 8)  # a cosine of 0.35 with 8 rows: squared distances of 1.29, and of 1 to the zero row
    table = nn.functional.normalize(theirs.codebook.weight, dim=-1)
    best = nearest_in_float64(nn.functional.normalize(z[0], dim=-1), table)
    assert best.tolist() == [SIZE - 1]
    assert theirs.decode_latents(z.mT)[1].tolist() == [[0]]
    assert ours.encode(z).codes[0, 0].tolist() == best.tolist()


# -- values and losses


def test_dac_normalises_for_the_search_only():
    """Rows come out with the lengths they have, and losses compare them with latents as they are. Ours is cosine throughout."""
    theirs = DacVectorQuantize(dac_config())
    ours = VectorQuantizer(DIM, codebook_size=SIZE, codebook_dim=8, metric="cosine", update="gradient").train()
    with torch.no_grad():
        theirs.codebook.weight.mul_(3)
        ours.codebook.embedding.copy_(theirs.codebook.weight)
        for mine, other in ((ours.project_in, theirs.in_proj), (ours.project_out, theirs.out_proj)):
            mine.weight.copy_(other.weight[:, :, 0])
            mine.bias.copy_(other.bias)
    z = torch.randn(3, 50, DIM)
    out = ours(z)
    quantized, commitment, _, codes, latents = theirs(z.mT)
    assert torch.equal(out.codes[:, 0], codes)
    rows = theirs.codebook(codes)
    torch.testing.assert_close(commitment, nn.functional.mse_loss(latents.mT, rows))
    unit = nn.functional.normalize(rows, dim=-1)
    torch.testing.assert_close(out.quantized, ours.project_out(unit))
    torch.testing.assert_close(
        out.losses["commitment_loss"], nn.functional.mse_loss(nn.functional.normalize(latents.mT, dim=-1), unit)
    )
    assert (out.quantized - quantized.mT).abs().max() > 0.1


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_dac_is_a_number_per_sample(training):
    """All equal; the documentation says a shape of (1), and so do those who call `backward`."""
    theirs, ours = DacResidualVectorQuantizer(dac_config(quantizer_dropout=0.0)), residual()
    commitment = theirs.train(training)(torch.randn(3, DIM, 50))[3]
    assert commitment.shape == (3,) and len(commitment.unique()) == 1
    with pytest.raises(RuntimeError, match="scalar"):
        commitment.backward()
    loss = ours.train()(torch.randn(3, 50, DIM, requires_grad=True)).loss
    assert loss.shape == ()
    loss.backward()


def test_dropout_of_dac_takes_the_first_samples_and_none_of_a_batch_of_one():
    """Of 8 samples the last 4 always keep all codebooks; half of one sample is none. Ours draws for each sample."""
    theirs = DacResidualVectorQuantizer(dac_config(quantizer_dropout=0.5))
    ours = residual(depth_dropout=0.5).train()
    z = torch.randn(8, DIM, 5)
    whole = theirs.eval()(z)[0]
    passes = torch.stack([theirs.train()(z)[0] for _ in range(20)])
    torch.testing.assert_close(passes[:, 4:], whole[4:].expand(20, 4, DIM, 5))
    assert (passes[:, :4] - whole[:4]).abs().max() > 0.01
    for _ in range(20):
        torch.testing.assert_close(theirs.train()(z[:1])[0], whole[:1])
    depths = set()
    for _ in range(60):
        out = ours(z[:1].mT)
        prefixes = torch.stack([ours.embed_codes(out.codes[:, :depth]) for depth in range(1, DEPTH + 1)])
        depths.add(int((prefixes - out.quantized).abs().amax((1, 2, 3)).argmin()))
    assert depths == {0, 1, 2, 3}


def test_dac_ignores_n_quantizers_in_training():
    theirs, ours = DacResidualVectorQuantizer(dac_config(quantizer_dropout=0.0)), residual()
    z = torch.randn(2, DIM, 5)
    assert theirs.train()(z, n_quantizers=1)[1].shape[1] == DEPTH
    assert theirs.eval()(z, n_quantizers=1)[1].shape[1] == 1
    out = ours.train()(z.mT)
    assert ours.embed_codes(out.codes[:, :1]).shape == z.mT.shape


def test_encodec_and_mimi_cannot_be_trained():
    for theirs in (EncodecResidualVectorQuantizer(ENCODEC), MimiResidualVectorQuantizer(MIMI)):
        assert list(theirs.parameters()) == []
        assert not hasattr(theirs.layers[0].codebook, "update")
        with pytest.raises(NotImplementedError):
            theirs(torch.randn(2, DIM, 5))  # encode and decode only: there is no forward pass
    out = residual().train()(torch.randn(2, 5, DIM))
    assert float(out.loss) > 0


# -- tables that go stale, axes


def test_the_table_of_mimi_is_kept_after_its_weights_changed():
    theirs, ours = MimiEuclideanCodebook(MIMI), Codebook(SIZE, DIM)
    codes = torch.arange(SIZE)
    for weights in (torch.randn(SIZE, DIM), torch.randn(SIZE, DIM)):
        theirs.load_state_dict({**theirs.state_dict(), "embed_sum": weights})
        ours.load_state_dict({**ours.state_dict(), "embedding": weights})
        before, fresh = theirs.decode(codes), weights
        assert torch.equal(ours(codes), fresh)
    assert not torch.equal(before, fresh)


def test_the_table_of_mimi_is_kept_when_its_dtype_changes():
    theirs, ours = MimiEuclideanCodebook(MIMI), Codebook(SIZE, DIM)
    codes = torch.arange(SIZE)
    theirs.decode(codes)
    theirs.double()
    assert theirs.embed_sum.dtype == torch.float64 and theirs.decode(codes).dtype == torch.float32
    assert ours.double()(codes).dtype == ours.embedding.dtype == torch.float32  # by design: tables are fp32


def test_mimi_does_not_decode_what_it_encodes():
    """(Q, B, t) comes out of `encode`, (B, Q, t) goes into `decode`: with as many samples as codebooks there is no error."""
    theirs, ours = MimiResidualVectorQuantizer(MIMI), residual().eval()
    for layer in theirs.layers:
        layer.codebook.embed_sum.normal_()
    z = torch.randn(DEPTH, DIM, 50)
    codes = theirs.encode(z)
    assert codes.shape == (DEPTH, DEPTH, 50)
    assert not torch.allclose(theirs.decode(codes), theirs.decode(codes.transpose(0, 1)))
    out = ours(z.mT)
    assert torch.equal(ours.embed_codes(out.codes), out.quantized)
