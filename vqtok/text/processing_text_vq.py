"""Text to the ids of the model, and back."""

import codecs
import difflib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from .configuration_text_vq import MAX_STRIDE

# Keys that transformers writes into preprocessor_config.json beside the state.
_SERVICE_KEYS = frozenset(("image_processor_type", "processor_class", "feature_extractor_type", "auto_map"))
_FIELDS = ("stride", "vocab_size", "tokenizer_json")
BYTES = 256
MAX_FILE_BYTES = 1 << 28


class TextVQProcessor(FeatureExtractionMixin):
    """Text to `input_ids` and back: the bytes of its UTF-8, or the ids of a tokenizer. Nothing is normalised.

    Texts are padded to a multiple of `stride` with the id `vocab_size`, which stands for nothing; `postprocess` cuts that off again.

    Args:
        stride: the largest stride of the model's layout, in units.
        vocab_size: of the model: 256 of bytes, or one more than the largest id of the tokenizer.
        tokenizer_json: a fast tokenizer as JSON, as `from_tokenizer` takes it of any `AutoTokenizer`; None takes bytes.

    Raises:
        ValueError: an impossible value, or a name that is none of these (the nearest one is said).

    Example:
        >>> processor = TextVQProcessor(stride=8)
        >>> ids, size = processor.prepare("naïve")
        >>> ids.tolist(), size
        ([110, 97, 195, 175, 118, 101, 256, 256], (6,))
        >>> processor.postprocess(ids[None], [size])
        ['naïve']
        >>> processor.postprocess(torch.tensor([[110, 195, 118]]), [(3,)])
        ['n?v']
    """

    model_input_names = ["input_ids", "sizes"]  # noqa: RUF012 (the name and form transformers reads)

    def __init__(
        self, stride: int = 8, vocab_size: int = BYTES, tokenizer_json: str | None = None, **kwargs: Any
    ) -> None:
        for key in kwargs:
            if key not in _SERVICE_KEYS and not key.startswith("_"):
                near = difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.0)
                raise ValueError(f"TextVQProcessor has no field {key!r}. Did you mean {near[0]!r}?")
        super().__init__()
        for name, value in {"stride": stride, "vocab_size": vocab_size}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TextVQProcessor.{name} must be a positive integer, got {value!r}")
        if not (tokenizer_json is None or isinstance(tokenizer_json, str)):
            raise ValueError(f"TextVQProcessor.tokenizer_json must be a string or null, got {tokenizer_json!r:.80}")
        if stride > MAX_STRIDE:  # the shortest text is padded to it
            raise ValueError(f"TextVQProcessor.stride must be at most {MAX_STRIDE}, got {stride}")
        known = BYTES if tokenizer_json is None else _num_ids(_read_tokenizer(tokenizer_json))
        if vocab_size != known:
            kind = "bytes have" if tokenizer_json is None else "the tokenizer has"
            raise ValueError(f"TextVQProcessor.vocab_size is {vocab_size}, but {kind} {known} ids: set it to that")
        self.stride, self.vocab_size, self.tokenizer_json = stride, vocab_size, tokenizer_json

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, stride: int) -> "TextVQProcessor":
        """A processor whose units are the tokens of a fast tokenizer of transformers, which is kept in it.

        Raises:
            ValueError: the tokenizer is not a fast one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} is no fast tokenizer: load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        return cls(stride, _num_ids(backend), backend.to_str())

    @property
    def unit(self) -> str:
        """What sizes count: "byte" or "token"."""
        return "byte" if self.tokenizer_json is None else "token"

    @property
    def code_fields(self) -> dict[str, Any]:
        """What decides codes, for the fingerprint."""
        told = None if self.tokenizer_json is None else hashlib.sha256(self.tokenizer_json.encode()).hexdigest()
        return {"stride": self.stride, "vocab_size": self.vocab_size, "tokenizer": told, "padding": "nothing, right"}

    def prepare(self, text: Any) -> tuple[Tensor, tuple[int]]:
        """One text as the model wants it.

        Args:
            text: a string; a path object of a file of UTF-8; or an array or tensor `(units,)` of ids.

        Returns:
            ids: integers `(T,)`, T padded to a multiple of the stride.
            size: `(units,)` before padding: bytes, or tokens.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the text is empty or holds a lone surrogate; a file is not UTF-8 or too large; an id out of range.
            TypeError: anything else.
        """
        if isinstance(text, os.PathLike):
            text = read_text_file(text)
        if isinstance(text, str):
            ids = self.ids(text)
        elif isinstance(text, (np.ndarray, Tensor)):
            ids = self._checked(torch.as_tensor(text))
        else:
            raise TypeError(f"a text is a str, a path object or an array of ids, not {type(text).__name__}")
        if not len(ids):
            raise ValueError("the text is empty, and nothing has no codes: leave it out")
        return torch.nn.functional.pad(ids, (0, -len(ids) % self.stride), value=self.vocab_size), (len(ids),)

    def __call__(self, text: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """A batch of texts of any lengths, padded to the longest, in the form of transformers.

        Args:
            text: one text or a list (see `prepare`).
            return_tensors: "pt" for tensors, "np" for arrays.

        Returns:
            input_ids: int64 `(B, T)`.
            sizes: int64 `(B, 1)`, units before padding; `TextVQModel.encode` takes them.
        """
        batch = list(text) if isinstance(text, (list, tuple)) else [text]
        if not batch:
            raise ValueError("there is no text: give at least one")
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors must be 'pt' or 'np', got {return_tensors!r}")
        prepared = [self.prepare(each) for each in batch]
        rows = [ids.long() for ids, _ in prepared]
        data = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.vocab_size),
            "sizes": torch.tensor([size for _, size in prepared], dtype=torch.int64),
        }
        return BatchFeature(data if return_tensors == "pt" else {name: value.numpy() for name, value in data.items()})

    def postprocess(self, ids: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Texts of the given sizes. Bytes that are no UTF-8 become a question mark each, so that the length stays exact.

        Args:
            ids: integers `(B, T)`, or logits `(B, T, V)`, of which the likeliest count.
            sizes: `(B, 1)`, units of each text without its padding.
        """
        ids = ids.argmax(-1) if ids.ndim == 3 else ids
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        rows = [row[:size].cpu() for row, (size,) in zip(ids, sizes, strict=True)]
        if self.tokenizer_json is None:
            return [bytes_to_text(row.clamp(max=BYTES - 1).to(torch.uint8).numpy().tobytes()) for row in rows]
        tokenizer = _read_tokenizer(self.tokenizer_json)
        return [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows]

    def unit_bytes(self, text: str) -> Tensor:
        """How many bytes of UTF-8 each unit of a text stands for, int64 `(units,)`; they sum to those of the text.

        Bytes that no token stands for, such as spaces that a tokenizer drops, count with the token after them, at the end with the
        one before; those of a character that several tokens spell, with the first of them.
        """
        if self.tokenizer_json is None:
            return torch.ones(len(text.encode()), dtype=torch.int64)
        ends = [end for _, end in _read_tokenizer(self.tokenizer_json).encode(text, add_special_tokens=False).offsets]
        if not ends:
            return torch.zeros(0, dtype=torch.int64)
        bytes_before = np.concatenate([[0], np.cumsum([len(each.encode()) for each in text])])
        at = np.maximum.accumulate(bytes_before[ends])
        at[-1] = bytes_before[-1]
        return torch.from_numpy(np.diff(at, prepend=0))

    def ids(self, text: str) -> Tensor:
        """The ids of a string, integers `(units,)`, without padding; none where a tokenizer drops all of it.

        Raises:
            ValueError: the text holds a lone surrogate.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}, which is half a "
                "character: repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            ) from None
        if self.tokenizer_json is None:
            return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int16))
        ids = _read_tokenizer(self.tokenizer_json).encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int32)

    def _checked(self, ids: Tensor) -> Tensor:
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers (units,), got {ids.dtype} of shape {tuple(ids.shape)}")
        ids = ids.long()  # torch compares no uint16
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ValueError(f"ids must be below {self.vocab_size}, got {int(ids.min())} to {int(ids.max())}")
        return ids.detach().cpu().to(torch.int32)


codecs.register_error(
    "vqtok.question_marks", lambda error: ("?" * (error.end - error.start), error.end)
)  # in linear time


def bytes_to_text(data: bytes) -> str:
    """The text of UTF-8, with a question mark for each byte that does not belong: as many bytes as before."""
    return data.decode("utf-8", "vqtok.question_marks")


def read_text_file(path: str | os.PathLike) -> str:
    """The text of a file of UTF-8, line ends and all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, empty, or larger than any text should be.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"the file {path} has {path.stat().st_size:,} bytes, more than {MAX_FILE_BYTES:,}: cut it")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file {path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    if not text:
        raise ValueError(f"the file {path} is empty: there is no text in it")
    return text


_tokenizers: dict[str, Tokenizer] = {}  # of the last JSON that was read: parsing takes as long as encoding a book


def _num_ids(tokenizer: Tokenizer) -> int:
    """All ids lie below; there may be fewer entries, where some ids were left out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _read_tokenizer(json: str) -> Tokenizer:
    if json not in _tokenizers:
        try:
            tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"TextVQProcessor.tokenizer_json is no tokenizer ({error}): save it again") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        _tokenizers.clear()
        _tokenizers[json] = tokenizer
    return _tokenizers[json]
