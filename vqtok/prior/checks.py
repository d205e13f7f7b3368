"""What a prior is given, checked before anything is computed: each mistake is one sentence with the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vqtok.codes import CodeLayout

from .condition_codes import code_rows
from .configuration_code_prior import CodePriorConfig


def check_codes(codes: Sequence[Tensor], sizes: Tensor | None, config: CodePriorConfig) -> None:
    """Refuse anything but all levels `(B, Q, *grid)` of one grid that a size token can announce."""
    layout = CodeLayout.from_dict(config.layout)
    if isinstance(codes, Tensor) or len(codes) != len(layout.levels):
        raise ValueError(
            f"codes are a tuple of {len(layout.levels)} levels, coarse to fine, got {type(codes).__name__} of {len(codes)}"
        )
    batch, grid = codes[0].shape[0], tuple(codes[0].shape[2:])
    for index, (values, level, ratio) in enumerate(zip(codes, layout.levels, config.ratios, strict=True)):
        wanted = (batch, level.num_codebooks, *(n * config.ratios[0] // ratio for n in grid))
        if values.dtype != torch.int64 or values.ndim != 2 + layout.ndim or values.shape != wanted:
            raise ValueError(f"level {index}: codes must be int64 {wanted}, got {values.dtype} {tuple(values.shape)}")
    if not batch:
        raise ValueError("codes hold no sample: give a batch of at least 1")
    check_grid(grid, config)
    if sizes is not None and config.stops:
        if len(sizes) != batch or max(layout.grids(size)[0] for size in sizes.tolist()) != grid:
            raise ValueError(
                f"sizes {sizes.tolist()[:8]} do not fit {batch} samples of up to {grid[0]} coarse frames: give one for each, the longest "
                "filling the codes"
            )
    elif sizes is not None:
        found = sorted({layout.grids(size)[0] for size in sizes.tolist()})
        if len(sizes) != batch or found != [grid]:
            raise ValueError(
                f"a batch holds samples of one grid, here {grid}, but its {len(sizes)} sizes have the grids {found}: "
                "group samples by their padded size"
            )


def check_grid(grid: Sequence[int], config: CodePriorConfig) -> None:
    """Refuse a coarsest grid that no size token announces."""
    if not all(1 <= extent <= config.max_grid for extent in grid):
        raise ValueError(
            f"a coarsest grid of {tuple(grid)} is outside 1 to max_grid {config.max_grid} codes per side: "
            "use smaller media, or make the prior with a larger max_grid"
        )


def check_condition(ids: Tensor, mask: Tensor | None, batch: int, config: CodePriorConfig) -> tuple[Tensor, Tensor]:
    """Ids and bool mask `(B, L)` of conditions that the config knows: text tokens padded on the left, or class labels `(B,)`.

    A row of padding alone is the null condition.
    """
    if config.condition == "none":
        raise ValueError("this prior was made without conditions: leave the condition away")
    ids = ids[:, None] if ids.ndim == 1 and config.condition == "class" else ids
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    if config.condition == "features":
        raise ValueError("this prior takes the features of its text encoder, not ids: give condition_features")
    most, what = config.prefix_length, {"text": "tokens", "codes": "sizes and codes"}.get(config.condition, "label")
    if ids.dtype != torch.int64 or ids.ndim != 2 or len(ids) != batch or mask.shape != ids.shape:
        raise ValueError(
            f"conditions must be int64 (B={batch}, L) with a mask of the same shape, got {ids.dtype} "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    if not 1 <= ids.shape[1] <= most:
        raise ValueError(f"a condition of {ids.shape[1]} ids does not fit: this prior takes 1 to {most} {what}")
    _check_padding(mask)
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= config.text_size:
        raise ValueError(
            f"condition id {low if low < 0 else high} is outside [0, {config.text_size}): use the prior's own text tokenizer or labels"
        )
    return ids, mask


def check_features(features: Tensor, mask: Tensor | None, batch: int, config: CodePriorConfig) -> tuple[Tensor, Tensor]:
    """Features `(B, L, D)` and bool mask `(B, L)` of conditions, padded on the left; a row of padding alone is null."""
    if config.condition != "features":
        raise ValueError(f"this prior has the condition {config.condition!r} and takes no condition_features")
    shape, most = tuple(features.shape), config.max_text_length
    mask = torch.ones(shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask.bool()
    fits = features.is_floating_point() and len(shape) == 3 and shape[::2] == (batch, config.feature_size)
    if not fits or tuple(mask.shape) != shape[:2]:
        raise ValueError(
            f"condition features must be float (B={batch}, L, feature_size={config.feature_size}) with a mask (B, L), got "
            f"{features.dtype} {shape} and {tuple(mask.shape)}: use the text encoder that the prior was trained with"
        )
    if not 1 <= shape[1] <= most:
        raise ValueError(f"features of {shape[1]} tokens do not fit: this prior takes 1 to {most}")
    _check_padding(mask)
    if not bool(torch.isfinite(features).all()):
        raise ValueError("condition features hold values that are not finite: run the text encoder in float32")
    return features, mask.to(features.device)


def _check_padding(mask: Tensor) -> None:
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            "conditions must be padded on the left, but their mask has padding after a token: use pad_conditions"
        )


def condition_rows(condition: Any, config: CodePriorConfig, count: int | None = None) -> list[list[int] | Tensor]:
    """One row per condition: ids of text tokens, of one class, of codes; features `(L, D)`; or the id of `null`.

    Args:
        condition: a list of lists of text tokens, of class labels, of features, or `Codes`; None, as a whole or as an entry, is the
            null condition.
        count: how many there must be; None takes any number.
    """
    null = [config.vocabulary.special_id("null")]
    if config.condition == "codes" and condition is not None:
        condition = code_rows(condition, config)
    if condition is None:
        rows: list[Any] = [None] * (1 if count is None else count)
    elif isinstance(condition, int | str):
        raise ValueError(f"condition must be a list with one entry per sample, got {condition!r}: put it in a list")
    else:
        listed = isinstance(condition, Tensor) and config.condition != "features"
        rows = condition.tolist() if listed else list(condition)
    if not rows or count not in (None, len(rows)):
        wanted = f"for {count} samples: give one each" if count else "given: give at least one, or None"
        raise ValueError(f"there are {len(rows)} conditions {wanted}")
    if any(row is None for row in rows) and config.condition != "none" and not config.condition_dropout:
        raise ValueError(
            "this prior was trained with condition_dropout 0 and knows no null condition: give a condition, or train it with 0.1"
        )
    out: list[list[int] | Tensor] = []
    for row in rows:
        if config.condition == "features" and row is not None:
            if not isinstance(row, Tensor):
                raise ValueError(
                    f"conditions are features (L, {config.feature_size}), got {row!r}: encode texts with the prior's text encoder, "
                    "or use VQPipeline"
                )
            out.append(check_features(row[None], None, 1, config)[0][0])
            continue
        if isinstance(row, str):
            raise ValueError(f"conditions are ids, got {row!r}: encode words with encode_prompts, or use VQPipeline")
        row = row.tolist() if isinstance(row, Tensor) else row
        ids = null if row is None else list(row) if isinstance(row, Iterable) else [row]
        if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
            raise ValueError(f"conditions are ids, got {row!r}: give lists of whole numbers, or use VQPipeline")
        if row is not None:
            check_condition(torch.tensor([ids], dtype=torch.int64), None, 1, config)
        out.append(ids)
    return out


def size_rows(sizes: Any, count: int, config: CodePriorConfig) -> list[list[int]]:
    """One size per condition from one for all or one each, each checked against `max_grid`."""
    layout = CodeLayout.from_dict(config.layout)
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    values = [sizes] if isinstance(sizes, int | float) else list(sizes)
    values = [values] * count if not values or isinstance(values[0], int | float) else values
    if len(values) != count:
        raise ValueError(f"there are {len(values)} sizes for {count} conditions: give one for all, or one each")
    for size in values:
        if not isinstance(size, Sequence) or any(not isinstance(n, int) for n in size):
            raise ValueError(f"sizes are whole numbers of pixels, samples or bytes, got {size}")
        check_grid(layout.grids(size)[0], config)
    return values


def check_guidance(scale: float, config: CodePriorConfig) -> None:
    """Refuse guidance where there is nothing to guide away from."""
    if scale != 1 and config.condition == "none":
        raise ValueError(f"guidance_scale {scale} needs a condition, and this prior was made without: leave it at 1")
    if scale != 1 and not config.condition_dropout:
        raise ValueError(
            f"guidance_scale {scale} needs the null condition, and this prior was trained with condition_dropout 0: "
            "use guidance_scale 1, or train it with condition_dropout 0.1"
        )


def at_least_one(value: int, name: str) -> int:
    """The value, if it is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value
