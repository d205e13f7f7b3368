"""From codes of coarser levels to what they say about each place of finer ones: the conditioning stack of a cascade.

As VQ-VAE-2 (Razavi et al. 2019, section 3.2) and Jukebox (Dhariwal et al. 2020, section 3.3) do it: embed the codes, let them see their
neighbours through residual convolutions, go up to the finer grid.

Axis letters: B batch, M width; `*grid` is `(h, w)` or `(t,)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LevelConditioner(nn.Module):
    """One small stack of convolutions per given level, coarse to fine, each added to what came down from the coarser ones.

    Args:
        width: M.
        ndim: grid axes, 1 or 2.
        num_levels: given levels.
        num_layers: residual blocks of each stack.
    """

    def __init__(self, width: int, ndim: int, num_levels: int, num_layers: int = 2):
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d)[ndim - 1]
        self.stacks = nn.ModuleList(
            nn.ModuleList(_Block(convolution, width, 3**index if ndim == 1 else 1) for index in range(num_layers))
            for _ in range(num_levels)
        )

    def forward(self, embedded: Sequence[Tensor], grids: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return one map `(B, *grid, M)` for each of `grids`.

        Args:
            embedded: one `(B, *grid, M)` per given level, coarse to fine.
            grids: of finer levels.
        """
        x = None
        for level, stack in zip(embedded, self.stacks, strict=True):
            here = level.movedim(-1, 1)
            x = here if x is None else _up(x, tuple(here.shape[2:])) + here
            for block in stack:
                x = block(x)
        assert x is not None
        return [_up(x, grid).movedim(1, -1) for grid in grids]


class _Block(nn.Module):
    def __init__(self, convolution: type[nn.Module], width: int, dilation: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.near = convolution(width, width, 3, padding=dilation, dilation=dilation)
        self.mix = convolution(width, width, 1)
        nn.init.zeros_(self.mix.weight)  # a block starts as the identity
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: Tensor) -> Tensor:
        # A norm per place: what is far away changes nothing.
        h = F.gelu(self.near(self.norm(x.movedim(1, -1)).movedim(-1, 1)))
        return x + self.mix(h)


def _up(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Repeat cells so that `(B, M, *coarse)` becomes `(B, M, *grid)`; grids nest."""
    for axis, extent in enumerate(grid, 2):
        x = torch.repeat_interleave(x, extent // x.shape[axis], axis)
    return x
