"""The levels of a VQ-VAE-2: each quantized in turn, coarse to fine, the finer ones knowing the coarser (Razavi et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqtok.outputs import QuantizerOutput

from .codebook import Codebook, update_codebooks
from .vector import VectorQuantizer

Propose = Callable[[int, list[Tensor]], Tensor]


class HierarchicalQuantizer(nn.Module):
    """A list of quantizers, level 0 the coarsest.

    The convolutions that merge levels belong to the model; they come in as `propose(level, quantized_so_far)`, which returns
    the latents `(B, *grid, dim)` of that level.
    """

    def __init__(self, levels: Sequence[VectorQuantizer]):
        super().__init__()
        self.levels = nn.ModuleList(levels)

    @property
    def _quantizers(self) -> list[VectorQuantizer]:
        return cast(list[VectorQuantizer], list(self.levels))

    def forward(self, propose: Propose) -> list[QuantizerOutput]:
        """Quantize every level, with gradients and accumulation in training."""
        return self._walk(propose, self._quantizers)

    @torch.no_grad()
    def encode(self, propose: Propose) -> list[QuantizerOutput]:
        """Quantize every level without changing any state."""
        return self._walk(propose, [level.encode for level in self._quantizers])

    @staticmethod
    def _walk(propose: Propose, quantize: Sequence[Callable[[Tensor], QuantizerOutput]]) -> list[QuantizerOutput]:
        outputs: list[Any] = []
        for index, quantize_level in enumerate(quantize):
            outputs.append(quantize_level(propose(index, [out.quantized for out in outputs])))
        return outputs

    def embed_codes(self, codes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The quantized latents of each given level: `(B, Q, *grid)` -> `(B, *grid, dim)`; fewer levels are a prefix."""
        return tuple(level.embed_codes(value) for level, value in zip(self._quantizers, codes, strict=False))

    @property
    def codebooks(self) -> list[Codebook]:
        """Every codebook, level by level."""
        return [module for module in self.modules() if isinstance(module, Codebook)]

    @torch.no_grad()
    def initialise(self, level: int, z: Tensor) -> None:
        """Set the codebook of `level` to the k-means centroids of its latents `z` `(*, codebook_dim)`."""
        self._quantizers[level].codebook.initialise(z.reshape(-1, z.shape[-1]))

    def update(self) -> None:
        """Apply what was accumulated, one collective for all levels; call it after `optimizer.step()`."""
        update_codebooks(self.codebooks)

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or allow) every change of the codebooks and projections, also in `train()`."""
        for parameter in self.parameters():
            parameter.requires_grad_(not frozen)
        for codebook in self.codebooks:
            codebook.freeze(frozen)
