"""Drawing codes from a prior, and asking it how likely codes are: `sample_codes` and `score`.

Axis letters: B batch, A grid axes, L condition tokens, T input tokens, P code positions, M width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vqtok.codes import Codes
from vqtok.fingerprint import check_fingerprint
from vqtok.modeling import evaluating

from .checks import at_least_one, check_codes, check_guidance, condition_rows, size_rows
from .fast import decoder_for
from .known import Known, check_fits, known_rows
from .sampling import CodeScores, SamplingSettings, checked_seed, uniforms
from .sequence import OrderTable, unflatten
from .stepping import Prompt, Stepping, draw_stream

_ENDS = 1 << 20  # the stream of numbers that decide where a time series ends

Rows = list[list[int] | Tensor]
Condition = Sequence[Sequence[int] | None] | Sequence[int | None] | Sequence[Tensor | None] | Codes | None


@dataclass(frozen=True)
class Batch:
    """Samples that are drawn together: of one grid, or time series of one longest length.

    Attributes:
        table: the order.
        prompt: the conditions.
        prefix_T: ids of begin and sizes.
        frames: cells of the coarsest grid along its first axis.
        coarse: given levels, each int64 `(B, Q, *grid)`.
        samples: the number of each sample among all that were asked for; with the seed it decides what is drawn.
        settings: how to draw.
        seed: of all samples.
        known: ids and which of them are kept, both `(B, P)`, or None.
    """

    table: OrderTable
    prompt: Prompt
    prefix_T: Tensor
    frames: int
    coarse: Sequence[Tensor]
    samples: Sequence[int]
    settings: SamplingSettings
    seed: int
    known: tuple[Tensor, Tensor] | None


class CodeDrawingMixin:
    """What every prior shares of drawing and scoring: what is asked for, checked and put into batches of one grid.

    A model supplies the network, and `_draw_ids`, which draws a `Batch`.
    """

    def _sample_codes(
        self,
        condition: Condition,
        sizes: Sequence[int] | Sequence[Sequence[int]] | None,
        num_samples: int,
        settings: SamplingSettings,
        seed: int | None,
        batch_size: int,
        known: Known | Codes | None,
    ) -> Codes:
        """What `sample_codes` does, once it is known how to draw."""
        seed = checked_seed(seed)
        check_guidance(settings.guidance_scale, self.config)
        num_samples, batch_size = at_least_one(num_samples, "num_samples"), at_least_one(batch_size, "batch_size")
        rows = condition_rows(condition, self.config)
        kept = known_rows(known, len(rows), self.config)
        conditions = [row for row in rows for _ in range(num_samples)]
        layout, parts, order = self.vocabulary.layout, [], []
        with evaluating(self):
            if sizes is not None:
                wanted = size_rows(sizes, len(rows), self.config)
            elif self.config.stops:
                wanted = [[self.config.max_grid * layout.stride]] * len(rows)
            elif kept is not None:
                wanted = kept.codes.sizes.tolist()
            else:
                wanted = None
            if wanted is None:
                batches = grouped([0] * len(conditions), batch_size)
                extents = [self._draw_grids(conditions, part, settings, seed) for part in batches]
                wanted = (layout.stride * torch.cat(extents)).tolist()
            else:
                wanted = [size for size in wanted for _ in range(num_samples)]
            if kept is not None:
                kept = kept[[row for row in range(len(rows)) for _ in range(num_samples)]]
                check_fits(kept, wanted, self.config)
            for size in {layout.padded(size) for size in wanted}:
                self.check_size(size)
            for indices in grouped([layout.padded(size) for size in wanted], batch_size):
                parts.append(self._draw_codes(conditions, wanted, indices, settings, seed, kept))
                order += indices
        return Codes.cat(parts)[torch.tensor(order).argsort().tolist()]

    def _draw_grids(self, conditions: Rows, indices: list[int], settings: SamplingSettings, seed: int) -> Tensor:
        """Extents `(B, A)` of the coarsest grid, for some of the samples: one size token after another."""
        axes = self.vocabulary.layout.ndim
        stream = (self.vocabulary.size_offset, self.vocabulary.max_grid)
        prompt = self._conditions([conditions[i] for i in indices], settings)
        numbers_BA = torch.stack([uniforms(seed, i, axes) for i in indices]).to(self.device)
        begin_T, prefix_TM, rows = self._prefix(()), self._prefix_vectors(), len(prompt.mask_BL)
        seen = prompt.mask_BL.shape[1]
        start = self.config.prefix_length - seen
        self._check_length(start + seen + axes)
        decoder, embed, drawn = decoder_for(self.backbone, rows, seen + axes, start), self.get_input_embeddings(), []
        x_BTM = torch.cat([prompt.vectors_BLM, (embed(begin_T) + prefix_TM[:1]).expand(rows, -1, -1)], 1)
        for axis in range(axes):
            x_BTM = decoder(x_BTM, prompt.mask_so_far(seen + 1 + axis), True)
            drawn.append(draw_stream(self, x_BTM[:, -1:], stream, numbers_BA[:, axis, None], settings, prompt.guided))
            x_BTM = embed(drawn[-1]).repeat(prompt.halves, 1, 1) + prefix_TM[axis + 1]
        return (1 + torch.cat(drawn, 1) - stream[0]).cpu()

    def _draw_codes(
        self,
        conditions: Rows,
        sizes: list[list[int]],
        indices: list[int],
        settings: SamplingSettings,
        seed: int,
        kept: Known | None,
    ) -> Codes:
        """Codes of some of the samples, all of one grid (or, of time series that end by themselves, of one longest grid)."""
        layout, config = self.vocabulary.layout, self.config
        part = [sizes[i] for i in indices]
        grids = layout.grids(part[0])
        table = self._table(self._shapes(self._with_room(grids)))
        known, coarse = None, ()
        if kept is not None:
            kept = kept[indices]
            known = kept.on_table(self.vocabulary, table, config.first_level, self.device)
            coarse = tuple(level.to(self.device) for level in kept.codes.levels[: config.first_level])
        prompt, prefix_T = self._conditions([conditions[i] for i in indices], settings), self._prefix(grids[0])
        batch = Batch(table, prompt, prefix_T, grids[0][0], coarse, indices, settings, seed, known)
        ids_BP, frames_B = self._draw_ids(batch)
        names = zip(table.level_P.tolist(), table.codebook_P.tolist(), strict=True)
        first_ids_P = torch.tensor([self._own_stream(*name)[0] for name in names], device=self.device)
        levels = unflatten(ids_BP - first_ids_P, table)
        if frames_B is not None:
            levels = _cut(levels, frames_B)
            part = [[min(size[0], n * layout.stride)] for size, n in zip(part, frames_B.tolist(), strict=True)]
        levels = (*coarse, *self.vocabulary.merge(levels, config.first_level))
        return Codes(levels, torch.tensor(part), layout, config.fingerprint)

    def _conditions(self, rows: Rows, settings: SamplingSettings) -> Prompt:
        """Conditions as vectors, with the null condition as a second half where there is something to guide away from."""
        null = [self.null_id]
        guided = settings.guidance_scale != 1 and any(isinstance(row, Tensor) or row != null for row in rows)
        return Prompt(*self._condition_vectors([*rows, *([null] * len(rows) if guided else [])]), guided)

    def _score_codes(
        self,
        codes: Codes,
        condition: Condition,
        batch_size: int,
        code_nats: Callable[[Codes, Prompt, Sequence[int]], tuple[Tensor, OrderTable]],
    ) -> CodeScores:
        """What `score` does, with -ln p of each code `(B, P)` of a batch, and its table, from a function."""
        layout = self.vocabulary.layout
        if codes.layout != layout:
            raise ValueError(
                f"these codes have the layout {codes.layout}, the prior was made for {layout}: use the tokenizer of the prior"
            )
        if self.config.fingerprint is not None and codes.fingerprint is not None:
            check_fingerprint(self.config.fingerprint, codes.fingerprint, "these codes")
        conditions = condition_rows(condition, self.config, len(codes))
        own = self.config.own_levels
        maps = [torch.zeros(level.shape, device=self.device) for level in codes.levels[own]]
        sizes = codes.sizes.tolist()
        with evaluating(self):
            for indices in grouped([layout.padded(size) for size in sizes], at_least_one(batch_size, "batch_size")):
                part = codes[indices]
                check_codes(part.levels, part.sizes, self.config)
                prompt = self._conditions([conditions[i] for i in indices], SamplingSettings())
                nats_BP, table = code_nats(part, prompt, indices)
                rows = torch.tensor(indices, device=self.device)
                for target, nats, level in zip(maps, unflatten(nats_BP, table), part.levels[own], strict=True):
                    # -ln p of a factorised code is the sum over its factors.
                    nats = nats.unflatten(1, (level.shape[1], -1)).sum(2)
                    inside = tuple(map(slice, level.shape[2:]))
                    target[(rows, slice(None), *inside)] = nats[(slice(None), slice(None), *inside)]
        per_level = [
            [
                level.num_codebooks * math.prod(grid)
                for level, grid in zip(layout.levels[own], layout.grids(size)[own], strict=True)
            ]
            for size in sizes
        ]
        counts = torch.tensor(per_level, device=self.device)
        sums = torch.stack([nats.flatten(1).sum(1) for nats in maps], 1)
        units = torch.tensor([math.prod(size) for size in sizes], device=self.device)
        return CodeScores(sums.sum(1), sums / counts, tuple(maps), sums.sum(1) / math.log(2) / units)


class StepDrawingMixin(CodeDrawingMixin):
    """Drawing and scoring of a prior that predicts step after step."""

    @torch.no_grad()
    def sample_codes(
        self,
        condition: Condition = None,
        sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
        num_samples: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        batch_size: int = 64,
        guidance_schedule: str | None = None,
        known: Known | Codes | None = None,
    ) -> Codes:
        """Return drawn codes: `num_samples` for the first condition, then for the second, and so on.

        Sample i draws from a generator keyed by (seed, i) and does not depend on the batch it was drawn in. Guidance runs both
        halves in one batch with one cache. What is None is read from `generation_config`; see `SamplingSettings` for the order.

        Args:
            condition: a list of lists of text tokens, of class labels, or of a text encoder's features `(L, feature_size)`; `Codes` of
                the condition's code space; None, as a whole or as an entry of a list, is the null condition.
            sizes: `(ndim,)` in pixels, samples or bytes for all, or a list with one per condition; None draws the coarsest grid too,
                and sizes are then whole multiples of the largest stride. For a time series that ends by itself, the longest it may
                become (None: `max_grid` coarse frames).
            num_samples: samples per condition, at least 1.
            guidance_scale: at least 0; 1 is no guidance.
            temperature: at least 0; 0 takes the likeliest code.
            top_k: at least 1.
            top_p: in (0, 1].
            seed: at least 0; None draws one from torch's global generator.
            batch_size: how many samples are drawn together; changes speed and memory only.
            guidance_schedule: how the scale grows from 1 to `guidance_scale` over the steps: "constant" (it is the same at all of them),
                "linear" or "cosine".
            known: codes that are kept, one sample for all or one per condition: a beginning that is continued, an image of which a
                part is drawn anew, or the coarser levels that a finer stage of a cascade is given. `Codes` are kept wholly, `Known`
                says which of them. With None as `sizes` media get the size of the known ones, but for time series that end by themselves.

        Returns:
            `Codes` of the prior's code space, on its device.

        Raises:
            ValueError: a value out of its range, a condition or size the prior does not know, guidance without a null condition,
                known codes that do not fit.
        """
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        given["guidance_schedule"] = guidance_schedule
        settings = SamplingSettings.resolve(self.generation_config, **given)
        return self._sample_codes(condition, sizes, num_samples, settings, seed, batch_size, known)

    def _draw_ids(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Ids `(B, P)`, and the frames `(B,)` of time series that end by themselves."""
        # The first numbers of a sample are for its size, whether it is drawn or given; each stage of a cascade has its own.
        skip, stream = len(batch.prefix_T) - 1, self.config.first_level
        numbers = [uniforms(batch.seed, i, skip + len(batch.table), stream)[skip:] for i in batch.samples]
        ends = None
        if self.config.stops:
            ends = torch.stack([uniforms(batch.seed, i, batch.frames + 1, _ENDS) for i in batch.samples]).to(
                self.device
            )
        return Stepping(
            self,
            batch.table,
            batch.prompt,
            batch.prefix_T,
            batch.coarse,
            torch.stack(numbers).to(self.device),
            batch.settings,
            batch.known,
            ends,
        ).run()

    @torch.no_grad()
    def score(self, codes: Codes, condition: Condition = None, batch_size: int = 64) -> CodeScores:
        """Return how likely the prior finds codes, given their sizes and conditions.

        Args:
            codes: all levels and codebooks, of any sizes. A prior that is given coarser levels scores the finer ones, given these.
            condition: one entry per sample, as for `sample_codes`; None is the null condition for all.
            batch_size: how many samples are scored together; changes speed and memory only.

        Raises:
            ValueError: codes of another layout or code space (both are named), or conditions that do not fit.
        """
        return self._score_codes(codes, condition, batch_size, self._code_nats)

    def _code_nats(self, codes: Codes, prompt: Prompt, samples: Sequence[int]) -> tuple[Tensor, OrderTable]:
        """-ln p of each code, `(B, P)`, and the table."""
        sequence = self._sequence(codes.levels, codes.sizes, prompt.vectors_BLM, prompt.mask_BL)
        nats_BP, *_ = self._nats_of_windows(sequence, 0, sequence.units)
        return F.pad(nats_BP, (0, len(sequence.table) - nats_BP.shape[1])), sequence.table


def _cut(levels: Sequence[Tensor], frames_B: Tensor) -> list[Tensor]:
    """Levels of time series without what lies behind the last frame of each."""
    out, longest = [], int(frames_B.max())
    ratios = [values.shape[2] // levels[0].shape[2] for values in levels]
    for values, ratio in zip(levels, ratios, strict=True):
        cell = torch.arange(longest * ratio, device=values.device) // ratio
        out.append(values[..., : longest * ratio] * (cell < frames_B[:, None])[:, None])
    return out


def grouped(keys: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Indices of equal keys together, in batches of at most `batch_size`.

    Example:
        >>> grouped(["a", "b", "a", "a"], 2)
        [[0, 2], [3], [1]]
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [group[at : at + batch_size] for group in groups.values() for at in range(0, len(group), batch_size)]
