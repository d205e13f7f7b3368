"""Product quantization: parts that know nothing of each other."""

import pytest
import torch

from tests import reference
from vqtok.quantizers import ProductQuantizer, VectorQuantizer, k_means

LAYER = {"type": "vector", "codebook_size": 9, "update": "gradient"}


def build(**options) -> ProductQuantizer:
    return ProductQuantizer(8, **{"num_codebooks": 4, "layer": LAYER, **options})


def test_each_codebook_codes_its_own_part_in_order():
    quantizer, z = build().eval(), torch.randn(3, 5, 8)
    out = quantizer(z)
    assert out.codes.shape == (3, 4, 5)
    assert quantizer.embed_codes(out.codes).equal(out.quantized)
    for part, layer in enumerate(quantizer.layers):
        rows = z[..., 2 * part : 2 * part + 2].reshape(-1, 2)
        table = layer.codebook.embedding
        assert out.codes[:, part].flatten().equal(reference.nearest_code(rows, table))
        assert out.quantized[..., 2 * part : 2 * part + 2].equal(table[out.codes[:, part]])


def test_a_change_of_one_part_changes_nothing_else():
    quantizer, z = build().eval(), torch.randn(3, 5, 8)
    other = z.clone()
    other[..., 4:6] += 10
    one, two = quantizer(z), quantizer(other)
    changed = [not one.codes[:, q].equal(two.codes[:, q]) for q in range(4)]
    assert changed == [False, False, True, False]
    assert one.quantized[..., [0, 1, 2, 3, 6, 7]].equal(two.quantized[..., [0, 1, 2, 3, 6, 7]])


@pytest.mark.parametrize("layer", [LAYER, {**LAYER, "codebook_dim": 3}, {**LAYER, "metric": "cosine"}])
def test_losses_and_gradients_are_those_of_separate_quantizers(layer):
    quantizer, z = build(layer=layer).train(), torch.randn(3, 5, 8).requires_grad_()
    out = quantizer(z)
    (out.loss + out.quantized.square().sum()).backward()
    options = {name: value for name, value in layer.items() if name != "type"}
    copy, total = z.detach().clone().requires_grad_(), 0
    for part, mine in enumerate(quantizer.layers):
        alone = VectorQuantizer(2, **options).train()
        alone.load_state_dict(mine.state_dict())
        found = alone(copy[..., 2 * part : 2 * part + 2])
        total = total + found.loss / 4 + found.quantized.square().sum()
    total.backward()
    torch.testing.assert_close(z.grad, copy.grad)
    assert out.loss.item() == pytest.approx(
        out.losses["commitment_loss"].item() * 0.25 + out.losses["codebook_loss"].item()
    )


def test_initialised_part_by_part():
    quantizer, z = build(), torch.randn(4, 100, 8) * torch.arange(1, 9)
    quantizer.initialise(z)
    for part, layer in enumerate(quantizer.layers):
        rows = z[..., 2 * part : 2 * part + 2].reshape(-1, 2)
        assert layer.codebook.embedding.equal(k_means(rows, 9))
    assert quantizer.is_initialised


def test_a_prefix_of_the_codes_does_not_decode():
    quantizer = build().eval()
    codes = quantizer(torch.randn(3, 5, 8)).codes
    with pytest.raises(ValueError, match=r"\(3, 2, 5\)"):
        quantizer.embed_codes(codes[:, :2])


@pytest.mark.parametrize("num_codebooks", [3, 16])
def test_a_width_that_cannot_be_cut_is_refused(num_codebooks):
    with pytest.raises(
        ValueError, match=f"num_codebooks must be a divisor of the latents' width 8, got {num_codebooks}"
    ):
        build(num_codebooks=num_codebooks)


def test_two_equal_parts_have_tables_of_their_own():
    quantizer = build()
    assert len({tuple(layer.codebook.embedding.flatten().tolist()) for layer in quantizer.layers}) == 4
    z = torch.randn(40, 5, 8)
    z[..., 2:4] += 30
    quantizer = build(layer={"type": "vector", "codebook_size": 9, "decay": 0.0}).train()
    quantizer(z)
    quantizer.update()
    means = [layer.codebook.embedding.mean().item() for layer in quantizer.layers]
    assert max(range(4), key=means.__getitem__) == 1 and means[1] > 5
