"""Which codes are masked: when a model is trained, and in each pass of decoding. Pure functions.

A level is filled while finer levels are absent and coarser ones are known. Within a level the codes of a coarser residual codebook
are known before those of a finer one (as SoundStorm, Borsos et al. 2023, does it), and codes of one codebook in any order.

Axis letters: B batch, Q codebooks, N positions of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def split_passes(num_passes: int | Sequence[int], num_levels: int) -> tuple[int, ...]:
    """Return the passes of each level: equally many, and what is left over for the finest.

    Args:
        num_passes: of all levels together, or one number per level, which is what is returned.

    Example:
        >>> split_passes(12, 2), split_passes(8, 3), split_passes([8, 2], 2)
        ((6, 6), (2, 2, 4), (8, 2))

    Raises:
        ValueError: fewer passes than levels, or another number of levels.
    """
    if isinstance(num_passes, Sequence):
        if len(num_passes) != num_levels:
            raise ValueError(
                f"num_passes {list(num_passes)} names {len(num_passes)} levels, this prior predicts {num_levels}"
            )
        return tuple(num_passes)
    if num_passes < num_levels:
        raise ValueError(f"num_passes {num_passes} is too few for {num_levels} levels: each takes at least one")
    each, left = divmod(num_passes, num_levels)
    return (each,) * (num_levels - 1) + (each + left,)


def masked_after(count: int, done: int, passes: int) -> int:
    """Return how many of `count` codes are still masked when `done` of the passes are done: floor(count cos(pi / 2 done / passes)).

    The cosine schedule of MaskGIT (Chang et al. 2022, section 3.3): few codes first, most of them late.

    Example:
        >>> [masked_after(100, done, 4) for done in range(5)]
        [100, 92, 70, 38, 0]
    """
    return 0 if done == passes else math.floor(count * math.cos(math.pi / 2 * done / passes))


def masked_per_codebook(free_BQ: Tensor, passes: int) -> Tensor:
    """Return how many codes of each codebook are masked before each pass and after the last, int64 `(passes + 1, B, Q)`.

    Args:
        free_BQ: int64, codes that are to be drawn. All codebooks follow one schedule, the coarser first.
    """
    before_BQ = free_BQ.cumsum(1) - free_BQ
    rows = []
    for done in range(passes + 1):
        known = [sum(free) - masked_after(sum(free), done, passes) for free in free_BQ.tolist()]
        shown_BQ = (torch.tensor(known)[:, None] - before_BQ).clamp(min=0)
        rows.append(free_BQ - torch.minimum(shown_BQ, free_BQ))
    return torch.stack(rows)


def reveal_order(codebook_N: Tensor, numbers_BN: Tensor) -> Tensor:
    """Return the positions of a level in a random order, the coarser codebooks first, `(B, N)`.

    Args:
        numbers_BN: in [0, 1), one for each code.
    """
    return (codebook_N + numbers_BN).argsort(stable=True, dim=1)


def random_masks(codebook_N: Tensor, ratio_B: Tensor, numbers_BN: Tensor) -> Tensor:
    """Return which codes of a level a training sample has masked, bool `(B, N)`: at least one.

    Args:
        ratio_B: in [0, 1): of which the cosine of pi / 2 times it is the part that is masked.
        numbers_BN: in [0, 1), one for each code.
    """
    order_BN = reveal_order(codebook_N, numbers_BN)
    count_B = (len(codebook_N) * torch.cos(ratio_B * math.pi / 2)).ceil().clamp(min=1)
    last_BN = torch.arange(len(codebook_N), device=order_BN.device) >= (len(codebook_N) - count_B)[:, None]
    return torch.zeros_like(last_BN).scatter(1, order_BN, last_BN)
