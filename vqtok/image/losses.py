"""Losses of pictures."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def pixel_loss(reconstruction: Tensor, pixels: Tensor, kind: str) -> Tensor:
    """Mean over all values of the squared ("l2") or absolute ("l1") difference, or the mean of both ("l1+l2"), in fp32.

    Args:
        reconstruction: `(B, C, H, W)`, nominally in [-1, 1].
        pixels: `(B, C, H, W)` in [-1, 1].
    """
    x, y = reconstruction.float(), pixels.float()
    terms = {"l2": functional.mse_loss, "l1": functional.l1_loss}
    return sum(terms[name](x, y) for name in kind.split("+")) / (1 + kind.count("+"))
