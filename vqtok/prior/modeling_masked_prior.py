"""The masked prior: a bidirectional transformer over codes, decoded in a few passes.

Source: MaskGIT (Chang et al. 2022); the hierarchy of levels is ours. In the transformer

    [condition]  begin  sizes  level 0  level 1 ...

the prompt sees what is before it, and the units of a level see the prompt, all coarser levels and each other. In training each level but
the finest is there twice, as it is for the finer levels to see and with codes masked, so that one pass trains all levels.

Axis letters: B batch, L condition tokens, T input tokens, P code positions, N positions of a level, M width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqtok.codes import Codes
from vqtok.outputs import CodePriorOutput

from .checks import check_codes
from .configuration_masked_prior import MaskedCodePriorConfig
from .drawing import Batch, CodeDrawingMixin, Condition
from .generation import CodeGenerationMixin
from .known import Known
from .masking import random_masks, split_passes
from .network import CodePriorPreTrainedModel
from .sampling import CodeScores, uniforms
from .sequence import OrderTable, flatten
from .stepping import Prompt
from .unmasking import Filling, MaskedSettings, Unmasking, level_slices

# Streams of numbers of a sample; those of its codes are numbered by the first level that is predicted.
_CHOICE, _SCORE = 1 << 21, 1 << 22


class MaskedCodePriorModel(CodePriorPreTrainedModel, CodeDrawingMixin, CodeGenerationMixin):
    """A masked prior over codes: trains on them (`forward`), draws them (`sample_codes`), tells how likely they are (`score`).

    Example:
        >>> layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 16}]}
        >>> backbone = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> backbone |= {"num_attention_heads": 2, "num_key_value_heads": 2}
        >>> config = MaskedCodePriorConfig(layout=layout, condition="class", text_size=10, backbone_config=backbone)
        >>> prior = MaskedCodePriorModel(config).eval()
        >>> codes = prior.sample_codes([3, 7], sizes=(32, 24), seed=0, num_passes=4)
        >>> tuple(codes.levels[0].shape), tuple(prior.score(codes, [3, 7]).nats.shape)
        ((2, 1, 4, 3), (2,))
    """

    config: MaskedCodePriorConfig
    config_class = MaskedCodePriorConfig

    def __init__(self, config: MaskedCodePriorConfig):
        super().__init__(config)
        self.mask_embed = nn.Embedding(1, config.backbone_config.hidden_size)
        settings = MaskedSettings()
        for name in ("num_passes", "choice_temperature"):
            setattr(self.generation_config, name, getattr(settings, name))
        self.post_init()

    def forward(
        self,
        codes: Sequence[Tensor],
        sizes: Tensor | None = None,
        condition_ids: Tensor | None = None,
        condition_mask: Tensor | None = None,
        condition_features: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CodePriorOutput:
        """Return the loss of codes of which a random part is masked; in eval mode that of `score`, without gradient.

        In train mode each sample and level draws a part cos(pi / 2 u), u uniform over the batch, and the loss is the mean over masked
        codes (and size tokens). torch's global CPU generator decides, so that a resumed run goes on as it was.

        Args:
            codes: all levels, coarse to fine, each int64 `(B, Q, *grid)`, of one grid.
            sizes: int64 `(B, ndim)` in pixels, samples or bytes; checked against the grid.
            condition_ids: int64 `(B, L)` text tokens padded on the left, or `(B,)` class labels; None is the null condition. In train
                mode conditions become null with probability `condition_dropout`.
            condition_mask: `(B, L)`, true for tokens; None if nothing is padding. A row of padding alone is null.
            condition_features: float `(B, L, feature_size)`, what a text encoder says, instead of `condition_ids`.
            return_dict: ignored, the output is always named.

        Returns:
            `loss`, 0-dim, and `nats_per_code`, `(num_levels,)` of the levels that are predicted.

        Raises:
            ValueError: codes or conditions that do not fit the config, or samples of different grids.
        """
        check_codes(codes, sizes, self.config)
        condition = self._batch_condition(len(codes[0]), condition_ids, condition_mask, condition_features)
        prompt = Prompt(condition.vectors_BLM, condition.mask_BL, guided=False)
        if self.training:
            nats_BP, counted_BP, size_nats, table = self._masked_nats(codes, prompt)
        else:
            with torch.no_grad():
                passes = self.generation_config.num_passes
                nats_BP, size_nats, table = self._ordered_nats(codes, prompt, range(len(codes[0])), passes, 0)
            counted_BP = torch.ones_like(nats_BP, dtype=torch.bool)
        levels = len(table.shapes)
        sums = nats_BP.new_zeros(levels).index_add(0, table.level_P, nats_BP.detach().sum(0))
        counts = nats_BP.new_zeros(levels).index_add(0, table.level_P, counted_BP.sum(0, dtype=torch.float32))
        loss = (nats_BP.sum() + size_nats.sum()) / (counts.sum() + size_nats.numel())
        # Of a codebook of several factors the nats add up.
        own = zip(table.shapes, codes[self.config.own_levels], strict=True)
        factors = torch.tensor([shape[0] / values.shape[1] for shape, values in own])
        return CodePriorOutput(loss=loss, nats_per_code=sums * factors.to(sums) / counts)

    # -- inputs

    def _masked_inputs(self, ids_BN: Tensor, masked_BN: Tensor | None) -> Tensor:
        """Vectors `(B, N, M)` of codes, without their places; None masks none."""
        x_BNM = self.get_input_embeddings()(ids_BN)
        return x_BNM if masked_BN is None else torch.where(masked_BN[..., None], self.mask_embed.weight[0], x_BNM)

    def _flat(self, codes: Sequence[Tensor]) -> tuple[Tensor, OrderTable]:
        """Ids `(B, P)` of the levels that are predicted, and their table."""
        levels = self.vocabulary.to_ids([values.to(self.device) for values in codes])
        table = self._table(tuple(tuple(values.shape[1:]) for values in levels))
        return flatten(levels[self.config.own_levels], table), table

    # -- nats

    def _masked_nats(self, codes: Sequence[Tensor], prompt: Prompt) -> tuple[Tensor, Tensor, Tensor, OrderTable]:
        """-ln p of masked codes `(B, P)`, 0 elsewhere, which they are, -ln p of the size tokens `(B, A)`, and the table."""
        ids_BP, table = self._flat(codes)
        batch, vectors, prefix_T = len(ids_BP), self._unit_vectors(table), self._prefix(codes[0].shape[2:])
        masked_BP = torch.empty_like(ids_BP, dtype=torch.bool)
        for here in level_slices(table):
            # Evenly spread over the batch, which makes the loss less noisy than independent numbers.
            ratio_B = (torch.rand(()) + torch.arange(batch)[torch.randperm(batch)] / batch) % 1
            numbers_BN = torch.rand(batch, here.stop - here.start)
            masked_BP[:, here] = random_masks(table.codebook_P[here].cpu(), ratio_B, numbers_BN).to(self.device)
        given_BPM = self._given(codes, table)
        place_BPM = vectors.unit_UM if given_BPM is None else vectors.unit_UM + given_BPM
        prompt_BTM = self._prompt(prompt.vectors_BLM, prefix_T, vectors, None, False)
        length, known = prompt_BTM.shape[1], level_slices(table)[-1].start  # codes of all levels but the finest
        seen_BNM = (self._masked_inputs(ids_BP, None) + place_BPM)[:, :known]
        asked_BPM = self._masked_inputs(ids_BP, masked_BP) + place_BPM
        unit_T = torch.cat([torch.arange(known), torch.arange(len(table))]).to(self.device)
        start = self.config.prefix_length - prompt.mask_BL.shape[1]
        self._check_length(start + length + len(table))
        position_T = start + torch.cat([torch.arange(length, device=self.device), length + unit_T])
        bias = levels_bias(
            prompt.mask_so_far(length + len(unit_T)), table.level_P[unit_T], known, length, seen_BNM.dtype
        )
        x_BTM = self._run(torch.cat([prompt_BTM, seen_BNM, asked_BPM], 1), start, bias, position_T)
        x_BPM, nats_BP = x_BTM[:, length + known :], torch.zeros(ids_BP.shape, device=self.device)
        for run in table.runs:
            here_Bn = masked_BP[:, run.positions]
            nats_n = self._stream_nats(
                x_BPM[:, run.positions][here_Bn][None],
                ids_BP[:, run.positions][here_Bn][None],
                *self._own_stream(run.level, run.codebook),
            )
            nats_BP[:, run.positions] = nats_BP[:, run.positions].masked_scatter(here_Bn, nats_n)
        return nats_BP, masked_BP, self._size_nats(x_BTM[:, :length], prefix_T), table

    def _ordered_nats(
        self,
        codes: Sequence[Tensor],
        prompt: Prompt,
        samples: Sequence[int],
        num_passes: int | Sequence[int],
        seed: int,
    ) -> tuple[Tensor, Tensor, OrderTable]:
        """-ln p of all codes `(B, P)` in a random order of each sample, of the size tokens `(B, A)`, and the table."""
        ids_BP, table = self._flat(codes)
        coarse = [values.to(self.device) for values in codes[: self.config.first_level]]
        prefix_T = self._prefix(codes[0].shape[2:])
        unmasking = Unmasking(self, table, prompt, prefix_T, coarse)
        stream = _SCORE + self.config.first_level
        numbers_BP = torch.stack([uniforms(seed, i, len(table), stream) for i in samples]).to(self.device)
        nats_BP = unmasking.nats(ids_BP, numbers_BP, num_passes)
        return nats_BP, self._size_nats(unmasking.prompt_BTM, prefix_T), table

    def _size_nats(self, x_BTM: Tensor, prefix_T: Tensor) -> Tensor:
        axes = 0 if self.config.first_level else len(prefix_T) - 1  # a finer stage of a cascade knows the sizes
        sizes = (self.vocabulary.size_offset, self.vocabulary.max_grid)
        begin = x_BTM.shape[1] - len(prefix_T)
        return self._stream_nats(x_BTM[:, begin : begin + axes], prefix_T[1 : 1 + axes].expand(len(x_BTM), -1), *sizes)

    # -- drawing and scoring

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
        num_passes: int | Sequence[int] | None = None,
        choice_temperature: float | None = None,
    ) -> Codes:
        """Return drawn codes: `num_samples` for the first condition, then for the second, and so on.

        Sample i draws from generators keyed by (seed, i) and does not depend on the batch it was drawn in. Levels are filled one
        after another, coarse to fine. In each pass all masked codes of a level are drawn, and the surest stay (`MaskedSettings`). What is
        None is read from `generation_config`.

        Args:
            condition, sizes, num_samples, top_k, top_p, seed, batch_size: as for `CodePriorModel.sample_codes`.
            guidance_scale, guidance_schedule: as there; the scale grows over the passes.
            temperature: at least 0; 0 takes the likeliest codes, without noise in the choice of those that stay.
            known: codes that are kept, one sample for all or one per condition; the others are drawn seeing the kept ones of their own
                level and all coarser ones. `Codes` are kept wholly, `Known` says which of them.
            num_passes: of the transformer over all levels together, or a number per level.
            choice_temperature: at least 0; see `MaskedSettings`.

        Returns:
            `Codes` of the prior's code space, on its device.

        Raises:
            ValueError: a value out of its range, a condition or size the prior does not know, guidance without a null condition,
                known codes that do not fit.
        """
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        given |= {"guidance_schedule": guidance_schedule}
        given |= {"num_passes": num_passes, "choice_temperature": choice_temperature}
        settings = MaskedSettings.resolve(self.generation_config, **given)
        split_passes(settings.num_passes, len(self.config.streams_per_level[self.config.own_levels]))
        return self._sample_codes(condition, sizes, num_samples, settings, seed, batch_size, known)

    def _draw_ids(self, batch: Batch) -> tuple[Tensor, None]:
        settings, table, first = batch.settings, batch.table, self.config.first_level
        unmasking = Unmasking(self, table, batch.prompt, batch.prefix_T, batch.coarse)
        rows = max(passes for _, passes in unmasking.split(settings.num_passes))
        # The first numbers of a sample are for its size, whether it is drawn or given.
        skip, shape = len(batch.prefix_T) - 1, (rows, len(table))
        count = math.prod(shape)
        numbers = [uniforms(batch.seed, i, skip + count, first)[skip:].view(shape) for i in batch.samples]
        noise = [uniforms(batch.seed, i, count, _CHOICE + first).view(shape) for i in batch.samples]
        tensors = [torch.stack(values, 1).to(self.device) for values in (numbers, noise)]
        return Filling(unmasking, settings, *tensors, known=batch.known).run(), None

    @torch.no_grad()
    def score(
        self,
        codes: Codes,
        condition: Condition = None,
        batch_size: int = 64,
        num_passes: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> CodeScores:
        """Return how likely codes are when the model reveals them in a random order, given their sizes and conditions.

        That is the chain rule over groups of codes: coarse levels first, within a level as many groups as it has passes, of the
        sizes of the cosine schedule, filled at random. Codes of a group are independent given the groups before. It is a distribution over
        codes (its probabilities sum to 1), that of drawing with a very large `choice_temperature` and nothing else changed. It is not
        that of the usual way of drawing, which keeps the surest codes and has no likelihood in closed form.

        Args:
            codes: all levels and codebooks, of any sizes. A prior that is given coarser levels scores the finer ones, given these.
            condition: one entry per sample, as for `sample_codes`; None is the null condition for all.
            batch_size: how many samples are scored together; changes speed and memory only.
            num_passes: groups of all levels together, or of each; None takes those of `generation_config`. As many as codes put each
                code into a group of its own, or almost.
            seed: with the number of the sample it decides the order.

        Raises:
            ValueError: codes of another layout or code space (both are named), or conditions that do not fit.
        """
        passes = MaskedSettings.resolve(self.generation_config, num_passes=num_passes).num_passes

        def code_nats(part: Codes, prompt: Prompt, samples: Sequence[int]) -> tuple[Tensor, OrderTable]:
            nats_BP, _, table = self._ordered_nats(part.levels, prompt, samples, passes, seed)
            return nats_BP, table

        return self._score_codes(codes, condition, batch_size, code_nats)


def levels_bias(mask_BT: Tensor | None, level_N: Tensor, known: int, length: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores in training, `(B | 1, 1, T, T)`: 0 where a token may look, the lowest number elsewhere.

    Args:
        mask_BT: false for padding; None if nothing is padding.
        level_N: int64, level of each unit: first those that are only seen, then those that are masked.
        known: how many are only seen.
        length: tokens of the prompt, before the units.
    """
    device = level_N.device
    level_T = torch.cat([torch.full((length,), -1, device=device), level_N])
    place_T = torch.arange(len(level_T), device=device)
    asked_T = place_T >= length + known
    prompt_T = place_T < length
    coarser = (level_T[None, :] < level_T[:, None]) & ~asked_T[None, :]  # the prompt too
    beside = (level_T[None, :] == level_T[:, None]) & (asked_T[None, :] == asked_T[:, None])
    before = ~prompt_T[:, None] | (place_T[None, :] <= place_T[:, None])
    allowed = ((coarser | beside) & before)[None, None]
    if mask_BT is not None:
        # A row of padding attends to itself, as no softmax can be over nothing; nobody reads what comes out.
        allowed = (allowed & mask_BT[:, None, None, :]) | torch.eye(len(level_T), dtype=torch.bool, device=device)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)
