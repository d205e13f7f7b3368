"""A new card and the cards that were there before: what a person wrote is kept.

The rule. Between the marks `BEGIN` and `END` everything is ours and new. Text before and after them is a person's: the folder's
own card supplies it, and where it has none, the card on the Hub. A card without marks is a person's as a whole and goes behind
ours, unless it is one that transformers generates. In the header our fields win (tags are joined), and every other field stays,
the folder's before the Hub's; a `license` is ours only if one was asked for.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from .card import BEGIN, END, front

_HEADER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.S)
# Sentences of the cards that transformers writes by itself.
_GENERATED = ("model card has been automatically generated", "model card has been generated automatically")


class Card(NamedTuple):
    """A README.md in its parts; `ours` is None where nothing is marked as ours."""

    fields: dict[str, Any]
    before: str
    ours: str | None
    after: str


def read_card(text: str, where: str) -> Card:
    """The parts of a README.md.

    Raises:
        ValueError: its header is no YAML, or no mapping; `where` is named.
    """
    match = _HEADER.match(text)
    body = text[match.end() :] if match else text
    try:
        fields = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the header of {where} is no YAML ({reason}): mend it first") from None
    if not isinstance(fields or {}, dict):
        raise ValueError(f"the header of {where} must hold fields such as `license: mit`: mend it first")
    before, begin, rest = body.partition(BEGIN)
    ours, end, after = rest.partition(END)
    if not begin or not end:
        generated = any(sentence in body for sentence in _GENERATED)
        return Card(fields or {}, "", None, "" if generated else body.strip())
    return Card(fields or {}, before.strip(), ours, after.strip())


def _without_ours(fields: dict[str, Any], ours: str) -> dict[str, Any]:
    """The header of an older card of ours without the tags and the data set that it had from us: they may be true no more."""
    dataset = re.search(r"^\| dataset \| (.*) \|$", ours, re.M)
    left = dict(fields)
    for name, is_ours in (
        ("tags", lambda tag: tag in ("vqtok", "vq-vae") or str(tag).endswith("-tokenization")),
        ("datasets", lambda name: dataset is not None and name == dataset[1]),
    ):
        values = left.pop(name, None) or []
        if kept := [each for each in ([values] if isinstance(values, str) else values) if not is_ours(each)]:
            left[name] = kept
    return left


def merge_cards(new: str, local: str | None, remote: str | None) -> str:
    """The new card with what a person wrote in the folder's card and in the Hub's, after the rule of this module.

    Args:
        new: what `vqtok.hub.card.render` returned.
        local: README.md of the folder, if any.
        remote: README.md of the repository, if any.

    Raises:
        ValueError: the header of one cannot be read.
    """
    mine = read_card(new, "the new card")
    theirs = [
        read_card(text, where)
        for text, where in ((local, "the folder's README.md"), (remote, "README.md on the Hub"))
        if text
    ]
    fields = dict(mine.fields)
    for card in theirs:
        # Fields that we generate and that are absent now (figures that were not measured again) must not live on.
        generated = {"model-index", "base_model", "pipeline_tag", "library_name"} if card.ours is not None else set()
        kept = card.fields if card.ours is None else _without_ours(card.fields, card.ours)
        fields = {**fields, **{k: v for k, v in kept.items() if k not in fields and k not in generated}}
        tags = kept.get("tags") or []
        known = fields.get("tags", [])
        fields["tags"] = [*known, *(tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in known)]
    if not any(card.ours is not None for card in theirs):
        fields["tags"] = [tag for tag in fields["tags"] if tag != "transformers"]
    before = next((card.before for card in theirs if card.before), "")
    after = next((card.after for card in theirs if card.after), "")
    parts = [before, f"{BEGIN}{mine.ours}{END}", after]
    return front(fields) + "\n" + "\n\n".join(part for part in parts if part) + "\n"
