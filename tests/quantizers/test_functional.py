"""Nearest code, straight-through, usage: against hand-worked tables and slow float64 twins."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests import reference
from vqtok.quantizers import (
    code_counts,
    entropy_bits,
    full_precision,
    nearest_code,
    perplexity,
    straight_through,
    usage,
)
from vqtok.quantizers import search as module

# Five numbers per code, simple enough to check by eye.
TABLE = torch.tensor(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [-3.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 10.0, 0.0, 0.0],
    ]
)


def test_a_table_worked_by_hand():
    z = torch.tensor(
        [
            [0.4, 0.4, 0.4, 0.4, 0.4],  # 0.80 from code 0, 1.80 from code 1
            [0.6, 0.6, 0.6, 0.6, 0.6],  # 1.80 from code 0, 0.80 from code 1
            [-1.6, 0.0, 0.0, 0.0, 0.0],  # 2.56 from code 0, 1.96 from code 2
            [0.0, 0.0, 6.0, 0.0, 0.0],  # 36 from code 0, 29 from code 1, 16 from code 3
            [0.0, 0.0, 5.0, 0.0, 0.0],  # 25 from code 0, 20 from code 1, 25 from code 3
        ]
    )
    assert nearest_code(z, TABLE).tolist() == [0, 1, 2, 3, 1]
    assert nearest_code(z, TABLE).dtype == torch.int64
    # A formula with the sign of |e|^2 turned takes the longest code for nearly everything.
    assert nearest_code(torch.zeros(1, 5), TABLE).tolist() == [0]


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("offset", [0.0, 1e4, -3e5])
def test_brute_force_with_codes_of_unequal_norm(dim, offset):
    table = torch.randn(60, dim) * torch.logspace(-2, 2, 60)[:, None] + offset
    z = torch.cat([torch.randn(40, dim) * scale + offset for scale in (0.01, 1, 100)])
    assert nearest_code(z, table).tolist() == reference.nearest_code(z, table).tolist()


@pytest.mark.parametrize("z_scale", [1.0, 1e2, 3e4])
def test_latents_around_zero_and_a_table_far_from_it(z_scale):
    """The mean of the codes is 1e4 times their spread, so that |e|^2 alone has no digits left for the differences."""
    table, z = torch.randn(100, 8) + 1e4, torch.randn(300, 8) * z_scale
    codes = nearest_code(z, table)
    assert codes.tolist() == reference.nearest_code(z, table).tolist()
    assert z_scale < 1e4 or codes.unique().numel() > 1


def test_few_rows_need_float64(monkeypatch):
    """A large common offset costs no digits, so it must not cost time either."""
    asked, decide = [], module._Search._decide

    def noted(search, z_mD):
        asked.append(len(z_mD))
        return decide(search, z_mD)

    monkeypatch.setattr(module._Search, "_decide", noted)
    for offset in (0.0, 1e4):
        asked.clear()
        nearest_code(torch.randn(2000, 16) + offset, torch.randn(100, 16) + offset)
        assert sum(asked) < 20


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-20, 1e-10, 1e10, 1e18])
def test_any_scale(scale):
    """At 1e-20 the products are too small for fp32, at 1e18 nearly too large."""
    z, table = torch.randn(200, 4) * scale, torch.randn(50, 4) * scale
    assert nearest_code(z, table).tolist() == reference.nearest_code(z, table).tolist()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dim=st.integers(1, 6), num_codes=st.integers(1, 12), exponent=st.integers(-3, 4))
def test_coarse_lattices_full_of_ties(data, dim, num_codes, exponent):
    """Integer coordinates times a power of two: all sums are exact, so every tie is one, and the lowest index has to win."""
    numbers = st.integers(-3, 3)
    draw = lambda rows: data.draw(st.lists(st.lists(numbers, min_size=dim, max_size=dim), min_size=rows, max_size=rows))  # noqa: E731
    z, table = (torch.tensor(draw(rows), dtype=torch.float32) * 2.0**exponent for rows in (9, num_codes))
    assert nearest_code(z, table).tolist() == reference.nearest_code(z, table).tolist()


def test_planted_ties_take_the_lowest_index():
    code = torch.randn(16) + 50
    table = torch.stack([torch.randn(16), code, torch.randn(16), code, code])
    assert nearest_code(code[None], table).tolist() == [1]
    # Half way between two codes, with an offset that makes their scores in fp32 differ by chance.
    middle, step = torch.full((8,), 4096.0), torch.tensor([0.25, -0.5, 0.75, 1.0, -0.25, 0.5, 1.25, -1.0])
    pair = torch.stack([torch.full((8,), -4096.0), middle + step, middle - step])
    assert nearest_code(middle[None], pair).tolist() == [1]
    assert nearest_code(middle[None], pair[[0, 2, 1]]).tolist() == [1]


def test_a_difference_below_fp32_is_seen():
    """1 + 2^-23 against 1 - 2^-24: nearer by half a bit, and only float64 can tell."""
    table = torch.tensor([[1 + 2.0**-23], [1 - 2.0**-24]])
    assert nearest_code(torch.ones(1, 1), table).tolist() == [1]
    assert nearest_code(torch.ones(1, 1) * 1e3, table * 1e3).tolist() == [1]


def test_equal_rows_and_a_single_row():
    z = torch.randn(50, 3)
    assert nearest_code(z, torch.randn(1, 3)).tolist() == [0] * 50
    assert nearest_code(z, torch.randn(1, 3).repeat(7, 1)).tolist() == [0] * 50
    assert nearest_code(z, torch.zeros(7, 3)).tolist() == [0] * 50


def test_each_row_is_decided_alone():
    z, table = torch.randn(300, 16), torch.randn(70, 16)
    alone = [nearest_code(row[None], table).item() for row in z]
    assert nearest_code(z, table).tolist() == alone
    assert nearest_code(z.t().contiguous().t(), table).tolist() == alone, "memory layout must not matter"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_searched_in_fp32(dtype):
    table, z = torch.randn(200, 32), torch.randn(300, 32).to(dtype)
    assert nearest_code(z, table).tolist() == reference.nearest_code(z.float(), table).tolist()


def test_autocast_does_not_choose_the_codes():
    table, z = torch.randn(512, 64), torch.randn(500, 64)
    codes = nearest_code(z, table)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = (-2 * z @ table.T + table.square().sum(1)).argmin(1)
        assert nearest_code(z, table).equal(codes)
    assert not in_bf16.equal(codes), "this table does not show the difference"


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, and the precision settings during products."""

    def __init__(self):
        super().__init__()
        self.largest, self.precisions = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.vqtok.nearest_code.default:
            with self:  # also what happens inside the operator
                return module._nearest_code._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, torch.Tensor)]
        known = {each.untyped_storage().data_ptr() for each in given}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            # A view or a result written in place is no new memory.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        if "mm" in str(func):
            self.precisions.add((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return out


@pytest.mark.parametrize("equal_rows", [False, True])
def test_memory_is_flat(monkeypatch, equal_rows):
    """No N x K matrix, and no N x K x D one when every code is a candidate for every row."""
    block = 1 << 14
    monkeypatch.setattr(module, "_TILE_BYTES", {"cpu": block})
    num_rows, num_codes, dim = 2000, 64, 32
    z, table = torch.randn(num_rows, dim), torch.randn(num_codes, dim)
    if equal_rows:
        table = table[:1].repeat(num_codes, 1)
    expected = reference.nearest_code(z[:20], table).tolist()
    with Watch() as watch:
        codes = nearest_code(z, table)
    assert codes[:20].tolist() == expected
    # A tile of fp32 scores is `block` bytes; float64 or int64 beside it are twice that, candidate pairs four times.
    assert block <= watch.largest <= 4 * block, f"{watch.largest} bytes, N x K would be {num_rows * num_codes * 4}"


@pytest.mark.parametrize("setting", ["new", "legacy", "medium"])
def test_no_shortcut_of_the_caller_reaches_the_products(setting):
    """TF32 and bf16 products lose half of the digits; every way to ask for them is undone, and afterwards as it was."""
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        if setting == "new":
            matmul.fp32_precision = "tf32"
        elif setting == "legacy":
            matmul.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision("medium")
        with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
            nearest_code(torch.randn(5, 4), torch.randn(6, 4))
        assert watch.precisions == {("ieee", False)}
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(ZeroDivisionError), full_precision("cpu"):
            raise ZeroDivisionError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_codes", [1, 2, 50])
def test_what_is_not_finite_is_refused(bad, num_codes):
    z = torch.randn(10, 4)
    z[7, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        nearest_code(z, torch.randn(num_codes, 4))


@pytest.mark.parametrize(
    "shapes", [((3,), (2, 3)), ((3, 2), (4, 3)), ((1, 3, 2), (4, 2)), ((3, 2), (0, 2)), ((3, 2), (2,))]
)
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(ValueError, match=r"\(N, D\).*\(K, D\)"):
        nearest_code(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_no_rows():
    assert nearest_code(torch.zeros(0, 4), torch.randn(3, 4)).shape == (0,)


def test_straight_through_is_the_identity_for_gradients():
    z, rows = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out = straight_through(z, rows)
    assert torch.allclose(out, rows, atol=1e-6)
    out.sum().backward()
    assert z.grad.equal(torch.ones(4, 3)) and rows.grad is None


def test_usage_entropy_and_perplexity():
    codes = torch.tensor([[0, 0, 0, 0], [2, 2, 3, 3]])
    counts = code_counts(codes, 6)
    assert counts.tolist() == [4, 0, 2, 2, 0, 0]
    assert usage(counts) == 0.5
    assert entropy_bits(counts) == pytest.approx(1.5, abs=1e-12) == reference.entropy_bits(counts.tolist())
    assert perplexity(counts) == pytest.approx(2**1.5)
    assert perplexity(torch.ones(512, dtype=torch.int64)) == pytest.approx(512)
    assert entropy_bits(torch.zeros(4)) == 0.0 and perplexity(torch.tensor([0, 9])) == 1.0
