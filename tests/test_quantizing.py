"""The proof that codes differ only at near-ties is worth what `tests.quantizing` refuses."""

import pytest
import torch

from tests.quantizing import check_differences, in_turn, is_near_tie, rows, searched
from vqtok.quantizers import build_quantizer

LAYER = {"type": "vector", "codebook_size": 12}
KINDS = [
    {"type": "vector", "codebook_size": 20},
    {"type": "vector", "codebook_size": 20, "metric": "cosine", "codebook_dim": 3},
    {"type": "vector", "codebook_size": 20, "metric": "inner_product", "update": "gradient"},
    {"type": "sim", "codebook_size": 20},
    {"type": "gumbel", "codebook_size": 20},
    {"type": "fsq", "scalar_levels": [5, 4, 3]},
    {"type": "lfq", "bits": 5},
    {"type": "bsq", "bits": 4},
    {"type": "residual", "num_codebooks": 3, "layer": LAYER},
    {"type": "product", "num_codebooks": 2, "layer": LAYER},
]


def name(values) -> str:
    return f"{values['type']}-{values.get('metric', '')}"


@pytest.mark.parametrize("values", KINDS, ids=name)
def test_codes_of_equal_latents_may_not_differ_at_all(values):
    quantizer, z = build_quantizer(values, 4).eval(), torch.randn(3, 5, 4)
    codes = quantizer.encode(z).codes
    for (leaf, p), own in zip(searched(quantizer, z), codes.unbind(1), strict=True):
        for at in ((0, 0), (1, 3), (2, 4)):
            others = [code for code in range(leaf.config.size) if code != own[at]]
            assert not any(is_near_tie(leaf, p[at], p[at], int(own[at]), code) for code in others)
    other = codes.clone()
    other[1, -1, 2] = (other[1, -1, 2] + 1) % leaf.config.size
    with pytest.raises(AssertionError):
        check_differences(quantizer, searched(quantizer, z), searched(quantizer, z), codes, other)


@pytest.mark.parametrize("values", KINDS, ids=name)
def test_a_code_that_is_not_on_the_way_is_refused(values):
    """Latents do move, and their codes change, but not to the code that is claimed."""
    quantizer, z = build_quantizer(values, 4).eval(), torch.randn(40, 5, 4)
    moved = z + 0.05 * torch.randn_like(z)
    first, second = (quantizer.encode(each).codes for each in (z, moved))
    seen = searched(quantizer, z), searched(quantizer, moved)
    assert check_differences(quantizer, *seen, first, second) > 0
    refused = 0
    for index, ((leaf, p), (_, q)) in enumerate(zip(*seen, strict=True)):
        a, b = first[:, index], second[:, index]
        for place in (a != b).nonzero().tolist():
            at = tuple(place)
            claimed = (int(b[at]) + leaf.config.size // 2) % leaf.config.size
            refused += claimed != a[at] and not is_near_tie(leaf, p[at], q[at], int(a[at]), claimed)
    assert refused > 0.5 * int((first != second).sum())


@pytest.mark.parametrize("values", KINDS[:8], ids=name)
def test_rows_are_those_of_every_code(values):
    quantizer = build_quantizer(values, 4).eval()
    exact, table = rows(quantizer)
    every = torch.arange(quantizer.config.size)
    torch.testing.assert_close(quantizer.embed_codes(every[None, None])[0], table.float(), rtol=1e-5, atol=1e-6)
    assert len(in_turn(quantizer, torch.zeros(1, 4))) == 1
    assert not exact or quantizer.embed_codes(every[None, None])[0].equal(table)
