"""Many samples of a prompt, the best of them first: by any scorer of (prompt, medium), as DALL-E does with CLIP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .checks import at_least_one

Scorer = Callable[[list[Any], list[Any]], Sequence[float]]


def check_keep_best(keep_best: int | None, num_samples: int, rerank: Scorer | None) -> int:
    """How many media of each prompt are kept.

    Raises:
        ValueError: more than there are, or a number without a scorer to choose by.
    """
    num_samples = at_least_one(num_samples, "num_samples")
    if keep_best is None:
        return num_samples
    if rerank is None:
        raise ValueError(
            f"keep_best {keep_best} needs a scorer to choose by: give rerank=scorer, or a smaller num_samples"
        )
    if at_least_one(keep_best, "keep_best") > num_samples:
        raise ValueError(f"keep_best {keep_best} is more than num_samples {num_samples}: draw more, or keep fewer")
    return keep_best


def best_first(scorer: Scorer, prompts: Sequence[Any], media: list[Any], keep_best: int) -> list[Any]:
    """Return `keep_best` media of each prompt, those with the highest scores first; of equal ones the earlier.

    Args:
        scorer: told the prompt of each medium, and the media; returns a finite number for each, higher is better.
        prompts: one for every `len(media) / len(prompts)` media.
        media: of the first prompt, then of the second, and so on.

    Example:
        >>> best_first(lambda prompts, media: [len(m) for m in media], ["p", "q"], ["a", "abc", "ab", "xyz", "x", "x"], 2)
        ['abc', 'ab', 'xyz', 'x']

    Raises:
        ValueError: another number of scores than of media, or one that is no finite number.
    """
    each = len(media) // len(prompts)
    given = scorer([prompt for prompt in prompts for _ in range(each)], media)
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"the scorer must return one number for each of {len(media)} media, got {given!r}") from None
    if len(scores) != len(media):
        raise ValueError(
            f"the scorer returned {len(scores)} scores for {len(media)} media: it must return one for each"
        )
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(
                f"the scorer gave sample {index % each} of the prompt {prompts[index // each]!r} the score {score}: it must be finite"
            )
    chosen = []
    for start in range(0, len(media), each):
        order = sorted(range(start, start + each), key=lambda index: -scores[index])
        chosen += [media[index] for index in order[:keep_best]]
    return chosen
