"""Every folder of tokenizers_configs/ loads, builds, and trains with known arguments."""

import json
from pathlib import Path

import pytest
import torch

from vqtok import VQTokenizer
from vqtok.audio import AudioVQConfig, AudioVQFeatureExtractor, AudioVQModel
from vqtok.audio.discriminators import AudioDiscriminator, read_discriminator_config
from vqtok.image import ImageVQConfig, ImageVQModel
from vqtok.prior import PRIORS
from vqtok.text import TextVQConfig, TextVQModel, TextVQProcessor
from vqtok.training import TrainingArguments, parse_arguments

ROOT = Path(__file__).resolve().parent.parent / "tokenizers_configs"
FOLDERS = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*/config.json"))

# name: (bits per pixel, millions of parameters)
IMAGE = {
    "image/vqvae-digits": (0.5, 0.23),
    "image/vqvae2-digits": (0.609375, 0.59),
    "image/residual-digits": (0.5625, 0.27),
    "image/multiscale-digits": (0.6640625, 0.24),
    "image/vqvae2-256": (0.703125, 2.08),
    "image/vqvae2-photos": (0.703125, 1.35),
}
# name: (kilobits per second, of a codebook less each, millions of parameters)
AUDIO = {
    "audio/spoken-16khz": (0.4, 2.33),
    "audio/speech-16khz": (6.0, 5.68),
    "audio/speech-spectra-16khz": (6.0, 5.72),
    "audio/vqvae2-16khz": (1.25, 3.83),
    "audio/general-24khz": (6.0, 8.58),
    "audio/snac-24khz": (0.984375, 14.04),
    "audio/music-44khz": (7.751953125, 23.54),
}

# name: (bits per byte, millions of parameters)
TEXT = {
    "text/bytes-4": (4.0, 0.80),
    "text/spans-4": (4.0, 0.95),
    "text/levels-4": (4.0, 2.17),
    "text/bytes-2.7": (8 / 3, 1.11),
    "text/spans-2.7": (8 / 3, 1.77),
    "text/bytes-2": (2.0, 1.48),
    "text/bytes-1": (1.0, 2.33),
}

# name: the tokenizer whose codes it is made for
PRIOR = {
    "prior/digits": "image/vqvae2-digits",
    "prior/digits-masked": "image/vqvae2-digits",
    "prior/digits-top": "image/vqvae2-digits",
    "prior/digits-bottom": "image/vqvae2-digits",
    "prior/digits-delay": "image/residual-digits",
    "prior/digits-depth": "image/residual-digits",
    "prior/digits-next-scale": "image/multiscale-digits",
    "prior/spoken": "audio/spoken-16khz",
    "prior/prose": "text/bytes-4",
}


def test_every_folder_is_named_here():
    assert set(IMAGE) | set(AUDIO) | set(TEXT) | set(PRIOR) == set(FOLDERS)


@pytest.mark.parametrize("name", AUDIO)
def test_an_audio_config_builds_with_its_feature_extractor(name):
    kbps, millions = AUDIO[name]
    with torch.device("meta"):
        model = AudioVQModel(AudioVQConfig.from_pretrained(ROOT / name))
    second = model.config.sampling_rate
    steps = model.layout.stride * 1000
    assert model.config.kbps() == kbps == pytest.approx(model.layout.bits((steps,)) / steps * second / 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    processor = AudioVQFeatureExtractor.from_pretrained(ROOT / name)
    assert (processor.stride, processor.sampling_rate) == (model.layout.stride, second)
    assert not processor.resample and not processor.mix
    if (path := ROOT / name / "discriminator_config.json").is_file():
        with torch.device("meta"):
            AudioDiscriminator(read_discriminator_config(path))


def test_the_speech_recipe_has_both_rates():
    config = AudioVQConfig.from_pretrained(ROOT / "audio/speech-16khz")
    assert config.kbps(num_codebooks=3) == 1.5 and config.kbps() == 6.0


@pytest.mark.parametrize("name", TEXT)
def test_a_text_config_builds_with_its_processor(name):
    bits, millions = TEXT[name]
    with torch.device("meta"):
        model = TextVQModel(TextVQConfig.from_pretrained(ROOT / name))
    assert model.config.bits_per_unit == pytest.approx(bits)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    processor = TextVQProcessor.from_pretrained(ROOT / name)
    assert (processor.stride, processor.vocab_size) == (model.layout.stride, model.config.vocab_size)


@pytest.mark.parametrize("name", IMAGE)
def test_an_image_config_builds_with_its_processor(name):
    bits, millions = IMAGE[name]
    with torch.device("meta"):
        model = ImageVQModel(ImageVQConfig.from_pretrained(ROOT / name))
    layout = model.layout
    side = 16 * layout.stride
    assert layout.bits((side, side)) / side**2 == bits
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert VQTokenizer.from_config(name).processor.stride == layout.stride


def test_the_large_config_has_the_codes_of_the_paper():
    layout = ImageVQConfig.from_pretrained(ROOT / "image/vqvae2-256").layout
    assert layout.grids((256, 256)) == ((32, 32), (64, 64))
    assert [level.codebook_size for level in layout.levels] == [512, 512]


@pytest.mark.parametrize("name", PRIOR)
def test_a_prior_config_builds_once_the_codes_are_known(name):
    recipe = json.loads((ROOT / name / "config.json").read_text())
    config_class, model_class = PRIORS[recipe.pop("model_type")]
    medium = PRIOR[name].partition("/")[0]
    config = {"audio": AudioVQConfig, "image": ImageVQConfig, "text": TextVQConfig}[medium]
    grid, size = {"audio": (200, (60_000,)), "image": (4, (32, 32)), "text": (600, (1100,))}[medium]
    layout = config.from_pretrained(ROOT / PRIOR[name]).layout
    texts = {"text_size": 300, "max_text_length": 32} if recipe["condition"] != "none" else {}
    model = model_class(config_class(**{**recipe, "layout": layout.to_dict(), "max_grid": grid, **texts}))
    model.check_size(size)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6


@pytest.mark.parametrize("name", FOLDERS)
def test_a_recipe_holds_known_training_arguments(name):
    from examples.train_prior import PriorArguments
    from examples.train_tokenizer import TokenizerArguments

    script = PriorArguments if name.startswith("prior/") else TokenizerArguments
    recipe = json.loads((ROOT / name / "training.json").read_text())
    flags = ["--output_dir", "x", "--config", name, "--tokenizer", "y"]
    _, args = parse_arguments((script, TrainingArguments), flags, recipe)
    assert args.max_steps == recipe["max_steps"]
