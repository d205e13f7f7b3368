"""Codes as the condition of other codes: their sizes and codes as ids, exactly and by arithmetic alone.

A condition of the grid (h, w) is the sequence `size h, size w`, then its codes in the flat order (coarse to fine, each level in raster
order, all codebooks of a place together), each codebook in a range of ids of its own. No two samples make the same ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqtok.codes import CodeLayout, Codes
from vqtok.fingerprint import check_fingerprint
from vqtok.vocabulary import CodeVocabulary

from .configuration_code_prior import CodePriorConfig
from .sequence import flatten, order_table, unflatten


def condition_length(layout: CodeLayout, size: Sequence[int]) -> int:
    """How many ids `code_ids` makes of a sample of this size.

    Example:
        >>> from vqtok.codes import LevelLayout
        >>> condition_length(CodeLayout(2, (LevelLayout(8, 1, 16),)), (16, 24))
        8
    """
    vocabulary = CodeVocabulary(layout)
    streams = [sum(stream.level == level for stream in vocabulary.streams) for level in range(len(layout.levels))]
    grids = layout.grids(size)
    return layout.ndim + sum(count * math.prod(grid) for count, grid in zip(streams, grids, strict=True))


def code_ids(levels: Sequence[Tensor], vocabulary: CodeVocabulary) -> list[int]:
    """The ids of one sample, from all of its levels, each int64 `(Q, *grid)`.

    Args:
        vocabulary: of the condition, see `CodePriorConfig.condition_vocabulary`.

    Raises:
        ValueError: codes out of range.
    """
    grid = levels[0].shape[1:]
    ids = vocabulary.to_ids([level[None].cpu() for level in levels])
    table = order_table(tuple(tuple(level.shape[1:]) for level in ids))
    return [*(vocabulary.size_offset + extent - 1 for extent in grid), *flatten(ids, table)[0].tolist()]


def codes_of_ids(ids: Sequence[int], vocabulary: CodeVocabulary) -> tuple[Tensor, ...]:
    """The exact inverse of `code_ids`."""
    layout = vocabulary.layout
    size = [(token - vocabulary.size_offset + 1) * layout.stride for token in ids[: layout.ndim]]
    counts = [sum(stream.level == level for stream in vocabulary.streams) for level in range(len(layout.levels))]
    table = order_table(tuple((q, *grid) for q, grid in zip(counts, layout.grids(size), strict=True)))
    levels = unflatten(torch.tensor([list(ids[layout.ndim :])]), table)
    return tuple(level[0] for level in vocabulary.from_ids(levels))


def code_rows(condition: Any, config: CodePriorConfig) -> list[list[int] | None]:
    """One list of ids per sample of a condition: `Codes`, or a list of `Codes` of one sample, of ids, or None.

    Raises:
        ValueError: codes of another layout or code space, of some levels or codebooks only, or too many of them.
    """
    rows: list[list[int] | None] = []
    for entry in [condition] if isinstance(condition, Codes) else list(condition):
        if not isinstance(entry, Codes):
            rows.append(entry)
            continue
        if not isinstance(condition, Codes) and len(entry) != 1:
            raise ValueError(
                f"a list of conditions has one sample per entry, got Codes of {len(entry)}: give them alone"
            )
        rows += _rows(entry, config)
    return rows


def _rows(codes: Codes, config: CodePriorConfig) -> list[list[int]]:
    vocabulary = config.condition_vocabulary
    layout = vocabulary.layout
    if codes.layout != layout:
        raise ValueError(
            f"the codes of the condition have the layout {codes.layout}, this prior takes {layout}: use the tokenizer of its conditions"
        )
    if config.condition_fingerprint is not None and codes.fingerprint is not None:
        check_fingerprint(config.condition_fingerprint, codes.fingerprint, "the codes of the condition")
    if [level.shape[1] for level in codes.levels] != [level.num_codebooks for level in layout.levels]:
        raise ValueError("the codes of a condition need all levels with all codebooks: encode them whole")
    for index, size in enumerate(codes.sizes.tolist()):
        if (length := condition_length(layout, size)) > config.max_text_length:
            raise ValueError(
                f"condition {index} of size {tuple(size)} makes {length} ids, this prior takes at most {config.max_text_length}: "
                "use a smaller one"
            )
    return [code_ids([level[0] for level in sample.levels], vocabulary) for sample in codes]
