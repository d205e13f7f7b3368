"""What codes hang on, for every kind of quantizer: which latents each codebook saw, its rows, and when two codes are equally good.

Everything is computed from the stored numbers in float64, beside the code that is tested.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests import reference
from vqtok.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    GumbelQuantizer,
    HierarchicalQuantizer,
    Hierarchy,
    ProductQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)


def level_quantizers(hierarchy: Hierarchy) -> list[Quantizer]:
    """The quantizer of each level; those on one grid may share it."""
    if isinstance(hierarchy, HierarchicalQuantizer):
        return list(hierarchy.levels)
    return list(hierarchy.layers) if len(hierarchy.layers) > 1 else [hierarchy.layers[0]] * hierarchy.num_levels


def in_turn(quantizer: Quantizer, z: Tensor) -> list[tuple[Quantizer, Tensor]]:
    """Each codebook of a level as a quantizer of its own, with the latents that it sees of `z`."""
    if isinstance(quantizer, ProductQuantizer):
        return list(zip(quantizer.layers, z.chunk(len(quantizer.layers), -1), strict=True))
    if not isinstance(quantizer, ResidualQuantizer):
        return [(quantizer, z)]
    layers = list(quantizer.layers) * (quantizer.config.depth // len(quantizer.layers))
    turns = []
    for layer in layers:
        turns.append((layer, z))
        z = z - layer.encode(z).quantized
    return turns


@torch.no_grad()
def rows(leaf: Quantizer) -> tuple[bool, Tensor]:
    """Every row `(K, dim)` that a quantizer with one codebook can return, and whether these very numbers are stored."""
    table = _inner_rows(leaf)
    if isinstance(leaf.project_out, nn.Identity):
        stored = isinstance(leaf, GumbelQuantizer | LFQ) and not isinstance(leaf, BSQ)
        return stored or (isinstance(leaf, VectorQuantizer) and leaf.config.metric != "cosine"), table
    return False, table.double() @ leaf.project_out.weight.double().T + leaf.project_out.bias.double()


def _inner_rows(leaf: Quantizer) -> Tensor:
    if isinstance(leaf, VectorQuantizer):
        table = leaf.codebook.embedding.detach()
        return table.double() / table.double().norm(dim=1, keepdim=True) if leaf.config.metric == "cosine" else table
    if isinstance(leaf, SimVQ):
        return leaf.frozen_codes.double() @ leaf.code_map.double().T + leaf.code_bias.double()
    if isinstance(leaf, GumbelQuantizer):
        return leaf.embedding.detach()
    if isinstance(leaf, LFQ):
        corner = leaf.config.bits**-0.5 if isinstance(leaf, BSQ) else 1.0
        texts = (f"{code:0{leaf.config.bits}b}" for code in range(leaf.config.size))
        return torch.tensor([[corner if bit == "1" else -corner for bit in text] for text in texts])
    assert isinstance(leaf, FSQ) and leaf.config.symmetric, f"no reference for {type(leaf).__name__}"
    return torch.tensor(
        [
            [2 * digit / (levels - 1) - 1 for digit, levels in zip(digits, leaf.config.scalar_levels, strict=True)]
            for digits in (_fsq_digits(code, leaf.config.scalar_levels) for code in range(leaf.config.size))
        ],
        dtype=torch.float64,
    )


def _fsq_digits(code: int, scalar_levels: list[int]) -> list[int]:
    digits = []
    for levels in scalar_levels:
        code, digit = divmod(code, levels)
        digits.append(digit)
    return digits


@torch.no_grad()
def is_near_tie(leaf: Quantizer, first: Tensor, second: Tensor, first_code: int, second_code: int) -> bool:
    """Whether the way from one to the other of two prepared latents `(inner_dim,)` is long enough to change the code so.

    The codes of tables: at `first` neither is better by more than that way explains. Codes made of digits or bits: each of
    these that differs has a border between its two numbers.
    """
    p, q = first.double(), second.double()
    moved = float((p - q).norm())
    if isinstance(leaf, LFQ):
        pairs = zip(*(f"{code:0{leaf.config.bits}b}" for code in (first_code, second_code)), strict=True)
        borders = [(a != b, abs(x) <= abs(x - y)) for (a, b), x, y in zip(pairs, p.tolist(), q.tolist(), strict=True)]
        return all(between for differs, between in borders if differs)
    if isinstance(leaf, FSQ):
        levels = leaf.config.scalar_levels
        digits = zip(*(_fsq_digits(code, levels) for code in (first_code, second_code)), strict=True)
        return all(
            _is_across(border + 0.5, x, y, number)
            for (a, b), x, y, number in zip(digits, p, q, levels, strict=True)
            for border in range(min(a, b), max(a, b))
        )
    if isinstance(leaf, GumbelQuantizer) or (
        isinstance(leaf, VectorQuantizer) and leaf.config.metric == "inner_product"
    ):
        gumbel = isinstance(leaf, GumbelQuantizer)
        weights = (leaf.logit_map if gumbel else leaf.codebook.embedding).double()
        difference = weights[first_code] - weights[second_code]
        margin = difference @ p + (
            leaf.logit_bias.double()[first_code] - leaf.logit_bias.double()[second_code] if gumbel else 0
        )
        return abs(float(margin)) <= moved * float(difference.norm())
    table = _inner_rows(leaf)
    # Rows that are computed are rounded before they are compared.
    stored = isinstance(leaf, VectorQuantizer) and leaf.config.metric == "euclidean"
    rounding = 0.0 if stored else 4e-7 * float(table.norm(dim=1).max())
    return reference.is_near_tie(p, table[first_code], table[second_code], moved + rounding)


def _is_across(border: float, x: Tensor, y: Tensor, levels: int) -> bool:
    x, y = ((float(value.tanh()) + 1) * (levels - 1) / 2 for value in (x, y))
    return abs(x - border) <= abs(x - y) + 1e-6 * levels  # fp32 where it is rounded


def searched(quantizer: Quantizer, z: Tensor) -> list[tuple[Quantizer, Tensor]]:
    """Each codebook of a level with the prepared latents `(B, *grid, inner_dim)` that it compares with its rows."""
    return [(leaf, leaf.prepare(own).detach()) for leaf, own in in_turn(quantizer, z)]


def check_differences(
    quantizer: Quantizer,
    first: list[tuple[Quantizer, Tensor]],
    second: list[tuple[Quantizer, Tensor]],
    first_codes: Tensor,
    second_codes: Tensor,
) -> int:
    """Show that every code that differs is a near-tie; return how many were looked at.

    Args:
        quantizer: of one level.
        first, second: what `searched` says of the two.
        first_codes, second_codes: `(B, Q, *grid)`.
    """
    looked_at = 0
    known = torch.ones_like(first_codes[:, 0], dtype=torch.bool)
    for index, ((leaf, p), (_, q)) in enumerate(zip(first, second, strict=True)):
        a, b = first_codes[:, index], second_codes[:, index]
        for place in ((a != b) & known).nonzero().tolist():
            at = tuple(place)
            assert is_near_tie(leaf, p[at], q[at], int(a[at]), int(b[at])), (index, at)
            looked_at += 1
        if isinstance(quantizer, ResidualQuantizer):
            known &= a == b  # the next codebooks saw something else
    return looked_at
