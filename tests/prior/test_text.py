"""Words: one token each, any text encodes, and prompts are checked against what the captions had."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vqtok.prior import encode_prompts, train_text_tokenizer
from vqtok.prior.text import from_ranges, seen_token_ids, to_ranges

COLOURS, DIGITS = ["red", "green", "blue"], ["zero", "three", "seven"]
CAPTIONS = [
    f"a {colour} {digit} {place}" for colour in COLOURS for digit in DIGITS for place in ("top left", "bottom right")
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(CAPTIONS)


@pytest.fixture(scope="module")
def seen(tokenizer):
    return seen_token_ids(encode_prompts(tokenizer, CAPTIONS, 64))


def test_every_caption_word_is_one_token(tokenizer):
    for caption in CAPTIONS:
        assert len(encode_prompts(tokenizer, [caption], 64)[0]) == len(caption.split())
    assert 256 < len(tokenizer) < 400 and tokenizer.all_special_tokens == []


def test_even_a_word_of_a_single_caption_is_one_token():
    assert len(train_text_tokenizer(["one rare hippopotamus"])("one rare hippopotamus").input_ids) == 3


def test_a_small_vocabulary_keeps_the_frequent_words():
    small = train_text_tokenizer(["a red dog"] * 50 + ["an extraordinarily rare caption"], vocab_size=262)
    assert len(small) == 262
    assert len(small("a red dog").input_ids) < 6 < len(small("extraordinarily").input_ids)


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1).filter(lambda text: text.strip()))
def test_any_text_encodes(text):
    tokenizer = train_text_tokenizer(CAPTIONS[:3])
    ids = encode_prompts(tokenizer, [text], 10_000)[0]
    assert all(0 <= token < len(tokenizer) for token in ids)


def test_white_space_does_not_matter_and_case_does(tokenizer):
    one, two, three = encode_prompts(tokenizer, ["a red three", "  a  red\n three ", "a Red three"], 64)
    assert one == two != three


def test_saving_keeps_the_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_prompts(again, CAPTIONS, 64) == encode_prompts(tokenizer, CAPTIONS, 64) and len(again) == len(
        tokenizer
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 1 is empty"),
        (" \n", "prompt 1 is empty"),
        (None, "prompt 1 must be a text, got None"),
        ("a red three top left " * 3, "prompt 1 has 15 tokens, this prior takes at most 8"),
        ("a purple three", "never had the word 'purple'"),
        ("a gren three", "never had the word 'gren'; the nearest known words are 'green'"),
        ("a Red three", "the word 'Red'; the nearest known words are 'red'"),
        ("a redthree", "the word 'redthree'"),
    ],
)
def test_bad_prompts_are_named(tokenizer, seen, prompt, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(tokenizer, ["a red three", prompt], 8, seen)


def test_known_words_pass_in_new_combinations(tokenizer, seen):
    assert len(encode_prompts(tokenizer, ["left blue top"], 8, seen)[0]) == 3
    assert encode_prompts(tokenizer, ["a purple dog"], 64)[0], "without seen_ids nothing is asked"


@given(st.sets(st.integers(0, 300)))
def test_ranges_are_exact(ids):
    assert from_ranges(to_ranges(ids)) == sorted(ids)


def test_no_captions_and_no_room_are_refused():
    with pytest.raises(ValueError, match="no captions"):
        train_text_tokenizer([])
    with pytest.raises(ValueError, match="at least 257"):
        train_text_tokenizer(["a"], vocab_size=100)
    with pytest.raises(ValueError, match="caption 1 is empty"):
        train_text_tokenizer(["a", ""])
