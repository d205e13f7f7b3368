"""Configuration of the text tokenizer."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

import math
from dataclasses import field
from itertools import accumulate
from operator import mul
from typing import Any

from huggingface_hub.dataclasses import strict

from vqtok.codes import CodeLayout
from vqtok.configuration import VQConfig, require
from vqtok.quantizers import QuantizerConfig, check_hierarchy, quantizer_config

MAX_STRIDE = 1 << 16  # units; a text of one byte is padded to it


@strict
class TextVQConfig(VQConfig):
    """Configuration of `TextVQModel`: convolutions along a text, and codes of long and of short spans.

    A unit is a byte, or a token where the processor holds a tokenizer. The shortening by strided convolutions and the decoder that
    writes all units at once are those of the latent transformer (Kaiser et al. 2018).

    Args:
        vocab_size: how many different units there are: 256 of bytes.
        downsampling_ratios: units per step that each stage of the encoder takes together.
        strides: units per latent of each level, coarse to fine; products of the first ratios, the largest of all of them.
        quantizer: how latents become codes: a dict with the key `type` (see `vqtok.quantizers.quantizer_config`), or a list of
            them, one per stride. One dict stands for every stride.
        embedding_size: width at the rate of the units.
        hidden_sizes: channels of each stage, as many as ratios.
        latent_size: width of the latents.
        kernel_size: of the convolutions in residual blocks, odd.
        num_blocks: residual blocks of each stage of the encoder.
        decoder_num_blocks: the same of the decoder.
        compress: channels of a stage per channel inside its blocks.
        latent_bound: "none"; "tanh", which suits quantizers that round or take signs; or "unit", latents of length 1.
        level_dropout: chance that a training sample is decoded from a prefix of its levels, so that every prefix decodes.
        continuous_steps: updates during which ever fewer training samples are decoded from the latents themselves instead of the
            codes, from all of them to `continuous_share`; the codebooks follow the latents meanwhile.
        continuous_share: share of training samples that stays so.
        reconstruction_weight: of the mean cross-entropy per unit, in nats.

    Example:
        >>> config = TextVQConfig(strides=[8, 4], quantizer={"type": "vector", "codebook_size": 256})
        >>> config.layout.grids((100,)), config.bits_per_unit
        (((13,), (26,)), 3.0)
    """

    model_type = "vqtok_text"

    vocab_size: int = 256
    downsampling_ratios: list[int] | tuple[int, ...] = (4, 2)
    strides: list[int] | tuple[int, ...] = (8, 4)
    quantizer: dict[str, Any] | list[dict[str, Any]] | tuple[dict[str, Any], ...] = field(
        default_factory=lambda: {"type": "residual", "num_codebooks": 2, "layer": {"type": "vector"}}
    )
    embedding_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (192, 192)
    latent_size: int = 16
    kernel_size: int = 5
    num_blocks: int = 2
    decoder_num_blocks: int = 2
    compress: int = 2
    latent_bound: str = "none"
    level_dropout: float | int = 0.1
    continuous_steps: int = 0
    continuous_share: float | int = 0.0
    reconstruction_weight: float | int = 1.0

    def check_ranges(self) -> None:
        """Refuse values that no model can be built from, before anything is allocated."""
        require(2 <= self.vocab_size <= 1 << 20, self, "vocab_size", "from 2 to 1048576")
        ratios = self.downsampling_ratios
        fits = 1 <= len(ratios) <= 12 and all(2 <= ratio <= 64 for ratio in ratios)
        require(fits, self, "downsampling_ratios", "1 to 12 ratios from 2 to 64")
        products = list(accumulate(ratios, mul))
        fits = list(self.strides) == sorted(set(self.strides) & set(products), reverse=True)
        fits = fits and len(self.strides) > 0 and self.strides[0] == products[-1]
        require(fits, self, "strides", f"chosen from {products[::-1]}, coarse to fine, the first included")
        fits = len(self.hidden_sizes) == len(ratios) and all(1 <= size <= 4096 for size in self.hidden_sizes)
        require(fits, self, "hidden_sizes", f"{len(ratios)} numbers from 1 to 4096, one per ratio")
        for name in ("embedding_size", "latent_size"):
            require(1 <= getattr(self, name) <= 4096, self, name, "from 1 to 4096")
        given = len(self.quantizer) if isinstance(self.quantizer, list) else len(self.strides)
        wanted = f"one dict, or {len(self.strides)} of them, one per stride"
        require(given == len(self.strides), self, "quantizer", wanted)
        check_hierarchy(self.quantizers, self.latent_size, ndim=1)
        wanted = f"ratios that give strides of at most {MAX_STRIDE}"
        require(
            self.layout.stride <= MAX_STRIDE, self, "downsampling_ratios", wanted
        )  # the layout refuses what does not nest
        require(1 <= self.kernel_size <= 99 and self.kernel_size % 2 == 1, self, "kernel_size", "odd, from 1 to 99")
        for name in ("num_blocks", "decoder_num_blocks"):
            require(1 <= getattr(self, name) <= 64, self, name, "from 1 to 64")
        require(1 <= self.compress <= 16, self, "compress", "from 1 to 16")
        require(self.latent_bound in ("none", "tanh", "unit"), self, "latent_bound", "'none', 'tanh' or 'unit'")
        self._check_training()

    def _check_training(self) -> None:
        for name in ("level_dropout", "continuous_share"):
            require(0 <= getattr(self, name) <= 1, self, name, "a probability in [0, 1]")
        require(0 <= self.continuous_steps < 1 << 40, self, "continuous_steps", "at least 0")
        one_grid = len(self.layout.levels) > len(self.strides)
        fits = not (one_grid and (self.continuous_steps or self.continuous_share))
        wanted = f"0 with the quantizer type {self.quantizers[0].type!r}, whose levels have latents of other grids"
        require(fits, self, "continuous_steps" if self.continuous_steps else "continuous_share", wanted)
        require(0 <= self.reconstruction_weight < math.inf, self, "reconstruction_weight", "at least 0")

    @property
    def quantizers(self) -> list[QuantizerConfig]:
        """The typed configuration of each stride's quantizer."""
        values = self.quantizer if isinstance(self.quantizer, list) else [self.quantizer] * len(self.strides)
        return [quantizer_config(each) for each in values]

    @property
    def layout(self) -> CodeLayout:
        """The shape of the codes."""
        pairs = zip(self.strides, self.quantizers, strict=True)
        return CodeLayout(1, tuple(level for stride, config in pairs for level in config.levels(stride)))

    @property
    def bits_per_unit(self) -> float:
        """Bits of the codes per byte or token: log2(codebook_size) each, without padding and header."""
        return sum(level.bits / level.stride for level in self.layout.levels)

    @property
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide codes, for the fingerprint. Losses, dropout and what only concerns the decoder do not."""
        names = ("model_type", "vocab_size", "downsampling_ratios", "strides", "embedding_size", "hidden_sizes")
        names += ("latent_size", "kernel_size", "num_blocks", "compress", "latent_bound")
        quantizers = [config.code_fields for config in self.quantizers]
        return {**{name: getattr(self, name) for name in names}, "quantizers": quantizers}
