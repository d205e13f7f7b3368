"""Quantizers from configurations: one literal dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Quantizer
from .binary import BSQ, LFQ
from .configuration import (
    BSQConfig,
    FSQConfig,
    GumbelConfig,
    LFQConfig,
    QuantizerConfig,
    SimVQConfig,
    VectorQuantizerConfig,
    read_config,
)
from .configuration_layered import MultiRateConfig, MultiScaleConfig, ProductConfig, ResidualConfig
from .gumbel import GumbelQuantizer
from .hierarchy import HierarchicalQuantizer, Hierarchy
from .multirate import MultiRateQuantizer
from .multiscale import MultiScaleQuantizer
from .product import ProductQuantizer
from .residual import ResidualQuantizer
from .scalar import FSQ
from .sim import SimVQ
from .vector import VectorQuantizer

QUANTIZERS: dict[str, tuple[type[QuantizerConfig], type[Any]]] = {
    "vector": (VectorQuantizerConfig, VectorQuantizer),
    "sim": (SimVQConfig, SimVQ),
    "gumbel": (GumbelConfig, GumbelQuantizer),
    "product": (ProductConfig, ProductQuantizer),
    "residual": (ResidualConfig, ResidualQuantizer),
    "fsq": (FSQConfig, FSQ),
    "lfq": (LFQConfig, LFQ),
    "bsq": (BSQConfig, BSQ),
    "multi_scale": (MultiScaleConfig, MultiScaleQuantizer),
    "multi_rate": (MultiRateConfig, MultiRateQuantizer),
}


def quantizer_config(values: Mapping[str, Any]) -> QuantizerConfig:
    """The typed configuration that a dict with the key `type` describes.

    Raises:
        ValueError: an unknown type or field (the nearest known one is named), or a value of a wrong type or out of range.

    Example:
        >>> quantizer_config({"type": "fsq", "scalar_levels": [8, 5, 5, 5]}).size
        1000
    """
    return read_config(values, {name: config for name, (config, _) in QUANTIZERS.items()})


def build_quantizer(config: Mapping[str, Any] | QuantizerConfig, dim: int, ndim: int = 2) -> Quantizer | Hierarchy:
    """The quantizer that a configuration describes, for latents of width `dim` on grids of `ndim` axes.

    "multi_scale" and "multi_rate" are hierarchies (a list of outputs, one per level), the others quantizers of one level.

    Raises:
        ValueError: see `quantizer_config`; or a width that the quantizer cannot take.

    Example:
        >>> build_quantizer({"type": "vector", "codebook_size": 8192, "codebook_dim": 8, "metric": "cosine"}, 256).config.size
        8192
    """
    config = config if isinstance(config, QuantizerConfig) else quantizer_config(config)
    options = {name: value for name, value in config.to_dict().items() if name != "type"}
    if config.type == "multi_scale":
        options["ndim"] = ndim
    quantizer: Quantizer | Hierarchy = QUANTIZERS[config.type][1](dim, **options)
    return quantizer


def check_hierarchy(configs: Sequence[QuantizerConfig], dim: int, ndim: int) -> None:
    """Refuse what `build_hierarchy` cannot build, before anything is allocated.

    Raises:
        ValueError: a quantizer that makes several levels of one grid is not the only one, is not for grids of `ndim` axes, or
            `dim` cannot be cut into the parts of a product quantizer.
    """
    for config in configs:
        if len(configs) > 1 and issubclass(QUANTIZERS[config.type][1], Hierarchy):
            raise ValueError(
                f"quantizer type {config.type!r} makes several levels of one grid: give the model one stride, not {len(configs)}"
            )
        if config.type == "multi_rate" and ndim != 1:
            raise ValueError("quantizer type 'multi_rate' is for sequences: of pictures use 'multi_scale'")
        if (
            config.type == "multi_scale" and ndim == 1
        ):  # it resizes the whole grid, padding and neighbours in a chunk's place too
            raise ValueError("quantizer type 'multi_scale' is for pictures: of sequences use 'multi_rate'")
        if isinstance(config, ProductConfig):
            config.check_width(dim)


def build_hierarchy(configs: Sequence[QuantizerConfig], dim: int, ndim: int) -> Hierarchy:
    """What a model holds: one configuration per grid of its encoder, coarse to fine.

    Raises:
        ValueError: see `check_hierarchy`.
    """
    check_hierarchy(configs, dim, ndim)
    quantizers = [build_quantizer(config, dim, ndim) for config in configs]
    if isinstance(quantizers[0], Hierarchy):
        return quantizers[0]
    return HierarchicalQuantizer([each for each in quantizers if isinstance(each, Quantizer)])
