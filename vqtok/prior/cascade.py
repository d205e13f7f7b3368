"""A cascade: one prior per level or few levels, each finer one given the codes of the coarser ones, drawn in order.

VQ-VAE-2 (Razavi et al. 2019, section 3.2) and the upsamplers of Jukebox (Dhariwal et al. 2020, section 3.3) generate so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vqtok.codes import Codes

from .checks import at_least_one, check_guidance, condition_rows, size_rows
from .drawing import Condition
from .known import Known
from .modeling_code_prior import CodePriorModel
from .sampling import CodeScores, SamplingSettings, checked_seed

_CONDITION = ("condition", "text_size", "feature_size", "condition_layout", "condition_fingerprint")


class CodeCascade(nn.Module):
    """Priors, coarse to fine, that draw and score as one.

    Args:
        stages: the first predicts level 0 and maybe further ones, the next goes on where it stops. A finer stage has the condition of
            the first, or none.

    Attributes:
        stages: as given. What is said of the whole (`config`, `vocabulary`) is said by the first.

    Raises:
        ValueError: stages of different code spaces or conditions, or levels that are missing or predicted twice.
    """

    def __init__(self, stages: Sequence[CodePriorModel]):
        super().__init__()
        if not stages:
            raise ValueError("a cascade has at least one stage: give its priors, coarse to fine")
        first = stages[0]
        level = 0
        for number, stage in enumerate(stages):
            config, wanted = stage.config, first.config
            for name in ("layout", "fingerprint"):
                if getattr(config, name) != getattr(wanted, name):
                    raise ValueError(
                        f"stage {number} of the cascade has the {name} {getattr(config, name)}, stage 0 {getattr(wanted, name)}: "
                        "train all stages on codes of one tokenizer"
                    )
            told, first_told = ({name: getattr(each, name) for name in _CONDITION} for each in (config, wanted))
            if told != first_told and config.condition != "none":
                raise ValueError(
                    f"stage {number} of the cascade has the condition {told}, stage 0 {first_told}: train it with the same text tokenizer, "
                    "encoder or labels, or without condition"
                )
            if config.first_level != level:
                raise ValueError(
                    f"stage {number} of the cascade predicts levels from {config.first_level} on, but {level} comes next: "
                    "order the stages coarse to fine"
                )
            level = len(config.layout["levels"][: config.own_levels.stop])
        self.stages = nn.ModuleList(stages)

    @property
    def config(self) -> Any:
        """The first stage's."""
        return self.stages[0].config

    @property
    def vocabulary(self) -> Any:
        """The first stage's; the ids of codes are those of all stages."""
        return self.stages[0].vocabulary

    @property
    def device(self) -> torch.device:
        """Where the first stage is."""
        return self.stages[0].device

    def sample_codes(
        self,
        condition: Condition = None,
        sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
        num_samples: int = 1,
        seed: int | None = None,
        known: Known | Codes | None = None,
        **sampling: Any,
    ) -> Codes:
        """Return drawn codes, stage after stage; see `CodePriorModel.sample_codes`.

        Args:
            sampling: further arguments, for all stages; what is not given comes from each stage's `generation_config`.

        Raises:
            ValueError: as there; what a later stage refuses is refused before the first one draws.
        """
        self._check(condition, sizes, sampling)
        seed, num_samples = checked_seed(seed), at_least_one(num_samples, "num_samples")
        known = Known(known) if isinstance(known, Codes) else known
        codes = self.stages[0].sample_codes(condition, sizes, num_samples, seed=seed, known=known, **sampling)
        count = len(codes) // num_samples
        if known is not None and len(known) == 1:
            known = known[[0] * count]
        again = [row for row in range(count) for _ in range(num_samples)]
        rows = [None] * count if condition is None else list(condition)
        for stage in self.stages[1:]:
            plain = stage.config.condition == "none"  # nothing to guide away from either
            told = [None if plain else rows[row] for row in again]
            options = {**sampling, "guidance_scale": None} if plain else sampling
            given = codes if known is None else _with_known(codes, known[again])
            codes = stage.sample_codes(told, codes.sizes.tolist(), seed=seed, known=given, **options)
        return codes

    def _check(self, condition: Condition, sizes: Any, sampling: dict[str, Any]) -> None:
        """Ask each stage what it will be asked later."""
        count = 1
        for stage in self.stages:
            if stage.config.condition != "none":
                scale = SamplingSettings.resolve(stage.generation_config, **sampling).guidance_scale
                check_guidance(scale, stage.config)
                count = len(condition_rows(condition, stage.config))
            for size in () if sizes is None else size_rows(sizes, count, stage.config):
                stage.check_size(size)

    def score(self, codes: Codes, condition: Condition = None, batch_size: int = 64) -> CodeScores:
        """Return how likely the stages together find codes; see `CodePriorModel.score`.

        Raises:
            ValueError: as there.
        """
        parts = [
            stage.score(codes, None if stage.config.condition == "none" else condition, batch_size)
            for stage in self.stages
        ]
        return CodeScores(
            sum(part.nats for part in parts),
            torch.cat([part.nats_per_code for part in parts], 1),
            tuple(level for part in parts for level in part.maps),
            sum(part.bits_per_unit for part in parts),
        )


def _with_known(codes: Codes, known: Known) -> Known:
    """Drawn coarse levels, kept wholly, and what is known of the finer ones."""
    if len(known.codes.levels) <= len(codes.levels):
        return Known(codes)
    fine = len(codes.levels)
    levels, keep = list(codes.levels), [torch.ones_like(level[:, 0], dtype=torch.bool) for level in codes.levels]
    grids = codes.layout.grids(codes.sizes.max(0).values.tolist())
    whole = known.keep or [torch.ones_like(level[:, 0], dtype=torch.bool) for level in known.codes.levels]
    for level, mask, grid in zip(known.codes.levels[fine:], whole[fine:], grids[fine:], strict=False):
        corner = (slice(None), *map(slice, level.shape[2:]))
        values = level.new_zeros(*level.shape[:2], *grid)
        values[(slice(None), *corner)] = level
        keeping = torch.zeros(len(level), *grid, dtype=torch.bool)
        keeping[corner] = mask.cpu()
        levels.append(values.to(codes.levels[0].device))
        keep.append(keeping)
    return Known(Codes(levels, codes.sizes, codes.layout, codes.fingerprint), tuple(mask.cpu() for mask in keep))
