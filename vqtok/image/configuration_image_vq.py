"""Configuration of the image tokenizer."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

import math
from typing import Any

from huggingface_hub.dataclasses import strict

from vqtok.codes import CodeLayout, LevelLayout
from vqtok.configuration import VQConfig, require


@strict
class ImageVQConfig(VQConfig):
    """Configuration of `ImageVQModel`: a VQ-VAE (one level) or VQ-VAE-2 (two levels and more).

    Args:
        num_channels: channels of the picture, 3 (RGB) or 1 (grey).
        strides: pixels per code along each side, one per level, coarse to fine; powers of two, each larger than the next.
        codebook_sizes: codes of each level, coarse to fine.
        codebook_dim: numbers per code.
        hidden_size: channels of the convolutions.
        residual_size: channels inside a residual block.
        num_residual_layers: residual blocks of each stack.
        codebook_update: "ema" or "gradient" (see `vqtok.quantizers.Codebook`).
        ema_decay: decay of the codebook's moving averages.
        revival_threshold: share of uniform use below which a code is revived; 0 never revives.
        commitment_weight: weight of the commitment loss (beta of the paper, on the encoder's side).
        codebook_loss_weight: weight of the codebook loss; only gradient codebooks have one.
        level_dropout: chance that a training sample is decoded from a prefix of its levels, so that every prefix decodes.
        reconstruction_loss: "l2", "l1", or "l1+l2" (the mean of both).

    Example:
        >>> config = ImageVQConfig(strides=[8, 4], codebook_sizes=[512, 512])
        >>> config.layout.grids((256, 256))
        ((32, 32), (64, 64))
    """

    model_type = "vqtok_image"

    num_channels: int = 3
    strides: list[int] | tuple[int, ...] = (8, 4)
    codebook_sizes: list[int] | tuple[int, ...] = (512, 512)
    codebook_dim: int = 64
    hidden_size: int = 128
    residual_size: int = 64
    num_residual_layers: int = 2
    codebook_update: str = "ema"
    ema_decay: float | int = 0.99
    revival_threshold: float | int = 0.05
    commitment_weight: float | int = 0.25
    codebook_loss_weight: float | int = 1.0
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
        require(
            len(self.codebook_sizes) == len(self.strides),
            self,
            "codebook_sizes",
            f"{len(self.strides)} sizes, one per stride",
        )
        require(all(1 <= k <= 1 << 20 for k in self.codebook_sizes), self, "codebook_sizes", "sizes from 1 to 1048576")
        require(1 <= self.codebook_dim <= 4096, self, "codebook_dim", "from 1 to 4096")
        require(1 <= self.hidden_size <= 4096, self, "hidden_size", "from 1 to 4096")
        require(1 <= self.residual_size <= 4096, self, "residual_size", "from 1 to 4096")
        require(0 <= self.num_residual_layers <= 64, self, "num_residual_layers", "from 0 to 64")
        require(self.codebook_update in ("ema", "gradient"), self, "codebook_update", "'ema' or 'gradient'")
        require(0 <= self.ema_decay < 1, self, "ema_decay", "in [0, 1)")
        require(0 <= self.revival_threshold < 1, self, "revival_threshold", "a share of uniform use in [0, 1)")
        for name in ("commitment_weight", "codebook_loss_weight"):
            require(0 <= getattr(self, name) < 1e6, self, name, "at least 0")
        require(0 <= self.level_dropout <= 1, self, "level_dropout", "a probability in [0, 1]")
        require(self.reconstruction_loss in ("l2", "l1", "l1+l2"), self, "reconstruction_loss", "'l2', 'l1' or 'l1+l2'")

    @property
    def layout(self) -> CodeLayout:
        """The shape of the codes."""
        levels = zip(self.strides, self.codebook_sizes, strict=True)
        return CodeLayout(2, tuple(LevelLayout(stride, 1, size) for stride, size in levels))

    @property
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide codes, for the fingerprint. Losses, dropout and EMA settings do not."""
        names = (
            "model_type",
            "num_channels",
            "strides",
            "codebook_sizes",
            "codebook_dim",
            "hidden_size",
            "residual_size",
        )
        return {name: getattr(self, name) for name in (*names, "num_residual_layers")}
