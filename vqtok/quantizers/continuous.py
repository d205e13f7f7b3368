"""A continuous start: while a model is young, part of its training samples skip the quantizer on their way to the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .collective import Accumulator


class ContinuousStart(Accumulator):
    """Counts updates: the share of samples decoded from latents falls linearly from 1 to `share` within `steps` of them.

    Skipping by sample is that of improved semantic hashing (Kaiser and Bengio 2018) and of Mimi (Défossez et al. 2024, section 3.3).

    Args:
        steps: updates until the share is reached; 0 starts there.
        share: of the samples that always skip.
    """

    def __init__(self, steps: int, share: float = 0.0):
        super().__init__()
        self.steps, self.share = steps, share

    def reset_parameters(self) -> None:
        """Start counting anew."""
        nn.init.zeros_(self.updates)

    @property
    def current_share(self) -> float:
        """The share of samples that skip the quantizer now; none when frozen, as then the decoder alone learns, from codes."""
        if self.frozen:
            return 0.0
        done = min(1.0, int(self.updates) / self.steps) if self.steps else 1.0
        return 1.0 + (self.share - 1.0) * done

    def mix(self, latents: Sequence[Tensor], quantized: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the decoder sees of each level `(B, *grid, D)`: of a sample that skips, all levels are its latents."""
        share = self.current_share
        if share == 0:
            return tuple(quantized)
        skips = (torch.rand(len(latents[0])) < share).to(latents[0].device)
        pairs = zip(latents, quantized, strict=True)
        return tuple(torch.where(skips.view(-1, *[1] * (z.ndim - 1)), z.to(q.dtype), q) for z, q in pairs)

    def packed(self, rank: int, world_size: int) -> list[Tensor]:
        """Nothing is summed."""
        return []

    def apply_sums(self, *sums: Tensor) -> None:
        """Nothing but the count changes."""
