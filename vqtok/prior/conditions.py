"""How the samples of a code cache become the conditions of a prior: captions, class labels, other codes, or nothing.

Captions that a text encoder reads are in `features.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from vqtok.codes import Codes
from vqtok.vocabulary import CodeVocabulary

from .condition_codes import code_ids, condition_length
from .data import CONDITION, CodeDataset
from .text import encode_prompts, seen_token_ids, train_text_tokenizer

COLUMNS = {"text": "text", "features": "text", "class": "label", "codes": CONDITION, "none": None}


def check_values(kind: str, values: Sequence[Any]) -> None:
    """Refuse captions or labels of which some are missing; of a data set that is long to encode, do it before.

    Raises:
        ValueError: how many are missing, and how to name the column.
    """
    missing = sum(value is None for value in values)
    if missing or not values:
        flag = {"class": "--label_column"}.get(kind, "--caption_column")
        raise ValueError(
            f"this prior needs a {COLUMNS[kind]} for every sample, {missing or 'all'} of {len(values)} samples lack it: name the "
            f"column with {flag}, or use a recipe with another condition"
        )


class Conditions:
    """What a prior of one kind needs to know of its training samples.

    Args:
        kind: "text", "class", "codes" or "none".
        values: the captions or labels of the training samples; of "codes" the `CodeDataset` of all of them; nothing for "none".
        text_tokenizer: any of transformers; None learns a byte-pair one from the captions.
        vocab_size: most entries of one that is learned.
        max_length: most tokens of a caption; most ids of codes.

    Attributes:
        column: the column of a sample that holds its condition, None for "none".
        text_size: ids of the condition: tokens, or classes.
        max_text_length: what the prior should take, twice the longest training caption at most.
        seen: token ids of the training captions; None where unseen ones are fine, with a tokenizer that was trained elsewhere.
        layout, fingerprint: of codes that are the condition, else None.
        encoder: None, see `FeatureConditions`.
        text_source: where on the Hub the text tokenizer comes from, if whoever gave it says so; see `VQPipeline.text_tokenizer_source`.

    Raises:
        ValueError: an unknown kind, a missing caption or label, or a caption that is too long.
    """

    encoder = None
    text_source: dict[str, str] | None = None

    def __init__(
        self,
        kind: str,
        values: Sequence[Any],
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        vocab_size: int = 1024,
        max_length: int = 128,
    ):
        if kind not in COLUMNS or kind == "features":
            others = ", ".join(name for name in COLUMNS if name != "features")
            raise ValueError(f"condition must be one of {others}, got {kind!r} (FeatureConditions is for 'features')")
        self.kind, self.column = kind, COLUMNS[kind]
        self.text_tokenizer, self.seen, self.text_size, self.max_text_length = None, None, 0, 1
        self.layout, self.fingerprint = None, None
        self._known: dict[str, list[int]] = {}
        if kind in ("text", "class"):
            check_values(kind, values)
        if kind == "class":
            self.text_size = max(values) + 1
        elif kind == "codes":
            self._of_codes(values, max_length)
        elif kind == "text":
            captions = sorted(set(values))
            self.text_tokenizer = text_tokenizer or train_text_tokenizer(captions, vocab_size)
            rows = encode_prompts(self.text_tokenizer, captions, max_length)
            self._known = dict(zip(captions, rows, strict=True))
            self.text_size = len(self.text_tokenizer)
            self.max_text_length = min(max_length, 2 * max(map(len, rows)))
            self.seen = None if text_tokenizer else seen_token_ids(rows)

    def _of_codes(self, given: CodeDataset, max_length: int) -> None:
        self.layout, self.fingerprint = given.layout, given.fingerprint
        sizes = {tuple(size) for size in given.sizes.tolist()}
        largest = max(sizes, key=lambda size: condition_length(given.layout, size))
        self.max_text_length = condition_length(given.layout, largest)
        if self.max_text_length > max_length:
            raise ValueError(
                f"the largest condition, of size {largest}, makes {self.max_text_length} ids, more than --max_text_length {max_length}"
            )
        self._vocabulary = CodeVocabulary(given.layout, 0, self.max_text_length, 1)

    @property
    def fields(self) -> dict[str, Any]:
        """What stands about the condition in the prior's config."""
        known = {"condition": self.kind, "text_size": self.text_size, "max_text_length": self.max_text_length}
        if self.layout is None:
            return known
        return {**known, "condition_layout": self.layout.to_dict(), "condition_fingerprint": self.fingerprint}

    def ids(self, sample: Mapping[str, Any]) -> list[int] | None:
        """The condition ids of a sample: text tokens, [label], sizes and codes, or None.

        Raises:
            ValueError: no caption or label, an unknown label, or a caption that is too long or has a word that was never seen.
        """
        if self.column is None:
            return None
        value = sample.get(self.column)
        if value is None:
            raise ValueError(f"a sample has no {self.column}, which this prior is conditioned on")
        if self.kind == "codes":
            length = condition_length(self.layout, value["size"])
            if length > self.max_text_length:
                raise ValueError(f"a condition of {length} ids is longer than those trained on, {self.max_text_length}")
            return code_ids(value["codes"], self._vocabulary)
        if self.kind == "class":
            if not 0 <= value < self.text_size:
                raise ValueError(f"label {value} is outside [0, {self.text_size}): no training sample had it")
            return [value]
        known = self._known.get(value)
        return known or encode_prompts(self.text_tokenizer, [value], self.max_text_length, self.seen)[0]

    def knows(self, sample: Mapping[str, Any]) -> bool:
        """Whether `ids` has an answer; held-out samples with words that training never saw cannot be scored."""
        try:
            self.ids(sample)
        except ValueError:
            return False
        return True

    def prompt(self, sample: Mapping[str, Any]) -> Any:
        """What a pipeline is told to draw something like this sample: its caption, its label, or the codes of its condition."""
        value = sample[self.column]
        if self.kind != "codes":
            return value
        return Codes(tuple(level[None] for level in value["codes"]), [value["size"]], self.layout, self.fingerprint)
