"""What quantizers without a table share: codes by arithmetic on each number, at the speed of reading and writing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import SingleQuantizer
from .functional import full_precision

_BLOCK_NUMBERS = {"cpu": 1 << 16}  # latents of a block of a table-free quantizer; elsewhere all at once


class TableFreeQuantizer(SingleQuantizer):
    """Codes by arithmetic on each number. A subclass supplies `_digits`, `_codes_of`, `_values` and `_digits_of_codes`.

    The digits of a code are whole numbers in fp32. Latents are walked over in blocks that stay in the cache, so that what is
    read and written once is all that counts.
    """

    def _digits(self, latents: Tensor) -> Tensor:
        """Digits `(*, inner_dim)` of latents."""
        raise NotImplementedError

    def _codes_of(self, digits: Tensor) -> Tensor:
        """Codes `(*)` of digits."""
        raise NotImplementedError

    def _values(self, digits: Tensor) -> Tensor:
        """Rows `(*, inner_dim)` of digits."""
        raise NotImplementedError

    def _digits_of_codes(self, codes: Tensor) -> Tensor:
        """Digits `(*, inner_dim)` of codes `(*)`."""
        raise NotImplementedError

    def _search(self, latents: Tensor) -> Tensor:
        return self._find(latents)[0]

    def _rows(self, codes: Tensor) -> Tensor:
        return self._values(self._digits_of_codes(codes))

    def _find(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        check_finite(latents)
        if torch.compiler.is_compiling():  # the compiler makes one loop of it all
            digits = self._digits(latents)
            return self._codes_of(digits), self._values(digits)
        with torch.no_grad():
            flat = latents.reshape(-1, latents.shape[-1])
            codes = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
            rows = torch.empty_like(flat)
            at_once = max(1, _BLOCK_NUMBERS.get(flat.device.type, len(flat) * flat.shape[1]) // flat.shape[1])
            for start in range(0, len(flat), at_once):
                part = slice(start, start + at_once)
                digits = self._digits(flat[part])
                codes[part], rows[part] = self._codes_of(digits), self._values(digits)
        return codes.view(latents.shape[:-1]), rows.view(latents.shape)


def exact_dot(digits: Tensor, weights: Sequence[int], largest: int) -> Tensor:
    """Sum of whole fp32 digits times whole weights, int64: in fp32 as long as every sum is exact there, else in int64."""
    if largest < 1 << 24:
        with full_precision(digits.device.type):
            return (digits @ torch.tensor(weights, dtype=torch.float32, device=digits.device)).long()
    return (digits.long() * torch.tensor(weights, dtype=torch.int64, device=digits.device)).sum(-1)


def check_finite(z: Tensor) -> None:
    """Refuse NaN and infinite latents, where no search does."""
    if z.numel() and not torch.compiler.is_compiling():
        low, high = z.detach().aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(
                "latents hold NaN or infinite values: look for a diverged training (lower the learning rate) or bad input"
            )
