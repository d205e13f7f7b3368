"""Items of many sizes, put together into batches of one size each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# One batch by default: enough to keep a CPU busy, small enough for the activations of wide models.
_MOST_ITEMS, _MOST_UNITS = 64, 1 << 20
# Items wait for others of their size; this many numbers at most.
_MOST_WAITING = 1 << 26


def default_batch_size(size: Sequence[int]) -> int:
    """How many items of `size` pixels or samples make a batch if nobody says otherwise."""
    return max(1, min(_MOST_ITEMS, _MOST_UNITS // math.prod(size)))


def group_by_shape(
    prepared: Iterable[tuple[Tensor, tuple[int, ...]]], batch_size: int | None, ndim: int
) -> Iterator[tuple[list[int], Tensor, list[tuple[int, ...]]]]:
    """Yield batches of equal shape, as soon as they are full; the rest at the end. Nothing is padded.

    Args:
        prepared: tensors `(C, *size)` with what was their size before padding.
        batch_size: None means `default_batch_size`.
        ndim: how many axes the size has.

    Yields:
        The places of the items in `prepared`, a batch `(B, C, *size)`, and their sizes.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor, tuple[int, ...]]]] = {}
    held = 0

    def take(shape: tuple[int, ...]) -> tuple[list[int], Tensor, list[tuple[int, ...]]]:
        places, tensors, sizes = zip(*waiting.pop(shape), strict=True)
        return list(places), torch.stack(tensors), list(sizes)

    for place, (tensor, size) in enumerate(prepared):
        shape = tuple(tensor.shape)
        waiting.setdefault(shape, []).append((place, tensor, size))
        held += tensor.numel()
        if len(waiting[shape]) >= (batch_size or default_batch_size(shape[-ndim:])):
            held -= tensor.numel() * len(waiting[shape])
            yield take(shape)
        elif held > _MOST_WAITING:
            held = 0
            yield from (take(other) for other in list(waiting))
    yield from (take(shape) for shape in list(waiting))
