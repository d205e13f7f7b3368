"""Configuration of the image tokenizer."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

import math
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict

from vqtok.codes import CodeLayout
from vqtok.configuration import VQConfig, require
from vqtok.quantizers import QuantizerConfig, check_hierarchy, quantizer_config


@strict
class ImageVQConfig(VQConfig):
    """Configuration of `ImageVQModel`: a VQ-VAE (one level) or VQ-VAE-2 (two levels and more).

    Args:
        num_channels: channels of the picture, 3 (RGB) or 1 (grey).
        strides: pixels per latent along each side, one per grid of the encoder, coarse to fine; powers of two, each larger than
            the next.
        quantizer: how latents become codes: a dict with the key `type` (see `vqtok.quantizers.quantizer_config`), or a list of
            them, one per stride. One dict stands for every stride. "multi_scale" takes one stride and makes several levels.
        latent_size: width of the latents.
        hidden_size: channels of the convolutions.
        residual_size: channels inside a residual block.
        num_residual_layers: residual blocks of each stack.
        level_dropout: chance that a training sample is decoded from a prefix of its levels, so that every prefix decodes.
        reconstruction_loss: "l2", "l1", or "l1+l2" (the mean of both).

    Example:
        >>> config = ImageVQConfig(strides=[8, 4], quantizer={"type": "vector", "codebook_size": 512})
        >>> config.layout.grids((256, 256))
        ((32, 32), (64, 64))
    """

    model_type = "vqtok_image"

    num_channels: int = 3
    strides: list[int] | tuple[int, ...] = (8, 4)
    quantizer: dict[str, Any] | list[dict[str, Any]] | tuple[dict[str, Any], ...] = field(
        default_factory=lambda: {"type": "vector", "codebook_size": 512}
    )
    latent_size: int = 64
    hidden_size: int = 128
    residual_size: int = 64
    num_residual_layers: int = 2
    level_dropout: float | int = 0.1
    reconstruction_loss: str = "l2"

    def check_ranges(self) -> None:
        """Refuse values that no model can be built from, before anything is allocated."""
        require(self.num_channels in (1, 3), self, "num_channels", "1 or 3")
        require(1 <= len(self.strides) <= 6, self, "strides", "a list of 1 to 6 strides")
        powers = all(2 <= s <= 256 and math.log2(s).is_integer() for s in self.strides)
        nested = all(a > b for a, b in zip(self.strides, self.strides[1:], strict=False))
        require(
            powers and nested, self, "strides", "powers of two from 2 to 256, coarse to fine, each larger than the next"
        )
        require(1 <= self.latent_size <= 4096, self, "latent_size", "from 1 to 4096")
        given = len(self.quantizer) if isinstance(self.quantizer, list) else len(self.strides)
        require(
            given == len(self.strides), self, "quantizer", f"one dict, or {len(self.strides)} of them, one per stride"
        )
        check_hierarchy(self.quantizers, self.latent_size, ndim=2)
        self.layout  # noqa: B018 (it refuses what does not nest)
        require(1 <= self.hidden_size <= 4096, self, "hidden_size", "from 1 to 4096")
        require(1 <= self.residual_size <= 4096, self, "residual_size", "from 1 to 4096")
        require(0 <= self.num_residual_layers <= 64, self, "num_residual_layers", "from 0 to 64")
        require(0 <= self.level_dropout <= 1, self, "level_dropout", "a probability in [0, 1]")
        require(self.reconstruction_loss in ("l2", "l1", "l1+l2"), self, "reconstruction_loss", "'l2', 'l1' or 'l1+l2'")

    @property
    def quantizers(self) -> list[QuantizerConfig]:
        """The typed configuration of each stride's quantizer."""
        values = self.quantizer if isinstance(self.quantizer, list) else [self.quantizer] * len(self.strides)
        return [quantizer_config(each) for each in values]

    @property
    def layout(self) -> CodeLayout:
        """The shape of the codes."""
        pairs = zip(self.strides, self.quantizers, strict=True)
        return CodeLayout(2, tuple(level for stride, config in pairs for level in config.levels(stride)))

    @property
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide codes, for the fingerprint. Losses, dropout and what only concerns training do not."""
        names = ("model_type", "num_channels", "strides", "latent_size", "hidden_size", "residual_size")
        quantizers = [config.code_fields for config in self.quantizers]
        return {**{name: getattr(self, name) for name in (*names, "num_residual_layers")}, "quantizers": quantizers}
