"""Codes that are known beforehand, and which of them a sample keeps: continuation, completion, inpainting, given coarse levels.

Axis letters: B batch, Q codebooks, P code positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vqtok.codes import CodeLayout, Codes
from vqtok.fingerprint import check_fingerprint
from vqtok.vocabulary import CodeVocabulary

from .configuration_code_prior import CodePriorConfig
from .sequence import OrderTable, flatten


@dataclass(frozen=True)
class Known:
    """Codes of which some are kept while others are drawn.

    Attributes:
        codes: maybe a prefix of levels or codebooks, maybe smaller than what is drawn: they then lie at its beginning.
        keep: per level of `codes` bool `(B, *grid)`, true where its codes are kept; None keeps all of them.

    Raises:
        ValueError: masks that do not fit the codes.
    """

    codes: Codes
    keep: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if self.keep is None:
            return
        wanted = [(len(self.codes), *level.shape[2:]) for level in self.codes.levels]
        found = [tuple(mask.shape) for mask in self.keep]
        if found != wanted or any(mask.dtype != torch.bool for mask in self.keep):
            raise ValueError(f"keep must be bool masks of the shapes {wanted}, one per level, got {found}")

    @classmethod
    def where(cls, codes: Codes, mask: Tensor) -> Known:
        """Keep the codes whose whole cell is true in `mask`, bool `(*size)` or `(B, *size)` in pixels, samples or bytes.

        Example:
            >>> from vqtok.codes import LevelLayout
            >>> codes = Codes((torch.zeros(1, 1, 2, 2, dtype=torch.int64),), [[4, 4]], CodeLayout(2, (LevelLayout(2, 1, 5),)))
            >>> mask = torch.ones(4, 4, dtype=torch.bool)
            >>> mask[3, 0] = False
            >>> Known.where(codes, mask).keep[0].tolist()
            [[[True, True], [False, True]]]

        Raises:
            ValueError: a mask of another size than the media, or media of different sizes.
        """
        mask = torch.as_tensor(mask)
        sizes = {tuple(size) for size in codes.sizes.tolist()}
        size = next(iter(sizes), ())
        mask = mask.expand(len(codes), *mask.shape) if mask.ndim == codes.layout.ndim else mask
        if len(sizes) != 1 or mask.dtype != torch.bool or tuple(mask.shape) != (len(codes), *size):
            raise ValueError(
                f"a mask of what to keep is bool and has the size of the media, {size}, got {mask.dtype} {tuple(mask.shape)}"
                + (" for media of several sizes: mask each size by itself" if len(sizes) > 1 else "")
            )
        keep = []
        for level in codes.layout.levels[: len(codes.levels)]:
            padding = [
                p
                for n, full in zip(reversed(size), reversed(codes.layout.padded(size)), strict=True)
                for p in (0, full - n)
            ]
            lost = F.pad(~mask, padding, value=False)[:, None].float()
            pool = F.max_pool2d if codes.layout.ndim == 2 else F.max_pool1d
            keep.append(pool(lost, level.stride)[:, 0] == 0)
        return cls(codes, tuple(keep))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, indices: Sequence[int]) -> Known:
        """The chosen samples."""
        codes = self.codes[indices]
        if self.keep is None:
            return replace(self, codes=codes)
        grids = [level.shape[2:] for level in codes.levels]
        keep = [mask[list(indices)][(slice(None), *map(slice, g))] for mask, g in zip(self.keep, grids, strict=True)]
        return Known(codes, tuple(keep))

    def on_table(
        self, vocabulary: CodeVocabulary, table: OrderTable, first_level: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Ids, and which of them are kept, both `(B, P)` in the table's order; ids that are not kept mean nothing."""
        layout, batch = vocabulary.layout, len(self)
        ids, forced = [], []
        own = range(first_level, first_level + len(table.shapes))
        for level, shape in zip(own, table.shapes, strict=True):
            facts = layout.levels[level]
            codes = torch.zeros(batch, facts.num_codebooks, *shape[1:], dtype=torch.int64)
            kept = torch.zeros(codes.shape, dtype=torch.bool)
            if level < len(self.codes.levels):
                given = self.codes.levels[level].cpu()
                corner = (slice(None), slice(given.shape[1]), *map(slice, given.shape[2:]))
                codes[corner] = given
                kept[corner] = self._kept(level)[:, None]
            factors = shape[0] // facts.num_codebooks
            ids.append(vocabulary.level_ids(level, codes))
            forced.append(kept.repeat_interleave(factors, 1))
        return flatten(ids, table).to(device), flatten(forced, table).to(device)

    def _kept(self, level: int) -> Tensor:
        """bool `(B, *grid)`: kept, and no padding of a smaller sample."""
        grid = self.codes.levels[level].shape[2:]
        inside = torch.zeros(len(self), *grid, dtype=torch.bool)
        for sample, size in enumerate(self.codes.sizes.tolist()):
            inside[(sample, *map(slice, self.codes.layout.grids(size)[level]))] = True
        return inside if self.keep is None else inside & self.keep[level].cpu()


def known_rows(known: Known | Codes | None, count: int, config: CodePriorConfig) -> Known | None:
    """What was given, as one sample per condition.

    Raises:
        ValueError: codes of another layout or code space, another number of samples, or the given levels of a finer stage are missing.
    """
    if known is None:
        if config.first_level:
            raise ValueError(
                f"this prior predicts levels from {config.first_level} on and is given the coarser ones: pass them as known=codes, or "
                "draw with the whole cascade"
            )
        return None
    known = Known(known) if isinstance(known, Codes) else known
    layout = CodeLayout.from_dict(config.layout)
    if known.codes.layout != layout:
        raise ValueError(
            f"the known codes have the layout {known.codes.layout}, the prior was made for {layout}: use the tokenizer of the prior"
        )
    if config.fingerprint is not None and known.codes.fingerprint is not None:
        check_fingerprint(config.fingerprint, known.codes.fingerprint, "the known codes")
    whole = [v.shape[1] == level.num_codebooks for v, level in zip(known.codes.levels, layout.levels, strict=False)]
    if whole[: config.first_level] != [True] * config.first_level:
        raise ValueError(f"the known codes must hold the first {config.first_level} levels with all their codebooks")
    if len(known) == 1 and count > 1:
        known = known[[0] * count]
    if len(known) != count:
        raise ValueError(f"there are {len(known)} known samples for {count} conditions: give one for all, or one each")
    return known


def check_fits(known: Known, sizes: Sequence[Sequence[int]], config: CodePriorConfig) -> None:
    """Refuse known codes that are larger than what is drawn; given levels must be of exactly its size."""
    layout = CodeLayout.from_dict(config.layout)
    for index, (own, wanted) in enumerate(zip(known.codes.sizes.tolist(), sizes, strict=True)):
        here, there = layout.padded(own), layout.padded(wanted)
        if any(a > b for a, b in zip(here, there, strict=True)) or (config.first_level and here != there):
            raise ValueError(
                f"sample {index}: the known codes are of size {tuple(own)}, which does not fit into {tuple(wanted)}"
                + (
                    ": a finer stage keeps the size of its coarse codes"
                    if config.first_level
                    else ": draw something larger"
                )
            )
