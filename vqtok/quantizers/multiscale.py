"""One grid seen at growing resolutions: the residual quantizer of VAR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import check_dim
from .configuration import make_config
from .configuration_layered import MultiScaleConfig
from .functional import full_precision
from .hierarchy import OneGridHierarchy
from .residual import build_layers


class MultiScaleQuantizer(OneGridHierarchy):
    """Multi-scale residual quantization (VAR, Tian et al. 2024, algorithm 1).

    Level l averages what is left over the cells of its grid, codes it, spreads the rows over the full grid (bicubic; linear for
    sequences), smooths them with (1 - s) x + s conv(x), and leaves the rest to the finer ones. Codes of level l are
    `(B, 1, *grid_l)` with grid_l = ceil(grid * scales[l] / scales[-1]).

    Args:
        dim: width of the latents.
        ndim: axes of the grid, 1 or 2.
        options: the fields of `MultiScaleConfig`: scales, layer, shared, smoothing, num_smoothings.

    Example:
        >>> quantizer = MultiScaleQuantizer(8, scales=[1, 2, 4]).eval()
        >>> levels = quantizer(torch.randn(2, 4, 8, 8))
        >>> [tuple(level.codes.shape) for level in levels]
        [(2, 1, 1, 2), (2, 1, 2, 4), (2, 1, 4, 8)]
    """

    config: MultiScaleConfig

    def __init__(self, dim: int, ndim: int = 2, **options: Any):
        super().__init__()
        if ndim not in (1, 2) or not isinstance(ndim, int) or isinstance(ndim, bool):
            raise ValueError(f"ndim, the axes of the grid, must be 1 or 2, got {ndim!r}")
        check_dim(dim)
        config = make_config(MultiScaleConfig, **options)
        self.dim, self.ndim, self.config, self.num_levels = dim, ndim, config, len(config.scales)
        self.layers = build_layers(dim, config, 1 if config.shared else self.num_levels)
        convolution = {1: nn.Conv1d, 2: nn.Conv2d}[ndim]
        number = min(config.num_smoothings, self.num_levels) if config.smoothing else 0
        self.smoothings = nn.ModuleList(convolution(dim, dim, 3, padding=1, dtype=torch.float32) for _ in range(number))

    @property
    def _is_shared(self) -> bool:
        return self.config.shared

    def _level_grid(self, level: int, grid: Sequence[int]) -> tuple[int, ...]:
        scale, finest = self.config.scales[level], self.config.scales[-1]
        return tuple(-(-n * scale // finest) for n in grid)

    def _full_grid(self, codes: Sequence[Tensor]) -> tuple[int, ...]:
        if len(codes) == self.num_levels:
            return tuple(codes[-1].shape[2:])
        # Of a prefix: the grid that its first level covers whole.
        return tuple(n * self.config.scales[-1] // self.config.scales[0] for n in codes[0].shape[2:])

    def _down(self, level: int, residual: Tensor) -> Tensor:
        grid = self._level_grid(level, residual.shape[1:-1])
        small = nn.functional.interpolate(residual.movedim(-1, 1), size=grid, mode="area")
        return small.movedim(1, -1)

    def _up(self, level: int, rows: Tensor, grid: Sequence[int]) -> Tensor:
        x = rows.movedim(-1, 1)
        if tuple(x.shape[2:]) != tuple(grid):
            x = nn.functional.interpolate(x, size=tuple(grid), mode={1: "linear", 2: "bicubic"}[self.ndim])
        if len(self.smoothings):
            smoothing = self.smoothings[level * len(self.smoothings) // self.num_levels]
            with full_precision(x.device.type):
                x = (1 - self.config.smoothing) * x + self.config.smoothing * smoothing(x)
        return x.movedim(1, -1)
