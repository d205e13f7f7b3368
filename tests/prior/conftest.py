"""Tiny priors: random weights, large enough that every logit differs clearly."""

import pytest
import torch

from vqtok.prior import CodePriorConfig, CodePriorModel, MaskedCodePriorConfig, MaskedCodePriorModel, stepping

BACKBONES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"hidden_size": 32, "num_attention_heads": 2, "n_positions": 512},
    "qwen3": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16
    },
    "mistral": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


def layout(*levels, ndim=2):
    """A layout as a dict from (stride, num_codebooks, codebook_size) of each level."""
    names = ("stride", "num_codebooks", "codebook_size")
    return {"ndim": ndim, "levels": [dict(zip(names, level, strict=True)) for level in levels]}


TWO_LEVELS = layout((8, 1, 11), (4, 1, 7))


@pytest.fixture(scope="session")
def make_prior():
    """Builds a tiny prior in eval mode; `scale` multiplies its random weights so that its choices are far from uniform."""
    return _maker(CodePriorConfig, CodePriorModel)


@pytest.fixture
def make_masked():
    """The same for a masked prior."""
    return _maker(MaskedCodePriorConfig, MaskedCodePriorModel)


def _maker(config_class, model_class):
    def make(levels=TWO_LEVELS, backbone="llama", scale=6.0, layers=2, **fields):
        fields = {"condition": "text", "text_size": 20, "max_text_length": 8, "max_grid": 4, **fields}
        torch.manual_seed(1)
        config = {"model_type": backbone, "num_hidden_layers": layers, **BACKBONES[backbone]}
        prior = model_class(config_class(layout=levels, backbone_config=config, **fields)).eval()
        with torch.no_grad():
            for name, value in prior.named_parameters():
                if "norm" not in name and "ln_" not in name:
                    value.mul_(scale)
        return prior

    return make


@pytest.fixture
def watch_passes(monkeypatch):
    """Makes a list of the shapes (rows, tokens) of every pass that sampling makes."""

    def watch():
        shapes, call = [], stepping.Stepping._read

        def watched(self, x_BTM, causal):
            shapes.append(tuple(x_BTM.shape[:2]))
            return call(self, x_BTM, causal)

        monkeypatch.setattr(stepping.Stepping, "_read", watched)
        return shapes

    return watch


@pytest.fixture
def random_codes():
    """Random codes of one grid: levels as a tuple of tensors."""

    def make(levels, batch, grid, seed=0):
        generator = torch.Generator().manual_seed(seed)
        coarsest = levels["levels"][0]["stride"]
        return tuple(
            torch.randint(
                level["codebook_size"],
                (batch, level["num_codebooks"], *(n * coarsest // level["stride"] for n in grid)),
                generator=generator,
            )
            for level in levels["levels"]
        )

    return make
