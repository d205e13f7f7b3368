"""Frozen rows: no optimizer moves them, decay and momentum included, and nothing of it is in the files."""

import copy
import gc

import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from transformers import AutoModelForCausalLM

from tests.multimodal.conftest import make_model, make_text_tokenizer
from vqtok import extend, freeze_old_rows
from vqtok.multimodal.frozen import vocabulary_parameters

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
}


def extended(vqs, kind="llama", **options):
    tokenizer = make_text_tokenizer()
    model = make_model(kind, len(tokenizer))
    return model, extend(tokenizer, model, vqs, **options).vocabulary


def train(model, vocabulary, optimizer, steps=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(vocabulary.size, (2, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["llama", "llama tied", "phi"])
def test_old_rows_stay_and_new_ones_learn(kind, optimizer, vqs):
    model, vocabulary = extended(vqs, kind, freeze=True)
    rows = vocabulary.text_size
    before = [parameter.detach().clone() for parameter in vocabulary_parameters(model)]
    layer = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    made = OPTIMIZERS[optimizer](model.parameters())
    train(model, vocabulary, made)
    for old, new in zip(before, vocabulary_parameters(model), strict=True):
        assert torch.equal(new[:rows], old[:rows]) and not torch.equal(new[rows:], old[rows:])
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, layer)


def test_their_gradient_is_zero_and_counts_in_no_norm(vqs):
    model, vocabulary = extended(vqs, freeze=True)
    ids = torch.randint(vocabulary.size, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in vocabulary_parameters(model):
        assert not parameter.grad[: vocabulary.text_size].any() and parameter.grad[vocabulary.text_size :].any()


def test_momentum_from_before_moves_nothing(vqs):
    model, vocabulary = extended(vqs)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, vocabulary, optimizer)
    handle = freeze_old_rows(model, vocabulary.text_size)
    before = model.get_input_embeddings().weight.detach().clone()
    train(model, vocabulary, optimizer)
    rows = vocabulary.text_size
    assert torch.equal(model.get_input_embeddings().weight[:rows], before[:rows])
    handle.remove()
    train(model, vocabulary, optimizer, 1)
    assert not torch.equal(model.get_input_embeddings().weight[:rows], before[:rows])


def test_saving_loading_and_moving_in_between(vqs, tmp_path):
    model, vocabulary = extended(vqs, freeze=True)
    rows = vocabulary.text_size
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, vocabulary, optimizer, 1)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    other = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(other)  # frozen is what is there, not what was there at first
    model.double().float()
    train(model, vocabulary, optimizer, 1)
    assert torch.equal(model.get_input_embeddings().weight[:rows], other["model.embed_tokens.weight"][:rows])
    for loose in (plain, copy.deepcopy(model)):
        start = loose.get_input_embeddings().weight.detach().clone()
        train(loose, vocabulary, OPTIMIZERS["adamw"](loose.parameters()), 1)
        assert not torch.equal(loose.get_input_embeddings().weight[:rows], start[:rows]), "a copy learns everything"


def test_the_hooks_go_with_the_model(vqs):
    gc.collect()
    before = len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks)
    model, vocabulary = extended(vqs, freeze=True)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before[0] + 1
    train(model, vocabulary, OPTIMIZERS["sgd"](model.parameters()), 1)
    del model
    gc.collect()
    assert (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    ) == before


def test_what_cannot_be_frozen_is_refused(vqs):
    model, vocabulary = extended(vqs)
    with pytest.raises(ValueError, match="rows cannot be frozen"):
        freeze_old_rows(model, 10_000)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="does not learn at all"):
        freeze_old_rows(model, vocabulary.text_size)
    tokenizer = make_text_tokenizer()
    still = make_model("llama", len(tokenizer)).requires_grad_(False)
    with pytest.raises(ValueError, match="does not learn at all"):
        extend(tokenizer, still, vqs, freeze=True)
    assert still.config.vocab_size == len(tokenizer) == vocabulary.text_size
