"""The best of many samples by any scorer, and what a scorer must return."""

import math

import pytest
import torch

from vqtok.prior.reranking import best_first, check_keep_best

MEDIA = ["a", "bbb", "bb", "x", "y", "z"]


def test_best_first_per_prompt_with_ties_in_order():
    told = []

    def by_length(prompts, media):
        told.extend(zip(prompts, media, strict=True))
        return torch.tensor([float(len(medium)) for medium in media])

    assert best_first(by_length, ["p", None], MEDIA, 2) == ["bbb", "bb", "x", "y"]
    assert told == [("p", "a"), ("p", "bbb"), ("p", "bb"), (None, "x"), (None, "y"), (None, "z")]
    assert best_first(by_length, ["p"], MEDIA, 6) == ["bbb", "bb", "a", "x", "y", "z"]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0] * 5, "returned 5 scores for 6 media"),
        ([1.0] * 7, "returned 7 scores for 6 media"),
        ([1.0] * 4 + [math.nan, 1.0], "sample 1 of the prompt 'q' the score nan"),
        ([1.0, 1.0, -math.inf, 1.0, 1.0, 1.0], "sample 2 of the prompt 'p' the score -inf"),
        (3.0, "one number for each of 6 media, got 3.0"),
        (None, "one number for each"),
        (["good"] * 6, "one number for each"),
    ],
)
def test_what_a_scorer_must_return(scores, message):
    with pytest.raises(ValueError, match=message):
        best_first(lambda prompts, media: scores, ["p", "q"], MEDIA, 1)


def test_how_many_are_kept():
    assert check_keep_best(None, 3, None) == check_keep_best(None, 3, len) == check_keep_best(3, 3, len) == 3
    for keep, scorer, message in [
        (4, len, "keep_best 4 is more than num_samples 3"),
        (0, len, "at least 1"),
        (1, None, "rerank"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_keep_best(keep, 3, scorer)
