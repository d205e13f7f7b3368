"""One batch of samples, drawn step after step: what each pass of the transformer reads, and what is drawn from what it says.

Axis letters: B batch, L condition tokens, T input tokens, U units, P code positions, N positions of a step, M width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .fast import Decoder, decoder_for
from .sampling import SamplingSettings, draw, guide
from .sequence import OrderTable, Step, StepRun


@dataclass
class Prompt:
    """Conditions of a batch as the transformer reads them.

    Attributes:
        vectors_BLM: of the conditions; with guidance a second half of rows holds the null condition.
        mask_BL: false for padding on the left.
        guided: whether there is a second half.
    """

    vectors_BLM: Tensor
    mask_BL: Tensor
    guided: bool

    @property
    def halves(self) -> int:
        """1, or 2 with guidance."""
        return 1 + self.guided

    def mask_so_far(self, length: int) -> Tensor | None:
        """`(B, length)`, true behind the condition; None if nothing is padding."""
        if bool(self.mask_BL.all()):
            return None
        return F.pad(self.mask_BL, (0, length - self.mask_BL.shape[1]), value=True)


def draw_stream(
    model: Any,
    x_BNM: Tensor,
    stream: tuple[int, int],
    numbers_BN: Tensor,
    settings: SamplingSettings,
    guided: bool,
    progress: float = 0.0,
) -> Tensor:
    """Return ids `(B, N)` of one stream (offset, size), each drawn by its own number."""
    offset, size = stream
    logits_BNK = model._logits(x_BNM, offset, size).float()
    if guided:
        logits_BNK = guide(*logits_BNK.chunk(2), settings.scale_at(progress))
    drawn = draw(logits_BNK.flatten(0, 1), numbers_BN.flatten(), settings)
    return drawn.view(numbers_BN.shape) + offset


def check_finite(model: Any, hidden_BUM: Tensor) -> None:
    """Refuse what the last codes were predicted from if it gives logits that are not numbers; one place of each sample is asked.

    Raises:
        ValueError: it does.
    """
    logits_BV = model._logits(hidden_BUM[:, -1], model.vocabulary.size_offset, model.lm_head.out_features)
    if not bool(torch.isfinite(logits_BV).all()):
        raise ValueError(
            "this prior gives logits that are not finite: its training diverged (train again with a lower learning rate), or its "
            f"weights overflow in {model.dtype} (load it with dtype float32)"
        )


class Stepping:
    """The codes of one batch.

    Args:
        model: the prior.
        table: the order, of grids that all samples share.
        prompt: the conditions.
        prefix_T: ids of begin and sizes.
        coarse: given levels, each int64 `(B, Q, *grid)`.
        numbers_BP: float64 in [0, 1), one for each code.
        settings: how to draw.
        known: ids and which of them are kept, both `(B, P)`.
        ends: for time series that end by themselves, numbers `(B, frames + 1)` that decide it, and None otherwise. The last frame is
            the longest that is allowed.
    """

    def __init__(
        self,
        model: Any,
        table: OrderTable,
        prompt: Prompt,
        prefix_T: Tensor,
        coarse: Sequence[Tensor],
        numbers_BP: Tensor,
        settings: SamplingSettings,
        known: tuple[Tensor, Tensor] | None = None,
        ends: Tensor | None = None,
    ):
        self.model, self.table, self.prompt, self.settings, self.numbers_BP = model, table, prompt, settings, numbers_BP
        self.vectors, device, batch = model._unit_vectors(table), numbers_BP.device, len(numbers_BP)
        repeated = [level.repeat(prompt.halves, *[1] * (level.ndim - 1)) for level in coarse]
        self.given_BUM = model._given(repeated, table)
        self.prompt_BTM = model._prompt(prompt.vectors_BLM, prefix_T, self.vectors, self.given_BUM, table.shifted)
        self.mask_BT = prompt.mask_so_far(self.prompt_BTM.shape[1] + len(table.step_U))
        self.ids_BP = torch.zeros(batch, len(table) + 1, dtype=torch.int64, device=device)
        self.forced_BP: Tensor | None = None
        if known is not None:
            self.forced_BP = known[1]
            self.ids_BP[:, :-1] = known[0] * known[1]
        self.ends, self.valid_BP, self.frames_B = ends, None, None
        if ends is not None:
            self.frames_B = torch.full((batch,), ends.shape[1] - 1, device=device)
            self.valid_BP = torch.ones(batch, len(table) + 1, dtype=torch.bool, device=device)
            self.valid_BP[:, -1] = False
        self.per_pass = max(step.units.stop - step.units.start for step in table.steps)
        self.decoder: Decoder | None = None
        self.last_BNM: Tensor | None = None
        self.depth: Any = None
        self.start = self.seen = 0

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Ids `(B, P)`, and the frames `(B,)` of time series that end by themselves."""
        for step in self.table.steps[self._first_free_step() :]:
            hidden_BUM = self._hidden(step)
            if self.ends is not None and step.frame and self._all_end(hidden_BUM, step):
                break
            self._draw(hidden_BUM, step)
        if self.last_BNM is not None:  # what is not a number stays in the cache, so the last step shows it
            check_finite(self.model, self.last_BNM)
        return self.ids_BP[:, :-1], self.frames_B

    def _progress(self, step: Step) -> float:
        """0 at the first step, 1 at the last one, so that schedules end at their full value."""
        last = len(self.table.steps) - 1
        return step.number / last if last else 1.0

    def _first_free_step(self) -> int:
        """The first step of which something is drawn; steps before it are read in one pass, but only in shifted orders."""
        if self.forced_BP is None or not self.table.shifted:
            return 0
        free = (~self.forced_BP.all(0)).nonzero()
        return int(self.table.step_P[free[0, 0]]) if len(free) else len(self.table.steps)

    def _hidden(self, step: Step) -> Tensor:
        """Hidden states `(B, U, M)` of the units of a step."""
        windows, shifted = self.model._windows, self.table.shifted
        start = 0 if windows is None else windows.of_unit(step.units.start)
        if self.decoder is None:
            position = self.model.config.prefix_length - self.prompt.mask_BL.shape[1]
            length = self.prompt_BTM.shape[1] + self.model._most_units(self.table)
            self.model._check_length(position + length)
            self.decoder = decoder_for(self.model.backbone, len(self.prompt_BTM), length, position, self.per_pass)
        if not self.seen or start != self.start:
            self.start, self.seen = start, 0
            self.decoder.restart()
            x_BTM = self.prompt_BTM
            if not shifted:
                self._read(x_BTM, causal=True)
                x_BTM = self._inputs(step.units, step.has_gaps)
            elif (before := slice(max(start, 1), step.units.stop)).start < before.stop:
                x_BTM = torch.cat([x_BTM, self._inputs(before, self.table.has_gaps)], 1)
        else:
            x_BTM = self._inputs(step.units, step.has_gaps)
        return self._read(x_BTM, causal=shifted)[:, step.units.start - step.units.stop :]

    def _inputs(self, units: slice, has_gaps: bool) -> Tensor:
        halves, valid_BP = self.prompt.halves, self.valid_BP
        ids_BP = self.ids_BP if halves == 1 else self.ids_BP.repeat(halves, 1)
        if valid_BP is not None and halves > 1:
            valid_BP = valid_BP.repeat(halves, 1)
        return self.model._unit_inputs(ids_BP, self.table, self.vectors, units, self.given_BUM, valid_BP, has_gaps)

    def _read(self, x_BTM: Tensor, causal: bool) -> Tensor:
        self.seen += x_BTM.shape[1]
        mask = None if self.mask_BT is None else self.mask_BT[:, : self.seen]
        assert self.decoder is not None
        return self.decoder(x_BTM, mask, causal)

    def _draw(self, hidden_BUM: Tensor, step: Step) -> None:
        """Draw every code of a step, but for those that are kept."""
        if self.model.config.order == "depth":
            self._draw_place(hidden_BUM, step)
            return
        for run in step.runs:
            self._draw_run(hidden_BUM[:, run.units], run, step)

    def _draw_run(self, x_BNM: Tensor, run: StepRun, step: Step) -> None:
        self.last_BNM = x_BNM
        where, progress = run.positions, self._progress(step)
        stream = self.model._own_stream(run.level, run.codebook)
        drawn_BN = draw_stream(
            self.model, x_BNM, stream, self.numbers_BP[:, where], self.settings, self.prompt.guided, progress
        )
        if self.forced_BP is not None:
            drawn_BN = torch.where(self.forced_BP[:, where], self.ids_BP[:, where], drawn_BN)
        self.ids_BP[:, where] = drawn_BN

    def _draw_place(self, hidden_B1M: Tensor, step: Step) -> None:
        """The codebooks of a place one after another, by the small transformer."""
        model, halves = self.model, self.prompt.halves
        if self.depth is None:
            most = max(shape[0] for shape in self.table.shapes)
            self.depth = decoder_for(model.depth, len(hidden_B1M), most, 0)
        self.depth.restart()
        inputs_QM = model._depth_places(step.runs[0].level)
        x_B1M = hidden_B1M
        for run in step.runs:
            x_B1M = x_B1M + inputs_QM[run.codebook]
            self._draw_run(self.depth(x_B1M, None, True), run, step)
            ids_B1 = self.ids_BP[:, run.positions]
            embedded_B1M = model.get_input_embeddings()(ids_B1)
            x_B1M = hidden_B1M + (embedded_B1M if halves == 1 else embedded_B1M.repeat(halves, 1, 1))

    def _all_end(self, hidden_BUM: Tensor, step: Step) -> bool:
        """Decide which samples have no more frames than `step.frame`; whether nothing of any sample is left to draw."""
        logit_B = self.model.end_head(hidden_BUM[:, 0])[:, 0].float()
        if self.prompt.guided:
            logit_B = guide(*logit_B.chunk(2), self.settings.scale_at(self._progress(step)))
        frame, most = step.frame, self.ends.shape[1] - 1
        # Drawn as codes are, so that top_p also takes away the ends that are hardly likely, of which one would come sooner or later.
        logits_B2 = torch.stack([logit_B, torch.zeros_like(logit_B)], 1)
        ended_B = draw(logits_B2, self.ends[:, min(frame, most)], self.settings) == 0
        run = step.runs[0]  # level 0, codebook 0 comes first
        if self.forced_BP is not None:
            ended_B = ended_B & ~self.forced_BP[:, run.positions].any(1)
        ended_B = (ended_B | (frame >= most)) & (self.frames_B >= frame)
        self.frames_B = torch.where(ended_B, torch.clamp(self.frames_B, max=frame), self.frames_B)
        self.valid_BP[:, :-1] &= self.table.frame_P < self.frames_B[:, None]
        wanted_BP = self.valid_BP[:, :-1] & (self.table.step_P >= step.number)
        return bool((self.frames_B <= frame).all()) and not bool(wanted_BP.any())
