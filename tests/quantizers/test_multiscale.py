"""Multi-scale residuals: one grid at growing resolutions, against loops over axes, cells and codes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import reference
from vqtok.quantizers import MultiScaleQuantizer

DIM = 3
LAYER = {"type": "vector", "codebook_size": 15, "revival_threshold": 0}


def build(seed: int = 0, ndim: int = 2, **options) -> MultiScaleQuantizer:
    torch.manual_seed(seed)
    return MultiScaleQuantizer(DIM, ndim, **{"scales": [1, 2, 4], "layer": LAYER, **options})


def smoothing_of(quantizer: MultiScaleQuantizer, level: int) -> int:
    """Which of the convolutions neighbouring scales share: the first for the first share of the scales, and so on."""
    return level * len(quantizer.smoothings) // len(quantizer.config.scales)


def expected(quantizer: MultiScaleQuantizer, sample: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Codes and parts of one sample by the slow version."""
    scales, share = quantizer.config.scales, quantizer.config.smoothing
    layers = list(quantizer.layers) * (len(scales) if quantizer.config.shared else 1)
    tables = [layer.codebook.embedding.detach().numpy() for layer in layers]
    convolutions = []
    for level in range(len(scales) if share else 0):
        convolution = quantizer.smoothings[smoothing_of(quantizer, level)]
        convolutions.append(tuple(value.detach().double().numpy() for value in (convolution.weight, convolution.bias)))
    return reference.multi_scale(sample.numpy(), tables, scales, share, convolutions)


GRIDS = {
    "as fine as the finest scale": (4, 4),
    "twice as fine": (8, 8),
    "unequal sides": (8, 4),
    "odd sides": (5, 7),
    "smaller than the finest scale": (3, 2),
    "one cell": (1, 1),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"shared": False, "smoothing": 0}, {"scales": [1, 2, 3], "smoothing": 1, "num_smoothings": 2}, {"scales": [3]}]
    + [{"scales": [2, 5], "smoothing": 0.25}],
    ids=str,
)
def test_codes_and_parts_are_those_of_the_slow_loops(grid, options):
    quantizer = build(**options)
    z = torch.randn(2, *grid, DIM) * 2
    for training in (False, True):
        out = quantizer.train(training)(z)
        assert len(out) == len(quantizer.config.scales)
        for b, sample in enumerate(z):
            codes, parts = expected(quantizer, sample)
            for level, output in enumerate(out):
                assert output.codes[b, 0].tolist() == codes[level].tolist()
                part = torch.from_numpy(parts[level]).float()
                torch.testing.assert_close(output.quantized[b].detach(), part, rtol=1e-4, atol=1e-5)
    # Every level's latents are what the coarser ones left, on its own grid.
    codes, parts = expected(quantizer, z[0])
    residual = z[0].numpy().astype(np.float64)
    for part, output in zip(parts, quantizer.eval()(z), strict=True):
        small = reference.shrink(residual, output.codes.shape[2:])
        torch.testing.assert_close(output.latents[0].double(), torch.from_numpy(small), rtol=1e-4, atol=1e-5)
        residual = residual - part


@pytest.mark.parametrize("steps", [1, 4, 8, 11])
def test_sequences(steps):
    quantizer = build(ndim=1, num_smoothings=2).eval()
    z = torch.randn(2, steps, DIM)
    out = quantizer(z)
    for b, sample in enumerate(z):
        codes, parts = expected(quantizer, sample)
        for level, output in enumerate(out):
            assert output.codes[b, 0].tolist() == codes[level].tolist()
            torch.testing.assert_close(
                output.quantized[b].double(), torch.from_numpy(parts[level]), rtol=1e-4, atol=1e-5
            )
    assert all(a.equal(b.quantized) for a, b in zip(quantizer.embed_codes([o.codes for o in out]), out, strict=True))


@pytest.mark.parametrize("options", [{}, {"scales": [1, 2, 3]}, {"scales": [3]}, {"shared": False, "smoothing": 0}])
@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (5, 7), (3, 2), (6, 9)])
def test_from_codes_equals_forward_whatever_the_grid(grid, options):
    """A well-known library takes the last scale for the size: 4 x 4 from the codes of 8 x 8 (style.md 2.9, defect 8)."""
    quantizer, z = build(**options).eval(), torch.randn(3, *grid, DIM)
    out = quantizer(z)
    parts = quantizer.embed_codes([level.codes for level in out])
    assert all(part.shape == z.shape and part.equal(level.quantized) for part, level in zip(parts, out, strict=True))
    finest = quantizer.config.scales[-1]
    for scale, level in zip(quantizer.config.scales, out, strict=True):
        assert level.codes.shape == (3, 1, *(-(-n * scale // finest) for n in grid))


@pytest.mark.parametrize("grid", [(4, 4), (8, 12), (16, 4)])
def test_a_prefix_of_levels_decodes_at_the_full_grid(grid):
    quantizer, z = build().eval(), torch.randn(3, *grid, DIM)
    out = quantizer(z)
    for number in (1, 2, 3):
        parts = quantizer.embed_codes([level.codes for level in out[:number]])
        assert len(parts) == number
        assert all(part.equal(level.quantized) for part, level in zip(parts, out, strict=False))
        (merged,), keep = quantizer.merge(parts, None)
        torch.testing.assert_close(merged, sum(level.quantized for level in out[:number]))
        assert keep is None and merged.shape == z.shape


def test_merge_keeps_as_many_levels_as_each_sample_wants():
    quantizer, z = build().eval(), torch.randn(3, 4, 8, DIM)
    parts = [level.quantized for level in quantizer(z)]
    (merged,), keep = quantizer.merge(parts, torch.tensor([2, 1, 3]))
    wanted = [parts[0][0] + parts[1][0], parts[0][1], parts[0][2] + parts[1][2] + parts[2][2]]
    assert keep is None
    torch.testing.assert_close(merged, torch.stack(wanted))
    (everything,), _ = quantizer.merge(parts, torch.tensor([3, 3, 3]))
    assert everything.equal(quantizer.merge(parts, None)[0][0])


@pytest.mark.parametrize(
    ("number", "groups"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_neighbouring_scales_share_a_convolution(number, groups):
    quantizer = build(scales=[1, 2, 3, 4], num_smoothings=number).eval()
    codes = [level.codes for level in quantizer(torch.randn(2, 4, 4, DIM))]
    before = quantizer.embed_codes(codes)
    assert len(quantizer.smoothings) == max(groups) + 1
    for index, smoothing in enumerate(quantizer.smoothings):
        with torch.no_grad():
            smoothing.bias += 1
        changed = [not a.equal(b) for a, b in zip(before, quantizer.embed_codes(codes), strict=True)]
        assert changed == [group == index for group in groups]
        with torch.no_grad():
            smoothing.bias -= 1
        before = quantizer.embed_codes(codes)


@pytest.mark.parametrize("shared", [True, False])
def test_tables_follow_the_mean_of_what_each_scale_saw(shared):
    quantizer = build(shared=shared).train()
    for book in quantizer.codebooks:
        book.decay = 0.0
    z = torch.randn(6, 4, 8, DIM)
    out = quantizer(z)
    seen = [(level.latents.detach().reshape(-1, DIM), level.codes.flatten()) for level in out]
    assert [len(rows) for rows, _ in seen] == [6 * 2, 6 * 8, 6 * 32]
    if shared:
        seen = [(torch.cat([rows for rows, _ in seen]), torch.cat([codes for _, codes in seen]))]
    before = [book.embedding.clone() for book in quantizer.codebooks]
    quantizer.update()
    assert len(quantizer.codebooks) == len(seen)
    for book, old, (rows, codes) in zip(quantizer.codebooks, before, seen, strict=True):
        wanted = torch.stack([rows[codes == k].mean(0) if (codes == k).any() else old[k] for k in range(15)])
        torch.testing.assert_close(book.embedding, wanted, rtol=1e-4, atol=1e-5)


def proposals(*batches: Tensor):
    return lambda: ((lambda level, quantized, z=z: z) for z in batches)


@pytest.mark.parametrize("shared", [True, False])
def test_initialised_the_levels_come_nearer_to_the_latents(shared):
    quantizer = build(shared=shared, smoothing=0)
    z = torch.randn(40, 8, 8, DIM) * 3 + torch.randn(40, 1, 1, DIM) * 10
    quantizer.initialise(proposals(z[:20], z[20:]), 10_000)
    parts = [level.quantized for level in quantizer.eval()(z)]
    errors = [float((sum(parts[:n]) - z).square().mean()) for n in (1, 2, 3)]
    assert errors[2] < errors[1] < errors[0] < 0.5 * float(z.square().mean())
    assert quantizer.is_initialised
    again = build(shared=shared, smoothing=0, seed=5)
    again.initialise(proposals(z[:20], z[20:]), 10_000)
    assert all(a.embedding.equal(b.embedding) for a, b in zip(quantizer.codebooks, again.codebooks, strict=True))


@pytest.mark.parametrize("max_latents", [4 * 16, 4 * 16 + 5])
def test_initialised_from_at_most_so_many_latents(max_latents):
    """An equal share of each batch, in whole samples of 16 positions."""
    first, second = torch.randn(3, 4, 4, DIM), torch.randn(8, 4, 4, DIM)
    tables = []
    for batches, most in (((first[:2], second[:2]), 10_000), ((first, second), max_latents)):
        quantizer = build(shared=False, layer={**LAYER, "codebook_size": 3})
        quantizer.initialise(proposals(*batches), most)
        tables.append(torch.stack([book.embedding for book in quantizer.codebooks]))
    assert tables[0].equal(tables[1])


def test_initialised_from_pictures_of_several_sizes():
    """A loader that groups by size has batches of different grids."""
    quantizer = build(layer={**LAYER, "codebook_size": 4})
    quantizer.initialise(proposals(torch.randn(3, 4, 4, DIM), torch.randn(3, 4, 8, DIM)), 10_000)
    assert quantizer.is_initialised


def test_the_finest_scale_alone_is_plain_quantization():
    quantizer, z = build(scales=[7], smoothing=0).eval(), torch.randn(2, 5, 3, DIM)
    (out,) = quantizer(z)
    assert out.codes.flatten().equal(reference.nearest_code(z.flatten(0, 2), quantizer.codebooks[0].embedding))
    assert out.quantized.equal(quantizer.codebooks[0].embedding[out.codes[:, 0]])


@pytest.mark.parametrize(("ndim", "grid"), [(2, (4,)), (2, (4, 4, 4)), (1, (4, 4))])
def test_a_grid_of_another_number_of_axes_is_refused(ndim, grid):
    with pytest.raises(ValueError, match=rf"\*{ndim} axes, {DIM}\).*shape \(2, {', '.join(map(str, grid))}, {DIM}\)"):
        build(ndim=ndim)(torch.randn(2, *grid, DIM))


@pytest.mark.parametrize("ndim", [0, 3, True, "2"])
def test_a_number_of_axes_that_cannot_be_is_refused(ndim):
    with pytest.raises(ValueError, match=f"ndim.*{ndim!r}"):
        build(ndim=ndim)


@pytest.mark.parametrize("dim", [0, -1, True, 2.0])
def test_a_width_that_cannot_be_is_refused(dim):
    with pytest.raises(ValueError, match=f"dim.*{dim!r}"):
        MultiScaleQuantizer(dim, scales=[1, 2])
