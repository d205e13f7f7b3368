"""What each code means to its codec, as vectors that the rows of another model may begin with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vqtok.vocabulary import CodeVocabulary

ROWS_AT_ONCE = 1024


@torch.no_grad()
def code_vectors(vocabulary: CodeVocabulary, model: Any) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """What each code of a stream adds to the latents, up to a constant: `(size, D)` for each (level, codebook or factor).

    Args:
        vocabulary: of the model's layout.
        model: a VQ model, whose `embed_codes` is asked.
    """
    layout = vocabulary.layout
    grids = layout.grids([layout.stride] * layout.ndim)
    for stream in vocabulary.streams:
        rows = []
        for start in range(0, stream.size, ROWS_AT_ONCE):
            chosen = torch.arange(start, min(start + ROWS_AT_ONCE, stream.size))
            streams = [sum(each.level == level for each in vocabulary.streams) for level in range(stream.level + 1)]
            codes = [
                torch.zeros(len(chosen), count, *grid, dtype=torch.int64)
                for count, grid in zip(streams, grids, strict=False)
            ]
            codes[-1][:, stream.codebook] = chosen.view(-1, *[1] * layout.ndim)
            merged = [level.to(model.device) for level in vocabulary.merge(codes)]
            rows.append(model.embed_codes(merged)[-1].flatten(1, -2)[:, 0].float().cpu())
        yield (stream.level, stream.codebook), torch.cat(rows)


def projected(points: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Vectors `(size, D)` around their mean, through a random matrix, with a spread of 1: `(size, width)`. What is near stays near."""
    projection = torch.randn(points.shape[1], width, generator=generator)
    rows = (points - points.mean(0)) @ projection
    return rows / rows.std().clamp(min=1e-8) if len(points) > 1 else rows
