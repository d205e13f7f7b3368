"""Soft assignments: against the whole matrix in float64, values and gradients; the penalty that is made from them."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import reference
from vqtok.quantizers import VectorQuantizer, assignment_entropy, entropy_penalty, index_backpropagation, soft

N, K, D = 23, 7, 5


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, D) * scale, torch.randn(K, D), torch.randn(K)


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.fixture(params=[1, 2, 7, 22, 23, 1000])
def rows_at_once(request, monkeypatch):
    """Blocks of one row, of several, with a rest, exactly all, and more than all."""
    monkeypatch.setattr(soft, "_BLOCK_BYTES", 4 * K * request.param + 3)
    assert len(list(soft._blocks(N, K))) == -(-N // request.param)
    return request.param


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3)])
def test_entropy_and_use_are_those_of_the_whole_matrix(rows_at_once, weights):
    given = [tensor.requires_grad_() for tensor in inputs()]
    direction = torch.randn(K)
    entropy, use = assignment_entropy(*given)
    (weights[0] * entropy + weights[1] * (use * direction).sum()).backward()

    exact = doubled(*given)
    exact_entropy, exact_use = reference.assignment_entropy(*exact)
    (weights[0] * exact_entropy + weights[1] * (exact_use * direction.double()).sum()).backward()
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(use.double(), exact_use, rtol=1e-5, atol=1e-7)
    for one, other in zip(given, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)
        assert other.grad.abs().sum() > 0


def test_the_derivative_is_that_of_the_function(monkeypatch):
    monkeypatch.setattr(soft, "_BLOCK_BYTES", 4 * K * 2)
    torch.autograd.gradcheck(soft._AssignmentEntropy.apply, doubled(*inputs()))


def test_index_backpropagation_is_that_of_the_whole_matrix(rows_at_once):
    z, table, _ = inputs()
    z, table, codes, above = z.requires_grad_(), table.requires_grad_(), torch.randint(K, (N,)), torch.randn(N, D)
    rows = index_backpropagation(z, table, codes)
    assert rows.equal(table[codes]), "the rows themselves, not their sum with p - p"
    (rows * above).sum().backward()
    exact = doubled(z, table)
    (reference.index_backpropagation(*exact, codes) * above.double()).sum().backward()
    for one, other in zip((z, table), exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)
    assert (table.grad.abs().sum(1) > 0).all(), "every code gets a gradient, chosen or not"


def test_every_code_learns_from_one_latent():
    """Of an ordinary table only the chosen row does."""
    quantizer = VectorQuantizer(D, codebook_size=K, metric="inner_product", update="gradient").train()
    quantizer(torch.randn(1, D)).quantized.sum().backward()
    assert (quantizer.codebook.embedding.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e2, 1e6])
def test_any_sharpness(scale):
    z, table, bias = (tensor.requires_grad_() for tensor in inputs(scale))
    entropy, use = assignment_entropy(z, table, bias)
    (entropy + (use * torch.arange(K)).sum() + index_backpropagation(z, table, torch.zeros(N).long()).sum()).backward()
    assert -1e-5 <= entropy.item() <= math.log(K) + 1e-5 and use.sum().item() == pytest.approx(1, abs=1e-5)
    assert all(tensor.grad.isfinite().all() for tensor in (z, table, bias))


def test_no_rows_and_one_code():
    z, table, bias = (tensor.requires_grad_() for tensor in inputs())
    entropy, use = assignment_entropy(z[:0], table, bias)
    (entropy + use.sum() + index_backpropagation(z[:0], table, torch.zeros(0).long()).sum()).backward()
    assert entropy == 0 and use.equal(torch.zeros(K)) and table.grad.equal(torch.zeros(K, D))
    entropy, use = assignment_entropy(z, table[:1], bias[:1])
    assert entropy == 0 and use.equal(torch.ones(1))


def test_autocast_does_not_reach_it():
    z, table, bias = inputs()
    expected = [*assignment_entropy(z, table, bias), index_backpropagation(z, table, torch.zeros(N).long())]
    with torch.autocast("cpu", torch.bfloat16):
        found = [*assignment_entropy(z, table, bias), index_backpropagation(z, table, torch.zeros(N).long())]
    assert all(one.equal(other) and one.dtype == torch.float32 for one, other in zip(found, expected, strict=True))


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("function", ["entropy", "index"])
def test_no_matrix_of_all_rows_times_all_codes(function, monkeypatch):
    """Open-MAGVIT2 and IBQ hold N x K: 8192 positions of 2^18 codes are 8.6 GB (image.md, 5b)."""
    monkeypatch.setattr(soft, "_BLOCK_BYTES", 4 * 500 * 8)
    z, table = torch.randn(300, 4).requires_grad_(), torch.randn(500, 4).requires_grad_()
    with Largest() as largest:
        if function == "entropy":
            entropy, use = assignment_entropy(z, table, torch.zeros(500))
            (entropy + use.square().sum()).backward()
        else:
            index_backpropagation(z, table, torch.zeros(300).long()).sum().backward()
    assert z.grad.abs().sum() > 0
    assert 500 * 4 <= largest.numel <= 500 * 8, f"{largest.numel} numbers at once, N x K is {300 * 500}"


# -- the penalty


def test_the_penalty_is_the_textbook_one_in_value_and_gradient():
    given = [tensor.requires_grad_() for tensor in inputs()]
    loss = entropy_penalty([tuple(given)])
    loss.backward()
    exact = doubled(*given)
    wanted = reference.entropy_penalty(exact[0] @ exact[1].T + exact[2])
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5) and loss.ndim == 0
    for one, other in zip(given, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-7)
    # The first term alone would be far from it.
    only_first = doubled(*given)
    reference.assignment_entropy(*only_first)[0].backward()
    assert (only_first[1].grad - exact[1].grad).norm() > 0.1 * exact[1].grad.norm()


def test_the_penalty_of_several_tables_is_the_sum_of_theirs():
    """Of different sizes, which are joined for the collective and must not mix."""
    first, second = inputs(), (torch.randn(N, 2), torch.randn(3, 2), torch.randn(3))
    tables = [[tensor.requires_grad_() for tensor in each] for each in (first, second)]
    loss = entropy_penalty(tables)
    loss.backward()
    total = 0.0
    for given in tables:
        exact = doubled(*given)
        wanted = reference.entropy_penalty(exact[0] @ exact[1].T + exact[2])
        wanted.backward()
        total += wanted.item()
        for one, other in zip(given, exact, strict=True):
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-7)
    assert loss.item() == pytest.approx(total, abs=1e-5)


def test_bounds_of_the_penalty():
    """0 where nothing is known and where all latents agree; -log K where latents are sure and spread evenly."""
    bias = torch.zeros(K)
    assert entropy_penalty([(torch.randn(N, D), torch.zeros(K, D), bias)]).item() == pytest.approx(0, abs=1e-5)
    one_row = torch.randn(1, D).expand(N, D)
    assert entropy_penalty([(one_row, torch.randn(K, D), bias)]).item() == pytest.approx(0, abs=1e-5)
    sure = torch.eye(K).repeat(4, 1) * 100
    assert entropy_penalty([(sure, torch.eye(K), bias)]).item() == pytest.approx(-math.log(K), abs=1e-4)


def test_a_code_that_is_never_used_has_a_finite_loss():
    z, table, bias = torch.randn(9, 2), torch.zeros(3, 2), torch.tensor([0.0, 0.0, -1e4]).requires_grad_()
    loss = entropy_penalty([(z, table, bias)])
    loss.backward()
    assert loss.isfinite() and bias.grad.isfinite().all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner_product"])
@pytest.mark.parametrize("temperature", [0.3, 4])
def test_the_entropy_loss_of_a_quantizer(metric, temperature):
    """softmax(-|z - e|^2 / T), or softmax(z . e / T), by the definition of the distance."""
    quantizer = VectorQuantizer(
        D, codebook_size=K, metric=metric, update="gradient", entropy_weight=1.0, entropy_temperature=temperature
    ).train()
    z = torch.randn(4, 6, D).requires_grad_()
    loss = quantizer(z).losses["entropy_loss"]
    loss.backward()
    exact_z, exact_table = doubled(z, quantizer.codebook.embedding)
    flat, rows = exact_z.flatten(0, 1), exact_table
    if metric == "cosine":
        flat, rows = flat / flat.norm(dim=1, keepdim=True), rows / rows.norm(dim=1, keepdim=True)
    closeness = flat @ rows.T if metric == "inner_product" else -(flat[:, None] - rows).square().sum(2)
    p = (closeness / temperature).softmax(1)
    wanted = -(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=2e-5)
    torch.testing.assert_close(z.grad.double(), exact_z.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(quantizer.codebook.embedding.grad.double(), exact_table.grad, rtol=1e-3, atol=1e-6)


def test_the_penalty_spreads_a_collapsed_use():
    """The sign of both terms, by what they do: from nearly all on one code to nearly uniform, and surer than before."""
    z, bias = torch.randn(64, 2), torch.tensor([3.0, 0.0, 0.0, 0.0]).requires_grad_()
    table = (torch.randn(4, 2) * 0.1).requires_grad_()
    optimizer = torch.optim.Adam([table, bias], 0.05)
    first, use = assignment_entropy(z, table, bias)
    for _ in range(150):
        optimizer.zero_grad()
        entropy_penalty([(z, table, bias)]).backward()
        optimizer.step()
    last, spread = assignment_entropy(z, table, bias)
    assert use.max() > 0.8 and spread.max() < 0.4 and last < 0.5 * first
