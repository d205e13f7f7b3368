"""Strict configurations of the quantizers that are made of several tables."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

from dataclasses import dataclass, field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration import QuantizerConfig, SimVQConfig, VectorQuantizerConfig, read_config

_LAYERS: dict[str, type[QuantizerConfig]] = {"vector": VectorQuantizerConfig, "sim": SimVQConfig}


@strict
@dataclass(kw_only=True)
class LayeredConfig(QuantizerConfig):
    """What quantizers made of several tables share: `layer` configures each of them.

    Args:
        layer: a dict with the key `type`, "vector" or "sim".
    """

    layer: dict[str, Any] = field(default_factory=lambda: {"type": "vector"})

    def check_ranges(self) -> None:
        self.layer_config  # noqa: B018 (it refuses what it cannot read)

    @property
    def layer_config(self) -> QuantizerConfig:
        """The configuration of one table."""
        return read_config(self.layer, _LAYERS, "layer")

    @property
    def size(self) -> int:
        return self.layer_config.size

    @property
    def start_latents(self) -> int:
        return self.layer_config.start_latents

    @property
    def code_fields(self) -> dict[str, Any]:
        return {**super().code_fields, "layer": self.layer_config.code_fields}


@strict
@dataclass(kw_only=True)
class ProductConfig(LayeredConfig):
    """Several codebooks side by side, each for its part of the latents (Jegou et al. 2011; "multi-head" codes).

    Args:
        num_codebooks: Q, how many parts; they divide the latents' width.
        layer: configuration of each; its `codebook_dim` is the width of one part's table.
    """

    type: ClassVar[str] = "product"

    num_codebooks: int = 4

    def check_ranges(self) -> None:
        super().check_ranges()
        self.require(1 <= self.num_codebooks <= 1024, "num_codebooks", "from 1 to 1024")

    def check_width(self, dim: int) -> None:
        """Refuse latents that cannot be cut into equal parts."""
        self.require(dim % self.num_codebooks == 0, "num_codebooks", f"a divisor of the latents' width {dim}")

    @property
    def depth(self) -> int:
        return self.num_codebooks


@strict
@dataclass(kw_only=True)
class ResidualConfig(LayeredConfig):
    """Codebooks in a row on one grid, each for what the ones before left over (SoundStream, Zeghidour et al. 2021).

    Args:
        num_codebooks: Q.
        layer: configuration of each. With a `codebook_dim` of its own each has projections of its own.
        shared: one table for all.
        depth_dropout: chance that a training sample is decoded from its first codebooks only, so that every prefix decodes.
        dropout_depths: how many these are, one of them by chance, where only some prefixes will be used; None: any number (EnCodec
            trains its bandwidths so).
    """

    type: ClassVar[str] = "residual"
    training_only: ClassVar[frozenset[str]] = frozenset(["depth_dropout", "dropout_depths"])

    num_codebooks: int = 4
    shared: bool = False
    depth_dropout: float | int = 0.0
    dropout_depths: list[int] | tuple[int, ...] | None = None

    def check_ranges(self) -> None:
        super().check_ranges()
        self.require(1 <= self.num_codebooks <= 1024, "num_codebooks", "from 1 to 1024")
        self.require(0 <= self.depth_dropout <= 1, "depth_dropout", "a probability in [0, 1]")
        depths = self.dropout_depths
        fits = depths is None or (len(depths) > 0 and all(1 <= depth <= self.num_codebooks for depth in depths))
        self.require(fits, "dropout_depths", f"None or numbers of codebooks from 1 to {self.num_codebooks}")

    @property
    def depth(self) -> int:
        return self.num_codebooks


@strict
@dataclass(kw_only=True)
class MultiScaleConfig(LayeredConfig):
    """One grid seen at growing resolutions, each coding what the coarser left over (VAR, Tian et al. 2024).

    Args:
        scales: cells along an axis, coarse to fine, where the finest stands for the whole grid: [1, 2, 4] on a grid of 32 x 16
            gives 8 x 4, 16 x 8 and 32 x 16. In a model each must be a multiple of the one before, so that grids nest.
        layer: configuration of the tables.
        shared: one table for all scales, as in VAR.
        smoothing: share of a 3-wide convolution in what each scale adds, in [0, 1]; 0 has none.
        num_smoothings: how many of these convolutions there are, shared by neighbouring scales.
    """

    type: ClassVar[str] = "multi_scale"

    scales: list[int] | tuple[int, ...] = (1, 2, 4, 8, 16)
    shared: bool = True
    smoothing: float | int = 0.5
    num_smoothings: int = 4

    def check_ranges(self) -> None:
        super().check_ranges()
        self.scales = list(self.scales)
        grow = all(a < b for a, b in zip(self.scales, self.scales[1:], strict=False))
        fits = 1 <= len(self.scales) <= 32 and self.scales[0] >= 1 and self.scales[-1] <= 1024 and grow
        self.require(fits, "scales", "1 to 32 growing numbers of cells, from 1 to 1024")
        self.require(0 <= self.smoothing <= 1, "smoothing", "a share in [0, 1]")
        self.require(1 <= self.num_smoothings <= 32, "num_smoothings", "from 1 to 32")

    @property
    def ratios(self) -> tuple[int, ...]:
        nested = all(b % a == 0 for a, b in zip(self.scales, self.scales[1:], strict=False))
        self.require(
            nested, "scales", "multiples of the one before, such as [1, 2, 4, 8, 16], in a model with a layout"
        )
        return tuple(self.scales[-1] // scale for scale in self.scales)


@strict
@dataclass(kw_only=True)
class MultiRateConfig(LayeredConfig):
    """One sequence seen at growing rates, each coding what the slower ones left over (SNAC, Siuzdak et al. 2024).

    Args:
        strides: steps of the sequence per code, coarse to fine, each a multiple of the next.
        layer: configuration of the tables; every rate has its own.
    """

    type: ClassVar[str] = "multi_rate"

    strides: list[int] | tuple[int, ...] = (4, 2, 1)

    def check_ranges(self) -> None:
        super().check_ranges()
        self.strides = list(self.strides)
        positive = 1 <= len(self.strides) <= 32 and all(1 <= stride <= 4096 for stride in self.strides)
        nested = positive and all(a > b and a % b == 0 for a, b in zip(self.strides, self.strides[1:], strict=False))
        self.require(nested and self.strides[-1] == 1, "strides", "falling multiples down to 1, such as [4, 2, 1]")

    @property
    def ratios(self) -> tuple[int, ...]:
        return tuple(self.strides)
