"""The prior: a decoder-only transformer over codes, in any order that predicts step after step.

Axis letters: B batch, A grid axes, L condition tokens, T input tokens, U units, P code positions, N some positions, Q codebooks, M width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from vqtok.outputs import CodePriorOutput

from .checks import check_codes
from .configuration_code_prior import CodePriorConfig
from .drawing import StepDrawingMixin
from .generation import CodeGenerationMixin
from .network import BatchCondition, CodePriorPreTrainedModel, UnitVectors, attention_bias
from .sequence import OrderTable, Run, Windows, as_slice, flatten


class _Sequence(NamedTuple):
    """A batch of codes as the transformer will see it.

    Attributes:
        ids_BP: ids of the codes in the table's order, and one more column that stands for no code.
        counted_BP: which codes are no padding.
        valid_BP: the same for `ids_BP`; None where there is no padding.
        given_BUM: what given levels add to each unit.
        frames_B: lengths of time series that end by themselves.
        prompt_BTM: input vectors of condition, begin and sizes.
        mask_BL: false for padding among the condition.
        prefix_T: ids of begin and sizes.
        units: how many units are needed.
    """

    table: OrderTable
    vectors: UnitVectors
    ids_BP: Tensor
    counted_BP: Tensor
    valid_BP: Tensor | None
    given_BUM: Tensor | None
    frames_B: Tensor | None
    prompt_BTM: Tensor
    mask_BL: Tensor
    prefix_T: Tensor
    units: int


class _Runs(NamedTuple):
    """Streams, and where each position is when they are laid one after another."""

    runs: tuple[Run, ...]
    order_N: Tensor


class CodePriorModel(CodePriorPreTrainedModel, StepDrawingMixin, CodeGenerationMixin):
    """A prior over codes: trains on them (`forward`), draws them (`sample_codes`), tells how likely they are (`score`).

    Example:
        >>> layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 16}]}
        >>> backbone = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> backbone |= {"num_attention_heads": 2, "num_key_value_heads": 2}
        >>> config = CodePriorConfig(layout=layout, condition="class", text_size=10, backbone_config=backbone)
        >>> prior = CodePriorModel(config).eval()
        >>> codes = prior.sample_codes([3, 7], sizes=(32, 24), seed=0)
        >>> tuple(codes.levels[0].shape), tuple(prior.score(codes, [3, 7]).nats.shape)
        ((2, 1, 4, 3), (2,))
    """

    def __init__(self, config: CodePriorConfig):
        super().__init__(config)
        width = config.backbone_config.hidden_size
        if config.order == "depth":
            self.depth = AutoModel.from_config(config.depth_config, dtype=torch.get_default_dtype())
            self.depth.set_input_embeddings(nn.Identity())  # it reads vectors, and a table would never learn
            self.depth_embed = nn.Embedding(len(self._streams), width)
        if config.stops:
            self.end_head = nn.Linear(width, 1)
        if config.text_loss_weight:
            self.text_head = nn.Linear(width, config.text_size, bias=False)
        self._windows = None if config.window is None else Windows(config.window, config.window // 2)
        self.post_init()

    # -- training

    def forward(
        self,
        codes: Sequence[Tensor] | None = None,
        sizes: Tensor | None = None,
        condition_ids: Tensor | None = None,
        condition_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        history_ids: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        condition_features: Tensor | None = None,
    ) -> CodePriorOutput:
        """Return the loss of codes, or for `input_ids` the logits that `generate` of transformers reads.

        Args:
            codes: all levels, coarse to fine, each int64 `(B, Q, *grid)`; one grid for the whole batch, but time series that end by
                themselves may be of different length, padded on the right.
            sizes: int64 `(B, ndim)` in pixels, samples or bytes; checked against the grid, and the lengths of such series.
            condition_ids: int64 `(B, L)` text tokens padded on the left, or `(B,)` class labels; None is the null condition. In train
                mode conditions become null with probability `condition_dropout` (torch's global CPU generator decides).
            condition_mask: `(B, L)`, true for tokens, false for padding; None if nothing is padding. A row of padding alone is null.
            input_ids: int64 `(B, T)`, ids of `vocabulary`: condition, begin, sizes, codes.
            attention_mask: `(B, cached + T)`, 0 for padding on the left.
            past_key_values: the cache of earlier tokens.
            history_ids: all ids so far, cached ones included; needed with a filled cache.
            use_cache: whether to return a cache; for `input_ids` only.
            return_dict: ignored, the output is always named.
            condition_features: float `(B, L, feature_size)` of a text encoder, padded on the left, in place of `condition_ids`.

        Returns:
            `loss`, `nats_per_code` and, with a `text_loss_weight`, `text_loss`;
            or `logits` `(B, T, V)`, -inf for every id that cannot follow, and `past_key_values`.

        Raises:
            ValueError: codes or conditions that do not fit the config, or samples of different grids.
        """
        if (codes is None) == (input_ids is None):
            raise ValueError("give either codes (to train) or input_ids (as transformers' generate does)")
        if input_ids is not None:
            return self._forward_ids(input_ids, attention_mask, past_key_values, history_ids, use_cache)
        check_codes(codes, sizes, self.config)
        batch = len(codes[0])
        condition = self._batch_condition(batch, condition_ids, condition_mask, condition_features)
        sequence = self._sequence(codes, sizes, condition.vectors_BLM, condition.mask_BL)
        first, last = 0, sequence.units
        if self._windows is not None:
            starts = self._windows.starts(last)
            first = starts[int(torch.randint(len(starts), ()))] if self.training else 0
            last = min(last, first + self._windows.length) if self.training else last
        nats_BN, more, hidden_BLM = self._nats_of_windows(sequence, first, last)
        levels = len(sequence.table.shapes)
        here = slice(*self._positions(sequence.table, first, last))
        level_N, counted_BN = sequence.table.level_P[here], sequence.counted_BP[:, here]
        sums = torch.zeros(levels, device=self.device).index_add(0, level_N, nats_BN.detach().sum(0))
        counts = torch.zeros(levels, device=self.device).index_add(0, level_N, counted_BN.sum(0, dtype=torch.float32))
        loss = (nats_BN.sum() + more.sum()) / (counts.sum() + more.numel())
        text_loss = None
        if weight := self.config.text_loss_weight:
            # Each a mean of its own, 1/8 text and 7/8 codes in DALL-E (Ramesh et al. 2021, section 2.2).
            text_loss = self._text_loss(hidden_BLM, condition)
            loss = (1 - weight) * loss + weight * text_loss
        # Of a codebook of several factors the nats add up.
        factors = torch.tensor(
            [s[0] / v.shape[1] for s, v in zip(sequence.table.shapes, codes[self.config.own_levels], strict=True)]
        )
        nats_per_code = sums * factors.to(sums) / counts.clamp(min=1)
        return CodePriorOutput(loss=loss, nats_per_code=nats_per_code, text_loss=text_loss)

    def _text_loss(self, hidden_BLM: Tensor, condition: BatchCondition) -> Tensor:
        """Mean nats of the tokens of texts, each predicted from the earlier ones of its text; 0 if there are none.

        The first token of a text has nothing before it and is not predicted; padding and null conditions do not count.
        """
        told_BL = condition.told_BL
        counted_BL = told_BL[:, 1:] & told_BL[:, :-1]
        if condition.ids_BL is None or not bool(counted_BL.any()):
            return self.text_head(hidden_BLM[:, :1]).float().sum() * 0.0  # every parameter takes part in every step
        logits_NK = self.text_head(hidden_BLM[:, :-1][counted_BL]).float()
        return F.cross_entropy(logits_NK, condition.ids_BL[:, 1:][counted_BL])

    def _sequence(
        self, codes: Sequence[Tensor], sizes: Tensor | None, condition_BLM: Tensor, mask_BL: Tensor
    ) -> _Sequence:
        """Everything that a batch of codes becomes before it meets the transformer."""
        config, batch = self.config, len(codes[0])
        grid = tuple(codes[0].shape[2:])
        frames_B = None
        if config.stops:
            stride = self.vocabulary.layout.stride
            full = torch.full((batch,), grid[0])
            frames_B = (full if sizes is None else -(-sizes[:, 0].cpu() // stride)).to(self.device)
            room = self._with_room([values.shape[2:] for values in codes])
            codes = [F.pad(values, (0, n - values.shape[2])) for values, (n,) in zip(codes, room, strict=True)]
        levels = self.vocabulary.to_ids([values.to(self.device) for values in codes])
        shapes = tuple(tuple(values.shape[1:]) for values in levels)
        table = self._table(shapes)
        ids_BP = F.pad(flatten(levels[config.own_levels], table), (0, 1))
        valid_BP, units = None, len(table.step_U)
        counted_BP = torch.ones_like(ids_BP[:, :-1], dtype=torch.bool)
        if frames_B is not None:
            counted_BP = table.frame_P < frames_B[:, None]
            valid_BP = F.pad(counted_BP, (0, 1))
            last = int(table.step_P[table.frame_P < grid[0]].max())
            units = max(last, int(table.frame_starts[grid[0]])) + 1
        vectors = self._unit_vectors(table)
        given_BUM = self._given(codes, table)
        prefix_T = self._prefix(grid)
        prompt_BTM = self._prompt(condition_BLM, prefix_T, vectors, given_BUM, table.shifted)
        return _Sequence(
            table, vectors, ids_BP, counted_BP, valid_BP, given_BUM, frames_B, prompt_BTM, mask_BL, prefix_T, units
        )

    def _nats_of_windows(self, sequence: _Sequence, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `_nats`, of units [first, last), each in the window that predicts it."""
        if self._windows is None or last - first <= self._windows.length:
            return self._nats(sequence, first, first, last)
        parts, done = [], first
        for start in self._windows.starts(last):
            end = min(last, start + self._windows.length)
            parts.append(self._nats(sequence, start, done, end))
            done = end
        # The size tokens are predicted in the first window, ends in each.
        more = [part[1] for part in parts]
        nats_BN = torch.cat([part[0] for part in parts], 1)
        return nats_BN, torch.cat(more) if self.config.stops else more[0], parts[0][2]

    def _nats(self, sequence: _Sequence, start: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """-ln p, float32, of the codes that units [first, last) predict, `(B, N)`, 0 for padding; and of what else is predicted.

        Args:
            start: the first unit that the transformer sees.

        Returns:
            The second is `(B, A)` for the size tokens, or flat for the ends of time series; the third `(B, L, M)`, the hidden states
            of the condition.
        """
        table, config = sequence.table, self.config
        own = slice(max(start, int(table.shifted)), last)  # unit 0 of a shifted order is in the prompt
        units_BUM = self._unit_inputs(
            sequence.ids_BP, table, sequence.vectors, own, sequence.given_BUM, sequence.valid_BP, table.has_gaps
        )
        x_BTM = torch.cat([sequence.prompt_BTM, units_BUM], 1)
        length, mask_BL = sequence.prompt_BTM.shape[1], sequence.mask_BL
        mask = None if bool(mask_BL.all()) else F.pad(mask_BL, (0, x_BTM.shape[1] - mask_BL.shape[1]), value=True)
        if not table.shifted:
            step_T = torch.cat([torch.arange(-length, 0, device=self.device), table.step_U[own]])
            mask = attention_bias(mask, step_T, x_BTM.dtype)
        x_BTM = self._run(x_BTM, config.prefix_length - mask_BL.shape[1], mask)
        begin, axes = mask_BL.shape[1], len(sequence.prefix_T) - 1
        x_BUM = x_BTM[:, length - int(table.shifted and start == 0) :][:, first - start :]
        low, high = self._positions(table, first, last)
        ids_BN, runs = sequence.ids_BP[:, low:high], self._runs(table, low, high)
        x_BNM = self._predictors(x_BUM, ids_BN, table, first, low, high)
        parts = [
            self._stream_nats(
                x_BNM[:, run.positions], ids_BN[:, run.positions], *self._own_stream(run.level, run.codebook)
            )
            for run in runs.runs
        ]
        nats_BN = torch.cat(parts, 1)[:, runs.order_N]
        if sequence.valid_BP is not None:
            nats_BN = nats_BN * sequence.valid_BP[:, low:high]
        if config.stops:
            return nats_BN, self._end_nats(x_BUM, sequence, first, last), x_BTM[:, :begin]
        if config.first_level or start:  # the sizes are known
            axes = 0
        sizes = (self.vocabulary.size_offset, self.vocabulary.max_grid)
        announced = sequence.prefix_T[1 : 1 + axes].expand(len(x_BTM), -1)
        return nats_BN, self._stream_nats(x_BTM[:, begin : begin + axes], announced, *sizes), x_BTM[:, :begin]

    def _end_nats(self, x_BUM: Tensor, sequence: _Sequence, first: int, last: int) -> Tensor:
        """-ln p of "there is one more frame", or of "there is none", before each frame of each sample but its first, flat."""
        start_F = sequence.table.frame_starts
        frame_N = ((start_F >= max(first, 1)) & (start_F < last)).nonzero()[:, 0]
        if not len(
            frame_N
        ):  # nothing, by way of the head, so that it is part of every training pass: DDP waits for all parameters
            return self.end_head(x_BUM[:, :0]).float().flatten()
        unit_N = start_F[frame_N] - first
        frames_B1 = sequence.frames_B[:, None]
        ended_BN, asked_BN = frame_N >= frames_B1, frame_N <= frames_B1
        logit_BN = self.end_head(x_BUM[:, unit_N])[..., 0].float()
        return F.binary_cross_entropy_with_logits(logit_BN[asked_BN], ended_BN[asked_BN].float(), reduction="none")

    def _predictors(self, x_BUM: Tensor, ids_BN: Tensor, table: OrderTable, first: int, low: int, high: int) -> Tensor:
        """`(B, N, M)`, what each of the positions [low, high) is predicted from, given the hidden states of units from `first` on."""
        unit_N = table.unit_P[low:high] - first
        x_BNM = x_BUM if len(unit_N) == x_BUM.shape[1] else x_BUM[:, unit_N]
        if self.config.order != "depth":
            return x_BNM
        out_BNM = torch.empty_like(x_BNM)
        for level, (streams, *_) in enumerate(table.shapes):
            here = (table.level_P[low:high] == level).nonzero()[:, 0].cpu()
            if not len(here):  # a window may hold no place of a level
                continue
            here = as_slice(here, self.device)
            h_XQM = x_BNM[:, here].unflatten(1, (-1, streams)).flatten(0, 1) + self._depth_places(level)
            before_XQ = ids_BN[:, here].unflatten(1, (-1, streams)).flatten(0, 1)[:, :-1]
            h_XQM = h_XQM + F.pad(self.get_input_embeddings()(before_XQ), (0, 0, 1, 0))
            h_XQM = self.depth(inputs_embeds=h_XQM, use_cache=False).last_hidden_state
            out_BNM[:, here] = h_XQM.unflatten(0, (len(x_BNM), -1)).flatten(1, 2)
        return out_BNM

    def _depth_places(self, level: int) -> Tensor:
        """`(Q, M)`: which stream each token of the small transformer predicts."""
        names = list(self._streams)
        at = [index for index, (of, _) in enumerate(names) if of == level + self.config.first_level]
        return self.depth_embed.weight[at[0] : at[-1] + 1]

    @staticmethod
    def _positions(table: OrderTable, first: int, last: int) -> tuple[int, int]:
        """The positions that units [first, last) predict, [low, high)."""
        if first == 0 and last == len(table.step_U):
            return 0, len(table)
        bounds = torch.tensor([first, last], device=table.unit_P.device)
        low, high = torch.searchsorted(table.unit_P, bounds).tolist()
        return low, high

    @staticmethod
    def _runs(table: OrderTable, low: int, high: int) -> _Runs:
        """The streams among the positions [low, high), counted from `low`."""
        if high - low == len(table):
            return _Runs(table.runs, table.from_runs_P)
        level_N, codebook_N = table.level_P[low:high], table.codebook_P[low:high]
        runs, where = [], []
        for run in table.runs:
            here = ((level_N == run.level) & (codebook_N == run.codebook)).nonzero()[:, 0]
            if len(here):
                where.append(here)
                runs.append(Run(run.level, run.codebook, as_slice(here.cpu(), here.device)))
        return _Runs(tuple(runs), torch.cat(where).argsort())
