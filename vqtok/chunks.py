"""Long sequences in constant memory, by overlapping chunks.

Each chunk is computed with as much of the sequence around it as its latents can see, so they are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor


def encode_chunks(
    model: Any, num_units: int, read: Callable[[int, int], Tensor], chunk_units: int | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the codes of a long sequence part by part: tuples over levels, int64 `(B, Q, t)`, to be joined along time.

    Their latents are those of the whole, to rounding. No more is in memory than a chunk and what it sees around it.

    Args:
        model: a `VQPreTrainedModel` in eval mode, whose encoder says its `context`.
        num_units: samples, bytes or tokens of the whole, with its padding a multiple of the layout's stride.
        read: `read(start, end)` gives these units, as `model.encode` takes them.
        chunk_units: about how many are encoded at once, beside the context; None takes those of the model.
    """
    stride = model.layout.stride
    for start, end, low, high in _chunks(model, num_units // stride, model.encoder.context, chunk_units):
        codes = model.encode(read(low * stride, high * stride)).codes
        yield tuple(_cut(value, start - low, end - low, high - low) for value in codes)


def decode_chunks(
    model: Any,
    codes: Sequence[Tensor],
    chunk_units: int | None = None,
    decode: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield the media of codes part by part, to be joined along the last axis; those of the whole, to rounding.

    Args:
        model: a `VQPreTrainedModel` in eval mode, whose decoder says its `context`.
        codes: as `model.decode` takes them; on any device.
        chunk_units: about how many units are decoded at once, beside the context; None takes those of the model.
        decode: makes of codes a tensor whose last axis is time; None takes the reconstruction of `model.decode`.
    """
    stride, steps = model.layout.stride, codes[0].shape[2]
    for start, end, low, high in _chunks(model, steps, model.decoder.context, chunk_units):
        part = [_cut(value, low, high, steps).to(model.device) for value in codes]
        media = model.decode(part).reconstruction if decode is None else decode(part)
        yield media[..., (start - low) * stride : (end - low) * stride]


def _chunks(
    model: Any, steps: int, context: tuple[int, int], chunk_units: int | None
) -> Iterator[tuple[int, int, int, int]]:
    """Where each chunk starts and ends, and from where to where it has to be computed, in steps of the coarsest level."""
    stride = model.layout.stride
    size = max(1, round((chunk_units or model.chunk_units) / stride))
    before, after = (-(-units // stride) for units in context)
    for start in range(0, steps, size):
        end = min(start + size, steps)
        yield start, end, max(0, start - before), min(steps, end + after)


def _cut(codes: Tensor, start: int, end: int, steps: int) -> Tensor:
    """Codes from a step of the coarsest level to another, of `steps` such steps."""
    ratio = codes.shape[2] // steps
    return codes[:, :, start * ratio : end * ratio]
