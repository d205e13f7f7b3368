"""Matrix products of few rows with weights that do not change for a while: laid out once as the library that multiplies likes it.

Axis letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_LARGE = 1 << 17  # weights; a smaller matrix is multiplied sooner than the library of the other layout is called
_MANY = 16  # rows; from here on the other layout is worth it for small matrices too


class Product(Protocol):
    """x W^T + bias + more, `(N, O)` in the dtype of x, for x `(N, I)`."""

    def __call__(self, x_NI: Tensor, more_NO: Tensor | None = None) -> Tensor: ...


def product(weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, rows: int) -> Product:
    """A product by these weights, of which a copy is made.

    Args:
        weight_OI: the weights, in any dtype.
        dtype: what they are multiplied in. Small matrices on a CPU are multiplied in float32 even if this has 16 bits.
        rows: N of most calls; any other works too.
    """
    large = weight_OI.numel() >= _LARGE
    if weight_OI.device.type != "cpu" or dtype == torch.float64:
        return Plain(weight_OI, bias_O, dtype)
    if _has_packed and (large or rows >= _MANY):
        return Packed(weight_OI, bias_O, dtype, rows)
    return Plain(weight_OI, bias_O, torch.float32)


class Plain:
    """By torch's own product."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype):
        self.weight_IO = weight_OI.to(dtype).t()
        self.bias_O = None if bias_O is None else bias_O.to(dtype)

    def __call__(self, x_NI: Tensor, more_NO: Tensor | None = None) -> Tensor:
        weight_IO, bias_O = self.weight_IO, self.bias_O
        if weight_IO.dtype != x_NI.dtype:
            y_NO = torch.mm(x_NI.to(weight_IO.dtype), weight_IO).to(x_NI.dtype)
        elif more_NO is not None:
            y_NO, more_NO = torch.addmm(more_NO, x_NI, weight_IO), None
        else:
            y_NO = torch.mm(x_NI, weight_IO)
        y_NO = y_NO if bias_O is None else y_NO + bias_O
        return y_NO if more_NO is None else y_NO + more_NO


class Packed:
    """By oneDNN, in whose layout of the weights few rows go two to three times as fast; the same numbers, to rounding."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, rows: int):
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.to(dtype), rows)
        self.bias_O = None if bias_O is None else bias_O.to(dtype)

    def __call__(self, x_NI: Tensor, more_NO: Tensor | None = None) -> Tensor:
        y_NO = torch.ops.mkldnn._linear_pointwise(x_NI.to(self.dtype), self.weight, self.bias_O, "none", [], "")
        y_NO = y_NO.to(x_NI.dtype)
        return y_NO if more_NO is None else y_NO.add_(more_NO)


_has_packed = True
