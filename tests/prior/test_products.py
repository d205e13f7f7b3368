"""Products with packed weights are products."""

import pytest
import torch

from vqtok.prior import products
from vqtok.prior.products import Packed, Plain, product

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
LARGE, SMALL = (384, 512), (24, 16)


@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_numbers_are_the_obvious_ones(shape, rows, bias, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=F64) / shape[1] ** 0.5
    bias = torch.randn(shape[0], dtype=F64) if bias else None
    made = product(weight, bias, dtype, rows)
    tolerance = {F32: 1e-5, F64: 1e-12}[dtype]
    for count in (rows, 7):  # packed for `rows`, but any number may come
        x, more = torch.randn(count, shape[1], dtype=F64), torch.randn(count, shape[0], dtype=F64)
        before = x.to(dtype), more.to(dtype)
        given = before[0].clone(), before[1].clone()
        expected = x @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(made(given[0]).double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(made(*given).double(), expected + more, rtol=tolerance, atol=tolerance)
        assert torch.equal(given[0], before[0]) and torch.equal(given[1], before[1])
        assert made(given[0]).dtype == dtype


@pytest.mark.parametrize(("rows", "of_one"), [(1, 1), (16, 1), (64, 1), (64, 64)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_16_bits_only_where_they_pay_whatever_the_batch(shape, dtype, rows, of_one):
    """In bf16 large matrices, or many rows of one sample, are rounded to 8 bits on both sides; everything else is multiplied in 32."""
    torch.manual_seed(0)
    weight, x = torch.randn(shape) / shape[1] ** 0.5, torch.randn(rows, shape[1])
    y = product(weight, None, dtype, rows, of_one)(x)
    assert y.dtype == F32
    if dtype == BF16 and (shape == LARGE or of_one == 64) and products._packs(BF16):
        expected = (x.bfloat16().double() @ weight.bfloat16().double().T).bfloat16().float()
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-3)
        assert not torch.allclose(y, x @ weight.T, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_who_multiplies(monkeypatch):
    """The other layout for large matrices and many rows, where torch has it; else the plain product."""

    def kind(shape, rows, dtype=F32, of_one=1):
        return type(product(torch.ones(shape), None, dtype, rows, of_one))

    products._packs.cache_clear()
    if products._packs(F32):
        assert [kind(LARGE, 1), kind(SMALL, 64), kind(SMALL, 1), kind(LARGE, 1, F64)] == [Packed, Packed, Plain, Plain]
        # Many rows of one sample mean few passes, which do not pay for laying out a small matrix.
        assert [kind(SMALL, 256, of_one=256), kind(SMALL, 4096, of_one=256), kind(LARGE, 256, of_one=256)] == [
            Plain,
            Packed,
            Packed,
        ]
    monkeypatch.setattr(products, "_packs", lambda dtype: False)
    assert [kind(LARGE, 1), kind(SMALL, 64), kind(LARGE, 1, BF16)] == [Plain, Plain, Plain]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_build_without_the_calls_is_noticed(monkeypatch, dtype):
    products._packs.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not products._packs(dtype)
    monkeypatch.undo()
    products._packs.cache_clear()
