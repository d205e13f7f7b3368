"""What a sample is made of: text and media in their order, which modality a medium is of, and what of it is learned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vqtok.auto import VQTokenizer
from vqtok.codes import Codes

from .chat import is_chat

LEARNED = ("all", "last", "text", "media", "assistant")


class Piece(NamedTuple):
    """The ids of one item: `modality` 0 for text, 1 for the first modality, and so on."""

    modality: int
    ids: list[int]


def as_batch(samples: Any) -> list[Any]:
    """Samples as a list of lists of items, chats as they are."""
    if is_chat(samples) or not isinstance(samples, list):
        samples = [samples]
    return [sample if isinstance(sample, list) else [sample] for sample in samples]


def name_of(item: Any, vqs: Mapping[str, VQTokenizer]) -> tuple[str | None, Any]:
    """The modality of an item (None for text), and the medium alone.

    Raises:
        ValueError: a text that is no Unicode, no such modality, more than one that it may be of, or codes of none of them.
        TypeError: it is neither text nor a medium.
    """
    if isinstance(item, str):
        _check_text(item)
        return None, item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        if item[0] not in vqs:
            raise ValueError(f"no modality {item[0]!r}: there are {', '.join(vqs)}")
        if isinstance(item[1], Codes):
            vqs[item[0]].check_codes(item[1])
        return item
    if isinstance(item, Codes):
        return _name_of_codes(item, vqs), item
    kind = _kind(item)
    names = [name for name, vq in vqs.items() if vq.modality == kind]
    if len(names) != 1:
        which = f"several modalities ({', '.join(names)})" if names else f"no modality of {', '.join(vqs)}"
        raise ValueError(f"{kind} is of {which}: give it as a pair, (name, medium)")
    return names[0], item


def _kind(item: Any) -> str:
    if isinstance(item, Image.Image) or isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim > 1:
        return "image"
    if isinstance(item, Mapping) and "audio" in item:
        return "audio"
    if isinstance(item, np.ndarray | Tensor) and item.ndim in (1, 2):
        return "audio"
    raise TypeError(
        f"an item is a text, a picture, sound, Codes, or a pair (name, medium), got {type(item).__name__}: give paths as pairs, such as "
        "('image', 'cat.png')"
    )


def _name_of_codes(codes: Codes, vqs: Mapping[str, VQTokenizer]) -> str:
    if len(codes) != 1:
        raise ValueError(f"Codes of {len(codes)} samples stand where one medium should: give codes[0], codes[1], ...")
    for name, vq in vqs.items():
        if codes.layout == vq.layout and (
            None in (codes.fingerprint, vq.fingerprint) or codes.fingerprint == vq.fingerprint
        ):
            return name
    if len(vqs) == 1:
        next(iter(vqs.values())).check_codes(codes)  # says what does not fit
    own = ", ".join(f"{name} {vq.fingerprint}" for name, vq in vqs.items())
    raise ValueError(f"codes of the code space {codes.fingerprint} belong to none of {own}: encode the media again")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text holds the lone surrogate U+{ord(text[error.start]):04X} at {error.start}, which is no Unicode: remove it, or read "
            "the text with errors='replace'"
        ) from None


def text_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], first: int, parse_tokens: bool
) -> list[list[int]]:
    """The ids of texts, without what the tokenizer writes around them.

    Args:
        first: the first id of a medium.
        parse_tokens: whether names of ids from `first` on may become these ids; otherwise they are spelled like any text.

    """
    encoded = tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
    if parse_tokens:
        return encoded
    return [
        ids if max(ids, default=0) < first else _spelled(tokenizer, text, first)
        for text, ids in zip(texts, encoded, strict=True)
    ]


def _spelled(tokenizer: PreTrainedTokenizerBase, text: str, first: int) -> list[int]:
    """The ids of a text in which the tokenizer's own special tokens count, and the names of ids from `first` on do not."""
    own = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id < first}
    pattern = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text) if own else [text]:
        if piece in own:
            ids.append(own[piece])
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def learned_items(
    labels: str | Sequence[Iterable[int]] | None, samples: Sequence[Sequence[Piece]], answers: Sequence[set[int] | None]
) -> list[set[int]] | None:
    """The numbers of the items of each sample that are learned; None without labels.

    Raises:
        ValueError: an unknown word, items that are not there, or answers of what is no chat.
    """
    if labels is None:
        return None
    if not isinstance(labels, str):
        chosen = [{int(i) for i in row} for row in labels]
        if len(chosen) != len(samples):
            raise ValueError(f"labels are given for {len(chosen)} samples, there are {len(samples)}")
        for index, (row, sample) in enumerate(zip(chosen, samples, strict=True)):
            if wrong := sorted(i for i in row if not 0 <= i < len(sample)):
                raise ValueError(f"sample {index}: item {wrong[0]} shall be learned, it has {len(sample)} items")
        return chosen
    if labels not in LEARNED:
        raise ValueError(
            f"labels must be one of {', '.join(LEARNED)}, or numbers of items for each sample, got {labels!r}"
        )
    if labels == "assistant":
        if None in answers:
            raise ValueError(f"sample {list(answers).index(None)} is no chat, so it has no answers: say labels='last'")
        return [set(row or ()) for row in answers]
    wanted = {
        "all": lambda sample, i: True,
        "last": lambda sample, i: i == len(sample) - 1,
        "text": lambda sample, i: sample[i].modality == 0,
        "media": lambda sample, i: sample[i].modality > 0,
    }[labels]
    return [{i for i in range(len(sample)) if wanted(sample, i)} for sample in samples]
