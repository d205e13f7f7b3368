"""Tiny pictures and sounds, and tiny tokenizers of them and of text, for tests."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

from vqtok.audio import AudioVQConfig, AudioVQFeatureExtractor, AudioVQModel
from vqtok.auto import VQTokenizer
from vqtok.image import ImageVQConfig, ImageVQModel
from vqtok.image.image_processing_image_vq import ImageVQImageProcessor
from vqtok.text import TextVQConfig, TextVQModel, TextVQProcessor

needs_auto_image_processor = pytest.mark.skipif(
    getattr(AutoImageProcessor, "_backends", None) == ["torchvision"],
    reason="older transformers put a placeholder that wants torchvision in the place of AutoImageProcessor",
)


def vectors(*sizes, **fields):
    """The `quantizer` of a config: vector quantizers of these codebook sizes, coarse to fine."""
    return [{"type": "vector", "codebook_size": size, **fields} for size in sizes]


CONFIG = {"strides": [8, 4], "quantizer": vectors(16, 32), "hidden_size": 16, "residual_size": 8, "latent_size": 4}


def picture(height, width, seed=0):
    """Coarse noise, so that codes differ from place to place."""
    rng = np.random.default_rng([seed, height, width])
    small = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
    return small.resize((width, height))


def make_tokenizer(seed=0, **changes):
    """Random weights; the codebooks fit them, so that many codes are used."""
    torch.manual_seed(seed)
    model = ImageVQModel(ImageVQConfig(**{**CONFIG, **changes})).eval()
    tokenizer = VQTokenizer(model, ImageVQImageProcessor(model.layout.stride, model.config.num_channels))
    pixels = torch.stack([tokenizer.processor.prepare(picture(64, 64, s))[0] for s in range(4)])
    model.init_codebooks([pixels])
    return tokenizer


def assert_same_codes(one, other):
    assert one.sizes.tolist() == other.sizes.tolist()
    for a, b in zip(one.levels, other.levels, strict=True):
        assert torch.equal(a, b)


AUDIO_CONFIG = {
    "sampling_rate": 8000,
    "downsampling_ratios": [4, 5, 2],
    "strides": [40],
    "hidden_sizes": [8, 12, 16],
    "latent_size": 6,
    "residual_kernel_size": 3,
    "dilations": [1, 3],
    "quantizer": {"type": "residual", "num_codebooks": 3, "layer": {"type": "vector", "codebook_size": 16}},
}


def sound(samples, seed=0):
    """Tones that come and go, so that codes differ from place to place: float32 (samples,)."""
    rng = np.random.default_rng([seed, samples])
    time = np.arange(samples) / 8000
    corners = np.arange(0, time[-1] + 0.2, 0.1)
    loudness = np.interp(time, corners, rng.random(len(corners)))
    tone = np.sin(2 * np.pi * (200 + 300 * rng.random()) * time)
    return (0.3 * loudness * tone + 0.02 * rng.standard_normal(samples)).astype(np.float32)


def make_audio_tokenizer(seed=0, **changes):
    """Random weights; the codebooks fit them, so that many codes are used."""
    torch.manual_seed(seed)
    model = AudioVQModel(AudioVQConfig(**{**AUDIO_CONFIG, **changes})).eval()
    config = model.config
    processor = AudioVQFeatureExtractor(model.layout.stride, config.sampling_rate, config.num_channels)
    (length,) = model.layout.padded((8000,))
    clips = torch.stack([torch.from_numpy(sound(length, s)).expand(config.num_channels, -1) for s in range(4)])
    model.init_codebooks([clips])
    return VQTokenizer(model, processor)


TEXT_CONFIG = {
    "downsampling_ratios": [2, 2],
    "strides": [4, 2],
    "embedding_size": 8,
    "hidden_sizes": [12, 16],
    "latent_size": 6,
    "kernel_size": 3,
    "num_blocks": 1,
    "decoder_num_blocks": 1,
    "quantizer": vectors(16, 8),
}


def make_text_tokenizer(seed=0, **changes):
    """Random weights; the codebooks fit them, so that many codes are used."""
    torch.manual_seed(seed)
    model = TextVQModel(TextVQConfig(**{**TEXT_CONFIG, **changes})).eval()
    model.init_codebooks([torch.randint(0, 256, (8, 64))])
    return VQTokenizer(model, TextVQProcessor(model.layout.stride))


def words():
    """A text tokenizer of three words, which drops white space."""
    vocabulary = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
