"""Sampling and scoring: pure functions on the logits of one stream, and what they are told.

Axis letters: B batch, K entries of the stream, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


@dataclass(frozen=True)
class SamplingSettings:
    """How codes are drawn; the order is always: combine for guidance, divide by temperature, top-k, top-p, draw. Where a time series
    ends is drawn the same way, of the two that it ends and that it goes on.

    Attributes:
        guidance_scale: s in u + s (c - u) of the unconditional u and conditional c logits (Ho & Salimans 2022, as LlamaGen and
            transformers write it); 1 is no guidance, 0 unconditional. Adding a constant to the logits of a position changes nothing,
            so this equals the combination of log-probabilities.
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: keep only the k likeliest codes; None keeps all.
        top_p: keep only the likeliest codes that together hold this probability (the one that crosses it included); 1 keeps all.
        guidance_schedule: how the scale grows over the steps, from 1 to `guidance_scale`: "constant" (it is `guidance_scale` all the
            time), "linear" (as MAR and VAR), "cosine" ((1 - cos(pi r)) / 2 of the way at r of the steps, as RAR).

    Raises:
        ValueError: a value out of its range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance_schedule: str = "constant"

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "temperature"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                remedy = (
                    "1 is no guidance"
                    if name == "guidance_scale"
                    else "0 takes the likeliest code, 1 samples as trained"
                )
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}: {remedy}")
        if self.top_k is not None and (
            not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1
        ):
            raise ValueError(f"top_k must be an integer of at least 1, got {self.top_k!r}: None keeps all codes")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}: 1 keeps all codes")
        if self.guidance_schedule not in SCHEDULES:
            raise ValueError(
                f"guidance_schedule must be one of {', '.join(SCHEDULES)}, got {self.guidance_schedule!r}: 'constant' guides them alike"
            )

    def scale_at(self, progress: float) -> float:
        """The guidance scale when `progress`, from 0 to 1, of the steps is done."""
        return 1 + (self.guidance_scale - 1) * SCHEDULES[self.guidance_schedule](progress)

    @classmethod
    def resolve(cls, defaults: Any, **given: Any) -> SamplingSettings:
        """Settings that were given (not None), else those of `generation_config.json`, where 0 stands for no top-k."""
        stored = {field.name: getattr(defaults, field.name, None) for field in fields(cls)}
        stored["top_k"] = stored["top_k"] or None
        values = {name: stored[name] if given.get(name) is None else given[name] for name in stored}
        return cls(**{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class CodeScores:
    """How likely a prior finds codes, given their size and condition.

    Attributes:
        nats: float32 `(B,)`, -ln p of all codes of a sample.
        nats_per_code: float32 `(B, num_levels)`, mean per level, coarse to fine; compare with ln K.
        maps: per level float32 `(B, Q, *grid)`, nats of each code; 0 where a smaller sample is padded.
        bits_per_unit: float32 `(B,)`, nats / ln 2 per pixel, sample or byte of the input.
    """

    nats: Tensor
    nats_per_code: Tensor
    maps: tuple[Tensor, ...]
    bits_per_unit: Tensor


def uniforms(seed: int, index: int, count: int, stream: int = 0) -> Tensor:
    """Return `count` float64 numbers in [0, 1) that belong to sample `index` of `seed`; each `stream` has numbers of its own.

    They come from a counter-based generator keyed by both (Philox; its stream is fixed for ever). torch's own CPU generator reads
    only 32 bits of its seed, so that among 10^5 samples some would be twins.

    Example:
        >>> bool((uniforms(0, 3, 5)[:4] == uniforms(0, 3, 4)).all()), bool((uniforms(0, 3, 4) == uniforms(3, 0, 4)).any())
        (True, False)
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, index, stream] if stream else [seed, index])).random_raw(count)
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def guide(conditional_BK: Tensor, unconditional_BK: Tensor, scale: float) -> Tensor:
    """Return u + s (c - u)."""
    return torch.add(unconditional_BK, conditional_BK - unconditional_BK, alpha=scale)


def filter_logits(logits_BK: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Return logits (shifted so that the largest is 0) with everything that may not be drawn at -inf: temperature, then top-k, then top-p.

    Codes tied with the k-th stay. At least one code always stays.

    Args:
        logits_BK: float; computed in fp32.
        temperature: above 0.

    Example:
        >>> filter_logits(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), top_k=2)
        tensor([[-inf, -inf, -1.,  0.]])
    """
    logits_BK = logits_BK.float()
    logits_BK = (logits_BK - logits_BK.amax(1, keepdim=True)) / temperature  # no overflow, however cold
    if top_k is not None and top_k < logits_BK.shape[1]:
        least_B1 = logits_BK.topk(top_k, dim=1).values[:, -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < least_B1, -math.inf)
    if top_p < 1:
        sorted_BK, order_BK = logits_BK.sort(dim=1, descending=True, stable=True)
        probabilities_BK = sorted_BK.softmax(1)
        before_BK = probabilities_BK.cumsum(1) - probabilities_BK  # exactly 0 for the likeliest, which always stays
        drop_BK = torch.empty_like(before_BK, dtype=torch.bool).scatter(1, order_BK, before_BK >= top_p)
        logits_BK = logits_BK.masked_fill(drop_BK, -math.inf)
    return logits_BK


def draw(logits_BK: Tensor, uniform_B: Tensor, settings: SamplingSettings) -> Tensor:
    """Return one code per row, int64 `(B,)`, by the inverse of the cumulative distribution; each row depends on itself alone.

    Args:
        logits_BK: float, already combined for guidance.
        uniform_B: float64 in [0, 1), one number per row.
    """
    if settings.temperature == 0:
        return logits_BK.float().argmax(1)
    filtered_BK = logits_BK.float()
    if settings.temperature != 1 or settings.top_k is not None or settings.top_p < 1:
        filtered_BK = filter_logits(filtered_BK, settings.temperature, settings.top_k, settings.top_p)
    cumulative_BK = filtered_BK.softmax(1).cumsum(1, dtype=torch.float64)
    # Below the total even when u is rounded up, so that what is found has a probability above 0.
    threshold_B1 = (uniform_B * (1 - 2.0**-52))[:, None] * cumulative_BK[:, -1:]
    found_B = torch.searchsorted(cumulative_BK, threshold_B1, right=True)[:, 0]
    return found_B.clamp(max=logits_BK.shape[1] - 1)  # only logits that are not numbers get that far


def checked_seed(seed: int | None) -> int:
    """The seed, or one from torch's global generator.

    Raises:
        ValueError: the seed is negative or no integer.
    """
    if seed is None:
        return int(torch.randint(1 << 62, ()))
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}: None draws a new one")
    return seed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
