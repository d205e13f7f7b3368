"""Ids: one vocabulary of text, special tokens and codes, used by the prior and by language models alike.

    [ text | specials (null, begin) | sizes 1..max_grid | level 0 codebook 0 | level 0 codebook 1 | ... | padding to a multiple ]

Text rows keep their ids, so that pretrained text weights fit. Ids are found by arithmetic, never by parsing names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vqtok.codes import CodeLayout, check_range

MAX_CODEBOOK_SIZE = 65_536
MAX_CODEBOOKS = 65_536
SPECIAL_TOKENS = ("null", "begin")


@dataclass(frozen=True)
class Stream:
    """One run of ids: the codes of one codebook, or of one factor of a codebook too large to be one run.

    Attributes:
        level: index of the level, 0 the coarsest.
        codebook: index among the streams of that level (codebook * num_factors + factor).
        size: how many ids.
        offset: the first id.
    """

    level: int
    codebook: int
    size: int
    offset: int


@dataclass(frozen=True)
class CodeVocabulary:
    """The id ranges of a prior or language model over `layout`.

    Args:
        layout: the codes.
        text_size: how many ids the condition has: text tokens, or class labels; 0 for none.
        max_grid: the largest extent of the coarsest grid that a size token can announce.
        multiple: the vocabulary is padded to a multiple of this.
        specials: names of the special tokens; those of a prior, unless a language model needs others.

    Example:
        >>> from vqtok.codes import CodeLayout, LevelLayout
        >>> vocabulary = CodeVocabulary(CodeLayout(2, (LevelLayout(8, 1, 16), LevelLayout(4, 1, 32))), text_size=100, max_grid=8)
        >>> vocabulary.offset(1), vocabulary.size, vocabulary.padded_size
        (126, 158, 192)

    Raises:
        ValueError: a size is negative, there are more than `MAX_CODEBOOKS` codebooks, or one of over 65,536 entries has no exact
            factors.
    """

    layout: CodeLayout
    text_size: int = 0
    max_grid: int = 64
    multiple: int = 64
    specials: tuple[str, ...] = SPECIAL_TOKENS

    def __post_init__(self) -> None:
        for name, least in (("text_size", 0), ("max_grid", 1), ("multiple", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"CodeVocabulary.{name} must be an integer of at least {least}, got {value!r}")
        names = self.specials
        if (
            not isinstance(names, tuple)
            or not all(isinstance(name, str) for name in names)
            or len(set(names)) < len(names)
        ):
            raise ValueError(
                f"CodeVocabulary.specials must be different names, got {names!r:.80}: such as {SPECIAL_TOKENS}"
            )
        count = sum(level.num_codebooks for level in self.layout.levels)
        if count > MAX_CODEBOOKS:  # a file may say so, and a list of them would fill the memory
            raise ValueError(f"a layout of {count} codebooks is no vocabulary's: at most {MAX_CODEBOOKS} are possible")
        _ = self.streams

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """Every run of code ids, level by level, codebook by codebook."""
        streams: list[Stream] = []
        offset = self.text_size + len(self.specials) + self.max_grid
        for index, level in enumerate(self.layout.levels):
            sizes = factors(level.codebook_size) * level.num_codebooks
            for codebook, size in enumerate(sizes):
                streams.append(Stream(index, codebook, size, offset))
                offset += size
        return tuple(streams)

    @property
    def size(self) -> int:
        """Ids in use."""
        return self.streams[-1].offset + self.streams[-1].size

    @property
    def padded_size(self) -> int:
        """Ids in use, rounded up to `multiple`: the rows of the embedding."""
        return math.ceil(self.size / self.multiple) * self.multiple

    def special_id(self, name: str) -> int:
        """The id of a special token: of a prior "null" (the learned null condition) or "begin" (codes follow)."""
        if name not in self.specials:
            raise ValueError(f"no special token {name!r}: there are {', '.join(self.specials)}")
        return self.text_size + self.specials.index(name)

    @property
    def size_offset(self) -> int:
        """The id of the size token that announces an extent of 1."""
        return self.text_size + len(self.specials)

    def offset(self, level: int, codebook: int = 0) -> int:
        """The id of code 0 of this level and codebook (or factor)."""
        return self._stream(level, codebook).offset

    def split(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Codes with every codebook over 65,536 entries replaced by its factors: each `(B, Q, *grid)` -> `(B, Q * F, *grid)`.

        Raises:
            ValueError: a code is out of range.
        """
        return tuple(self._split(index, codes) for index, codes in enumerate(levels))

    def _split(self, level: int, codes: Tensor) -> Tensor:
        size = self.layout.levels[level].codebook_size
        check_range(codes, size, f"level {level}")
        parts = factors(size)
        if len(parts) == 1:
            return codes
        high = [torch.div(codes, parts[1], rounding_mode="floor"), codes % parts[1]]
        return torch.stack(high, dim=2).flatten(1, 2)

    def merge(self, levels: Sequence[Tensor], first_level: int = 0) -> tuple[Tensor, ...]:
        """The exact inverse of `split`, for levels from `first_level` on."""
        out = []
        for index, codes in enumerate(levels, first_level):
            parts = factors(self.layout.levels[index].codebook_size)
            if len(parts) > 1:
                codes = codes[:, 0::2] * parts[1] + codes[:, 1::2]
            out.append(codes)
        return tuple(out)

    def to_ids(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Ids of codes: each `(B, Q, *grid)` -> `(B, Q * F, *grid)`, every codebook (or factor) shifted to its own run."""
        return tuple(self.level_ids(index, codes) for index, codes in enumerate(levels))

    def level_ids(self, level: int, codes: Tensor) -> Tensor:
        """Ids of the codes of one level: `(B, Q, *grid)` -> `(B, Q * F, *grid)`."""
        streams = self._split(level, codes)
        return streams + self._offsets(level, streams)

    def from_ids(self, ids: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The exact inverse of `to_ids`."""
        return self.merge([value - self._offsets(index, value) for index, value in enumerate(ids)])

    def locate(self, token: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """What an id means: ("text", id), (special token, 0), ("size", extent), ("code", level, codebook, code) or ("padding", 0)."""
        if not 0 <= token < self.padded_size:
            raise ValueError(f"id {token} is outside [0, {self.padded_size})")
        if token < self.text_size:
            return ("text", token)
        if token < self.size_offset:
            return (self.specials[token - self.text_size], 0)
        if token < self.size_offset + self.max_grid:
            return ("size", token - self.size_offset + 1)
        for stream in self.streams:
            if token < stream.offset + stream.size:
                return ("code", stream.level, stream.codebook, token - stream.offset)
        return ("padding", 0)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `from_dict` turns back into an equal vocabulary."""
        fields: dict[str, Any] = {
            "layout": self.layout.to_dict(),
            "text_size": self.text_size,
            "max_grid": self.max_grid,
            "multiple": self.multiple,
        }
        return fields if self.specials == SPECIAL_TOKENS else {**fields, "specials": list(self.specials)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> CodeVocabulary:
        """The vocabulary that `to_dict` described."""
        known = {"layout", "text_size", "max_grid", "multiple"}
        if not isinstance(value, Mapping) or set(value) - {"specials"} != known:
            raise ValueError(f"a code vocabulary is a dict with the keys {sorted(known)}, got {value!r}")
        sizes = {name: value[name] for name in ("text_size", "max_grid", "multiple")}
        specials = value.get("specials", SPECIAL_TOKENS)
        specials = tuple(specials) if isinstance(specials, list) else specials
        return cls(CodeLayout.from_dict(value["layout"]), **sizes, specials=specials)

    def _stream(self, level: int, codebook: int) -> Stream:
        for stream in self.streams:
            if (stream.level, stream.codebook) == (level, codebook):
                return stream
        raise ValueError(f"no level {level} codebook {codebook} in {self.layout}")

    def _offsets(self, level: int, codes: Tensor) -> Tensor:
        offsets = [self.offset(level, codebook) for codebook in range(codes.shape[1])]
        return torch.tensor(offsets, device=codes.device).view(1, -1, *[1] * (codes.ndim - 2))


def factors(codebook_size: int) -> tuple[int, ...]:
    """(K,) for K up to 65,536, else the two exact factors of K nearest to each other, the larger digit first.

    Raises:
        ValueError: K has no two factors of at most 65,536.
    """
    if codebook_size <= MAX_CODEBOOK_SIZE:
        return (codebook_size,)
    least = -(-codebook_size // MAX_CODEBOOK_SIZE)
    for low in range(math.isqrt(codebook_size), least - 1, -1):
        if codebook_size % low == 0:
            return (codebook_size // low, low)
    raise ValueError(
        f"a codebook of {codebook_size} entries cannot be written as two factors of at most {MAX_CODEBOOK_SIZE}: "
        "choose a power of two"
    )
