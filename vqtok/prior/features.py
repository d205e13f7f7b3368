"""What a frozen text encoder says about captions: hidden states, computed once per distinct caption and kept on disk.

Texts run through the encoder in batches of equal length, so that there is no padding and no encoder's way of handling it. What it says
about a text then does not depend on what other texts there are, but for rounding.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

from vqtok.configuration import refuse_code
from vqtok.files import read_json, write_with
from vqtok.fingerprint import fingerprint
from vqtok.hub.folders import fetch_folder
from vqtok.hub.weights import MODEL_FILES, require_safetensors, weight_shapes
from vqtok.modeling import check_shapes

from .drawing import grouped
from .text import TOKENIZER_FILES, encode_prompts, load_text_tokenizer

# Parts of an encoder's class that its last hidden states never pass through; base models are often saved without.
_UNUSED = ("pooler.",)
# What a text encoder's folder consists of, for downloads. No adapters.
ENCODER_FILES = (*MODEL_FILES, *TOKENIZER_FILES)
# What wrong files of a model lead to in transformers.
_LOADING = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)


class TextEncoder:
    """A frozen text encoder of transformers with its tokenizer.

    Args:
        model: takes `input_ids` and `attention_mask`, returns `last_hidden_state`: T5EncoderModel, BertModel, CLIPTextModel, a
            decoder-only AutoModel. Kept in eval mode, without gradients.
        tokenizer: of this model. Its special tokens are used, as the model knows no texts without.

    Attributes:
        model, tokenizer: as given.
        source: `{"repo", "revision"}` of the place on the Hub that it was loaded from, if it was.

    Raises:
        ValueError: a model that reads no text.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = _checked(model).eval().requires_grad_(False), tokenizer
        self.source: dict[str, str] | None = None
        # Of an encoder-decoder, such as BART, the encoder alone.
        self._run = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
        vocab_size = self.model.get_input_embeddings().num_embeddings
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"this tokenizer has {len(tokenizer)} tokens, the text encoder {type(model).__name__} knows {vocab_size}: use its own"
            )

    @classmethod
    def from_pretrained(
        cls, id_or_folder: str | os.PathLike, *, device: torch.device | str | None = None, **hub: Any
    ) -> TextEncoder:
        """The encoder of a folder or of a repository on the Hub, in float32. No code and no pickle is ever loaded.

        Args:
            id_or_folder: a folder with model and tokenizer, or "owner/name" on the Hub.
            device: where it runs; None means the CPU.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, as everywhere in huggingface_hub.

        Raises:
            OSError: there is no such model, or it has no safetensors.
            ValueError: it reads no text, weights are missing or damaged, or its config names code, weights or kernels elsewhere.
        """
        source = str(id_or_folder)
        try:
            folder, commit = fetch_folder(id_or_folder, ENCODER_FILES, **hub)
            model, info = _load(folder)
            tokenizer = load_text_tokenizer(folder)
        except SafetensorError as error:
            raise ValueError(f"{source}: the text encoder's weights are truncated or damaged ({error})") from error
        except _LOADING as error:
            kind, why = OSError if isinstance(error, OSError) else ValueError, " ".join(str(error).split())[:300]
            raise kind(f"{source} cannot be loaded as a text encoder with safetensors and tokenizer: {why}") from error
        missing = sorted(name for name in info["missing_keys"] if not name.startswith(_UNUSED))
        if missing or info["mismatched_keys"]:
            raise ValueError(f"{source}: weights of the text encoder are missing or do not fit: {missing[:5]}")
        # Memory that torch aligns itself: on that of the file, sums can be rounded otherwise than they were in training.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        model.config.name_or_path = source
        encoder = cls(model, tokenizer)
        encoder.source = None if commit is None else {"repo": source, "revision": commit}
        return encoder if device is None else encoder.to(device)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model and tokenizer into one folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def size(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def max_length(self) -> int:
        """The most tokens of a text, special tokens included; of encoders that name no limit what their tokenizer says."""
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        return min(limit for limit in limits if isinstance(limit, int) and limit > 0)

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each text, special tokens included.

        Raises:
            ValueError: a text that is empty, or longer than `max_length` or than the encoder takes.
        """
        return encode_prompts(self.tokenizer, texts, min(max_length, self.max_length), special_tokens=True)

    @torch.no_grad()
    def encode(self, rows: Sequence[Sequence[int]], batch_size: int = 64) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each row of token ids, and its last hidden states, float32 `(L, size)` on the CPU, in any order."""
        for numbers in grouped([len(row) for row in rows], batch_size):
            ids = torch.tensor([list(rows[number]) for number in numbers], device=self.model.device)
            hidden = self._run(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            # Each its own memory, so that one row does not keep its whole batch.
            yield from zip(numbers, (row.clone() for row in hidden.float().cpu()), strict=True)

    def features(self, texts: Sequence[str], max_length: int) -> list[Tensor]:
        """Features `(L, size)` of each text."""
        found = dict(self.encode(self.tokenize(texts, max_length)))
        return [found[index] for index in range(len(texts))]

    @cached_property
    def fingerprint(self) -> str:
        """Equal for encoders that say the same: a sha256 over architecture and weights."""
        facts = {name: value for name, value in self.model.config.to_dict().items() if not name.startswith("_")}
        for name in ("transformers_version", "dtype", "torch_dtype", "architectures"):
            facts.pop(name, None)
        weights = {name: value for name, value in self.model.state_dict().items() if not name.startswith(_UNUSED)}
        return fingerprint({"config": facts}, weights)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the model; returns itself."""
        self.model.to(device)
        return self


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says about its weights; all is checked that can be before anything is allocated."""
    require_safetensors(folder)
    refuse_code(read_json(folder / "config.json"), "config.json")
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if config.model_type == "clip":  # the text half of both
        model_class, config = CLIPTextModel, config.text_config
    else:
        mapping = MODEL_FOR_TEXT_ENCODING_MAPPING if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else MODEL_MAPPING
        model_class = mapping.get(type(config), None)
    _check_reads(model_class, config)
    check_shapes(model_class, config, weight_shapes(folder), "model.safetensors", _UNUSED)
    options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
    return _checked(model), info


def _check_reads(model_class: Any, config: Any) -> None:
    """Refuse a class of models that reads no text."""
    is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    takes = set(inspect.signature(model_class.forward).parameters) if is_model else set()
    if not {"input_ids", "attention_mask"} <= takes or not hasattr(config.get_text_config(), "hidden_size"):
        name = getattr(model_class, "__name__", config.__class__.__name__)
        raise ValueError(
            f"{name} is no text encoder (it must take input_ids and attention_mask, and have a hidden_size and a table of token "
            "embeddings): choose a model such as T5, BERT, CLIP's text model, or a decoder-only language model"
        )


def _checked(model: Any) -> Any:
    """The model, refused if it reads no text."""
    _check_reads(type(model), getattr(model, "config", None))
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise ValueError(f"{type(model).__name__} is no text encoder: it has no table of token embeddings")
    return model


class FeatureCache:
    """Features of captions on disk, in safetensors shards that are whole or absent and read by memory-mapping.

    An entry is found by the caption's token ids. A cache belongs to one encoder (another one has its own files in the same folder), and
    grows: what is there is never computed again.

    Args:
        folder: of the cache.
        encoder: whose features they are.
        shard_bytes: features in memory before a shard is written.

    Raises:
        ValueError: a shard that is damaged.
    """

    def __init__(self, folder: str | Path, encoder: TextEncoder, shard_bytes: int = 1 << 28):
        self.folder, self.size, self.shard_bytes = Path(folder), encoder.size, shard_bytes
        self.key = encoder.fingerprint
        self._open: dict[str, Any] = {}
        self._where: dict[bytes, tuple[str, int, int]] = {}
        for path in sorted(self.folder.glob(f"{self.key[:16]}-*.safetensors")):
            self._index(path)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, ids: Sequence[int]) -> bool:
        return _digest(ids) in self._where

    def __getitem__(self, ids: Sequence[int]) -> Tensor:
        """Features float32 `(L, size)` of a caption's token ids."""
        file, first, last = self._where[_digest(ids)]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, "pt")
        return self._open[file].get_slice("features")[first:last]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process opens the files by itself

    def add(self, encoder: TextEncoder, rows: Iterable[Sequence[int]], batch_size: int = 64) -> int:
        """Encode the rows of token ids that are not there yet, each once; return how many these were.

        Raises:
            OSError: the disk is full, say. Shards that were finished stay.
        """
        wanted = list({_digest(ids): list(ids) for ids in rows if ids not in self}.values())
        waiting: list[tuple[bytes, Tensor]] = []
        held = 0
        for number, features in encoder.encode(wanted, batch_size):
            waiting.append((_digest(wanted[number]), features))
            held += features.numel() * 4
            if held >= self.shard_bytes:
                self._write(waiting)
                waiting, held = [], 0
        if waiting:
            self._write(waiting)
        return len(wanted)

    def _write(self, entries: list[tuple[bytes, Tensor]]) -> None:
        lengths = torch.tensor([len(features) for _, features in entries])
        digests = np.frombuffer(b"".join(digest for digest, _ in entries), np.uint8).reshape(-1, 32).copy()
        tensors = {
            "features": torch.cat([features for _, features in entries]),
            "lengths": lengths,
            "digests": torch.from_numpy(digests),
        }
        # Named by what is in it: two processes that encode the same captions write the same file.
        path = self.folder / f"{self.key[:16]}-{hashlib.sha256(digests.tobytes()).hexdigest()[:16]}.safetensors"
        write_with(path, lambda temporary: save_file(tensors, temporary, metadata={"text_encoder": self.key}))
        self._index(path)

    def _index(self, path: Path) -> None:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, "pt"))
                lengths, digests = file.get_tensor("lengths"), file.get_tensor("digests")
                shape = file.get_slice("features").get_shape()
                if (file.metadata() or {}).get("text_encoder") != self.key or shape != [int(lengths.sum()), self.size]:
                    raise ValueError("it does not belong to this text encoder")
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}): delete it, and it is computed again") from None
        ends = lengths.cumsum(0).tolist()
        for digest, first, last in zip(digests.numpy(), [0, *ends], ends, strict=False):
            self._where[digest.tobytes()] = (path.name, first, last)


class FeatureConditions:
    """What a prior of the condition "features" needs to know of its samples, as `Conditions` is for others.

    Args:
        encoder: the text encoder.
        captions: of all samples, training and held out.
        max_length: most tokens of a caption.

    Attributes:
        kind, column, text_tokenizer, seen, text_source: as of `Conditions`.
        encoder: as given.
        max_text_length: what the prior should take, twice the longest caption at most.

    Raises:
        ValueError: a caption that is empty or too long.
    """

    kind, column, text_tokenizer, seen, text_source = "features", "text", None, None, None

    def __init__(self, encoder: TextEncoder, captions: Sequence[str], max_length: int = 128):
        texts = sorted(set(captions))
        rows = encoder.tokenize(texts, max_length)
        self.encoder = encoder
        self.max_text_length = min(max_length, encoder.max_length, 2 * max(map(len, rows)))
        self._known = dict(zip(texts, rows, strict=True))
        self._cache: FeatureCache | None = None

    def __len__(self) -> int:
        return len(self._known)

    @property
    def fields(self) -> dict[str, Any]:
        """What stands about the condition in the prior's config."""
        return {"condition": self.kind, "feature_size": self.encoder.size, "max_text_length": self.max_text_length}

    def prepare(self, folder: str | Path, encode: bool = True) -> int:
        """Open the cache in `folder`, and encode the distinct captions that it lacks; return how many these were.

        Args:
            encode: whether to; of several processes one does, before the others open the cache.
        """
        self._cache = FeatureCache(folder, self.encoder)
        return self._cache.add(self.encoder, self._known.values()) if encode else 0

    def ids(self, sample: Mapping[str, Any]) -> Tensor:
        """Features `(L, feature_size)` of a sample's caption, from the cache.

        Raises:
            ValueError: a sample without a caption, or with one that was not prepared.
        """
        caption = sample.get(self.column)
        if caption not in self._known or self._cache is None:
            raise ValueError(f"there are no features of the caption {caption!r}: give all captions, and prepare them")
        return self._cache[self._known[caption]]

    def knows(self, sample: Mapping[str, Any]) -> bool:
        """Whether `ids` has an answer."""
        return sample.get(self.column) in self._known

    def prompt(self, sample: Mapping[str, Any]) -> str:
        """What a pipeline is told to draw something like this sample."""
        return sample[self.column]


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(np.asarray(ids, "<i8").tobytes()).digest()
