"""Ids of a language model, cut into text and media; what is unfinished or out of place is refused or, if asked, left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .generation import announced
from .vocabulary import MultimodalVocabulary, plan


class Span(NamedTuple):
    """A run of text, or one medium.

    Attributes:
        name: of the modality; None for text.
        grid: of a medium, the coarsest; None where it was not announced whole.
        ids: of the text; of a medium those behind the size tokens, as far as each stands where it may.
        missing: how many ids of a medium are missing.
    """

    name: str | None
    grid: tuple[int, ...] | None
    ids: list[int]
    missing: int


def spans(vocabulary: MultimodalVocabulary, ids: Sequence[int], strict: bool) -> Iterator[Span]:
    """Text and media of one row of ids, in their order.

    Args:
        strict: refuse a medium that is not whole, and ids of media outside of one; otherwise a medium ends where it stops making sense,
            and what is out of place is left out.

    Raises:
        ValueError: see `strict`; or an id below 0.
    """
    begins = {block.special_id("begin"): name for name, block in vocabulary.blocks.items()}
    text: list[int] = []
    at = 0
    while at < len(ids):
        token = ids[at]
        if token in begins:
            if text:
                yield Span(None, None, text, 0)
                text = []
            medium, length = _medium(vocabulary, begins[token], ids[at + 1 :])
            if strict and medium.missing:
                raise ValueError(_explain(vocabulary, medium, ids, at, at + length))
            yield medium
            at += length
        elif token < 0:
            raise ValueError(f"column {at} holds {token}, which is no id: give ids, not labels")
        else:
            if token < vocabulary.text_size:
                text.append(token)
            elif strict:
                raise ValueError(
                    f"column {at} holds {vocabulary.locate(token)} where no medium has begun: generate with a GridLogitsProcessor, or "
                    "decode with unfinished='coarse' to leave it out"
                )
            at += 1
    if text:
        yield Span(None, None, text, 0)


def _medium(vocabulary: MultimodalVocabulary, name: str, behind: Sequence[int]) -> tuple[Span, int]:
    """The medium that begins before `behind`, and how many ids it has with its begin."""
    block = vocabulary.block(name)
    axes = block.layout.ndim
    sizes = behind[:axes]
    announced_axes = next((i for i, token in enumerate(sizes) if announced(block, [token]) is None), len(sizes))
    if announced_axes < axes:
        return Span(name, None, [], 1), 1 + announced_axes
    grid = announced(block, sizes)
    places = plan(block, grid)
    body = torch.tensor(behind[axes : axes + len(places)], dtype=torch.int64)
    first, count = places[: len(body)].T
    wrong = ((body < first) | (body >= first + count)).nonzero()
    good = int(wrong[0]) if len(wrong) else len(body)
    return Span(name, grid, body[:good].tolist(), len(places) - good), 1 + axes + good


def _explain(vocabulary: MultimodalVocabulary, medium: Span, ids: Sequence[int], begin: int, stop: int) -> str:
    what = f"the {medium.name} that begins in column {begin}"
    if stop < len(ids):
        return (
            f"{what} holds {vocabulary.locate(ids[stop])} in column {stop}, where it cannot stand: generate with a GridLogitsProcessor, "
            "or decode with unfinished='coarse'"
        )
    lack = f"{medium.missing} ids of its {medium.grid} grid" if medium.grid else "its size"
    return (
        f"{what} is not finished: {lack} are missing at the end. Raise max_new_tokens (vocabulary.num_tokens says how many a medium "
        "takes), or decode with unfinished='coarse' to get what its finished levels show"
    )
