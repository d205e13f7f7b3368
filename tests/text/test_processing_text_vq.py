"""TextVQProcessor: any text to ids and back, exact lengths, and errors for what is no text."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import words
from vqtok.text import TextVQProcessor
from vqtok.text.processing_text_vq import bytes_to_text

PROCESSOR = TextVQProcessor(stride=8)


@given(st.text(min_size=1))
def test_any_text_comes_back_from_its_ids(text):
    ids, (size,) = PROCESSOR.prepare(text)
    assert size == len(text.encode()) and len(ids) % 8 == 0 and len(ids) - size < 8
    assert ids[size:].tolist() == [256] * (len(ids) - size)
    assert PROCESSOR.postprocess(ids[None], [(size,)]) == [text]


@given(st.binary(min_size=1))
def test_any_bytes_become_valid_text_of_the_same_length(data):
    text = bytes_to_text(data)
    written = text.encode()  # raises where it is no valid text
    assert len(written) == len(data)
    assert all(a == b or a == ord("?") for a, b in zip(written, data, strict=True))
    assert bytes_to_text(written) == text


def test_repair_takes_linear_time():
    assert bytes_to_text(b"\xff" * 10**6) == "?" * 10**6


@pytest.mark.parametrize(
    ("text", "error", "named"),
    [
        ("", ValueError, "the text is empty"),
        ("ab\ud800c", ValueError, r"lone surrogate, U\+D800, at character 2"),
        (b"abc", TypeError, "not bytes"),
        (None, TypeError, "not NoneType"),
        (np.array([1, 256]), ValueError, "below 256, got 1 to 256"),
        (np.array([1.0]), ValueError, "must be integers"),
        (np.array([[1]]), ValueError, r"\(units,\)"),
    ],
)
def test_what_is_no_text_is_named(text, error, named):
    with pytest.raises(error, match=named):
        PROCESSOR.prepare(text)


def test_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("zwölf\r\n\x00".encode())
    assert PROCESSOR.prepare(tmp_path / "a.txt")[0][:9].tolist() == list("zwölf\r\n\x00".encode())
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="b.txt is not UTF-8 .* at byte 2"):
        PROCESSOR.prepare(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="c.txt is empty"):
        PROCESSOR.prepare(tmp_path / "c.txt")
    with pytest.raises(FileNotFoundError):
        PROCESSOR.prepare(tmp_path / "none.txt")


def test_a_batch_is_padded_to_its_longest():
    batch = PROCESSOR(["abc", "a" * 9])
    assert batch["input_ids"].shape == (2, 16) and batch["sizes"].tolist() == [[3], [9]]
    assert batch["input_ids"].dtype == torch.int64 and (batch["input_ids"][0, 3:] == 256).all()


def test_the_ids_of_any_fast_tokenizer(tmp_path):
    processor = TextVQProcessor.from_tokenizer(words(), stride=4)
    ids, size = processor.prepare("the cat sat the cat")
    assert ids.tolist() == [1, 2, 3, 1, 2, 4, 4, 4] and size == (5,)
    assert processor.postprocess(ids[None], [size]) == ["the cat sat the cat"]
    processor.save_pretrained(tmp_path)
    back = TextVQProcessor.from_pretrained(tmp_path)
    assert back.prepare("sat")[0].tolist() == [3, 4, 4, 4] and back.code_fields == processor.code_fields
    assert processor.code_fields != TextVQProcessor(stride=4).code_fields
    with pytest.raises(ValueError, match="no fast tokenizer"):
        TextVQProcessor.from_tokenizer(object(), 4)


def test_ids_may_have_holes():
    """The padding stands behind the largest id, not behind as many as there are."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 7}, unk_token="[UNK]"))
    processor = TextVQProcessor.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), stride=4)
    assert processor.vocab_size == 8 and processor.prepare("cat")[0].tolist() == [7, 8, 8, 8]
    assert processor.unit == "token" and PROCESSOR.unit == "byte"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_ids_of_any_integers(dtype):
    assert PROCESSOR.prepare(np.array([97, 255], dtype))[0][:3].tolist() == [97, 255, 256]


def test_fields_are_checked(tmp_path):
    with pytest.raises(ValueError, match="no field 'strid'. Did you mean 'stride'"):
        TextVQProcessor(strid=8)
    with pytest.raises(ValueError, match="stride must be a positive integer"):
        TextVQProcessor(stride=0)
    with pytest.raises(ValueError, match="stride must be at most 65536"):
        TextVQProcessor(stride=1 << 40)
    with pytest.raises(ValueError, match="vocab_size is 300, but bytes have 256"):
        TextVQProcessor(vocab_size=300)
    with pytest.raises(ValueError, match="is no tokenizer"):
        TextVQProcessor(tokenizer_json="{}")
    PROCESSOR.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["stride"] == 8 and "tokenizer" not in written


def test_units_know_their_bytes():
    assert PROCESSOR.unit_bytes("naïve").tolist() == [1] * 6
    words = Tokenizer(models.WordLevel({"one": 0, "naïve": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = TextVQProcessor.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), stride=8)
    assert processor.unit_bytes("  one naïve 世界 ").tolist() == [
        5,
        7,
        8,
    ]  # spaces go with what follows, at the end with what was
    pieces = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    processor = TextVQProcessor.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=pieces), stride=8)
    assert processor.unit_bytes("aïb").tolist() == [1, 2, 0, 1]
