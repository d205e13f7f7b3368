"""Compiled and exported quantizers give the codes of eager ones, with any batch."""

import pytest
import torch
from torch import Tensor, nn

from tests.quantizers.cases import build, codes_of, embed, latents, levels, same

# One of every way of searching and of every way of putting codebooks together.
NAMES = [
    "vector",
    "vector, a width of its own",
    "vector, cosine",
    "vector, inner product",
    "sim",
    "gumbel",
    "fsq",
    "fsq, the paper's rule",
    "lfq, several groups",
    "bsq, a width of its own",
    "product",
    "residual, shared",
    "residual, DAC",
    "multi-scale",
    "multi-scale, a sequence",
    "multi-rate",
]


class Codes(nn.Module):
    """Codes and rows of latents, as `encode` gives them or as the pass in eval does."""

    def __init__(self, quantizer: nn.Module, encode: bool):
        super().__init__()
        self.quantizer, self.encode = quantizer, encode

    def forward(self, z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        out = levels(self.quantizer.encode(z) if self.encode else self.quantizer(z))
        return codes_of(out), [level.quantized for level in out]


def mostly_slow(*quick: str) -> list:
    """All names; those that are not `quick` only in the slow run, because a compilation takes a second."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def check(compiled, quantizer: nn.Module, name: str, batches: tuple[int, ...]) -> None:
    for seed, batch in enumerate(batches):
        z = latents(name, seed=seed, batch=batch)
        with torch.no_grad():
            codes, quantized = compiled(z)
            expected = levels(quantizer(z))
        assert same(codes, codes_of(expected))
        for one, other in zip(quantized, expected, strict=True):
            torch.testing.assert_close(one, other.quantized, rtol=1e-6, atol=1e-6)


SECOND = ("fsq, the paper's rule", "vector, cosine", "residual, shared", "multi-scale, a sequence")  # of a kind


@pytest.mark.parametrize("encode", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "encode"])
@pytest.mark.parametrize("name", mostly_slow(*(name for name in NAMES if name not in SECOND)))
def test_compiled_in_one_graph(name, encode):
    torch._dynamo.reset()
    quantizer = build(name).eval()
    compiled = torch.compile(Codes(quantizer, encode).eval(), fullgraph=True, backend="aot_eager")
    check(compiled, quantizer, name, (3,))


@pytest.mark.parametrize("name", mostly_slow("vector"))
def test_compiled_once_for_any_batch(name):
    torch._dynamo.reset()
    quantizer, graphs = build(name).eval(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Codes(quantizer, False).eval(), fullgraph=True, backend=backend, dynamic=True)
    check(compiled, quantizer, name, (5, 7, 9))  # sizes that no other axis has: equal ones would be taken for one
    assert len(graphs) == 1


@pytest.mark.parametrize("name", mostly_slow(*(name for name in NAMES if name not in SECOND)))
def test_exported_with_a_dynamic_batch(name):
    quantizer = build(name).eval()
    dynamic = {"z": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(Codes(quantizer, encode=True).eval(), (latents(name),), dynamic_shapes=dynamic)
    check(program.module(), quantizer, name, (3, 7))


@pytest.mark.parametrize("name", ["vector, a width of its own", "fsq", "residual, DAC", "multi-scale", "multi-rate"])
def test_exported_decoding_of_codes(name):
    class Rows(nn.Module):
        def __init__(self, quantizer):
            super().__init__()
            self.quantizer = quantizer

        def forward(self, codes):
            return embed(self.quantizer, codes)

    quantizer = build(name).eval()
    codes = codes_of(quantizer(latents(name)))
    program = torch.export.export(Rows(quantizer).eval(), (codes,))
    other = codes_of(quantizer(latents(name, seed=5)))
    for one, wanted in zip(program.module()(other), embed(quantizer, other), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-6)


def test_the_search_is_an_operator_that_holds_what_it_says():
    """Schema, fake tensors and autograd registration, by torch's own checks."""
    z, table = torch.randn(6, 4), torch.randn(5, 4)
    for metric in ("euclidean", "inner_product"):
        torch.library.opcheck(torch.ops.vqtok.nearest_code, (z, table, metric))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_by_inductor(name):
    torch._dynamo.reset()
    quantizer = build(name).eval()
    check(torch.compile(Codes(quantizer, False).eval(), fullgraph=True), quantizer, name, (3,))
