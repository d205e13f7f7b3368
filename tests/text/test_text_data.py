"""Texts from a file, a folder, a table and from Python itself: splits without overlap, labels, errors with a remedy."""

import numpy as np
import pytest
import torch

from tests.tiny import make_text_tokenizer, words
from vqtok.encoding import load_media
from vqtok.text import TextVQProcessor
from vqtok.text import prose as prose_module
from vqtok.text.data import TextCropDataset, load_text
from vqtok.text.prose import PythonProse, join_passages


@pytest.fixture
def few(monkeypatch):
    """Python's help alone: reading all docstrings takes seconds."""
    monkeypatch.setattr(prose_module, "_library", dict)
    prose_module._paragraphs.cache_clear()
    yield
    prose_module._paragraphs.cache_clear()


def test_the_prose_is_held_out_by_topic(few):
    train, test, whole = (PythonProse(split) for split in ("train", "test", "all"))
    assert len(train) + len(test) == len(whole) and len(test) > 5
    topics = [{passage.topic for passage in part.passages} for part in (train, test)]
    assert not topics[0] & topics[1]
    paragraphs = [{p for passage in part.passages for p in passage.text.split("\n\n")} for part in (train, test)]
    assert not paragraphs[0] & paragraphs[1], "what several topics share is in one of them alone"
    item = test[3]
    assert item["text"] and test.label_names[item["label"]] == test.passages[3].topic
    assert len(PythonProse("train", num_samples=3)) == 3
    assert len(PythonProse("test", passage_bytes=0)) == len(topics[1])
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        PythonProse("dev")


def test_docstrings_are_read_from_the_sources():
    found = prose_module._library()
    assert "heap" in found["heapq"].lower() and len(found) > 50 and "test" not in found


def test_a_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of a short book." for i in range(200)), encoding="utf-8")
    train, test = (load_text(path, split, passage_bytes=100) for split in ("train", "test"))
    assert len(train) > 20 and 0 < len(test) < len(train)
    assert not {item["text"] for item in train} & {test[i]["text"] for i in range(len(test))}
    assert load_text(path, "all", passage_bytes=0)[0]["text"] == path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="cannot use holdout"):
        load_text(path, holdout=["a"])


def test_a_folder_has_labels_from_its_subfolders(tmp_path):
    for kind in ("news", "poems"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            (tmp_path / kind / f"{i}.txt").write_text(f"{kind} number {i}", encoding="utf-8")
    data = load_text(tmp_path, "all")
    assert len(data) == 6 and data.label_names == ["news", "poems"]
    assert data[5] == {"text": "poems number 2", "label": 1}
    assert [item["text"] for item in load_text(tmp_path, "test", holdout=["1"])] == ["news number 1", "poems number 1"]
    (tmp_path / "news" / "0.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="0.txt is not UTF-8"):
        load_text(tmp_path, "all")


def test_a_column_of_a_data_set():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"review": ["good", "", "bad"], "stars": [5, 3, 1]})
    data = load_text(table, "all", text_column="review", label_column="stars")
    assert [data[i] for i in range(2)] == [{"text": "good", "label": 5}, {"text": "bad", "label": 1}]
    assert data.skipped == [("text 1", "it is empty")]
    with pytest.raises(ValueError, match="no column 'text' of texts.*text_column"):
        load_text(table, "all")
    with pytest.raises(ValueError, match="no texts in column 'stars'"):
        load_text(table, "all", text_column="stars")


def test_tables_are_read_whatever_text_lies_beside_them(tmp_path):
    """A data set of the Hub comes with a README.md."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one row", "another"]}).to_parquet(tmp_path / "train.parquet")
    for name in ("README.md", ".cache/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("about it", encoding="utf-8")
        assert [item["text"] for item in load_text(tmp_path, "all")] == ["one row", "another"]
        (tmp_path / name).unlink()


def test_passages_are_cut_between_characters():
    assert list(join_passages(["é世a"], 4)) == ["é", "世a"]
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"passage_bytes must be 0 or at least 4, .* got {wrong}"):
            list(join_passages(["é"], wrong))


def test_a_tokenizer_that_drops_white_space_can_train():
    processor = TextVQProcessor.from_tokenizer(words(), 4)
    texts = [{"text": text} for text in ("the cat", " ", "sat")]
    assert TextCropDataset(texts, processor, 4).ids.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="no tokens of these texts"):
        TextCropDataset([{"text": " "}], processor, 4)


def test_options_of_other_media_are_refused(few):
    tok = make_text_tokenizer()
    assert len(load_media(tok, split="test", num_samples=2)) == 2
    for option in ("image_column", "audio_column", "caption_column"):
        with pytest.raises(ValueError, match=f"{option} does not go with a tokenizer of text"):
            load_media(tok, **{option: "a"})
    for name, what in (("digits", "pictures"), ("spoken-numbers", "recordings")):
        with pytest.raises(ValueError, match=f"{name} has {what}, this tokenizer takes texts: give python-prose, say"):
            load_media(tok, name)


def test_a_folder_may_be_called_as_embedded_data_of_another_medium(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "a.txt").write_text("a text of digits: 1, 2, 3")
    monkeypatch.chdir(tmp_path)
    assert len(load_media(make_text_tokenizer(), "digits", split="all")) == 1


def test_crops_depend_on_seed_and_draw_alone():
    texts = [{"text": "abcdefgh" * 20}, {"text": "é" * 50}]
    crops = TextCropDataset(texts, TextVQProcessor(8), 32, seed=1)
    again = TextCropDataset(texts, TextVQProcessor(8), 32, seed=1)
    drawn = torch.stack([crops[i] for i in range(80)])
    assert drawn.equal(torch.stack([again[i] for i in range(80)])) and drawn.shape == (80, 32)
    assert not drawn.equal(torch.stack([TextCropDataset(texts, TextVQProcessor(8), 32, seed=2)[i] for i in range(80)]))
    ends = (drawn == 256).any(1)
    assert 2 <= int(ends.sum()) <= 25 and (drawn[:, 0] < 256).all()
    whole = ("abcdefgh" * 20 + "\n\n" + "é" * 50 + "\n\n").encode()
    assert all(bytes(np.array(row[row < 256].tolist(), np.uint8)) in whole for row in drawn)
    with pytest.raises(ValueError, match="there is no text to crop"):
        TextCropDataset([], TextVQProcessor(8), 32)
