"""Every folder of tokenizers_configs/ loads, builds, and trains with known arguments."""

import json
from pathlib import Path

import pytest
import torch

from vqtok import VQTokenizer
from vqtok.image import ImageVQConfig, ImageVQModel
from vqtok.prior import PRIORS
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


# name: the tokenizer whose codes it is made for
PRIOR = {
    "prior/digits": "image/vqvae2-digits",
    "prior/digits-masked": "image/vqvae2-digits",
    "prior/digits-top": "image/vqvae2-digits",
    "prior/digits-bottom": "image/vqvae2-digits",
    "prior/digits-delay": "image/residual-digits",
    "prior/digits-depth": "image/residual-digits",
    "prior/digits-next-scale": "image/multiscale-digits",
}


def test_every_folder_is_named_here():
    assert set(IMAGE) | set(PRIOR) == set(FOLDERS)


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
    layout = ImageVQConfig.from_pretrained(ROOT / PRIOR[name]).layout
    model = model_class(config_class(**recipe, layout=layout.to_dict(), text_size=300, max_text_length=32, max_grid=4))
    model.check_size((32, 32))
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
