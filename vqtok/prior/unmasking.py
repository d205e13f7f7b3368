"""One batch of samples, unmasked pass after pass: drawn, or asked how likely they are.

Axis letters: B batch, L condition tokens, T input tokens, Q codebooks, P code positions, N positions of a level, n those of them that
a pass looks at, K entries of a stream, M width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .fast import decoder_for
from .masking import masked_per_codebook, reveal_order, split_passes
from .sampling import SamplingSettings, draw, guide
from .sequence import OrderTable
from .stepping import Prompt, check_finite


@dataclass(frozen=True)
class MaskedSettings(SamplingSettings):
    """How a masked prior draws: as every prior, and

    Attributes:
        num_passes: of all levels together, or a number per level.
        choice_temperature: of the noise in the choice of codes that stay. In each pass a code is drawn for every masked place, and those
            of the highest ln p + choice_temperature * (1 - r) * g stay, with g from the standard Gumbel distribution and r the part of the
            level's passes that is done (Chang et al. 2022, and its published code). 0 keeps the likeliest; very large is a random order.

    Raises:
        ValueError: a value out of its range.
    """

    num_passes: int | Sequence[int] = 12
    choice_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        passes = [self.num_passes] if isinstance(self.num_passes, int) else self.num_passes
        if not isinstance(passes, list | tuple) or not passes or any(type(n) is not int or n < 1 for n in passes):
            raise ValueError(
                f"num_passes must be an integer of at least 1, or one per level, got {self.num_passes!r}: try 12"
            )
        value = self.choice_temperature
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(
                f"choice_temperature must be a number of at least 0, got {value!r}: 0 keeps the likeliest codes"
            )


class Unmasking:
    """The transformer over a batch whose levels are filled one after another, coarse to fine.

    What a token sees does not depend on the tokens after it but for its own level, so the prompt and each finished level are read once
    and stay in the cache, and a pass reads the units of one level.

    Args:
        model: the prior.
        table: the order, of grids that all samples share.
        prompt: the conditions.
        prefix_T: ids of begin and sizes.
        coarse: given levels, each int64 `(B, Q, *grid)`.

    Attributes:
        prompt_BTM: hidden states of condition, begin and sizes.
        levels: the positions of each level.
    """

    def __init__(self, model: Any, table: OrderTable, prompt: Prompt, prefix_T: Tensor, coarse: Sequence[Tensor]):
        self.model, self.table, self.prompt = model, table, prompt
        vectors = model._unit_vectors(table)
        given_BPM = model._given([level.repeat(prompt.halves, *[1] * (level.ndim - 1)) for level in coarse], table)
        self.place_BPM = vectors.unit_UM[None] if given_BPM is None else vectors.unit_UM + given_BPM
        x_BTM = model._prompt(prompt.vectors_BLM, prefix_T, vectors, None, False)
        length = x_BTM.shape[1] + len(table)
        start = model.config.prefix_length - prompt.mask_BL.shape[1]
        model._check_length(start + length)
        self.mask_BT = prompt.mask_so_far(length)
        self.levels = level_slices(table)
        most = max(here.stop - here.start for here in self.levels)
        self.decoder, self.seen = decoder_for(model.backbone, len(x_BTM), length, start, most), 0
        self.prompt_BTM = self._read(x_BTM, causal=True)
        self.seen = x_BTM.shape[1]

    def _read(self, x_BTM: Tensor, causal: bool, at_Bn: Tensor | None = None) -> Tensor:
        self.decoder.restart(self.seen)
        mask = None if self.mask_BT is None else self.mask_BT[:, : self.seen + x_BTM.shape[1]]
        hidden: Tensor = self.decoder(x_BTM, mask, causal, at_Bn)
        return hidden

    def hidden(self, here: slice, ids_BN: Tensor, masked_BN: Tensor | None, at_Bn: Tensor | None = None) -> Tensor:
        """Hidden states `(B, n, M)` of these positions of a level (None: of all), a second half of rows with guidance."""
        x_BNM = self.model._masked_inputs(ids_BN, masked_BN)
        if self.prompt.halves == 2:
            x_BNM, at_Bn = x_BNM.repeat(2, 1, 1), None if at_Bn is None else at_Bn.repeat(2, 1)
        return self._read(x_BNM + self.place_BPM[:, here], False, at_Bn)

    def finish(self, here: slice, ids_BN: Tensor) -> None:
        """Read a level whose codes are known, for the finer ones to see."""
        if here.stop < len(self.table):
            self.hidden(here, ids_BN, None)
            self.seen += ids_BN.shape[1]

    def nats(self, ids_BP: Tensor, numbers_BP: Tensor, num_passes: int | Sequence[int]) -> Tensor:
        """-ln p of each code, float32 `(B, P)`, when they are revealed in the random order that the numbers give."""
        nats_BP = torch.empty(ids_BP.shape, dtype=torch.float32, device=ids_BP.device)
        for level, (here, passes) in enumerate(self.split(num_passes)):
            ids_BN, codebook_N = ids_BP[:, here], self.table.codebook_P[here]
            order_BN = reveal_order(codebook_N, numbers_BP[:, here])
            counts_Q = torch.bincount(codebook_N).cpu()
            starts = (counts_Q.cumsum(0) - counts_Q).tolist()
            shown_TQ = (counts_Q - masked_per_codebook(counts_Q[None], passes)[:, 0]).tolist()
            for before, after in pairwise(shown_TQ):
                if before == after:
                    continue
                masked_BN = torch.ones_like(ids_BN, dtype=torch.bool).scatter(1, order_BN[:, : sum(before)], False)
                revealed = [
                    order_BN[:, first + low : first + high]
                    for first, low, high in zip(starts, before, after, strict=True)
                ]
                hidden_BnM = self.hidden(here, ids_BN, masked_BN, torch.cat(revealed, 1))
                parts = hidden_BnM.split([index_Bn.shape[1] for index_Bn in revealed], 1)
                for codebook, (index_Bn, part_BnM) in enumerate(zip(revealed, parts, strict=True)):
                    stream = self.model._own_stream(level, codebook)
                    nats_Bn = self.model._stream_nats(part_BnM, ids_BN.gather(1, index_Bn), *stream)
                    nats_BP.scatter_(1, index_Bn + here.start, nats_Bn)
            self.finish(here, ids_BN)
        return nats_BP

    def split(self, num_passes: int | Sequence[int]) -> list[tuple[slice, int]]:
        """The positions and the passes of each level."""
        return list(zip(self.levels, split_passes(num_passes, len(self.levels)), strict=True))


class Filling:
    """Draws the codes of a batch.

    Args:
        unmasking: the transformer over the batch.
        settings: how to draw.
        numbers_TBP: float64 in [0, 1), that codes are drawn by, for each pass of a level.
        noise_TBP: float64 in [0, 1), for the choice of codes that stay, for each pass of a level.
        known: ids and which of them are kept, both `(B, P)`.
    """

    def __init__(
        self,
        unmasking: Unmasking,
        settings: MaskedSettings,
        numbers_TBP: Tensor,
        noise_TBP: Tensor,
        known: tuple[Tensor, Tensor] | None = None,
    ):
        self.unmasking, self.settings, self.numbers_TBP, self.noise_TBP = unmasking, settings, numbers_TBP, noise_TBP
        self.levels = unmasking.split(settings.num_passes)
        self.ids_BP = torch.zeros(numbers_TBP.shape[1:], dtype=torch.int64, device=numbers_TBP.device)
        self.masked_BP = torch.ones_like(self.ids_BP, dtype=torch.bool)
        if known is not None:
            self.ids_BP, self.masked_BP = known[0] * known[1], ~known[1]
        self.last_BnM: Tensor | None = None

    def run(self) -> Tensor:
        """Ids `(B, P)`."""
        done, total = 0, sum(passes for _, passes in self.levels)
        for level, (here, passes) in enumerate(self.levels):
            scales = [self.settings.scale_at((done + at) / max(1, total - 1)) for at in range(passes)]
            self._fill(level, here, passes, scales)
            self.unmasking.finish(here, self.ids_BP[:, here])
            done += passes
        if self.last_BnM is not None:
            check_finite(self.unmasking.model, self.last_BnM)
        return self.ids_BP

    def _fill(self, level: int, here: slice, passes: int, scales: Sequence[float]) -> None:
        """Draw what is masked of a level."""
        places = codebook_places(self.unmasking.table.codebook_P[here])
        fixed_Bn = [~self.masked_BP[:, here][:, place_n] for place_n in places]
        left_TBQ = masked_per_codebook(torch.stack([(~x).sum(1) for x in fixed_Bn], 1).cpu(), passes)
        # Of each codebook the places that are masked; behind them those that are not.
        index_QBn = [n[x.to(torch.int8).argsort(stable=True, dim=1)] for n, x in zip(places, fixed_Bn, strict=True)]
        for at in range(passes):
            left_QB = list(zip(left_TBQ[at].T, left_TBQ[at + 1].T, strict=True))
            drawn = [q for q, (before_B, after_B) in enumerate(left_QB) if not torch.equal(before_B, after_B)]
            if not drawn:
                continue
            asked = [index_QBn[q][:, : int(left_QB[q][0].max())] for q in drawn]
            # Each token of a level sees all others, so the pass reads all of them, to say something of the masked ones alone.
            hidden_BnM = self.unmasking.hidden(here, self.ids_BP[:, here], self.masked_BP[:, here], torch.cat(asked, 1))
            warmth = self.settings.choice_temperature * (1 - (at + 1) / passes)
            parts = hidden_BnM.split([index_Bn.shape[1] for index_Bn in asked], 1)
            for q, index_Bn, part_BnM in zip(drawn, asked, parts, strict=True):
                ids_Bn, sure_Bn = self._draw(part_BnM, (level, q), here, index_Bn, at, scales[at], warmth)
                index_QBn[q] = self._keep(here, index_Bn, ids_Bn, sure_Bn, *left_QB[q])
            self.last_BnM = hidden_BnM

    def _draw(
        self,
        hidden_BnM: Tensor,
        stream: tuple[int, int],
        here: slice,
        index_Bn: Tensor,
        at: int,
        scale: float,
        warmth: float,
    ) -> tuple[Tensor, Tensor]:
        """Ids of places of a level, and how sure of each the model is, both `(B, n)`."""
        unmasking, settings = self.unmasking, self.settings
        offset, size = unmasking.model._own_stream(*stream)
        logits_BnK = unmasking.model._logits(hidden_BnM, offset, size).float()
        if unmasking.prompt.guided:
            logits_BnK = guide(*logits_BnK.chunk(2), scale)
        numbers_Bn = self.numbers_TBP[at][:, here].gather(1, index_Bn)
        drawn_Bn = draw(logits_BnK.flatten(0, 1), numbers_Bn.flatten(), settings).view(index_Bn.shape)
        sure_Bn = logits_BnK.log_softmax(2).gather(2, drawn_Bn[..., None])[..., 0]
        if warmth and settings.temperature:
            noise_Bn = self.noise_TBP[at][:, here].gather(1, index_Bn)
            sure_Bn = sure_Bn + warmth * gumbel(noise_Bn).float()
        return drawn_Bn + offset, sure_Bn

    def _keep(
        self, here: slice, index_Bn: Tensor, drawn_Bn: Tensor, sure_Bn: Tensor, before_B: Tensor, after_B: Tensor
    ) -> Tensor:
        """Keep the surest codes, so that of the first `before_B` places `after_B` stay masked; these first, `(B, n)`."""
        column_n, device = torch.arange(index_Bn.shape[1], device=index_Bn.device), index_Bn.device
        before_B1, after_B1 = before_B.to(device)[:, None], after_B.to(device)[:, None]
        order_Bn = sure_Bn.masked_fill(column_n >= before_B1, math.inf).argsort(stable=True, dim=1)
        index_Bn, drawn_Bn = index_Bn.gather(1, order_Bn), drawn_Bn.gather(1, order_Bn)
        kept_Bn = (column_n >= after_B1) & (column_n < before_B1)
        ids_BN, masked_BN = self.ids_BP[:, here], self.masked_BP[:, here]  # views
        ids_BN.scatter_(1, index_Bn, torch.where(kept_Bn, drawn_Bn, ids_BN.gather(1, index_Bn)))
        masked_BN.scatter_(1, index_Bn, ~kept_Bn & masked_BN.gather(1, index_Bn))
        return index_Bn


def gumbel(numbers: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones."""
    return -(-numbers.clamp(min=2.0**-60).log()).log()


def level_slices(table: OrderTable) -> list[slice]:
    """The positions of each level."""
    ends = torch.bincount(table.level_P).cumsum(0).tolist()
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def codebook_places(codebook_N: Tensor) -> list[Tensor]:
    """The places of each codebook among the positions of a level."""
    return [(codebook_N == codebook).nonzero()[:, 0] for codebook in range(int(codebook_N.max()) + 1)]
