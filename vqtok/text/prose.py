"""English prose that every Python has: the topics of its help and the docstrings of its standard library, held out by topic."""

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from pydoc_data import topics as help_topics
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from vqtok.sources.folder import hashed_test

from .medium import TEXTS

PASSAGE_BYTES = 512
_LEFT_OUT = frozenset(("test", "tests", "idlelib", "idle_test", "site-packages", "pydoc_data", "__pycache__"))
_SPACES = re.compile(r"[ \t]+")
_SHORTEST = 40  # bytes of a paragraph


class Passage(NamedTuple):
    """A passage and where it comes from."""

    text: str
    topic: str


class PythonProse(Dataset[dict[str, Any]]):
    """Passages of paragraphs, about `passage_bytes` long and never twice that; a paragraph that stands in several places is there once.

    A topic is a topic of Python's help, or a package of its standard library; about a tenth of the topics are "test". What there is
    depends on the version of Python.

    Args:
        split: "train", "test" or "all".
        num_samples: at most the first so many passages.
        passage_bytes: when a passage is full; 0 makes each topic one text.

    Items: `{"text": str, "label": int}`; `label_names` are all topics.
    """

    medium = TEXTS

    def __init__(self, split: str = "train", num_samples: int | None = None, passage_bytes: int = PASSAGE_BYTES):
        if split not in ("train", "test", "all"):
            raise ValueError(f"unknown split {split!r} of the prose: use 'train', 'test' or 'all'")
        texts = _paragraphs()
        self.label_names = sorted(texts)
        test = {self.label_names[i] for i in hashed_test(self.label_names)}
        chosen = [name for name in self.label_names if split == "all" or (name in test) == (split == "test")]
        self.passages = [Passage(text, name) for name in chosen for text in join_passages(texts[name], passage_bytes)][
            :num_samples
        ]
        self._label_of = {name: label for label, name in enumerate(self.label_names)}
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, topic = self.passages[index]
        return {"text": text, "label": self._label_of[topic]}

    def name(self, index: int) -> str:
        """Return the topic of one passage and its number."""
        return f"passage {index} ({self.passages[index].topic})"


def join_passages(paragraphs: Sequence[str], passage_bytes: int) -> Iterator[str]:
    """Paragraphs joined by an empty line until they have `passage_bytes`, and never twice that; 0 joins all.

    Example:
        >>> list(join_passages(["one", "two", "a longer one"], 8))
        ['one\\n\\ntwo', 'a longer', ' one']
    """
    if not passage_bytes:
        yield "\n\n".join(paragraphs)
        return
    if passage_bytes < 4:
        raise ValueError(f"passage_bytes must be 0 or at least 4, the bytes of a character, got {passage_bytes}")
    held: list[str] = []
    size = 0
    for paragraph in (piece for whole in paragraphs for piece in _pieces(whole, passage_bytes)):
        held.append(paragraph)
        size += len(paragraph.encode()) + 2
        if size >= passage_bytes:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


def _pieces(paragraph: str, most: int) -> Iterator[str]:
    """A paragraph in pieces of at most `most` bytes: whole lines where they fit, else cut anywhere between characters."""
    piece = ""
    for line in paragraph.splitlines(keepends=True):
        for part in _cut(line, most):
            if piece and len((piece + part).encode()) > most:
                yield piece
                piece = ""
            piece += part
    if piece:
        yield piece


def _cut(line: str, most: int) -> Iterator[str]:
    data = line.encode()
    while data:
        end = min(most, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        yield data[:end].decode()
        data = data[end:]


@cache
def _paragraphs() -> dict[str, list[str]]:
    """Topic -> its paragraphs. The shortest topics keep what they share with longer ones."""
    whole = {f"help: {name}": text for name, text in help_topics.topics.items()}
    whole |= {f"library: {name}": text for name, text in _library().items()}
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name in sorted(whole, key=lambda name: (len(whole[name]), name)):
        kept = []
        for paragraph in re.split(r"\n\s*\n", whole[name]):
            lines = (_SPACES.sub(" ", line).strip() for line in paragraph.strip().splitlines())
            paragraph = "\n".join(lines)
            if len(paragraph) >= _SHORTEST and "Related help topics" not in paragraph and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        if kept:
            found[name] = kept
    return found


def _library() -> dict[str, str]:
    """Package or module -> its docstrings, read from the sources; nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT & set(parts) or parts[0].startswith("lib") or parts[0] == "config":
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source) if '"""' in source else None
        except (OSError, ValueError, SyntaxError):  # bad samples among the library's own files
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [] if tree is None else [node for node in ast.walk(tree) if isinstance(node, kinds)]
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
        found.setdefault(parts[0], []).extend(texts)
    return {name: "\n\n".join(texts) for name, texts in found.items() if texts}
