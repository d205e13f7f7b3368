"""Codes: the one form in which integers of every modality travel, their static layout, and the container they are saved in.

Laws (docs/design.md, section 3): a tuple over levels, coarse to fine, each `LongTensor (B, Q, *grid)`; `CodeLayout` is static,
`Codes` carries what a batch adds. Axis letters: B batch, Q codebooks of a level, h w t latent grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqtok.container import bits_for, frame, pack_bits, run_lengths, unframe, unpack_bits
from vqtok.files import write_bytes

MAX_CODES_WITHOUT_BITS = 1 << 24  # a codebook of one entry takes no bytes: a tiny file must not claim all the memory


@dataclass(frozen=True)
class LevelLayout:
    """One resolution of the hierarchy: `stride` input units per code along each axis, `num_codebooks` codes per grid
    position, each in [0, codebook_size).

    Raises:
        ValueError: a field is no positive integer.
    """

    stride: int
    num_codebooks: int = 1
    codebook_size: int = 512

    def __post_init__(self) -> None:
        for name in ("stride", "num_codebooks", "codebook_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"LevelLayout.{name} must be a positive integer, got {value!r}")

    @property
    def bits(self) -> float:
        """Bits of one grid position: num_codebooks * log2(codebook_size)."""
        return self.num_codebooks * math.log2(self.codebook_size)


@dataclass(frozen=True)
class CodeLayout:
    """The static shape of a code space: number of grid axes and the levels, coarse to fine.

    Strides never grow from one level to the next, and every stride is a multiple of the one after it, so that grids nest.

    Example:
        >>> layout = CodeLayout(ndim=2, levels=(LevelLayout(8, 1, 256), LevelLayout(4, 1, 512)))
        >>> layout.grids((30, 45))
        ((4, 6), (8, 12))

    Raises:
        ValueError: ndim is not 1 or 2, there is no level, or strides do not nest coarse to fine.
    """

    ndim: int
    levels: tuple[LevelLayout, ...]

    def __post_init__(self) -> None:
        if type(self.ndim) is not int or self.ndim not in (1, 2):
            raise ValueError(f"CodeLayout.ndim must be 1 (audio, text) or 2 (images), got {self.ndim!r}")
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels:
            raise ValueError("CodeLayout.levels must hold at least one LevelLayout")
        for level in self.levels:
            if not isinstance(level, LevelLayout):
                raise ValueError(f"CodeLayout.levels must hold LevelLayouts, got {level!r}")
        strides = [level.stride for level in self.levels]
        for coarse, fine in zip(strides, strides[1:], strict=False):
            if coarse % fine:
                raise ValueError(
                    f"CodeLayout strides must go from coarse to fine and nest (each a multiple of the next), got {strides}"
                )

    @property
    def stride(self) -> int:
        """The largest stride: inputs are padded to a multiple of it."""
        return self.levels[0].stride

    def padded(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size, rounded up per axis to a multiple of the largest stride."""
        return tuple(-(-int(n) // self.stride) * self.stride for n in self._checked(size))

    def grids(self, size: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The grid of each level for an input of `size` (pixels, samples or bytes), coarse to fine.

        Raises:
            ValueError: the size has another number of axes or an axis below 1.
        """
        padded = self.padded(size)
        return tuple(tuple(n // level.stride for n in padded) for level in self.levels)

    def num_codes(self, size: Sequence[int]) -> int:
        """How many integers an input of `size` becomes, over all levels and codebooks."""
        return sum(
            math.prod(grid) * level.num_codebooks for grid, level in zip(self.grids(size), self.levels, strict=True)
        )

    def bits(self, size: Sequence[int]) -> float:
        """Bits of an input of `size` at a fixed rate of log2(codebook_size) per code."""
        return sum(math.prod(grid) * level.bits for grid, level in zip(self.grids(size), self.levels, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `from_dict` turns back into an equal layout."""
        return {
            "ndim": self.ndim,
            "levels": [
                {"stride": level.stride, "num_codebooks": level.num_codebooks, "codebook_size": level.codebook_size}
                for level in self.levels
            ],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> CodeLayout:
        """The layout that `to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        if not isinstance(value, Mapping) or set(value) != {"ndim", "levels"}:
            raise ValueError(f"a code layout is a dict with the keys 'ndim' and 'levels', got {value!r}")
        try:
            return cls(value["ndim"], tuple(LevelLayout(**level) for level in value["levels"]))
        except TypeError as error:
            raise ValueError(
                f"code layout levels need the keys stride, num_codebooks, codebook_size: {error}"
            ) from None

    def _checked(self, size: Sequence[int]) -> Sequence[int]:
        if len(size) != self.ndim or any(int(n) < 1 for n in size):
            raise ValueError(f"a size for this layout has {self.ndim} axes of at least 1, got {tuple(size)}")
        return size


@dataclass(frozen=True)
class Codes:
    """A batch of codes with everything needed to decode it.

    Attributes:
        levels: coarse to fine, each int64 `(B, Q, *grid)` with values in [0, codebook_size). Samples of different size are
            right-padded with 0 to the largest grid; a shorter tuple than the layout's is a prefix of levels, fewer
            codebooks a prefix of the residual depth.
        sizes: int64 `(B, ndim)`, the input size of each sample in pixels, samples or bytes.
        layout: the static layout.
        fingerprint: the code space these integers belong to; None while the tokenizer was never saved.
        side: per-sample tensors `(B, ...)` such as gains.

    Raises:
        ValueError: shapes, ranges or dtypes that do not fit the layout, named.
    """

    levels: tuple[Tensor, ...]
    sizes: Tensor
    layout: CodeLayout
    fingerprint: str | None = None
    side: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "sizes", torch.as_tensor(self.sizes, dtype=torch.int64).cpu())
        self._check()

    def _check(self) -> None:
        layout = self.layout
        if self.sizes.ndim != 2 or self.sizes.shape[1] != layout.ndim:
            raise ValueError(f"sizes must have shape (B, {layout.ndim}), got {tuple(self.sizes.shape)}")
        if bool((self.sizes < 1).any()):
            raise ValueError(f"sizes must be at least 1, got {int(self.sizes.min())}")
        if not 1 <= len(self.levels) <= len(layout.levels):
            raise ValueError(
                f"codes have {len(self.levels)} levels, the layout {len(layout.levels)}: give a prefix of them"
            )
        batch = self.sizes.shape[0]
        grids = self._max_grids()
        for index, (codes, level) in enumerate(zip(self.levels, layout.levels, strict=False)):
            if codes.dtype != torch.int64:
                raise ValueError(f"level {index}: codes must be int64, got {codes.dtype}; convert them with .long()")
            if (
                codes.ndim != 2 + layout.ndim
                or codes.shape[0] != batch
                or not 1 <= codes.shape[1] <= level.num_codebooks
            ):
                raise ValueError(
                    f"level {index}: codes must have shape (B={batch}, 1<=Q<={level.num_codebooks}, *grid), got {tuple(codes.shape)}"
                )
            if batch and tuple(codes.shape[2:]) != grids[index]:
                raise ValueError(
                    f"level {index}: sizes up to {tuple(self.sizes.max(0).values.tolist())} need a grid of {grids[index]}, "
                    f"got {tuple(codes.shape[2:])}"
                )
            check_range(codes, level.codebook_size, f"level {index}")
        for name, value in self.side.items():
            if value.shape[:1] != (batch,):
                raise ValueError(f"side[{name!r}] must have {batch} rows, got shape {tuple(value.shape)}")

    def _max_grids(self) -> tuple[tuple[int, ...], ...]:
        if not self.sizes.shape[0]:
            return tuple((0,) * self.layout.ndim for _ in self.layout.levels)
        return self.layout.grids(self.sizes.max(0).values.tolist())

    def __len__(self) -> int:
        return int(self.sizes.shape[0])

    def __iter__(self) -> Iterator[Codes]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor) -> Codes:
        """The chosen samples (an index, a slice, indices or a mask) as `Codes` of their own, cropped to the largest grid
        among them.

        Raises:
            IndexError: an index is out of range, or a mask of another length.
        """
        if isinstance(index, slice):
            rows = torch.tensor(range(len(self))[index], dtype=torch.int64)
        else:
            wanted = torch.as_tensor(index).cpu()
            is_mask = wanted.dtype == torch.bool and wanted.ndim == 1
            rows = torch.arange(len(self))[wanted if is_mask else wanted.long()].reshape(-1)
        sizes = self.sizes[rows]
        grids = self.layout.grids(sizes.max(0).values.tolist()) if len(rows) else self._max_grids()
        levels = tuple(
            codes[rows.to(codes.device)][(slice(None), slice(None), *(slice(n) for n in grid))]
            for codes, grid in zip(self.levels, grids, strict=False)
        )
        side = {name: value[rows.to(value.device)] for name, value in self.side.items()}
        return Codes(levels, sizes, self.layout, self.fingerprint, side)

    def to(self, device: torch.device | str) -> Codes:
        """The same codes with every level and side tensor on `device`; `sizes` stay on the CPU."""
        side = {name: value.to(device) for name, value in self.side.items()}
        return Codes(tuple(c.to(device) for c in self.levels), self.sizes, self.layout, self.fingerprint, side)

    def prefix(self, num_levels: int | None = None, num_codebooks: int | None = None) -> Codes:
        """The first `num_levels` levels and the first `num_codebooks` codebooks of each: always decodable (law 4)."""
        for name, value, most in (
            ("num_levels", num_levels, len(self.levels)),
            ("num_codebooks", num_codebooks, max(c.shape[1] for c in self.levels)),
        ):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be between 1 and {most}, got {value}")
        levels = tuple(codes[:, :num_codebooks] for codes in self.levels[:num_levels])
        return Codes(levels, self.sizes, self.layout, self.fingerprint, self.side)

    @classmethod
    def cat(cls, parts: Iterable[Codes]) -> Codes:
        """One batch of several, right-padded to the largest grid.

        Raises:
            ValueError: no parts, or parts of different layouts, fingerprints, numbers of levels or codebooks, or
                side tensors.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("Codes.cat needs at least one part")
        first = parts[0]
        for part in parts[1:]:
            if part.layout != first.layout or len(part.levels) != len(first.levels):
                raise ValueError(f"cannot join codes of different layouts: {first.layout} and {part.layout}")
            if [codes.shape[1] for codes in part.levels] != [codes.shape[1] for codes in first.levels]:
                raise ValueError("cannot join codes of different numbers of codebooks: take the same prefix of each")
            if set(part.side) != set(first.side):
                raise ValueError(
                    f"cannot join codes with the side tensors {sorted(first.side)} and {sorted(part.side)}"
                )
            if part.fingerprint != first.fingerprint:
                raise ValueError(f"cannot join codes of fingerprints {first.fingerprint} and {part.fingerprint}")
        sizes = torch.cat([part.sizes for part in parts])
        grids = first.layout.grids(sizes.max(0).values.tolist()) if len(sizes) else first._max_grids()
        levels = tuple(
            torch.cat([_pad_grid(part.levels[i], grid) for part in parts])
            for i, grid in zip(range(len(first.levels)), grids, strict=False)
        )
        side = {name: torch.cat([part.side[name] for part in parts]) for name in first.side}
        return cls(levels, sizes, first.layout, first.fingerprint, side)

    def save(self, path: str | Path) -> None:
        """Write the container: magic, version, JSON header, one bit-packed run per level (exact to a byte), side tensors, CRC-32.

        Raises:
            OSError: the disk is full or the folder cannot be written; nothing is left behind.
        """
        write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Codes:
        """The codes that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is foreign, truncated, altered, or of a newer version; the reason is said.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_bytes(self) -> bytes:
        """The container as bytes (see `save`)."""
        header: dict[str, Any] = {
            "n": self.layout.ndim,
            "l": [[level.stride, level.num_codebooks, level.codebook_size] for level in self.layout.levels],
            "q": [codes.shape[1] for codes in self.levels],
            "f": self.fingerprint,
            "s": run_lengths(self.sizes.tolist()),
        }
        if self.side:
            header["x"] = {name: list(value.shape[1:]) for name, value in self.side.items()}
        payload = []
        for index, codes in enumerate(self.levels):
            flat = [
                codes[i][(slice(None), *(slice(n) for n in grids[index]))].reshape(-1)
                for i, grids in self._sample_grids()
            ]
            values = torch.cat(flat).cpu().numpy() if flat else np.zeros(0, np.int64)
            payload.append(pack_bits(values, bits_for(self.layout.levels[index].codebook_size)))
        payload += [value.detach().cpu().float().numpy().astype("<f4").tobytes() for value in self.side.values()]
        return frame(header, b"".join(payload))

    @classmethod
    def from_bytes(cls, data: bytes) -> Codes:
        """The codes of a container (see `load`)."""
        header, payload = unframe(data)
        return cls._from_payload(payload, *_read_header(header))

    @classmethod
    def _from_payload(
        cls,
        payload: bytes,
        layout: CodeLayout,
        sizes: Tensor,
        codebooks: list[int],
        fingerprint: str | None,
        side_shapes: dict[str, list[int]],
    ) -> Codes:
        batch = len(sizes)
        sample_grids = [layout.grids(size) for size in sizes.tolist()]
        counts = [q * sum(math.prod(grids[index]) for grids in sample_grids) for index, q in enumerate(codebooks)]
        if sum(counts) > 8 * len(payload) + MAX_CODES_WITHOUT_BITS:
            raise ValueError(f"the header promises {sum(counts)} codes, more than {len(payload)} bytes can hold")
        widths = [bits_for(level.codebook_size) for level in layout.levels]
        sizes_in_bytes = [math.ceil(n * w / 8) for n, w in zip(counts, widths, strict=False)]
        side_bytes = sum(4 * batch * math.prod(shape) for shape in side_shapes.values())
        if sum(sizes_in_bytes) + side_bytes != len(payload):
            raise ValueError(
                f"the payload has {len(payload)} bytes, the header promises {sum(sizes_in_bytes) + side_bytes}"
            )
        largest = layout.grids(sizes.max(0).values.tolist()) if batch else [(0,) * layout.ndim] * len(layout.levels)
        levels, at = [], 0
        for index, q in enumerate(codebooks):
            values = torch.from_numpy(
                unpack_bits(payload[at : at + sizes_in_bytes[index]], widths[index], counts[index])
            )
            at += sizes_in_bytes[index]
            parts = values.split([q * math.prod(grids[index]) for grids in sample_grids]) if batch else []
            padded = [
                _pad_grid(part.view(1, q, *grids[index]), largest[index])
                for part, grids in zip(parts, sample_grids, strict=True)
            ]
            levels.append(torch.cat(padded) if padded else torch.zeros((0, q, *largest[index]), dtype=torch.int64))
        side = {}
        for name, shape in side_shapes.items():
            n = batch * math.prod(shape)
            side[name] = torch.from_numpy(np.frombuffer(payload, "<f4", n, at).astype(np.float32)).view(batch, *shape)
            at += 4 * n
        return cls(tuple(levels), sizes, layout, fingerprint, side)

    def _sample_grids(self) -> Iterator[tuple[int, tuple[tuple[int, ...], ...]]]:
        return ((i, self.layout.grids(size)) for i, size in enumerate(self.sizes.tolist()))


def check_range(codes: Tensor, codebook_size: int, where: str) -> None:
    """Refuse codes outside [0, codebook_size) before they reach an embedding lookup.

    Raises:
        ValueError: naming `where`, the offending value and the range.
    """
    if codes.numel():
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < 0 or high >= codebook_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"{where}: code {bad} is outside [0, {codebook_size}); these codes are of another tokenizer"
            )


def _pad_grid(codes: Tensor, grid: Sequence[int]) -> Tensor:
    padding = [
        n for have, want in zip(reversed(codes.shape[2:]), reversed(tuple(grid)), strict=True) for n in (0, want - have)
    ]
    return torch.nn.functional.pad(codes, padding)


def _read_header(raw: bytes) -> tuple[CodeLayout, Tensor, list[int], str | None, dict[str, list[int]]]:
    try:
        header = json.loads(raw)
        layout = CodeLayout(header["n"], tuple(LevelLayout(*level) for level in header["l"]))
        codebooks, fingerprint, side = header["q"], header["f"], header.get("x", {})
        runs = header["s"]
        if any(type(n) is not int or not 1 <= n < 1 << 48 for run in runs for n in run) or any(
            len(run) != 1 + layout.ndim for run in runs
        ):
            raise ValueError(f"sizes {runs!r}")
        if sum(run[0] for run in runs) > 10_000_000:
            raise ValueError(f"{sum(run[0] for run in runs)} samples")
        if not isinstance(fingerprint, str | None):
            raise ValueError(f"fingerprint {fingerprint!r}")
        if len(codebooks) > len(layout.levels) or any(type(q) is not int or q < 1 for q in codebooks):
            raise ValueError(f"codebooks {codebooks!r}")
        if any(type(n) is not int or n < 1 for shape in side.values() for n in shape):
            raise ValueError(f"side {side!r}")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"the header of this file of codes makes no sense: {error}") from None
    rows = [run[1:] for run in runs for _ in range(run[0])]
    sizes = torch.tensor(rows, dtype=torch.int64).view(len(rows), layout.ndim)
    return layout, sizes, codebooks, fingerprint, side
