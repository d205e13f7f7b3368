"""What a published codec of transformers has to say of itself, to stand behind our contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqtok.codes import LevelLayout
from vqtok.quantizers import HierarchicalQuantizer

# Far beyond any codec that was published; a file must not ask for a model that takes minutes to build.
_MOST_NUMBER, _MOST_LIST, _MOST_COUNT, _MOST_HOP = 1 << 20, 64, 128, 1 << 16


class Codec:
    """One published codec: its classes in transformers, and how its parts become encoder, quantizer and decoder of ours.

    Its quantizer becomes our residual one with the same tables, so that search, ties, prefixes and precision are ours; encoder and
    decoder are transformers' own modules.

    Attributes:
        name: how people call it.
        config_class, model_class: of transformers.
        code_names: fields of the config that decide codes, for the fingerprint.
        pads: whether its own feature extractor continues a clip with silence to a multiple of the hop; otherwise its convolutions
            complete the last step in their own way, and a clip goes in as it is.
    """

    name: str
    config_class: Any
    model_class: Any
    code_names: tuple[str, ...]
    pads: bool = False

    # -- what its config says

    def check(self, config: Any) -> None:
        """Refuse a config under which the promises of `VQPreTrainedModel` cannot be kept, or that makes no sense.

        Raises:
            ValueError: naming the field, the reason and what to do.
        """
        _check_numbers(config.to_dict(), self.name)
        level = self.level(config)
        if not 2 <= level.stride <= _MOST_HOP:
            raise ValueError(
                f"{self.name}: a hop of {level.stride} samples is not from 2 to {_MOST_HOP}: mend the config"
            )
        if not 1 <= level.num_codebooks <= _MOST_COUNT:
            raise ValueError(
                f"{self.name}: {level.num_codebooks} codebooks are not from 1 to {_MOST_COUNT}: mend the config"
            )
        if not 1 <= self.sampling_rate(config) <= 1_000_000:
            raise ValueError(
                f"{self.name}: a sampling rate of {self.sampling_rate(config)} Hz makes no sense: mend the config"
            )
        if self.num_channels(config) not in (1, 2):
            raise ValueError(
                f"{self.name}: {self.num_channels(config)} channels are neither mono nor stereo: mend the config"
            )

    def sampling_rate(self, config: Any) -> int:
        return config.sampling_rate

    def num_channels(self, config: Any) -> int:
        return 1

    def level(self, config: Any) -> LevelLayout:
        """Its one level of codes."""
        raise NotImplementedError

    def latent_size(self, config: Any) -> int:
        """Width of what is quantized."""
        raise NotImplementedError

    def layer(self, config: Any) -> dict[str, Any]:
        """The configuration of each of our codebooks."""
        return {"type": "vector", "codebook_size": self.level(config).codebook_size, "revival_threshold": 0.0}

    def code_fields(self, config: Any) -> dict[str, Any]:
        """The fields that decide codes, as JSON."""
        values = config.to_dict()
        return {name: getattr(config, name, values.get(name)) for name in self.code_names}

    # -- what its model is made of

    def encoder(self, model: Any) -> nn.Module:
        """Sound `(B, C, T)` to latents `(B, D, t)`."""
        raise NotImplementedError

    def decoder(self, model: Any) -> nn.Module:
        """Quantized latents `(B, D, t)` to sound `(B, C, T)`, T as the codec has it."""
        raise NotImplementedError

    def adapt(self, quantizer: HierarchicalQuantizer) -> None:
        """Change what of our quantizer differs from the codec's; by default nothing."""

    def fill(self, quantizer: HierarchicalQuantizer, model: Any) -> None:
        """Copy the tables of the codec's model."""
        for codebook, rows in zip(quantizer.codebooks, self.tables(model), strict=True):
            fill_codebook(codebook, rows)

    def tables(self, model: Any) -> list[Tensor]:
        """The rows `(K, D)` of each codebook, in their order."""
        raise NotImplementedError


@torch.no_grad()
def fill_codebook(codebook: Any, rows: Tensor) -> None:
    """Put rows into a table, which then counts as started from data."""
    codebook.embedding.copy_(rows.float())
    codebook.initialised.fill_(True)


class Front(nn.Module):
    """A module as it is, under one more name, so that all encoders and decoders are called alike.

    Attributes:
        context: nothing is computed in parts (see `vqtok.chunks`), so nothing has to be known around one.
    """

    context = (0, 0)

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def check_upsampling(config: Any, name: str) -> None:
    """Refuse a config of DAC whose decoder goes up otherwise than its encoder goes down."""
    down, up = list(config.downsampling_ratios), list(config.upsampling_ratios)
    if math.prod(down) != math.prod(up):
        raise ValueError(f"{name}: upsampling_ratios {up} do not undo downsampling_ratios {down}: mend the config")


def _check_numbers(value: Any, name: str, key: str = "") -> None:
    if isinstance(value, Mapping):
        for inner, each in value.items():
            _check_numbers(each, name, str(inner))
    elif isinstance(value, list | tuple):
        if len(value) > _MOST_LIST and key not in ("id2label", "architectures"):
            raise ValueError(f"{name}: {key} has {len(value)} entries, more than {_MOST_LIST}: mend the config")
        for each in value:
            _check_numbers(each, name, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        is_count = key.startswith("num_") or key.endswith(("_codebooks", "_layers"))
        most = (
            _MOST_COUNT
            if is_count and "filters" not in key and "buckets" not in key and "embeddings" not in key
            else _MOST_NUMBER
        )
        if not math.isfinite(value) or abs(value) > most:
            raise ValueError(f"{name}: {key} {value!r} is more than {most:,}: mend the config")
