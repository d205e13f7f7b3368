"""Generation inside the grid: which ids may follow, for `generate` of transformers and for any loop that has logits.

Nothing is remembered between two calls: where a row stands is read off its ids. So rows may be reordered by beams, padded on the left,
and begin anywhere, in the middle of a grid too.

Axis letters: B batch, T ids so far, V ids of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vqtok.vocabulary import CodeVocabulary

from .vocabulary import MultimodalVocabulary, plan

TEXT, INTERLEAVED = "text", "interleaved"


class GridLogitsProcessor(LogitsProcessor):
    """Sets the logits of everything to -inf that cannot follow.

    Inside a medium, from its begin to its end, that is all but the size tokens, the codes of the right level and codebook, the ends of
    rows, and the end, each where it belongs. Between media it depends on the mode:

    - "text": text alone, the tokenizer's own special tokens among it;
    - "interleaved": text, or the beginning of a medium;
    - the name of a modality: its beginning; behind an end `eos_token_id`, or without one the next beginning.

    A medium without size tokens, or one that goes on without its end, counts as none, so that beams that are given up disturb nobody;
    `batch_decode` names it. Ids behind the last one of the vocabulary are never drawn.

    Guidance comes from transformers: `generate(guidance_scale=2.0, negative_prompt_ids=...)` combines the logits before this processor sees
    them (`MultimodalProcessor.unconditional` makes the ids), and temperature, top-k and top-p come after it.

    Args:
        vocabulary: of the model.
        mode: "text", "interleaved" or the name of a modality.
        sizes: what is announced: pixels `(height, width)` or samples `(length,)`, by the name of the modality, or for the modality that
            is the mode; None lets the model choose.
        eos_token_id: what ends a row in the mode of one modality.

    Raises:
        ValueError: an unknown mode or name, a size that no size token can announce, an end that is no text token.

    Example:
        >>> from vqtok.codes import CodeLayout, LevelLayout
        >>> image = Modality("image", CodeLayout(2, (LevelLayout(8, 1, 4),)), max_grid=3)
        >>> grid = GridLogitsProcessor(MultimodalVocabulary(10, (image,)), "image", sizes=(8, 16), eos_token_id=0)
        >>> ids = [[5, 10, 13, 14, 16]]  # a word, begin, one row of two places, the first code
        >>> grid(torch.tensor(ids), torch.zeros(1, 64)).isfinite().nonzero()[:, 1].tolist()
        [16, 17, 18, 19]
    """

    def __init__(
        self,
        vocabulary: MultimodalVocabulary,
        mode: str = INTERLEAVED,
        sizes: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
        eos_token_id: int | None = None,
    ):
        if mode not in (TEXT, INTERLEAVED, *vocabulary.blocks):
            raise ValueError(f"mode must be text, interleaved, {' or '.join(vocabulary.blocks)}, got {mode!r}")
        if eos_token_id is not None and not 0 <= eos_token_id < vocabulary.text_size:
            raise ValueError(f"eos_token_id must be a text token below {vocabulary.text_size}, got {eos_token_id}")
        if sizes is not None and not isinstance(sizes, Mapping):
            if mode not in vocabulary.blocks:
                raise ValueError(f"in the mode {mode!r} sizes are given by the name of the modality, got {sizes!r}")
            sizes = {mode: sizes}
        self.vocabulary, self.mode, self.eos_token_id = vocabulary, mode, eos_token_id
        self._headers = {name: vocabulary.header(name, size)[1:] for name, size in (sizes or {}).items()}
        blocks = vocabulary.blocks.values()
        self._most_axes = max(block.layout.ndim for block in blocks)
        self._begins, self._ends = (
            torch.tensor([block.special_id(special) for block in blocks]) for special in ("begin", "end")
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `(B, V)` with -inf where an id cannot follow `input_ids` `(B, T)`.

        Raises:
            ValueError: the model has fewer rows than the vocabulary ids.
        """
        if scores.shape[-1] < self.vocabulary.size:
            raise ValueError(
                f"the model has {scores.shape[-1]} rows, the vocabulary {self.vocabulary.size} ids: use the model that was extended with it"
            )
        return scores.masked_fill(~self.allowed(input_ids, scores.shape[-1]), -torch.inf)

    def allowed(self, input_ids: Tensor, rows: int | None = None) -> Tensor:
        """Which of `rows` ids may follow each row of `input_ids` `(B, T)`: bool `(B, rows)`."""
        rows = rows or self.vocabulary.padded_size
        allowed = self._between(input_ids, rows)
        begin, end = (_last(input_ids, ids.to(input_ids.device)) for ids in (self._begins, self._ends))
        inside = (begin > end).nonzero()[:, 0].tolist()
        if not inside:
            return allowed
        told = (input_ids.shape[1] - 1 - begin).tolist()
        columns = begin[:, None] + torch.arange(1 + self._most_axes, device=input_ids.device)
        heads = input_ids.gather(
            1, columns.clamp(0, input_ids.shape[1] - 1)
        ).tolist()  # begin and size tokens: all that counts
        found = {row: span for row in inside if (span := self._next(heads[row], told[row])) is not None}
        if not found:
            return allowed
        first, count = torch.tensor(list(found.values()), device=allowed.device).view(-1, 2).T
        every = torch.arange(rows, device=allowed.device)
        allowed[list(found)] = (every >= first[:, None]) & (every < (first + count)[:, None])
        return allowed

    def _between(self, input_ids: Tensor, rows: int) -> Tensor:
        """What may follow outside of media, bool `(B, rows)`."""
        allowed = torch.zeros(len(input_ids), rows, dtype=torch.bool, device=input_ids.device)
        if self.mode in (TEXT, INTERLEAVED):
            allowed[:, : self.vocabulary.text_size] = True
            if self.mode == INTERLEAVED:
                allowed[:, self._begins.to(input_ids.device)] = True
            return allowed
        begin, end = (self.vocabulary.special_id(self.mode, special) for special in ("begin", "end"))
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.eos_token_id is not None and input_ids.shape[1]:
            ended = (input_ids[:, -1] == end) | (input_ids[:, -1] == self.eos_token_id)
            allowed[ended, self.eos_token_id] = True
        allowed[~ended, begin] = True
        return allowed

    def _next(self, head: list[int], told: int) -> tuple[int, int] | None:
        """First id and count of what may follow `told` ids behind the last begin, the first of `head`; None if these are no medium."""
        name = str(self.vocabulary.locate(head[0])[0])
        block = self.vocabulary.block(name)
        axes = block.layout.ndim
        grid = announced(block, head[1 : 1 + min(told, axes)])
        if grid is None:
            return None
        if told < axes:
            given = self._headers.get(name)
            return (block.size_offset, block.max_grid) if given is None else (given[told], 1)
        places = plan(block, grid)
        if told - axes >= len(places):
            return None
        first, count = places[told - axes].tolist()
        return first, count


def announced(block: CodeVocabulary, ids: Sequence[int]) -> tuple[int, ...] | None:
    """The extents that size tokens announce; None if one of them is no size token."""
    extents = tuple(token - block.size_offset + 1 for token in ids)
    return extents if all(1 <= extent <= block.max_grid for extent in extents) else None


def _last(input_ids: Tensor, wanted: Tensor) -> Tensor:
    """The last column of each row that holds one of the wanted ids, -1 where none does: `(B,)`."""
    columns = torch.arange(-1, input_ids.shape[1], device=input_ids.device)
    found = torch.nn.functional.pad(torch.isin(input_ids, wanted), (1, 0))
    return torch.where(found, columns, -1).amax(1)
