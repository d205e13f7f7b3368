"""A tiny text tokenizer, tiny VQ tokenizers of pictures and sound, and tiny language models of several kinds."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import make_audio_tokenizer, make_tokenizer
from vqtok import VQTokenizer, extend
from vqtok.prior import train_text_tokenizer

WORDS = ["a red three top left", "a blue seven bottom right", "there is a green zero"]
COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
MODELS = {
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "llama tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {**COMMON}),  # tied
    "phi": ("phi", {**LLAMA}),  # a bias in the head
    "gemma": ("gemma", {**LLAMA, "head_dim": 16}),  # tied, embeddings are scaled
}


def make_text_tokenizer():
    tokenizer = train_text_tokenizer(WORDS, 300)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"})
    return tokenizer


def make_model(kind, rows, seed=0, **changes):
    torch.manual_seed(seed)
    name, fields = MODELS[kind]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, vocab_size=rows, **{**fields, **changes})
    ).eval()
    with torch.no_grad():  # louder than fresh weights, so that what is read matters
        for own, value in model.named_parameters():
            if "norm" not in own and "ln" not in own and value.ndim > 1:
                value.mul_(4)
    return model


@pytest.fixture(scope="session")
def vqs(tmp_path_factory):
    """Saved VQ tokenizers of two levels of pictures and of three codebooks of sound."""
    folder = tmp_path_factory.mktemp("vqs")
    make_tokenizer().save_pretrained(folder / "image")
    make_audio_tokenizer().save_pretrained(folder / "audio")
    return {name: VQTokenizer.from_pretrained(folder / name) for name in ("image", "audio")}


@pytest.fixture(scope="session")
def _extended(vqs):
    tokenizer = make_text_tokenizer()
    model = make_model("llama", len(tokenizer))
    return model, extend(tokenizer, model, vqs, max_grid={"image": 4, "audio": 64})


@pytest.fixture
def extended(_extended):
    """A language model that knows pictures and sound, and its processor; copies, to spoil."""
    return copy.deepcopy(_extended)
