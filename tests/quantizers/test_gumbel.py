"""Gumbel-softmax: what is drawn, what is not, and how the temperature goes down."""

import math

import pytest
import torch

from tests import reference
from vqtok.quantizers import GumbelQuantizer, k_means


def build(dim: int = 4, **options) -> GumbelQuantizer:
    return GumbelQuantizer(dim, **{"codebook_size": 9, **options})


def exact_logits(quantizer: GumbelQuantizer, z: torch.Tensor) -> torch.Tensor:
    weight, bias = quantizer.logit_map.detach().double(), quantizer.logit_bias.detach().double()
    return torch.stack([weight @ row + bias for row in z.detach().double().reshape(-1, z.shape[-1])])


def probabilities(size: int = 4, **options) -> GumbelQuantizer:
    """One whose output is the mixture's weights: the rows are those of the identity."""
    quantizer = build(size, codebook_size=size, **options)
    with torch.no_grad():
        quantizer.embedding.copy_(torch.eye(size))
    return quantizer


def test_codes_are_the_likeliest_in_eval_and_in_training():
    quantizer, z = build(), torch.randn(5, 40, 4)
    with torch.no_grad():
        quantizer.logit_bias.copy_(torch.randn(9))
    expected = exact_logits(quantizer, z).argmax(1)
    for training in (True, False):
        assert quantizer.train(training)(z).codes.flatten().equal(expected)
    assert quantizer(z).quantized.equal(quantizer.embedding[expected].view(5, 40, 4))


def test_equal_logits_take_the_lowest_index():
    quantizer = build().eval()
    with torch.no_grad():
        quantizer.logit_map.copy_(quantizer.logit_map[:1].expand(9, 4).clone())
    assert quantizer(torch.randn(6, 4)).codes.flatten().tolist() == [0] * 6


def test_only_training_passes_draw_random_numbers():
    quantizer, z = build().train(), torch.randn(3, 5, 4)
    first = torch.get_rng_state()
    quantizer.encode(z)
    quantizer.eval()(z)
    quantizer.embed_codes(quantizer(z).codes)
    quantizer.train().freeze()
    quantizer(z)
    assert torch.get_rng_state().equal(first)
    quantizer.freeze(False)
    one, other = quantizer(z), quantizer(z)
    assert not torch.get_rng_state().equal(first)
    assert one.codes.equal(other.codes) and not one.quantized.equal(other.quantized)
    torch.set_rng_state(first)
    assert quantizer(z).quantized.equal(one.quantized)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0, 50.0])
def test_the_mixture_is_one(temperature):
    quantizer = probabilities(temperature=temperature, final_temperature=0.01).train()
    weights = quantizer(torch.randn(500, 4)).quantized
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(500))
    sharp = weights.amax(1).mean()
    assert (sharp > 0.95) == (temperature < 0.1) and (sharp < 0.3) == (temperature > 10)


def test_cold_samples_come_as_often_as_the_logits_say():
    """Gumbel's maximum draws from softmax of the logits: noise of the wrong sign or scale does not."""
    quantizer = probabilities(temperature=0.01, final_temperature=0.01).train()
    z = torch.tensor([0.7, -0.4, 0.2, 0.9])
    expected = exact_logits(quantizer, z).softmax(1)[0]
    found = quantizer(z.expand(20_000, 4)).quantized.double().mean(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)


def test_the_divergence_is_the_written_one():
    quantizer, z = build().train(), torch.randn(3, 7, 4).requires_grad_()
    loss = quantizer(z).losses["kl_loss"]
    p = exact_logits(quantizer, z).softmax(1)
    wanted = sum(float(q) * math.log(float(q) * 9) for row in p for q in row) / 21
    assert loss.item() == pytest.approx(wanted, rel=1e-4) and wanted > 0
    loss.backward()
    assert z.grad.abs().sum() > 0 and quantizer.logit_map.grad.abs().sum() > 0 and quantizer.embedding.grad is None
    with torch.no_grad():
        quantizer.logit_map.zero_()
    assert quantizer(z).losses["kl_loss"].item() == pytest.approx(0, abs=1e-6)


def test_the_temperature_goes_down_half_a_cosine_by_updates():
    quantizer = build(temperature=2.0, final_temperature=0.5, anneal_steps=4).train()
    found = []
    for _ in range(7):
        found.append(quantizer.annealing.temperature)
        quantizer(torch.randn(2, 4))  # two passes make one step all the same
        quantizer(torch.randn(2, 4))
        quantizer.update()
    expected = [0.5 + 1.5 * (1 + math.cos(math.pi * min(step, 4) / 4)) / 2 for step in range(7)]
    assert found == pytest.approx(expected) and found[0] == 2.0 and found[2] == pytest.approx(1.25)
    assert found[4] == found[6] == 0.5
    assert all(later <= earlier for earlier, later in zip(found, found[1:], strict=False))


def test_the_temperature_is_saved_and_loaded_and_frozen():
    quantizer = build(anneal_steps=10).train()
    for _ in range(3):
        quantizer(torch.randn(2, 4))
        quantizer.update()
    other = build(anneal_steps=10)
    assert other.annealing.temperature == 1.0
    other.load_state_dict(quantizer.state_dict())
    assert other.annealing.temperature == quantizer.annealing.temperature < 1.0
    other.freeze()
    other.train()(torch.randn(2, 4))
    other.update()
    assert other.annealing.temperature == quantizer.annealing.temperature
    quantizer.eval()(torch.randn(2, 4))
    assert other.annealing.temperature == quantizer.annealing.temperature


def test_gradients_come_through_the_mixture():
    """At each code's row by its weight; at the latents through the softmax at the temperature."""
    quantizer, z, above = (
        probabilities(temperature=0.7, final_temperature=0.7).train(),
        torch.randn(5, 4),
        torch.randn(5, 4),
    )
    z.requires_grad_()
    torch.manual_seed(3)
    out = quantizer(z)
    weights = out.quantized.detach().double()
    (out.quantized * above).sum().backward()
    torch.testing.assert_close(quantizer.embedding.grad.double(), weights.T @ above.double(), rtol=1e-4, atol=1e-5)
    inner = above.double() - (weights * above.double()).sum(1, keepdim=True)
    by_logits = weights * inner / 0.7
    torch.testing.assert_close(z.grad.double(), by_logits @ quantizer.logit_map.detach().double(), rtol=1e-3, atol=1e-5)


def test_frozen_it_gives_the_rows_themselves_to_a_decoder_that_learns():
    quantizer, z = build().train(), torch.randn(3, 5, 4).requires_grad_()
    quantizer.freeze()
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, quantizer.embed_codes(out.codes), rtol=1e-5, atol=1e-6)
    (out.quantized.sum() + out.loss).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0


def test_initialised_rows_are_centroids_and_codes_those_of_the_nearest():
    z = torch.randn(60, 10, 4) * 5 + 20
    quantizer = build().eval()
    quantizer.initialise(z)
    assert quantizer.is_initialised and not build().is_initialised
    assert quantizer.embedding.equal(k_means(z.flatten(0, 1), 9))
    codes = quantizer(z).codes.flatten()
    rows = z.flatten(0, 1)
    nearest = reference.nearest_code(rows, quantizer.embedding)
    different = (codes != nearest).nonzero()[:, 0].tolist()
    assert all(
        reference.is_near_tie(rows[i], quantizer.embedding[codes[i]], quantizer.embedding[nearest[i]], 1e-2)
        for i in different
    )
    assert len(different) < 6
    # Not so sure that the other codes never get a turn, not so unsure that the first mixtures are all alike.
    entropy = -(p := exact_logits(quantizer, z).softmax(1)).mul(p.clamp_min(1e-300).log()).sum(1).mean()
    assert 0.05 * math.log(9) < entropy < 0.9 * math.log(9)
