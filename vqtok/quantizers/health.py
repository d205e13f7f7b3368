"""The health of codebooks while they train: how much of each is used, and what to try when that is little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Quantizer
from .collective import Accumulator
from .configuration import QuantizerConfig
from .configuration_layered import LayeredConfig
from .functional import code_counts, entropy_bits, perplexity, usage
from .hierarchy import Hierarchy

_MAX_COUNTED = 1 << 22  # entries: of larger codebooks no histogram is kept
_COLLAPSED, _UNDERUSED = 0.1, 0.5  # shares of what uniform use of as many codes would have hit


class CodebookReport(NamedTuple):
    """One codebook's numbers.

    Attributes:
        level: coarse to fine.
        codebook: position in the level's depth.
        codebook_size: K.
        usage: share of the codes hit in the last whole window (before there is one: since the start).
        perplexity: of that window's histogram, in [1, K].
        entropy_bits: of that window's histogram, in [0, log2 K].
        usage_epoch: share of the codes hit in the last whole epoch (before there is one: since it began).
        expected_usage: what uniform use of as many codes would have hit.
        whole: whether there was a whole window yet.
    """

    level: int
    codebook: int
    codebook_size: int
    usage: float
    perplexity: float
    entropy_bits: float
    usage_epoch: float
    expected_usage: float
    whole: bool


class CodebookHealth(Accumulator):
    """Counts the codes of every training pass and reports per level and codebook; the same on every process.

    `observe(codes)` after each forward pass, then `update_all([*quantizer.accumulators, health])` in place of
    `quantizer.update()`: the counts travel in the same collective. Its state is part of a run, not of a model: a checkpoint that
    holds `state_dict()` continues exactly.

    Args:
        quantizer: of one level, or a hierarchy.
        window: codes of each codebook in a window.
        epoch_size: samples in an epoch; None: one epoch without end.

    Example:
        >>> from vqtok.quantizers import VectorQuantizer, update_all
        >>> quantizer = VectorQuantizer(8, codebook_size=32).train()
        >>> health = CodebookHealth(quantizer, window=1000)
        >>> out = quantizer(torch.randn(10, 20, 20, 8))
        >>> health.observe(out.codes)
        >>> update_all([*quantizer.accumulators, health])
        >>> [(each.level, each.usage) for each in health.report()]
        [(0, 1.0)]
    """

    samples: Tensor
    revived: Tensor
    _pending: list[Tensor | None]

    def __init__(self, quantizer: Quantizer | Hierarchy, window: int = 65_536, epoch_size: int | None = None):
        super().__init__()
        if window < 1 or (epoch_size is not None and epoch_size < 1):
            raise ValueError(f"window and epoch_size must be at least 1, got {window} and {epoch_size}")
        self.window, self.epoch_size = window, epoch_size
        self._levels = level_configs(quantizer)
        self._codebooks = quantizer.codebooks
        # Not the module itself: its weights are not this one's state.
        self._is_initialised, self._is_frozen = lambda: quantizer.is_initialised, lambda: quantizer.frozen
        self._seen_revived = 0
        self._entries = [(level, q) for level, config in enumerate(self._levels) for q in range(config.depth)]
        for index, (level, _) in enumerate(self._entries):
            size = self._levels[level].size
            for span in ("window", "epoch"):  # what is being counted, and the last whole one
                for state in ("now", "last"):
                    counted = size if size <= _MAX_COUNTED else 0
                    self.register_buffer(f"{span}_{state}_{index}", torch.zeros(counted, dtype=torch.int64))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))
        self.register_buffer("revived", torch.zeros((), dtype=torch.int64))
        self.drop_pending()

    @torch.no_grad()
    def observe(self, codes: Sequence[Tensor] | Tensor) -> None:
        """Count the codes of one pass: a tuple over levels, each int64 `(B, Q, *grid)`, or those of a single level."""
        levels = [codes] if isinstance(codes, Tensor) else list(codes)
        for index, (level, q) in enumerate(self._entries):
            if size := len(self._buffer("window_now", index)):
                counts = code_counts(levels[level][:, q], size)
                pending = self._pending[index]
                self._pending[index] = counts if pending is None else pending + counts
        self._samples += len(levels[0])

    def drop_pending(self) -> None:
        """Forget what was observed since the last update."""
        super().drop_pending()
        self._pending = [None] * len(self._entries)
        self._samples = 0

    def packed(self, rank: int, world_size: int) -> list[Tensor]:
        """The counts of each codebook, and the number of samples."""
        counts = [
            torch.zeros_like(self._buffer("window_now", index)) if pending is None else pending
            for index, pending in enumerate(self._pending)
        ]
        return [*(each.float() for each in counts), self.samples.new_tensor(self._samples).float()]

    def apply_sums(self, *sums: Tensor) -> None:
        """Add to window and epoch, and close those that are full."""
        *counts, samples = sums
        self.samples += samples.long()
        epoch_ends = self.epoch_size is not None and int(self.samples) >= self.epoch_size
        for index, count in enumerate(counts):
            for span in ("window", "epoch"):
                self._buffer(f"{span}_now", index).add_(count.long())
            self._close("window", index, int(self._buffer("window_now", index).sum()) >= self.window)
            self._close("epoch", index, epoch_ends)
        if epoch_ends:
            self.samples.zero_()
        revived = sum(codebook.num_revived for codebook in self._codebooks)
        self.revived += revived - self._seen_revived
        self._seen_revived = revived

    def report(self) -> list[CodebookReport]:
        """The numbers of every codebook that is counted, level by level."""
        reports = []
        for index, (level, q) in enumerate(self._entries):
            counts, epoch = self._counts("window", index), self._counts("epoch", index)
            if len(counts):
                size = len(counts)
                expected = 1 - (1 - 1 / size) ** int(counts.sum())
                whole = bool(self._buffer("window_last", index).any())
                numbers = (usage(counts), perplexity(counts), entropy_bits(counts), usage(epoch), expected, whole)
                reports.append(CodebookReport(level, q, size, *numbers))
        return reports

    def summary(self) -> dict[str, float]:
        """Few numbers for a log line: per level `usage_0`, `perplexity_0` (means over its codebooks), and `revived` in all."""
        out: dict[str, float] = {}
        reports = self.report()
        for level in sorted({each.level for each in reports}):
            mine = [each for each in reports if each.level == level]
            out[f"usage_{level}"] = sum(each.usage for each in mine) / len(mine)
            out[f"perplexity_{level}"] = sum(each.perplexity for each in mine) / len(mine)
        if self._codebooks:
            out["revived"] = float(self.revived)
        return out

    def warnings(self) -> list[str]:
        """A sentence for every codebook that collapses or is half empty over a whole window, with the next thing to try.

        Of frozen codes, which are as they were made, only a collapse is worth one.
        """
        sentences, too_few = [], _COLLAPSED if self._is_frozen() else _UNDERUSED
        for each in self.report():
            share = each.usage / each.expected_usage if each.expected_usage else 1.0
            if not each.whole or each.codebook_size == 1 or share >= too_few:
                continue
            where = f"level {each.level}" + (
                f", codebook {each.codebook}" if self._levels[each.level].depth > 1 else ""
            )
            used = round(each.usage * each.codebook_size)
            state = "the codebook collapses" if share < _COLLAPSED else "much of the codebook is idle"
            sentences.append(
                f"{where}: {used} of {each.codebook_size} codes in use ({each.usage:.1%}, perplexity {each.perplexity:.1f}): "
                f"{state}. Next to try: {self._advice(each)}"
            )
        return sentences

    def _advice(self, report: CodebookReport) -> str:
        if self._is_frozen():
            return "training the codes too, which are frozen here"
        config = self._levels[report.level]
        config = config.layer_config if isinstance(config, LayeredConfig) else config
        return advice(config, fresh=not self._is_initialised())

    def _buffer(self, name: str, index: int) -> Tensor:
        buffer: Tensor = getattr(self, f"{name}_{index}")
        return buffer

    def _counts(self, span: str, index: int) -> Tensor:
        last = self._buffer(f"{span}_last", index)
        return last if len(last) and int(last.sum()) else self._buffer(f"{span}_now", index)

    def _close(self, span: str, index: int, full: bool) -> None:
        if full:
            self._buffer(f"{span}_last", index).copy_(self._buffer(f"{span}_now", index))
            self._buffer(f"{span}_now", index).zero_()


def level_configs(quantizer: Quantizer | Hierarchy) -> list[QuantizerConfig]:
    """The configuration of each level's codebooks, coarse to fine."""
    return [quantizer.config] if isinstance(quantizer, Quantizer) else quantizer.level_configs


def advice(config: QuantizerConfig, fresh: bool) -> str:
    """The first remedy that is not in use yet.

    Args:
        config: of the codebook that is little used.
        fresh: its table was never initialised from data.
    """
    options: dict[str, Any] = config.to_dict()
    remedies = [
        (
            fresh and "update" in options,
            "start the table from data: quantizer.initialise(latents), model.init_codebooks(batches)",
        ),
        (options.get("revival_threshold") == 0, "revival_threshold=0.05, so that idle codes are moved onto latents"),
        (options.get("update") == "gradient" and options.get("metric") == "euclidean", "update='ema'"),
        (options.get("metric") == "euclidean", "metric='cosine' with a codebook_dim of 8 to 32"),
        (options.get("entropy_weight", 1) == 0, "entropy_weight=0.1"),
        (config.type in ("lfq", "bsq"), "a larger entropy_weight"),
        (config.type == "gumbel", "a larger kl_weight, or a final_temperature that is reached later"),
        (config.type == "sim", "quantizer.initialise(latents), which gives the codes the spread of the latents"),
        (config.type == "fsq", "a smaller learning rate, or fewer scalar_levels: the latents sit in few of them"),
    ]
    return next(
        (remedy for applies, remedy in remedies if applies),
        "a smaller codebook_size, a smaller learning rate, or type 'fsq'",
    )
