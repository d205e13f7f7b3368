"""Captions and labels become condition ids; what cannot be answered is said before training."""

import pytest

from vqtok.prior.conditions import Conditions
from vqtok.prior.text import train_text_tokenizer

CAPTIONS = ["a red three", "a blue seven", "a red three", None]


def test_captions_become_tokens_and_the_sizes_follow_from_them():
    conditions = Conditions("text", CAPTIONS[:3])
    ids = conditions.ids({"text": "a red three"})
    assert conditions.text_tokenizer.decode(ids).strip() == "a red three"
    assert conditions.ids({"text": "a blue three"}) == [*conditions.ids({"text": "a blue seven"})[:2], ids[-1]]
    assert (conditions.column, conditions.max_text_length) == ("text", 2 * 3)
    assert set(ids) <= set(conditions.seen) and conditions.text_size == len(conditions.text_tokenizer)


def test_unseen_words_are_known_only_to_tokenizers_trained_elsewhere():
    own = Conditions("text", CAPTIONS[:3])
    assert own.knows({"text": "a blue three"}) and not own.knows({"text": "a green three"})
    with pytest.raises(ValueError, match="'green'"):
        own.ids({"text": "a green three"})
    elsewhere = Conditions("text", CAPTIONS[:3], train_text_tokenizer(["a red three", "a blue seven", "a green one"]))
    assert elsewhere.seen is None and elsewhere.knows({"text": "a green three"})


def test_labels_and_nothing():
    conditions = Conditions("class", [0, 4, 2])
    assert (conditions.text_size, conditions.ids({"label": 2})) == (5, [2])
    with pytest.raises(ValueError, match=r"label 5 is outside \[0, 5\)"):
        conditions.ids({"label": 5})
    assert Conditions("none", []).ids({"text": "ignored"}) is None


def test_missing_captions_and_labels_are_counted_with_the_remedy():
    with pytest.raises(ValueError, match="1 of 4 samples lack it.*--caption_column"):
        Conditions("text", CAPTIONS)
    with pytest.raises(ValueError, match="all of 0 samples lack it.*--label_column"):
        Conditions("class", [])
    with pytest.raises(ValueError, match="has no text"):
        Conditions("text", CAPTIONS[:3]).ids({"text": None})
    with pytest.raises(ValueError, match="'sound'"):
        Conditions("sound", [])
    with pytest.raises(ValueError, match="at most 2"):
        Conditions("text", CAPTIONS[:3], max_length=2)
