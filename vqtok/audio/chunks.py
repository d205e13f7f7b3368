"""Long sound in constant memory, by overlapping chunks.

Each chunk is computed with as much sound around it as its latents can see, so they are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from vqtok.modeling import VQPreTrainedModel

CHUNK_SECONDS = 20


def encode_chunks(
    model: VQPreTrainedModel, num_samples: int, read: Callable[[int, int], Tensor], chunk_seconds: float = CHUNK_SECONDS
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the codes of long sound part by part: tuples over levels, int64 `(B, Q, t)`, to be joined along time.

    Their latents are those of the whole sound, to rounding. No more is in memory than a chunk and what it sees around it.

    Args:
        model: in eval mode.
        num_samples: of the whole sound, with its padding a multiple of the layout's stride.
        read: `read(start, end)` gives these samples, float `(B, C, end - start)`.
        chunk_seconds: about how much is encoded at once, beside the context.
    """
    stride = model.layout.stride
    for start, end, low, high in _chunks(model, num_samples // stride, model.encoder.context, chunk_seconds):
        codes = model.encode(read(low * stride, high * stride)).codes
        yield tuple(_cut(value, start - low, end - low, high - low) for value in codes)


def decode_chunks(
    model: VQPreTrainedModel, codes: Sequence[Tensor], chunk_seconds: float = CHUNK_SECONDS
) -> Iterator[Tensor]:
    """Yield the sound of codes part by part: float `(B, C, T)`, to be joined along time; that of the whole, to rounding.

    Args:
        model: in eval mode.
        codes: as `model.decode` takes them; on any device.
        chunk_seconds: about how much is decoded at once, beside the context.
    """
    stride, steps = model.layout.stride, codes[0].shape[2]
    for start, end, low, high in _chunks(model, steps, model.decoder.context, chunk_seconds):
        part = [_cut(value, low, high, steps).to(model.device) for value in codes]
        sound = model.decode(part).reconstruction
        yield sound[..., (start - low) * stride : (end - low) * stride]


def _chunks(
    model: VQPreTrainedModel, steps: int, context: tuple[int, int], chunk_seconds: float
) -> Iterator[tuple[int, int, int, int]]:
    """Where each chunk starts and ends, and from where to where it has to be computed, in steps of the coarsest level."""
    stride = model.layout.stride
    size = max(1, round(chunk_seconds * model.config.sampling_rate / stride))
    before, after = (-(-samples // stride) for samples in context)
    for start in range(0, steps, size):
        end = min(start + size, steps)
        yield start, end, max(0, start - before), min(steps, end + after)


def _cut(codes: Tensor, start: int, end: int, steps: int) -> Tensor:
    """Codes from a step of the coarsest level to another, of `steps` such steps."""
    ratio = codes.shape[2] // steps
    return codes[:, :, start * ratio : end * ratio]
