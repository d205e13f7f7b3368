"""Ways to compute the same: attention back ends, gradient checkpointing, bf16."""

import copy

import pytest
import torch

from tests.prior.conftest import BACKBONES, TWO_LEVELS
from vqtok.prior.attention import checkpoint_activations, set_attention
from vqtok.prior.fast import CachedDecoder, decoder_for

KINDS = sorted(BACKBONES)


def inputs(random_codes):
    words = torch.tensor([[3, 1, 4], [0, 0, 5]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    return {"codes": random_codes(TWO_LEVELS, 2, (2, 2)), "condition_ids": words, "condition_mask": mask}


def gradients(prior, batch):
    prior.zero_grad()
    torch.manual_seed(5)  # for dropout
    loss = prior(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in prior.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_sdpa_say_the_same(make_prior, random_codes, kind):
    prior, batch = make_prior(backbone=kind), inputs(random_codes)
    found = {}
    for name in ("eager", "sdpa"):
        set_attention(prior, name)
        assert prior.backbone.config._attn_implementation == prior.config._attn_implementation == name
        found[name] = gradients(prior, batch)
        codes = prior.sample_codes([[3, 1], [2]], sizes=(16, 16), seed=1)
        found[name] += ([level.tolist() for level in codes.levels],)
    torch.testing.assert_close(found["eager"][0], found["sdpa"][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found["eager"][1].items():
        torch.testing.assert_close(gradient, found["sdpa"][1][name], rtol=1e-3, atol=1e-4, msg=name)
    assert found["eager"][2] == found["sdpa"][2]


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", "flash_attention_3"])
def test_what_needs_an_accelerator_is_refused_without_one(make_prior, name):
    prior = make_prior()
    before = prior.backbone.config._attn_implementation
    with pytest.raises(ValueError, match=f"{name}' does not train on a CPU: use 'sdpa' or 'eager'"):
        set_attention(prior, name)
    assert prior.backbone.config._attn_implementation == prior.config._attn_implementation == before


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "flex_attention"), ("llama", "flash_attention_2")])
def test_what_the_backbone_or_the_installation_lacks_is_refused(make_prior, kind, name):
    prior = make_prior(backbone=kind)
    with pytest.raises(ValueError, match=f"{name}' cannot be used here .*: use 'sdpa' or 'eager'"):
        set_attention(prior, name, torch.device("cuda"))
    assert prior.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["flash", "paged|sdpa", "kernels-community/flash-attn", ""])
def test_unknown_names_are_refused(make_prior, name):
    with pytest.raises(ValueError, match="attention must be one of eager, sdpa"):
        set_attention(make_prior(), name)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_loss_and_gradients(make_prior, random_codes, kind):
    prior, batch = make_prior(backbone=kind).train(), inputs(random_codes)
    calls = []
    layers = prior.backbone.h if kind == "gpt2" else prior.backbone.layers
    first = layers[0].mlp
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, plain = gradients(prior, batch)
    assert len(calls) == 1
    checkpoint_activations(prior)
    again, checkpointed = gradients(prior, batch)
    assert len(calls) == 3, "each layer is computed twice"
    assert torch.equal(again, loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_close_and_samples(make_prior, random_codes, kind):
    prior, batch = make_prior(backbone=kind, scale=2.0), inputs(random_codes)
    half = copy.deepcopy(prior).to(torch.bfloat16)
    loss, gradient = gradients(prior, batch)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss = gradients(prior, batch)[0]
    half_loss, half_gradient = gradients(half, batch)
    assert half_loss.dtype == torch.float32, "the softmax is over float32"
    # bf16 keeps 8 bits: a few steps of 2^-8 of a loss of about two nats.
    assert abs(half_loss - loss) < 0.03 and abs(autocast_loss - loss) < 0.03
    name = "lm_head.weight"
    likeness = torch.cosine_similarity(gradient[name].flatten(), half_gradient[name].float().flatten(), 0)
    assert likeness > 0.99
    drawn = [half.sample_codes([[3, 1], [2]], sizes=(16, 16), seed=1, guidance_scale=1.5) for _ in range(2)]
    for level, again, size in zip(drawn[0].levels, drawn[1].levels, (11, 7), strict=True):
        assert torch.equal(level, again) and int(level.min()) >= 0 and int(level.max()) < size
    assert isinstance(decoder_for(half.backbone, 1, 2, 0), CachedDecoder) == (kind != "llama")
