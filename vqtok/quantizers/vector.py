"""One codebook on one grid: vector quantization and what grew out of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import SingleQuantizer, codebook_loss, commitment_loss, pass_gradient
from .codebook import Codebook
from .configuration import VectorQuantizerConfig, make_config
from .soft import entropy_penalty, index_backpropagation


class VectorQuantizer(SingleQuantizer):
    """Vector quantization with one codebook (van den Oord et al. 2017); see `VectorQuantizerConfig` for its variants.

    Args:
        dim: width of the latents that come in and of the quantized ones that go out.
        options: the fields of `VectorQuantizerConfig`: codebook_size, codebook_dim, metric, update, ...

    Example:
        >>> quantizer = VectorQuantizer(8, codebook_size=32).eval()
        >>> out = quantizer(torch.randn(2, 4, 4, 8))
        >>> tuple(out.codes.shape), bool((out.quantized == quantizer.embed_codes(out.codes)).all())
        ((2, 1, 4, 4), True)
    """

    config: VectorQuantizerConfig

    def __init__(self, dim: int, **options: Any):
        config = make_config(VectorQuantizerConfig, **options)
        inner_dim = config.codebook_dim or dim
        super().__init__(dim, inner_dim, config)
        plain = config.metric == "euclidean" and config.gradient == "straight_through"
        self.is_straight = plain and inner_dim == dim
        self.codebook = Codebook(
            config.codebook_size, inner_dim, config.update, config.metric, config.decay, config.revival_threshold
        )

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Set the codebook from the latents `z` `(*, dim)` of all processes, as `start` says."""
        self.codebook.initialise(self.prepare(z), self.config.start)

    def _prepare(self, latents: Tensor) -> Tensor:
        return self.codebook.prepare(latents)

    def _search(self, latents: Tensor) -> Tensor:
        return self.codebook.encode(latents)

    def _rows(self, codes: Tensor) -> Tensor:
        return self.codebook(codes)

    def _learn(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self._rows(codes)
        losses = {"commitment_loss": commitment_loss(latents, rows)}
        if isinstance(self.codebook.embedding, nn.Parameter):
            losses["codebook_loss"] = codebook_loss(latents, rows)
        if self.config.entropy_weight:
            losses["entropy_loss"] = self._entropy_loss(latents.flatten(0, -2))
        self.codebook.accumulate(latents, codes)
        if self.config.metric == "inner_product":
            flat = index_backpropagation(latents.flatten(0, -2), self.codebook.table, codes.flatten())
            return flat.view(latents.shape), losses
        return pass_gradient(latents, rows, self.config.gradient), losses

    def _entropy_loss(self, z_ND: Tensor) -> Tensor:
        """Soft assignments are softmax(-|z - e|^2 / temperature), with inner products softmax(z . e / temperature)."""
        table_KD, temperature = self.codebook.table, self.config.entropy_temperature
        if self.config.metric == "inner_product":
            return entropy_penalty([(z_ND, table_KD / temperature, table_KD.new_zeros(len(table_KD)))])
        bias_K = -table_KD.square().sum(1) / temperature  # |z|^2 is the same for all codes
        return entropy_penalty([(z_ND, table_KD * (2 / temperature), bias_K)])
