"""Codebooks side by side, each for its part of the latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqtok.outputs import QuantizerOutput

from .base import Quantizer, mean_losses
from .configuration import make_config
from .configuration_layered import ProductConfig
from .residual import build_layers


class ProductQuantizer(Quantizer):
    """Product quantization (Jegou et al. 2011): the latents' width is cut into Q equal parts, each with a codebook.

    All Q codes of a position are needed: unlike residual codes, a prefix does not decode.

    Args:
        dim: width of the latents, a multiple of `num_codebooks`.
        options: the fields of `ProductConfig`: num_codebooks, layer.
    """

    config: ProductConfig

    def __init__(self, dim: int, **options: Any):
        config = make_config(ProductConfig, **options)
        super().__init__(dim, config)
        config.check_width(dim)
        self.layers: Any = build_layers(dim // config.num_codebooks, config, config.num_codebooks)
        self.is_straight = all(layer.is_straight for layer in self.layers)

    def _quantize(self, z: Tensor, learn: bool) -> QuantizerOutput:
        outs = [layer._quantize(part, learn) for layer, part in zip(self.layers, self._parts(z), strict=True)]
        return QuantizerOutput(
            quantized=torch.cat([out.quantized for out in outs], -1),
            codes=torch.cat([out.codes for out in outs], 1),
            latents=z.float(),
            **mean_losses(outs),
        )

    def _embed(self, codes: Tensor) -> Tensor:
        parts = [layer._embed(codes[:, i : i + 1]) for i, layer in enumerate(self.layers)]
        return torch.cat(parts, -1)

    def _parts(self, z: Tensor) -> tuple[Tensor, ...]:
        return z.chunk(len(self.layers), -1)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Set each codebook to the k-means centroids of its part of the latents `z` `(*, dim)` of all processes."""
        for layer, part in zip(self.layers, self._parts(z), strict=True):
            layer.initialise(part)
