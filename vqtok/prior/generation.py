"""The way through `generate` of transformers: a compatibility path, equal to `sample_codes` when both are greedy.

Where a token stands is read off the ids themselves: the columns after `begin`, and the grid that the size tokens announce.

Axis letters: B batch, T input tokens, A grid axes, M width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from vqtok.outputs import CodePriorOutput

from .checks import check_grid
from .sequence import Shapes


class CodeGenerationMixin(GenerationMixin):
    """`input_ids` in, logits over the whole vocabulary out, with -inf for every id that cannot follow."""

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As transformers does it: after the last code comes `null` and generation ends. It knows no null condition, so no guidance.

        Raises:
            ValueError: a guidance_scale other than 1, or an order that is not one code after another.
        """
        self._check_plain()
        stored = getattr(generation_config or self.generation_config, "guidance_scale", None)
        scale = kwargs.get("guidance_scale", stored)
        if scale not in (None, 1):
            raise ValueError(
                f"generate cannot guide (guidance_scale {scale}): use sample_codes, or pass guidance_scale=1 to generate without"
            )
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """What transformers prepares, and all ids so far: they say where the new ones stand."""
        return {**super().prepare_inputs_for_generation(input_ids, **kwargs), "history_ids": input_ids}

    def _forward_ids(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        history_ids: Tensor | None,
        use_cache: bool | None,
    ) -> CodePriorOutput:
        self._check_plain()
        length = input_ids.shape[1]
        seen = cache.get_seq_length() if cache is not None else 0
        history_ids = input_ids if history_ids is None else history_ids
        if history_ids.shape[1] != seen + length:
            raise ValueError(
                f"with {seen} tokens in the cache and {length} new ones, history_ids must hold all {seen + length}, "
                f"got {history_ids.shape[1]}"
            )
        begin = self._begin_column(history_ids)
        shapes = [self._announced(row[begin + 1 :]) for row in history_ids.tolist()]
        start = self.config.prefix_length - begin + seen
        if start < 0:
            raise ValueError(
                f"a condition of {begin} tokens does not fit: this prior takes at most {self.config.prefix_length}"
            )
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config.backbone_config)
        # How far behind begin each input token stands: 0 is begin itself, below 0 is the condition.
        behind = range(seen - begin, seen - begin + length)
        vectors = {shape: self._vectors_behind(shape, behind) for shape in set(shapes)}
        places_BTM = torch.stack([vectors[shape] for shape in shapes])
        self._check_length(start + length)
        x_BTM = self.backbone(
            inputs_embeds=self.get_input_embeddings()(input_ids) + places_BTM,
            attention_mask=attention_mask,
            position_ids=torch.arange(start, start + length, device=input_ids.device)[None],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return CodePriorOutput(logits=self._all_logits(x_BTM, shapes, behind), past_key_values=cache)

    def _vectors_behind(self, shapes: Shapes, behind: range) -> Tensor:
        """Place vectors `(T, M)`: zero for the condition; tokens behind the last code, where a shorter sample ends, repeat its place."""
        vectors = self._unit_vectors(self._table(shapes))
        # The last token of the prefix is unit 0; behind the last code nothing is predicted.
        last_M = vectors.place_PM[len(vectors.unit_UM) - 1]
        vectors_PM = torch.cat([vectors.prefix_TM, vectors.unit_UM[1:], last_M[None]])
        index_T = torch.tensor(behind, device=vectors_PM.device)
        return vectors_PM[index_T.clamp(0, len(vectors_PM) - 1)] * (index_T >= 0)[:, None]

    def _all_logits(self, x_BTM: Tensor, shapes: list[Shapes], behind: range) -> Tensor:
        batch, length = x_BTM.shape[:2]
        logits_BTV = x_BTM.new_full((batch, length, self.vocabulary.padded_size), -math.inf, dtype=torch.float32)
        follows = {shape: self._follows(shape, behind) for shape in set(shapes)}
        for column in range(length):
            rows_of: dict[tuple[int, int], list[int]] = {}
            for row, shape in enumerate(shapes):
                rows_of.setdefault(follows[shape][column], []).append(row)
            for (offset, size), rows in rows_of.items():
                predicted = offset >= self.vocabulary.size_offset
                value = self._logits(x_BTM[rows, column], offset, size).float() if predicted else 0.0
                logits_BTV[rows, column, offset : offset + size] = value
        return logits_BTV

    def _follows(self, shapes: Shapes, behind: range) -> list[tuple[int, int]]:
        """The ids (offset, count) that can follow each token."""
        table, axes = self._table(shapes), self.vocabulary.layout.ndim
        streams = [self._streams[name] for name in zip(table.level_P.tolist(), table.codebook_P.tolist(), strict=True)]
        sizes = [(self.vocabulary.size_offset, self.vocabulary.max_grid)] * axes
        after = [*sizes, *streams]
        begin, end = (self.vocabulary.special_id("begin"), 1), (self.null_id, 1)
        return [begin if at < 0 else after[at] if at < len(after) else end for at in behind]

    def _check_plain(self) -> None:
        config = self.config
        if config.condition == "features":
            raise ValueError("generate and input_ids know ids alone, and this prior reads features: use sample_codes")
        if config.condition_places:
            raise ValueError(
                "generate and input_ids know no places of a condition, and this prior has some: use sample_codes"
            )
        if config.order != "flat" or config.stops or config.first_level or config.window or config.num_levels:
            raise ValueError(
                "generate and input_ids are for a prior of all levels in the order 'flat', without windows, of media that announce "
                f"their size; this one has order {config.order!r}: use sample_codes and score"
            )

    def _begin_column(self, history_ids: Tensor) -> int:
        """The column of `begin`, the same in all rows; the next one if it is still to come."""
        is_begin_BT = history_ids == self.vocabulary.special_id("begin")
        columns = torch.where(is_begin_BT.any(1), is_begin_BT.int().argmax(1), history_ids.shape[1]).unique().tolist()
        if len(columns) != 1:
            raise ValueError(
                f"begin stands in the columns {columns}: pad prompts on the left, and give it to all of them or to none"
            )
        return columns[0]

    def _announced(self, after_begin: list[int]) -> Shapes:
        """Shapes of the levels by the size tokens; of a 1x1 grid while these are not complete, when nothing depends on them."""
        axes, ratios = self.vocabulary.layout.ndim, self.config.ratios
        extents = [token - self.vocabulary.size_offset + 1 for token in after_begin[:axes]]
        check_grid(extents, self.config)
        extents = extents if len(extents) == axes else [1] * axes
        return self._shapes([[n * ratios[0] // ratio for n in extents] for ratio in ratios])
