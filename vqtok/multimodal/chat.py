"""Chats as lists of text and media: the template of the text tokenizer is filled in, with a mark where each medium stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_MARK = "\x02vqtok-medium-{}\x03"  # control characters that no str.strip() of a template takes away


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages."""
    return (
        isinstance(value, Sequence) and bool(len(value)) and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def chat_items(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
) -> tuple[list[Any], set[int]]:
    """Text and media of a chat in the order in which the model reads them, and which of them are the assistant's answers.

    Args:
        messages: each {"role": ..., "content": ...}, the content a text or a list of {"type": "text", "text": ...} and
            {"type": name, name: medium}.
        add_generation_prompt: end with what comes before an answer.

    Raises:
        ValueError: the tokenizer has no chat template, a message makes no sense, or the template does not write answers behind what
            came before.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"this {type(tokenizer).__name__} has no chat_template, so messages cannot be written: set tokenizer.chat_template, or give "
            "a list of text and media"
        )
    media: list[Any] = []
    filled = [{"role": str(message["role"]), "content": _content(message, media)} for message in messages]
    whole = _render(tokenizer, filled, add_generation_prompt)
    items: list[Any] = []
    answers: set[int] = set()
    at = 0
    for index, message in enumerate(filled):
        if message["role"] == "assistant":
            before, after = _render(tokenizer, filled[:index], True), _render(tokenizer, filled[: index + 1], False)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
                raise ValueError(
                    f"the chat template does not write message {index}, an answer, behind what came before it, so its part cannot be told: "
                    "use a template that does, or give a list of text and media with labels of your own"
                )
            items += _cut(whole[at : len(before)], media)
            answer = _cut(whole[len(before) : len(after)], media)
            answers |= set(range(len(items), len(items) + len(answer)))
            items += answer
            at = len(after)
    return items + _cut(whole[at:], media), answers


def _content(message: Mapping[str, Any], media: list[Any]) -> str:
    """The text of a message, with marks in the place of its media, which are added to `media`."""
    parts = message.get("content")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    if not isinstance(parts, Sequence):
        raise ValueError(f"the content of a message is a text or a list of parts, got {type(parts).__name__}")
    written = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in part:
            raise ValueError(
                f"a part of a message is {{'type': 'text', 'text': ...}} or {{'type': name, name: medium}}, got {part!r}"
            )
        if kind == "text":
            if "\x02vqtok-medium-" in part["text"]:
                raise ValueError("a text holds the mark that stands for media here: remove its control characters")
            written.append(part["text"])
        else:
            written.append(_MARK.format(len(media)))
            media.append((kind, part[kind]))
    return "".join(written)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if not messages:
        return ""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))


def _cut(text: str, media: list[Any]) -> list[Any]:
    """The text between marks, and the media in their place."""
    items: list[Any] = []
    first, *rest = text.split("\x02vqtok-medium-")
    items += [first] if first else []
    for piece in rest:
        number, _, after = piece.partition("\x03")
        items.append(media[int(number)])
        items += [after] if after else []
    return items
