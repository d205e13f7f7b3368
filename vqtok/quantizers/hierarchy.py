"""Hierarchies: what a model holds as its quantizer. One `QuantizerOutput` per level, coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqtok.outputs import QuantizerOutput

from .base import Quantizer, Updatable
from .configuration import QuantizerConfig
from .configuration_layered import LayeredConfig
from .residual import in_depth, in_turn, initialise_in_turn

Propose = Callable[[int, list[Tensor]], Tensor]


class Hierarchy(Updatable):
    """The contract of all hierarchies.

    Latents come as a function `propose(level, quantized_so_far)`, which returns the latents `(B, *grid, dim)` of that level. A
    hierarchy on one grid asks it once, for level 0, and takes a plain tensor as well.
    """

    def forward(self, propose: Propose | Tensor) -> list[QuantizerOutput]:
        """Quantize every level; in training with gradients, losses and statistics for `update()`."""
        return self._walk(propose, learn=self.training)

    @torch.no_grad()
    def encode(self, propose: Propose | Tensor) -> list[QuantizerOutput]:
        """Quantize every level without changing any state, in train mode neither."""
        return self._walk(propose, learn=False)

    def embed_codes(self, codes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The quantized latents of each given level, `(B, Q, *grid)` -> `(B, *grid, dim)`; fewer levels are a prefix."""
        raise NotImplementedError

    def merge(self, quantized: Sequence[Tensor], keep: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """What a decoder sees: one tensor per grid, and how many of these grids each sample uses (None: all that are given).

        Args:
            quantized: of a prefix of levels, as `forward` and `embed_codes` give them.
            keep: int64 `(B,)`, how many levels of each sample to use; None for all that are given.
        """
        raise NotImplementedError

    def initialise(self, proposals: Callable[[], Iterable[Propose]], max_latents: int) -> None:
        """Start the tables from data, coarse to fine; `proposals()` goes through the batches anew each time.

        About `max_latents` of each process are used, spread over the batches; of a grid with several levels whole samples, at
        least one of each batch.
        """
        raise NotImplementedError

    @property
    def level_configs(self) -> list[QuantizerConfig]:
        """The configuration of each level's codebooks, coarse to fine."""
        raise NotImplementedError

    def _walk(self, propose: Propose | Tensor, learn: bool) -> list[QuantizerOutput]:
        raise NotImplementedError


class HierarchicalQuantizer(Hierarchy):
    """A quantizer per level, each on a grid of its own, the finer ones knowing the coarser (VQ-VAE-2, Razavi et al. 2019).

    The convolutions that merge levels belong to the model; they come in through `propose`.
    """

    def __init__(self, levels: Sequence[Quantizer]):
        super().__init__()
        self.levels = nn.ModuleList(levels)

    @property
    def _quantizers(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.levels))

    @property
    def level_configs(self) -> list[QuantizerConfig]:
        return [quantizer.config for quantizer in self._quantizers]

    def _walk(self, propose: Propose | Tensor, learn: bool) -> list[QuantizerOutput]:
        if isinstance(propose, Tensor):
            if len(self.levels) > 1:
                raise ValueError(
                    f"{len(self.levels)} levels need a function that proposes the latents of each, got a tensor"
                )
            latents = propose
            propose = lambda level, quantized: latents  # noqa: E731
        outputs: list[Any] = []
        for index, quantizer in enumerate(self._quantizers):
            z = propose(index, [out.quantized for out in outputs])
            outputs.append(quantizer(z) if learn else quantizer.encode(z))
        return outputs

    def embed_codes(self, codes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _check_levels(codes, len(self.levels))
        return tuple(level.embed_codes(value) for level, value in zip(self._quantizers, codes, strict=False))

    def merge(self, quantized: Sequence[Tensor], keep: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        return list(quantized), keep

    @torch.no_grad()
    def initialise(self, proposals: Callable[[], Iterable[Propose]], max_latents: int) -> None:
        for level, quantizer in enumerate(self._quantizers):
            # Of one batch after the other only the latents are kept: what an encoder knows of a batch is far more.
            batches = _some([self._latents(propose, level).flatten(0, -2) for propose in proposals()])
            share = -(-max_latents // len(batches))  # of each batch, evenly spread over its positions
            rows = [z[:: max(1, -(-len(z) // share))] for z in batches]
            quantizer.initialise(torch.cat(rows)[:max_latents])

    def _latents(self, propose: Propose, level: int) -> Tensor:
        """The latents of a level, given the codes of the coarser ones as they are now."""
        quantized: list[Tensor] = []
        for finer, coarser in enumerate(self._quantizers[:level]):
            quantized.append(cast(Tensor, coarser.encode(propose(finer, quantized)).quantized))
        return propose(level, quantized)


class OneGridHierarchy(Hierarchy):
    """Levels that are resolutions of one grid, each coding what the coarser left over.

    Each level's `quantized` is its part at the full grid: the decoder sees their sum. `latents` are what was left, at the level's
    own grid. A subclass says how to go down to a level's grid and up again.
    """

    layers: nn.ModuleList
    config: LayeredConfig
    num_levels: int
    dim: int
    ndim: int

    @property
    def _is_shared(self) -> bool:
        raise NotImplementedError

    def _down(self, level: int, residual: Tensor) -> Tensor:
        """`(B, *grid, dim)` -> `(B, *grid of the level, dim)`."""
        raise NotImplementedError

    def _up(self, level: int, rows: Tensor, grid: Sequence[int]) -> Tensor:
        """`(B, *grid of the level, dim)` -> `(B, *grid, dim)`."""
        raise NotImplementedError

    def _full_grid(self, codes: Sequence[Tensor]) -> tuple[int, ...]:
        """The full grid of the codes of a prefix of levels."""
        raise NotImplementedError

    def _level_grid(self, level: int, grid: Sequence[int]) -> tuple[int, ...]:
        """The grid of a level of the full `grid`."""
        raise NotImplementedError

    @property
    def level_configs(self) -> list[QuantizerConfig]:
        return [self.config.layer_config] * self.num_levels

    @property
    def _turns(self) -> list[Any]:
        return in_depth(self.layers, self.num_levels)

    def _walk(self, propose: Propose | Tensor, learn: bool) -> list[QuantizerOutput]:
        z = propose if isinstance(propose, Tensor) else propose(0, [])
        if z.ndim != 2 + self.ndim or z.shape[-1] != self.dim or not z.is_floating_point():
            raise ValueError(
                f"latents must be floats, channel-last (B, *{self.ndim} axes, {self.dim}), got {z.dtype} of shape {tuple(z.shape)}"
            )
        if learn:
            self.count_pass()
        outputs = []
        with torch.autocast(z.device.type, enabled=False):
            for out, part in in_turn(z, self._turns, learn, self._down, self._up):
                outputs.append(replace(out, quantized=part))
        return outputs

    def embed_codes(self, codes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The part of each given level at the full grid: each `(B, Q, *grid_l)` -> `(B, *grid, dim)`."""
        _check_levels(codes, self.num_levels)
        for layer, level in zip(self._turns, codes, strict=False):
            layer._check_codes(level)
        grid = self._full_grid(codes)
        for index, level in enumerate(codes):
            wanted = (len(codes[0]), 1, *self._level_grid(index, grid))
            if tuple(level.shape) != wanted:
                raise ValueError(
                    f"level {index}: codes must have the shape {wanted}, as the others say, got {tuple(level.shape)}"
                )
        with torch.autocast(codes[0].device.type, enabled=False):
            return tuple(self._embed(codes, grid))

    def _embed(self, codes: Sequence[Tensor], grid: Sequence[int]) -> list[Tensor]:
        embedded = (layer._embed(level) for layer, level in zip(self._turns, codes, strict=False))
        return [self._up(level, rows, grid) for level, rows in enumerate(embedded)]

    def merge(self, quantized: Sequence[Tensor], keep: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        total = quantized[0]
        for level, part in enumerate(quantized[1:], start=1):
            if keep is not None:
                part = part * (keep > level).view(-1, *[1] * (part.ndim - 1))
            total = total + part
        return [total], None

    @torch.no_grad()
    def initialise(self, proposals: Callable[[], Iterable[Propose]], max_latents: int) -> None:
        batches = _some([propose(0, []) for propose in proposals()])
        share = -(-max_latents // len(batches))  # of each batch, in whole samples
        samples = [z[: max(1, share // math.prod(z.shape[1:-1]))] for z in batches]
        initialise_in_turn(samples, self._turns, self._is_shared, self._down, self._up)


def _check_levels(codes: Sequence[Tensor], num_levels: int) -> None:
    if not 1 <= len(codes) <= num_levels:
        raise ValueError(f"codes must have 1 to {num_levels} levels, coarse to fine, got {len(codes)}")


def _some(batches: list[Any]) -> list[Any]:
    if not batches:
        raise ValueError("a start from data needs at least one batch")
    return batches
