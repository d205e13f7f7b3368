"""Ids of codes behind the ids of a text tokenizer, for one or more modalities, and the order in which codes stand.

    [ text | image: begin, end, row, sizes, codes | audio: begin, end, sizes, codes | padding to a multiple ]

Each block is a `CodeVocabulary`. A medium is written as

    begin, size of the coarsest grid along each axis, level 0, level 1, ..., end

coarse to fine, place by place, the codebooks of a place one after another; in a grid of two axes every row ends with `row`. Ids
are found by arithmetic. Names are added to the tokenizer so that other programs can show them; nothing here ever reads one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from vqtok.codes import CodeLayout, Codes
from vqtok.vocabulary import CodeVocabulary

SPECIALS = {1: ("begin", "end"), 2: ("begin", "end", "row")}  # by the number of axes
NAME = re.compile(r"[a-z][a-z0-9]*")


@dataclass(frozen=True)
class Modality:
    """One kind of media inside a language model.

    Attributes:
        name: letters and digits, such as "image"; it stands in the names of the tokens.
        layout: of the codes.
        max_grid: the largest extent of the coarsest grid that a size token can announce.
        fingerprint: the code space; None while the VQ tokenizer was never saved.

    Raises:
        ValueError: the name has other characters.
    """

    name: str
    layout: CodeLayout
    max_grid: int = 64
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name) or self.name in ("text", "padding"):
            raise ValueError(
                f"a modality is named by small letters and digits, and not 'text' or 'padding', got {self.name!r}: say 'image'"
            )
        if not isinstance(self.fingerprint, str | None):
            raise ValueError(f"a fingerprint is a string or None, got {self.fingerprint!r}")


@dataclass(frozen=True)
class MultimodalVocabulary:
    """The ids of a language model that knows codes.

    Args:
        text_size: how many ids the text tokenizer has; the codes stand behind them.
        modalities: in the order of their blocks.
        multiple: the rows of the model are padded to a multiple of this.

    Example:
        >>> from vqtok.codes import CodeLayout, LevelLayout
        >>> image = Modality("image", CodeLayout(2, (LevelLayout(8, 1, 16), LevelLayout(4, 1, 32))), max_grid=8)
        >>> vocabulary = MultimodalVocabulary(100, (image,))
        >>> vocabulary.id("image", 1, 0, 17), vocabulary.locate(144), vocabulary.name(144)
        (144, ('image', 'code', 1, 0, 17), '<|image_1_0_17|>')
        >>> vocabulary.size, vocabulary.padded_size, vocabulary.num_tokens("image", (32, 16))
        (159, 192, 56)

    Raises:
        ValueError: no modalities, two of one name, or a number out of range.
    """

    text_size: int
    modalities: tuple[Modality, ...]
    multiple: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", tuple(self.modalities))
        names = [modality.name for modality in self.modalities]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a multimodal vocabulary needs modalities, each of its own name, got {names}")
        for name, least in (("text_size", 1), ("multiple", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"MultimodalVocabulary.{name} must be an integer of at least {least}, got {value!r}")
        _ = self.blocks

    @cached_property
    def blocks(self) -> dict[str, CodeVocabulary]:
        """The ids of each modality; "text" is everything in front of its block."""
        blocks, start = {}, self.text_size
        for modality in self.modalities:
            specials = SPECIALS[modality.layout.ndim]
            blocks[modality.name] = CodeVocabulary(modality.layout, start, modality.max_grid, 1, specials)
            start = blocks[modality.name].size
        return blocks

    @property
    def size(self) -> int:
        """Ids in use."""
        return self.blocks[self.modalities[-1].name].size

    @property
    def padded_size(self) -> int:
        """Ids in use, rounded up to `multiple`."""
        return math.ceil(self.size / self.multiple) * self.multiple

    def block(self, name: str) -> CodeVocabulary:
        """The ids of the modality `name`."""
        if name not in self.blocks:
            raise ValueError(f"no modality {name!r}: there are {', '.join(self.blocks)}")
        return self.blocks[name]

    def modality(self, name: str) -> Modality:
        """The modality `name`."""
        self.block(name)
        return next(modality for modality in self.modalities if modality.name == name)

    # -- ids and their meaning, by arithmetic

    def id(self, name: str, level: int, codebook: int, code: int) -> int:
        """The id of a code. A codebook of more than 65,536 entries counts as two, its factors (see `CodeVocabulary.split`).

        Raises:
            ValueError: no such modality, level, codebook or code.
        """
        for stream in self.block(name).streams:
            if (stream.level, stream.codebook) == (level, codebook) and 0 <= code < stream.size:
                return stream.offset + code
        raise ValueError(f"no code {code} in level {level}, codebook {codebook} of {name!r}")

    def special_id(self, name: str, special: str) -> int:
        """The id of "begin" or "end", or of "row" in a grid of two axes."""
        return self.block(name).special_id(special)

    def size_id(self, name: str, extent: int) -> int:
        """The id that announces an extent of the coarsest grid.

        Raises:
            ValueError: it is larger than `max_grid`.
        """
        block = self.block(name)
        if not 1 <= extent <= block.max_grid:
            raise ValueError(
                f"{name}: a coarsest grid of {extent} places along one axis, the vocabulary knows 1 to {block.max_grid}: make the "
                "medium smaller, or extend with a larger max_grid"
            )
        return block.size_offset + extent - 1

    def locate(self, token: int) -> tuple[Any, ...]:
        """What an id means: ("text", id), (modality, "begin" | "end" | "row"), (modality, "size", extent), (modality, "code", level,
        codebook, code), or ("padding",) behind all of them.

        Raises:
            ValueError: below 0.
        """
        if token < 0:
            raise ValueError(f"id {token} is below 0")
        if token < self.text_size:
            return ("text", token)
        for name, block in self.blocks.items():
            if token < block.size:
                kind, *rest = block.locate(token)
                return (name, kind) if kind in block.specials else (name, kind, *rest)
        return ("padding",)

    def name(self, token: int) -> str:
        """The name of an id behind the text, for other programs: `<|image_begin|>`, `<|image_size_4|>`, `<|image_0_0_17|>`."""
        modality, *rest = self.locate(token)
        if modality in ("text", "padding"):
            raise ValueError(f"id {token} is of {modality}, and only ids of media have names here")
        kind, *rest = rest
        return f"<|{'_'.join(map(str, (modality, *([kind] if kind != 'code' else []), *rest)))}|>"

    def names(self) -> Iterator[str]:
        """The names of all ids of media, in the order of the ids."""
        for name, block in self.blocks.items():
            yield from (f"<|{name}_{special}|>" for special in block.specials)
            yield from (f"<|{name}_size_{extent}|>" for extent in range(1, block.max_grid + 1))
            for stream in block.streams:
                yield from (f"<|{name}_{stream.level}_{stream.codebook}_{code}|>" for code in range(stream.size))

    # -- grids

    def num_tokens(self, name: str, size: Sequence[int]) -> int:
        """How many ids a medium of `size` pixels or samples becomes, `begin` and `end` among them."""
        block = self.block(name)
        return 1 + block.layout.ndim + len(plan(block, block.layout.grids(size)[0]))

    def header(self, name: str, size: Sequence[int]) -> list[int]:
        """`begin` and the size tokens of a medium of `size` pixels or samples.

        Raises:
            ValueError: its grid is larger than `max_grid`.
        """
        grid = self.block(name).layout.grids(size)[0]
        return [self.special_id(name, "begin"), *(self.size_id(name, extent) for extent in grid)]

    def write(self, name: str, codes: Codes) -> list[list[int]]:
        """The ids of each sample of `codes`, from `begin` to `end`.

        Raises:
            ValueError: codes of another layout, fewer levels or codebooks than it has, or a grid larger than `max_grid`.
        """
        block = self.block(name)
        depths = [level.num_codebooks for level in block.layout.levels]
        if codes.layout != block.layout or [level.shape[1] for level in codes.levels] != depths:
            raise ValueError(
                f"{name}: codes of the layout {codes.layout.to_dict()} with {[level.shape[1] for level in codes.levels]} codebooks per "
                f"level, the vocabulary is of {block.layout.to_dict()}: give all levels and codebooks of its own tokenizer"
            )
        rows = []
        for sample in codes:
            ids = [_flat(block, level, block.level_ids(level, value)[0]) for level, value in enumerate(sample.levels)]
            body = torch.cat([*ids, torch.tensor([block.special_id("end")])])
            rows.append(self.header(name, sample.sizes[0].tolist()) + body.tolist())
        return rows

    def read(self, name: str, grid: Sequence[int], ids: Sequence[int]) -> tuple[Tensor, ...]:
        """The inverse of `write`: the finished levels, each `(1, Q, *grid)`, of ids that follow the size tokens.

        Args:
            grid: the coarsest grid, as the size tokens say.
            ids: as many as there are, each where `plan` allows it.
        """
        block = self.block(name)
        levels, at = [], 0
        for level, extents in enumerate(_grids(block, tuple(grid))):
            streams = sum(stream.level == level for stream in block.streams)
            length = _length(block, extents, streams)
            if at + length > len(ids):
                break
            levels.append(_grid(block, torch.tensor(ids[at : at + length]), extents, streams))
            at += length
        return block.from_ids(levels)

    # -- files

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `from_dict` turns back into an equal vocabulary."""
        modalities = [
            {
                "name": modality.name,
                "layout": modality.layout.to_dict(),
                "max_grid": modality.max_grid,
                "fingerprint": modality.fingerprint,
            }
            for modality in self.modalities
        ]
        return {"text_size": self.text_size, "multiple": self.multiple, "modalities": modalities}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> MultimodalVocabulary:
        """The vocabulary that `to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        try:
            modalities = [
                Modality(**{**each, "layout": CodeLayout.from_dict(each["layout"])}) for each in value["modalities"]
            ]
            return cls(**{**value, "modalities": tuple(modalities)})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"a multimodal vocabulary is a dict of text_size, multiple and modalities ({type(error).__name__}: {error}), "
                f"got {value!r}"
            ) from None


@lru_cache(maxsize=512)
def plan(block: CodeVocabulary, grid: tuple[int, ...]) -> Tensor:
    """What may stand behind the size tokens of a medium whose coarsest grid is `grid`: int64 `(P, 2)`, first id and how many, up to
    and with `end`."""
    parts = []
    for level, extents in enumerate(_grids(block, grid)):
        streams = [(stream.offset, stream.size) for stream in block.streams if stream.level == level]
        ranges = torch.tensor(streams).T.reshape(2, len(streams), *[1] * len(extents))
        ranges = ranges.expand(2, len(streams), *extents)
        row = [block.special_id("row"), 1] if len(extents) == 2 else [0, 0]
        parts.append(torch.stack([_with_rows(values, end) for values, end in zip(ranges, row, strict=True)], 1))
    return torch.cat([*parts, torch.tensor([[block.special_id("end"), 1]])])


def _grids(block: CodeVocabulary, grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return block.layout.grids([extent * block.layout.stride for extent in grid])


def _flat(block: CodeVocabulary, level: int, ids: Tensor) -> Tensor:
    """Ids `(Q, *grid)` of a level in the order of the sequence, with the ends of rows."""
    return _with_rows(ids, block.special_id("row") if block.layout.ndim == 2 else 0)


def _with_rows(values: Tensor, row: int) -> Tensor:
    """`(Q, *grid)` place by place, the Q of a place together; in two axes `row` behind each row."""
    if values.ndim == 2:
        return values.T.flatten()
    height = values.shape[1]
    rows = values.permute(1, 2, 0).reshape(height, -1)
    return torch.cat([rows, rows.new_full((height, 1), row)], 1).flatten()


def _length(block: CodeVocabulary, extents: Sequence[int], streams: int) -> int:
    return streams * math.prod(extents) + (extents[0] if block.layout.ndim == 2 else 0)


def _grid(block: CodeVocabulary, ids: Tensor, extents: Sequence[int], streams: int) -> Tensor:
    """The inverse of `_flat`, `(1, Q, *grid)`."""
    if block.layout.ndim == 1:
        return ids.view(*extents, streams).T[None]
    height, width = extents
    return ids.view(height, -1)[:, :-1].reshape(height, width, streams).permute(2, 0, 1)[None]
