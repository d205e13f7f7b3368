"""The decode path of our own says what the backbone says."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from vqtok.prior import fast, products, stepping
from vqtok.prior.fast import CachedDecoder, FastDecoder, decoder_for, has_fast_path

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8, "num_attention_heads": 4}
TWO = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 1, "codebook_size": k} for s, k in ((8, 11), (4, 7))]}
VARIANTS = {
    "plain": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2},
    "biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "wide heads": {"num_key_value_heads": 1, "head_dim": 16},
    "gelu": {"num_key_value_heads": 4, "hidden_act": "gelu", "rms_norm_eps": 1e-2},
    "rope": {
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    },
}


def make(**options) -> LlamaModel:
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**{**TINY, **options})).eval()
    for name, parameter in model.named_parameters():  # norms of ones and biases of zeros would hide a mistake
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.5)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_hidden_states_are_the_backbones(variant, padded):
    model, start, length = make(**VARIANTS[variant]), 5, 11
    assert has_fast_path(model)
    x_BTM = torch.randn(3, length, 32)
    mask = torch.ones(3, length, dtype=torch.bool)
    if padded:
        mask[1, :3] = mask[2, :1] = False
    expected = model(
        inputs_embeds=x_BTM, attention_mask=mask.long(), position_ids=torch.arange(start, start + length)[None]
    ).last_hidden_state
    decoder, made, at = FastDecoder(model, 3, length, start), [], 0
    for step in (4, 1, 1, 3, 1, 1):
        now = mask[:, : at + step] if padded else None
        made.append(decoder(x_BTM[:, at : at + step], now))
        at += step
    torch.testing.assert_close(torch.cat(made, 1)[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert torch.cat(made, 1).isfinite().all()


@pytest.mark.parametrize("decoder", [FastDecoder, CachedDecoder])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_tokens_of_one_pass_may_see_each_other(decoder, padded):
    """Passes of 3, 2, 1 and 4 tokens, against one forward of the backbone with the mask written out."""
    model, steps = make(num_key_value_heads=2), (3, 2, 1, 4)
    x_BTM, mask = torch.randn(2, sum(steps), 32), torch.ones(2, sum(steps), dtype=torch.bool)
    if padded:
        mask[1, :2] = False
    number = torch.tensor([index for index, step in enumerate(steps) for _ in range(step)])
    sees = (number[None] <= number[:, None]) & mask[:, None]
    expected = model(
        inputs_embeds=x_BTM, attention_mask=torch.zeros(sees.shape).masked_fill(~sees, -1e9)[:, None]
    ).last_hidden_state
    made, at = [], 0
    decode = FastDecoder(model, 2, sum(steps), 0) if decoder is FastDecoder else CachedDecoder(model, 0)
    for step in steps:
        made.append(decode(x_BTM[:, at : at + step], mask[:, : at + step] if padded else None, causal=False))
        at += step
    torch.testing.assert_close(torch.cat(made, 1)[mask], expected[mask], rtol=1e-5, atol=1e-5)
    causal = model(inputs_embeds=x_BTM, attention_mask=mask.long()).last_hidden_state
    assert not torch.allclose(expected[mask], causal[mask], atol=1e-2)


@pytest.mark.parametrize("kind", [FastDecoder, CachedDecoder])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_chosen_places_say_what_they_say_among_all(kind, padded):
    """Others are not computed to the end, but are seen; the next pass finds the cache whole."""
    model, steps = make(num_key_value_heads=2), (3, 4, 5)
    x_BTM, mask = torch.randn(2, sum(steps), 32), torch.ones(2, sum(steps), dtype=torch.bool)
    if padded:
        mask[1, :2] = False
    all_of, some_of = ([], [])
    at_Bn = torch.tensor([[2, 0], [1, 3]])
    for found, chosen in ((all_of, None), (some_of, at_Bn), (some_of, at_Bn[:, :1])):
        decode, at = FastDecoder(model, 2, sum(steps), 0, 4) if kind is FastDecoder else CachedDecoder(model, 0), 0
        for step in steps:
            given = (x_BTM[:, at : at + step], mask[:, : at + step] if padded else None, False)
            found.append(decode(*given, chosen if step == 4 else None))
            at += step
    for index, width in ((1, 2), (4, 1)):
        assert some_of[index].shape == (2, width, 32)
        for row in range(2):
            expected = all_of[1][row, at_Bn[row, :width]]
            torch.testing.assert_close(some_of[index][row], expected, rtol=1e-5, atol=1e-5)
    for index in (2, 5):
        torch.testing.assert_close(some_of[index], all_of[2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_where_keys_lie_changes_nothing():
    model, x_BTM = make(num_key_value_heads=2), torch.randn(2, 6, 32)
    found = []
    for per_pass in (1, 3):
        decoder = FastDecoder(model, 2, 6, 0, per_pass)
        found.append(torch.cat([decoder(part, None, False) for part in x_BTM.split([3, 1, 2], 1)], 1))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_decoders_agree_and_positions_matter():
    model, x_BTM = make(num_key_value_heads=2), torch.randn(2, 6, 32)
    outs = []
    for decoder in (FastDecoder(model, 2, 6, 3), CachedDecoder(model, 3), FastDecoder(model, 2, 6, 0)):
        outs.append(torch.cat([decoder(part, None) for part in x_BTM.split([3, 1, 2], 1)], 1))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    # Rotary positions are relative: where a sequence begins must not matter.
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changed_weights_are_seen():
    model, x_BTM = make(num_key_value_heads=4), torch.randn(1, 2, 32)
    before = decoder_for(model, 1, 2, 0)(x_BTM, None)
    model.layers[0].self_attn.q_proj.weight.mul_(2)
    model.layers[1].mlp.up_proj.weight.mul_(2)
    after = decoder_for(model, 1, 2, 0)(x_BTM, None)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(inputs_embeds=x_BTM).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bf16_is_the_backbones_bf16():
    model = make(num_key_value_heads=4).to(torch.bfloat16)
    x_BTM = torch.randn(2, 5, 32).bfloat16()
    decoder = FastDecoder(model, 2, 5, 0)
    made = torch.cat([decoder(part, None) for part in x_BTM.split(1, 1)], 1)
    expected = model(inputs_embeds=x_BTM).last_hidden_state
    assert made.dtype == torch.bfloat16
    # bf16 has 8 bits: two orders of rounding differ by a few of its steps.
    torch.testing.assert_close(made.float(), expected.float(), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_autocast_changes_nothing(monkeypatch):
    monkeypatch.setattr(products, "_packs", lambda dtype: False)  # the packed products know no autocast anyway
    model, x_BTM = make(num_key_value_heads=4), torch.randn(2, 5, 32)
    plain = FastDecoder(model, 2, 5, 0)(x_BTM, None)
    with torch.autocast("cpu", torch.bfloat16):
        cast = FastDecoder(model, 2, 5, 0)(x_BTM, None)
    assert torch.equal(plain, cast)


def test_in_bf16_a_sample_does_not_depend_on_its_batch(make_prior):
    prior = make_prior(TWO, layers=2, scale=3.0).to(torch.bfloat16)
    drawn = [prior.sample_codes([[3]], (32, 16), num_samples=40, seed=0, batch_size=n) for n in (40, 4)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0].levels, drawn[1].levels, strict=True))


def test_what_it_does_not_know_goes_the_other_way():
    llama = make(num_key_value_heads=4)
    assert isinstance(decoder_for(llama, 1, 2, 0), FastDecoder)
    gpt2 = GPT2Model(GPT2Config(vocab_size=8, n_embd=32, n_layer=1, n_head=2))
    assert isinstance(decoder_for(gpt2, 1, 2, 0), CachedDecoder)

    class Adapted(nn.Linear):
        """As peft wraps a projection."""

    llama.layers[0].self_attn.q_proj = Adapted(32, 32, bias=False)
    assert not has_fast_path(llama)


def test_codes_are_those_of_the_other_way(make_prior, monkeypatch):
    prior = make_prior(TWO)
    used = []
    monkeypatch.setattr(stepping, "decoder_for", lambda *args: used.append(decoder_for(*args)) or used[-1])

    def sample(**settings):
        codes = prior.sample_codes([[3, 1], None, [2]], sizes=(32, 16), seed=1, num_samples=2, **settings)
        return [level.tolist() for level in codes.levels]

    settings = ({}, {"guidance_scale": 2.0}, {"temperature": 0})
    ours = [sample(**each) for each in settings]
    assert used and all(isinstance(decoder, FastDecoder) for decoder in used)
    used.clear()
    monkeypatch.setattr(fast, "has_fast_path", lambda backbone: False)
    assert [sample(**each) for each in settings] == ours
    assert used and all(isinstance(decoder, CachedDecoder) for decoder in used)
