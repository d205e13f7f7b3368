"""One sequence seen at growing rates: the residual quantizer of SNAC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import check_dim
from .configuration import make_config
from .configuration_layered import MultiRateConfig
from .hierarchy import OneGridHierarchy
from .residual import build_layers


class MultiRateQuantizer(OneGridHierarchy):
    """Multi-rate residual quantization (SNAC, Siuzdak et al. 2024, section 3.1).

    Level l averages what is left over spans of strides[l] steps, codes the means, and repeats their rows over the spans; the
    rest is left to the faster levels. Codes of level l are `(B, 1, t / strides[l])`.

    Args:
        dim: width of the latents.
        options: the fields of `MultiRateConfig`: strides, layer. SNAC's are of width 8 and found by direction.

    Example:
        >>> quantizer = MultiRateQuantizer(8, strides=[4, 2, 1]).eval()
        >>> [tuple(level.codes.shape) for level in quantizer(torch.randn(2, 12, 8))]
        [(2, 1, 3), (2, 1, 6), (2, 1, 12)]
    """

    config: MultiRateConfig

    def __init__(self, dim: int, **options: Any):
        super().__init__()
        check_dim(dim)
        config = make_config(MultiRateConfig, **options)
        self.dim, self.ndim, self.config, self.num_levels = dim, 1, config, len(config.strides)
        self.layers = build_layers(dim, config, self.num_levels)

    @property
    def _is_shared(self) -> bool:
        return False

    def _level_grid(self, level: int, grid: Sequence[int]) -> tuple[int, ...]:
        return (grid[0] // self.config.strides[level],)

    def _full_grid(self, codes: Sequence[Tensor]) -> tuple[int, ...]:
        return (codes[0].shape[2] * self.config.strides[0],)

    def _down(self, level: int, residual: Tensor) -> Tensor:
        stride = self.config.strides[level]
        if residual.shape[1] % self.config.strides[0]:
            raise ValueError(
                f"a sequence of {residual.shape[1]} steps is no multiple of the slowest level's stride of "
                f"{self.config.strides[0]}: pad it"
            )
        return residual.unflatten(1, (-1, stride)).mean(2)

    def _up(self, level: int, rows: Tensor, grid: Sequence[int]) -> Tensor:
        return rows.repeat_interleave(self.config.strides[level], 1)
