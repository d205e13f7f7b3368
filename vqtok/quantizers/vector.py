"""One codebook on one grid: projections, nearest code, straight-through gradient, losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqtok.outputs import QuantizerOutput

from .codebook import Codebook
from .functional import full_precision, straight_through


class VectorQuantizer(nn.Module):
    """Vector quantization with one codebook (van den Oord et al. 2017).

        loss terms: codebook_loss = mean (e - sg[z])^2 (gradient codebooks only), commitment_loss = mean (z - sg[e])^2     (eq. 3)

    Args:
        dim: width of the latents that come in and of the quantized ones that go out.
        codebook_size: K.
        codebook_dim: width of the table; another than `dim` adds a linear projection in and one out. None means `dim`.
        codebook_options: further arguments of `Codebook`.

    Example:
        >>> quantizer = VectorQuantizer(8, 32).eval()
        >>> out = quantizer(torch.randn(2, 4, 4, 8))
        >>> tuple(out.codes.shape), bool((out.quantized == quantizer.embed_codes(out.codes)).all())
        ((2, 1, 4, 4), True)
    """

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int | None = None, **codebook_options: Any):
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.dim = dim
        self.codebook = Codebook(codebook_size, codebook_dim, **codebook_options)
        projected = codebook_dim != dim
        self.project_in: nn.Module = nn.Linear(dim, codebook_dim) if projected else nn.Identity()
        self.project_out: nn.Module = nn.Linear(codebook_dim, dim) if projected else nn.Identity()

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize `z` `(B, *grid, dim)`. In training the pass is accumulated for the next update; in eval nothing changes.

        Returns:
            `quantized` `(B, *grid, dim)`, `codes` `(B, 1, *grid)`, `latents` `(B, *grid, codebook_dim)`, `losses`.
        """
        self._check(z)
        latents = _project(self.project_in, z)
        codes = self.codebook.encode(latents)
        rows = self.codebook(codes)
        losses = {}
        if self.training:
            losses["commitment_loss"] = nn.functional.mse_loss(latents, rows.detach())
            if isinstance(self.codebook.embedding, nn.Parameter):
                losses["codebook_loss"] = nn.functional.mse_loss(rows, latents.detach())
            self.codebook.accumulate(latents, codes)
            rows = straight_through(latents, rows)
        return QuantizerOutput(
            quantized=_project(self.project_out, rows), codes=codes[:, None], latents=latents, losses=losses
        )

    @torch.no_grad()
    def encode(self, z: Tensor) -> QuantizerOutput:
        """The codes of `z` and their table rows. Never changes state, in train mode neither."""
        self._check(z)
        latents = _project(self.project_in, z)
        codes = self.codebook.encode(latents)[:, None]
        return QuantizerOutput(quantized=self.embed_codes(codes), codes=codes, latents=latents, losses={})

    def embed_codes(self, codes: Tensor) -> Tensor:
        """The quantized latents of `codes` `(B, 1, *grid)`: `(B, *grid, dim)`."""
        return _project(self.project_out, self.codebook(codes[:, 0]))

    def _check(self, z: Tensor) -> None:
        if z.shape[-1] != self.dim:
            raise ValueError(f"latents must be channel-last with {self.dim} channels, got shape {tuple(z.shape)}")


def _project(layer: nn.Module, x: Tensor) -> Tensor:
    """The fp32 result of a projection whatever its weights' dtype and the autocast: the same latents get the same codes."""
    if isinstance(layer, nn.Linear):
        with full_precision(x.device.type):
            x = layer(x.to(layer.weight.dtype))
    return x.float()
