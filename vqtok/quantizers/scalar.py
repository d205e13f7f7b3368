"""FSQ: a few numbers, each rounded to a few levels. No table, nothing to collapse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .configuration import FSQConfig, make_config
from .functional import straight_through
from .table_free import TableFreeQuantizer, exact_dot

_MARGIN = 1e-3  # of the paper's code: how far beyond the outermost levels tanh reaches


class FSQ(TableFreeQuantizer):
    """Finite scalar quantization (Mentzer et al. 2023).

    Number i goes through tanh onto [0, L_i - 1] and is rounded: a digit. The code is the digits in mixed radix, the first one
    varying fastest; all of it in exact integers. There are no losses. Time and memory are those of reading and writing the
    latents, whatever K.

    Args:
        dim: width of the latents; another than the number of levels adds a linear projection in and one out.
        options: the fields of `FSQConfig`: scalar_levels, symmetric.

    Example:
        >>> quantizer = FSQ(4, scalar_levels=[8, 5, 5, 5])
        >>> codes = torch.arange(1000).view(1, 1, 1000)
        >>> bool((quantizer.codes(quantizer.digits(codes)) == codes).all())
        True
    """

    config: FSQConfig

    def __init__(self, dim: int, **options: Any):
        config = make_config(FSQConfig, **options)
        super().__init__(dim, len(config.scalar_levels), config)

    def digits(self, codes: Tensor) -> Tensor:
        """Digits `(*, number of levels)` int64, each in [0, L_i), of codes `(*)`."""
        levels = torch.tensor(self.config.scalar_levels, dtype=torch.int64, device=codes.device)
        return codes[..., None] // torch.tensor(self._basis, dtype=torch.int64, device=codes.device) % levels

    def codes(self, digits: Tensor) -> Tensor:
        """Codes `(*)` int64 of digits `(*, number of levels)` int64; the inverse of `digits`."""
        return (digits * torch.tensor(self._basis, dtype=torch.int64, device=digits.device)).sum(-1)

    @property
    def _basis(self) -> list[int]:
        basis = [1]
        for level in self.config.scalar_levels[:-1]:
            basis.append(basis[-1] * level)
        return basis

    def _top(self, like: Tensor) -> Tensor:
        # Made anew each time: a stored constant is lost where a model is built without memory.
        return torch.tensor(self.config.scalar_levels, dtype=torch.float32, device=like.device) - 1

    def _bounded(self, latents: Tensor) -> Tensor:
        """Latents on [0, L - 1], with a margin in the paper's rule."""
        top = self._top(latents)
        if self.config.symmetric:
            return (latents.tanh() + 1) * (top / 2)
        offset = (top % 2) / 2  # a half for even numbers of levels
        half = top * (1 + _MARGIN) / 2
        return (latents + (offset / half).atanh()).tanh() * half - offset + (top + 1).div(2, rounding_mode="floor")

    def _scaled(self, bounded: Tensor) -> Tensor:
        """Where they lie: in [-1, 1]."""
        top = self._top(bounded)
        if self.config.symmetric:
            return bounded * 2 / top - 1
        half = (top + 1).div(2, rounding_mode="floor")
        return (bounded - half) / half

    def _digits(self, latents: Tensor) -> Tensor:
        bounded = self._bounded(latents)
        if self.config.symmetric:  # borders lie at halves, where round() would go to the even neighbour
            return (bounded + 0.5).floor()
        return bounded.round().clamp_min(0).minimum(self._top(latents))

    def _codes_of(self, digits: Tensor) -> Tensor:
        return exact_dot(digits, self._basis, self.config.size)

    def _values(self, digits: Tensor) -> Tensor:
        return self._scaled(digits)

    def _digits_of_codes(self, codes: Tensor) -> Tensor:
        return self.digits(codes).float()

    def _learn(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return straight_through(self._scaled(self._bounded(latents)), self._rows(codes)), {}
