"""Codebooks that each code what the ones before left over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqtok.outputs import QuantizerOutput

from .base import Quantizer, SingleQuantizer, mean_losses
from .configuration import make_config
from .configuration_layered import LayeredConfig, ResidualConfig
from .sim import SimVQ
from .vector import VectorQuantizer

_LAYERS: dict[str, type[SingleQuantizer]] = {"vector": VectorQuantizer, "sim": SimVQ}

Down = Callable[[int, Tensor], Tensor]
Up = Callable[[int, Tensor, Sequence[int]], Tensor]


class ResidualQuantizer(Quantizer):
    """Q codebooks on one grid (SoundStream, Zeghidour et al. 2021, algorithm 1); the first q alone decode, for every q.

    Args:
        dim: width of the latents.
        options: the fields of `ResidualConfig`: num_codebooks, layer, shared, depth_dropout, dropout_depths.

    Example:
        >>> quantizer = ResidualQuantizer(8, num_codebooks=3, layer={"type": "vector", "codebook_size": 16}).eval()
        >>> codes = quantizer(torch.randn(2, 5, 8)).codes
        >>> tuple(codes.shape), tuple(quantizer.embed_codes(codes[:, :2]).shape)
        ((2, 3, 5), (2, 5, 8))
    """

    config: ResidualConfig

    def __init__(self, dim: int, **options: Any):
        config = make_config(ResidualConfig, **options)
        super().__init__(dim, config)
        self.layers = build_layers(dim, config, 1 if config.shared else config.num_codebooks)

    def _quantize(self, z: Tensor, learn: bool) -> QuantizerOutput:
        turns = in_turn(z, in_depth(self.layers, self.config.depth), learn)
        codes = torch.cat([out.codes for out, _ in turns], 1)
        if not learn:
            return self._output(z, add_up([part for _, part in turns]), codes)
        parts = [part for _, part in turns]
        if self.config.depth_dropout:
            kept = self._kept(len(z)).to(z.device).view(-1, *[1] * (z.ndim - 1))
            parts = [part if index == 0 else part * (kept > index) for index, part in enumerate(parts)]
        return QuantizerOutput(
            quantized=add_up(parts), codes=codes, latents=z.float(), **mean_losses([out for out, _ in turns])
        )

    def _kept(self, batch: int) -> Tensor:
        """How many codebooks each sample is decoded from."""
        depths = torch.tensor(list(self.config.dropout_depths or range(1, self.config.depth + 1)))
        some = depths[torch.randint(len(depths), (batch,))]
        dropped = torch.rand(batch) < self.config.depth_dropout
        return torch.where(dropped, some, self.config.depth)

    def _takes_depth(self, depth: int) -> bool:
        return 1 <= depth <= self.config.depth

    def _embed(self, codes: Tensor) -> Tensor:
        layers = in_depth(self.layers, self.config.depth)
        parts = [layer._embed(codes[:, i : i + 1]) for i, layer in zip(range(codes.shape[1]), layers, strict=False)]
        return add_up(parts)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Set the codebooks by k-means, each to what those before leave of the latents `z` `(*, dim)` of all processes."""
        initialise_in_turn([z.flatten(0, -2)], in_depth(self.layers, self.config.depth), self.config.shared)


def build_layers(dim: int, config: LayeredConfig, number: int) -> nn.ModuleList:
    """`number` quantizers as `config.layer` describes them."""
    options = {name: value for name, value in config.layer.items() if name != "type"}
    return nn.ModuleList(_LAYERS[config.layer["type"]](dim, **options) for _ in range(number))


def in_depth(layers: nn.ModuleList, depth: int) -> list[Any]:
    """The quantizer of each of `depth` turns: the one shared by all, or each its own."""
    return list(layers) if len(layers) == depth else [layers[0]] * depth


def in_turn(
    z: Tensor, layers: Sequence[Any], learn: bool, down: Down | None = None, up: Up | None = None
) -> list[tuple[Any, Tensor]]:
    """The `QuantizerOutput` of each quantizer on what the ones before left of `z` `(B, *grid, dim)`, and its part of the sum.

    `down(turn, residual)` takes what is left to the turn's own grid, `up(turn, rows, grid)` brings its rows back; None: the same grid.

    Where the quantizers are straight-through (as in EnCodec), the gradient of the sum to z is that of the identity, and each
    residual is z less constants, so that the commitment of every turn reaches the encoder. Where they project, normalise or
    rotate (as in DAC), each residual carries the gradients of the turns before it.
    """
    straight = all(layer.is_straight for layer in layers)
    residual = z = z.float()
    turns: list[tuple[Any, Tensor]] = []
    for turn, layer in enumerate(layers):
        out = layer._quantize(residual if down is None else down(turn, residual), learn)
        rows = out.quantized.detach() if straight and learn else out.quantized
        part = rows if up is None else up(turn, rows, z.shape[1:-1])
        residual = residual - (part.detach() if straight else part)
        turns.append((out, part))
    if straight and learn:
        turns[0] = (turns[0][0], turns[0][1] + (z - z.detach()))  # adds nothing but the gradient
    return turns


def initialise_in_turn(
    samples: Sequence[Tensor], layers: Sequence[Any], shared: bool, down: Down | None = None, up: Up | None = None
) -> None:
    """Start each quantizer from what the ones before leave of `samples`, each `(B, *grid, dim)`; a shared one from what all turns see."""

    def seen(set_each: bool) -> list[Tensor]:
        residuals, rows = [z.float() for z in samples], []
        for turn, layer in enumerate(layers):
            own = [z if down is None else down(turn, z) for z in residuals]
            rows.append(torch.cat([z.flatten(0, -2) for z in own]))
            if set_each:
                layer.initialise(rows[-1])
            quantized = [layer.encode(z).quantized for z in own]
            parts = [q if up is None else up(turn, q, z.shape[1:-1]) for q, z in zip(quantized, residuals, strict=True)]
            residuals = [z - part for z, part in zip(residuals, parts, strict=True)]
        return rows

    if not shared:
        seen(set_each=True)
        return
    layers[0].initialise(torch.cat([z.float().flatten(0, -2) for z in samples]))
    layers[0].initialise(torch.cat(seen(set_each=False)))


def add_up(parts: Sequence[Tensor]) -> Tensor:
    """The sum in one fixed order: what is embedded from codes has the bits of what was passed on."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
