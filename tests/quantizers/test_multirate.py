"""Multi-rate residuals: one sequence at growing rates, against loops over spans."""

import pytest
import torch
from torch import Tensor

from tests import reference
from vqtok.quantizers import MultiRateQuantizer

DIM = 3
LAYER = {"type": "vector", "codebook_size": 15, "revival_threshold": 0}


def build(seed: int = 0, **options) -> MultiRateQuantizer:
    torch.manual_seed(seed)
    return MultiRateQuantizer(DIM, **{"strides": [4, 2, 1], "layer": LAYER, **options})


@pytest.mark.parametrize(
    ("strides", "steps"), [([4, 2, 1], 12), ([4, 2, 1], 4), ([6, 3, 1], 18), ([1], 5), ([8, 1], 16)]
)
def test_codes_and_parts_are_those_of_the_slow_loops(strides, steps):
    quantizer, z = build(strides=strides), torch.randn(2, steps, DIM)
    tables = [layer.codebook.embedding.numpy() for layer in quantizer.layers]
    for training in (True, False):
        out = quantizer.train(training)(z)
        assert [level.codes.shape for level in out] == [(2, 1, steps // stride) for stride in strides]
        for b, sample in enumerate(z):
            codes, parts = reference.multi_rate(sample.numpy(), tables, strides)
            for level, output in enumerate(out):
                assert output.codes[b, 0].tolist() == codes[level].tolist()
                torch.testing.assert_close(
                    output.quantized[b].double(), torch.from_numpy(parts[level]), rtol=1e-5, atol=1e-5
                )
    parts = quantizer.embed_codes([level.codes for level in out])
    assert all(part.equal(level.quantized) for part, level in zip(parts, out, strict=True))


@pytest.mark.parametrize("steps", [4, 20])
def test_a_prefix_of_levels_decodes_at_the_full_rate(steps):
    quantizer, z = build().eval(), torch.randn(3, steps, DIM)
    out = quantizer(z)
    for number in (1, 2, 3):
        parts = quantizer.embed_codes([level.codes for level in out[:number]])
        assert len(parts) == number
        assert all(part.equal(level.quantized) for part, level in zip(parts, out, strict=False))
        (merged,), keep = quantizer.merge(parts, None)
        assert keep is None and merged.shape == z.shape
        torch.testing.assert_close(merged, sum(level.quantized for level in out[:number]))


def test_merge_keeps_as_many_levels_as_each_sample_wants():
    quantizer = build().eval()
    parts = [level.quantized for level in quantizer(torch.randn(2, 8, DIM))]
    (merged,), _ = quantizer.merge(parts, torch.tensor([1, 3]))
    torch.testing.assert_close(merged[0], parts[0][0])
    torch.testing.assert_close(merged[1], parts[0][1] + parts[1][1] + parts[2][1])


def test_every_level_has_a_table_of_its_own_that_follows_its_means():
    quantizer = build().train()
    for book in quantizer.codebooks:
        book.decay = 0.0
    out = quantizer(torch.randn(20, 8, DIM))
    before = [book.embedding.clone() for book in quantizer.codebooks]
    quantizer.update()
    assert len(before) == 3
    for book, old, level in zip(quantizer.codebooks, before, out, strict=True):
        rows, codes = level.latents.detach().reshape(-1, DIM), level.codes.flatten()
        wanted = torch.stack([rows[codes == k].mean(0) if (codes == k).any() else old[k] for k in range(15)])
        torch.testing.assert_close(book.embedding, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 6, 13])
def test_a_length_that_does_not_fit_is_named(steps):
    quantizer = build()
    for call in (quantizer, quantizer.encode, quantizer.eval()):
        with pytest.raises(ValueError, match=f"{steps} steps.*stride of 4: pad it"):
            call(torch.randn(2, steps, DIM))


def proposals(*batches: Tensor):
    return lambda: ((lambda level, quantized, z=z: z) for z in batches)


def test_initialised_the_levels_come_nearer_to_the_latents():
    quantizer, z = build(), torch.randn(60, 8, DIM) * 3 + 10 * torch.randn(60, 1, DIM)
    quantizer.initialise(proposals(z[:30], z[30:]), 10_000)
    parts = [level.quantized for level in quantizer.eval()(z)]
    errors = [float((sum(parts[:n]) - z).square().mean()) for n in (1, 2, 3)]
    assert errors[2] < errors[1] < errors[0] < 0.5 * float(z.square().mean())
    assert quantizer.is_initialised


def test_initialised_from_sequences_of_several_lengths():
    quantizer = build(layer={**LAYER, "codebook_size": 4})
    quantizer.initialise(proposals(torch.randn(3, 8, DIM), torch.randn(3, 16, DIM)), 10_000)
    assert quantizer.is_initialised


@pytest.mark.parametrize("dim", [0, -1, True, 2.0])
def test_a_width_that_cannot_be_is_refused(dim):
    with pytest.raises(ValueError, match=f"dim.*{dim!r}"):
        MultiRateQuantizer(dim)
