"""Matrix products of few rows with weights that do not change for a while: laid out once as the library that multiplies likes it.

Axis letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

_LARGE = 1 << 17  # weights; below this, the call of the other library takes longer than what it saves
_MANY = 32  # rows; from here on the other layout is worth it for smaller matrices too
_WORTH = 512  # rows; the same where a pass reads many of each sample: few passes follow, and laying out takes as long as 200 rows


class Product(Protocol):
    """x W^T + bias + more, `(N, O)` in the dtype of x, for x `(N, I)`; without gradients."""

    def __call__(self, x_NI: Tensor, more_NO: Tensor | None = None) -> Tensor: ...


def product(
    weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, rows: int, rows_per_sample: int = 1
) -> Product:
    """A product by these weights.

    On a CPU, 16 bits pay for large matrices or many rows alone, and for float16 never: the others are multiplied in float32. How
    many samples there are must not decide it, or a sample would depend on its batch.

    Args:
        weight_OI: the weights, of any dtype.
        dtype: of the weights in the product.
        rows: N of most calls; any other works too. It chooses the layout.
        rows_per_sample: of these, the rows of one sample.
    """
    if weight_OI.device.type != "cpu" or dtype == torch.float64:
        return Plain(weight_OI, bias_O, dtype)
    large = weight_OI.numel() >= _LARGE
    if dtype != torch.bfloat16 or not (large or rows_per_sample >= _MANY) or not _packs(dtype):
        dtype = torch.float32
    few_passes = rows_per_sample >= _MANY and dtype == torch.float32
    if (large or rows >= (_WORTH if few_passes else _MANY)) and _packs(dtype):
        return Packed(weight_OI, bias_O, dtype, rows)
    return Plain(weight_OI, bias_O, dtype)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether `Packed` works here, found by trying: its two calls are those of torch.compile, not public, and not in every build."""
    one = torch.eye(2, dtype=dtype)
    try:
        return torch.equal(Packed(one, None, dtype, 1)(one), one)
    except (AttributeError, RuntimeError):
        return False


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
    """By oneDNN, with the weights in a layout of its own choice, made once."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, rows: int):
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.to(dtype), rows)
        self.bias_O = None if bias_O is None else bias_O.to(dtype)

    def __call__(self, x_NI: Tensor, more_NO: Tensor | None = None) -> Tensor:
        y_NO = torch.ops.mkldnn._linear_pointwise(x_NI.to(self.dtype), self.weight, self.bias_O, "none", [], "")
        y_NO = y_NO.to(x_NI.dtype)
        return y_NO if more_NO is None else y_NO.add_(more_NO)
