"""Texts to train on and to measure with: a file, a folder, any `datasets` data set with a column of text, or embedded prose.

`load_text` gives a map-style data set of `{"text": str}`, where known with `"label": int`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqtok.sources.dataset import open_source, refuse_options
from vqtok.sources.folder import hashed_test, walk
from vqtok.sources.tables import TextTable, open_text_table

from .medium import TEXTS
from .processing_text_vq import read_text_file
from .prose import PASSAGE_BYTES, PythonProse, join_passages

__all__ = ["PythonProse", "TextCropDataset", "TextDataset", "load_text"]


def load_text(
    source: Any,
    split: str = "train",
    *,
    num_samples: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
    holdout: Sequence[str] | None = None,
    passage_bytes: int = PASSAGE_BYTES,
) -> PythonProse | TextDataset:
    """Return a map-style data set with items `{"text": str}`; with labels all items also have `"label"`, an int from 0.

    Args:
        source: "python-prose", the embedded English (see `PythonProse`); a file of UTF-8, of which about a tenth of the passages are
            "test"; a folder of .txt, .md and .rst files, searched recursively; or what `datasets` opens, with a column of text: a
            name on the Hub, a folder of Parquet or Arrow files, one written by `save_to_disk`, a `Dataset`.
        split: "train", "test" or "all"; see `vqtok.image.data.load_images`, which shares the rules of splits and labels.
        num_samples: at most so many texts.
        text_column: of a data set, the column of text; None takes `text`.
        label_column: of a data set, the column of labels. None takes its only complete `ClassLabel` column; of a folder the
            subfolders.
        config_name: which configuration of a data set on the Hub.
        holdout: of a folder, the files (by stem or name) that are "test"; all others are "train".
        passage_bytes: files and the prose are cut into passages of paragraphs, of about so many bytes and never twice as many; 0
            leaves them whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one sentence, naming value and remedy: an unknown split, no text, a file that is no UTF-8, options that the source
            cannot use, columns that are not there.
    """
    options = {
        "label_column": label_column,
        "media_column": text_column,
        "config_name": config_name,
        "holdout": holdout,
    }
    if isinstance(source, str) and source == TEXTS.embedded:
        refuse_options(TEXTS, "the prose of Python", options, allowed=())
        return PythonProse(split, num_samples, passage_bytes)
    if isinstance(source, (str, os.PathLike)) and Path(source).expanduser().is_file():
        refuse_options(TEXTS, f"the file {source}", options, allowed=())
        return TextDataset(*_of_file(Path(source).expanduser(), split, passage_bytes), str(source), num_samples)
    if isinstance(source, (str, os.PathLike)) and _holds_texts(Path(source).expanduser()):
        found = open_source(TEXTS, source, split, {"caption_column": None, **options})
        texts, labels = [], []
        for place, path in enumerate(found.files):
            parts = _passages(read_text_file(path), passage_bytes)
            texts += parts
            labels += [] if found.labels is None else [found.labels.numbers[place]] * len(parts)
        names = None if found.labels is None else found.labels.names
        return TextDataset(texts, labels or None, names, found.title, num_samples)
    refuse_options(TEXTS, "a data set", options, allowed=("label_column", "media_column", "config_name"))
    table: TextTable = open_text_table(TEXTS, source, split, label_column, text_column, config_name)
    numbers, names = (None, None) if table.labels is None else table.labels
    return TextDataset(table.texts, numbers, names, table.title, num_samples)


class TextDataset(Dataset[dict[str, Any]]):
    """Texts in memory: items as of `load_text`, which makes it.

    `skipped` lists the empty texts that were left out, as (name, reason); `label_names` the names of the labels, None if they have
    none.
    """

    medium = TEXTS

    def __init__(
        self, texts: list[str], labels: list[int] | None, names: list[str] | None, title: str, num_samples: int | None
    ) -> None:
        rows = range(len(texts))[:num_samples]
        self._kept = [i for i in rows if texts[i]]
        self.skipped = [(f"text {i}", "it is empty") for i in rows if not texts[i]]
        if not self._kept:
            raise ValueError(f"{title} has no text that is not empty: name another source")
        self._texts, self._labels, self.label_names, self.title = texts, labels, names, title

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self._kept[index]
        label = {} if self._labels is None else {"label": self._labels[place]}
        return {"text": self._texts[place], **label}

    def name(self, index: int) -> str:
        """Return how messages call one text."""
        return f"text {self._kept[index]}"


class TextCropDataset(Dataset[Tensor]):
    """Random crops of the ids of all texts, joined by an empty line: item `draw` depends on (seed, draw) alone.

    The index is a number that counts on through the epochs, so a run that remembers how many items it has drawn resumes exactly. One
    crop in eight ends early, in padding, as texts do.

    Args:
        texts: a map-style data set of `{"text": str}`.
        processor: a `TextVQProcessor`.
        num_units: length of the crops.
        seed: any integer >= 0.

    Items: integers `(num_units,)`. `skipped` is that of the texts.

    Raises:
        ValueError: there are no texts, or a number is out of range.
    """

    medium = TEXTS
    takes_draws = True  # `vqtok.training.step_loader` then passes draws instead of the numbers of texts

    def __init__(self, texts: Any, processor: Any, num_units: int, seed: int = 0) -> None:
        if not len(texts):
            raise ValueError("there is no text to crop: give a data set with at least one")
        if num_units < 1 or seed < 0:
            raise ValueError(f"crops need num_units >= 1 and seed >= 0, got {num_units} and {seed}")
        self.num_units, self.seed, self.padding = num_units, seed, processor.vocab_size
        self.skipped: list[tuple[str, str]] = getattr(texts, "skipped", [])
        gap = processor.ids("\n\n")  # nothing, where a tokenizer drops white space
        self.ids = torch.cat([part for i in range(len(texts)) for part in (processor.ids(texts[i]["text"]), gap)])
        if not len(self.ids):
            raise ValueError("the tokenizer makes no tokens of these texts: give texts that are more than white space")

    def __len__(self) -> int:
        return -(-len(self.ids) // self.num_units)

    def __getitem__(self, draw: int) -> Tensor:
        if draw < 0:
            raise IndexError(f"a draw counts from 0, got {draw}")
        rng = np.random.default_rng([self.seed, 4, draw])
        start = int(rng.integers(max(1, len(self.ids) - self.num_units + 1)))
        end = int(rng.integers(1, self.num_units)) if self.num_units > 1 and rng.random() < 1 / 8 else self.num_units
        crop = torch.full((self.num_units,), self.padding, dtype=torch.int64)
        part = self.ids[start : start + end]
        crop[: len(part)] = part
        return crop


def _passages(text: str, passage_bytes: int) -> list[str]:
    return list(join_passages(re.split(r"\n\s*\n", text), passage_bytes)) if passage_bytes else [text]


def _of_file(path: Path, split: str, passage_bytes: int) -> tuple[list[str], None, None]:
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r} of the file {path}: use 'train', 'test' or 'all'")
    passages = _passages(read_text_file(path), passage_bytes)
    test = set(hashed_test(f"{i} {text}" for i, text in enumerate(passages)))
    chosen = [text for i, text in enumerate(passages) if split == "all" or (i in test) == (split == "test")]
    if not chosen:
        raise ValueError(f"split {split!r} of {path} is empty: give a longer text, or use split='all'")
    return chosen, None, None


def _holds_texts(folder: Path) -> bool:
    """Whether a folder is one of text files; what lies beside the tables of a data set, such as its README.md, is not."""
    suffixes = {path.suffix.lower() for path in walk(folder)} if folder.is_dir() else set()
    return bool(suffixes & TEXTS.suffixes) and not suffixes & {".parquet", ".arrow"}
