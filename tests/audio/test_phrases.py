"""Spoken numbers: the grammar by ear, the splits by text, the sound sample by sample."""

import collections
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqtok.audio import phrases
from vqtok.audio.phrases import (
    MAX_SECONDS,
    Draws,
    SpokenNumbers,
    cardinal,
    join_words,
    longest,
    ordinal,
    phrase_split,
)
from vqtok.audio.words import recordings, recordings_of

pytest.importorskip("soundfile")


def _texts(split, num, **options):
    dataset = SpokenNumbers(split, num, **options)
    return [" ".join(dataset.words(i)) for i in range(num)]


def test_train_and_test_share_no_phrase_whatever_the_seed():
    train = {text for seed in range(3) for text in _texts("train", 6000, seed=seed)}
    test = {text for seed in range(3) for text in _texts("test", 600, seed=seed)}
    assert len(train) > 8000 and len(test) > 800
    assert not train & test
    assert {phrase_split(text) for text in train} == {"train"} and {phrase_split(text) for text in test} == {"test"}


def test_about_a_tenth_of_phrases_is_test():
    numbers = [" ".join([*cardinal(n), scale]) for n in range(1, 1000) for scale in phrases.SCALES]
    share = sum(phrase_split(text) == "test" for text in numbers) / len(numbers)
    assert 0.08 < share < 0.12


def test_training_says_every_recorded_word_so_that_no_test_word_is_new():
    said = collections.Counter(word for text in _texts("train", 8000) for word in text.split())
    assert said.keys() == recordings_of().keys()
    assert min(said.values()) >= 5, said.most_common()[-3:]


def test_an_item_depends_on_seed_split_and_index_alone():
    long, short = SpokenNumbers("train", 50, seed=3), SpokenNumbers("train", 5, seed=3)
    for i in (4, 0):  # in another order, from another object, after a journey to a worker
        again = pickle.loads(pickle.dumps(short))[i]
        assert again["text"] == long[i]["text"] and again["words"] == long[i]["words"]
        assert np.array_equal(again["audio"], long[i]["audio"])
    assert len({tuple(_texts("train", 5, seed=seed)) for seed in range(5)}) == 5
    assert np.array_equal(long[-1]["audio"], long[49]["audio"])
    with pytest.raises(IndexError):
        long[50]


def test_what_was_drawn_once_is_drawn_for_ever():
    """Recorded when the data set was made: a change here changes every result that was ever reported."""
    assert _texts("test", 4) == [
        "fourteen million",
        "three eight zero pound",
        "star three five",
        "five hundred sixty fourth",
    ]
    item = SpokenNumbers("test", 4)[1]
    assert [(word, start, stop) for word, start, stop in item["words"]] == [
        ("three", 1261, 12261),
        ("eight", 13644, 21978),
        ("zero", 23623, 35790),
        ("pound", 37598, 49598),
    ]


def test_items_have_the_form_that_is_promised():
    dataset = SpokenNumbers("train", 300, seed=1)
    assert len(dataset) == 300 and dataset.skipped == [] and dataset.label_names is None
    for item in itertools.islice((dataset[i] for i in range(300)), 300):
        audio, words = item["audio"], item["words"]
        assert audio.dtype == np.float32 and audio.ndim == 2 and audio.shape[0] == 1 and item["sampling_rate"] == 16_000
        assert 0.05 < np.abs(audio).max() < 1
        assert audio.shape[1] <= MAX_SECONDS * 16_000 and 2 <= len(words) <= 5
        assert item["text"].split() == [word.word for word in words]
        places = [0, *itertools.chain.from_iterable((start, stop) for _, start, stop in words), audio.shape[1]]
        assert places == sorted(places)
        for before, after in zip(places[::2], places[1::2], strict=True):  # silence around and between the words
            assert after - before >= 0.02 * 16_000 and not audio[0, before:after].any()


def test_a_word_is_its_recording_with_gain_when_nothing_else_changes(monkeypatch):
    monkeypatch.setattr(phrases, "SPEEDS", (100,))
    audio, (word,) = join_words(["seven"], key=5)
    recording = recordings_of()["seven"][0]
    original = recording.samples[recording.start : recording.stop].astype(np.float64) / 32768
    said = audio[word.start : word.stop]
    assert len(said) == len(original)
    inner = slice(80, -80)  # without the fades
    gain = said[inner] @ original[inner] / (original[inner] @ original[inner])
    assert np.abs(said[inner] - gain * original[inner]).max() < 1e-6
    assert -7.6 <= 20 * np.log10(gain) <= 1.6
    assert abs(said[0]) <= abs(original[0]) / 40 and abs(said[-1]) <= abs(original[-1]) / 40


def test_speed_changes_length_and_pitch_by_a_few_percent(monkeypatch):
    spoken = {}
    for speed in (95, 100, 105):
        monkeypatch.setattr(phrases, "SPEEDS", (speed,))
        audio, (word,) = join_words(["zulu"], key=1)
        spoken[speed] = audio[word.start : word.stop]
    for speed in (95, 105):
        assert len(spoken[speed]) == pytest.approx(len(spoken[100]) * 100 / speed, abs=1.5)
        # What is resampled holds the same wave: its energy grows with its length, to within the fades' and filter's share.
        assert (spoken[speed] ** 2).sum() == pytest.approx((spoken[100] ** 2).sum() * 100 / speed, rel=0.01)


def test_both_recordings_of_november_are_used():
    assert len({len(join_words(["november"], key)[0]) for key in range(40)}) > 2
    takes = recordings_of()["november"]
    lengths = {take.stop - take.start for take in takes}
    assert len(lengths) == 2


def test_no_phrase_of_the_grammar_can_be_longer_than_it_says():
    slowest = max(recordings(), key=lambda r: r.stop - r.start)
    assert longest([slowest.word]) < 1.5
    for key in range(60):
        words = ["seventeen", "twenty"]
        assert len(join_words(words, key)[0]) / 16_000 <= longest(words) + 1e-3


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "zero"), (10, "ten"), (19, "nineteen"), (20, "twenty"), (94, "ninety four"), (100, "one hundred")]
    + [(307, "three hundred seven"), (999, "nine hundred ninety nine")],
)
def test_cardinals_by_hand(number, said):
    assert " ".join(cardinal(number)) == said


@pytest.mark.parametrize(("number", "said"), [(1, "first"), (12, "twelfth"), (20, "twentieth"), (43, "forty third")])
def test_ordinals_by_hand(number, said):
    assert " ".join(ordinal(number)) == said


def test_numbers_are_said_apart():
    assert len({" ".join(cardinal(n)) for n in range(1000)}) == 1000
    assert len({" ".join(ordinal(n)) for n in range(1, 100)}) == 99


def test_another_rate_and_stereo():
    plain, other = SpokenNumbers("test", 2), SpokenNumbers("test", 2, sampling_rate=24_000, num_channels=2)
    one, two = plain[1], other[1]
    assert two["audio"].shape == (2, -(-one["audio"].shape[1] * 3 // 2)) and two["sampling_rate"] == 24_000
    assert np.array_equal(two["audio"][0], two["audio"][1])
    assert [(w, round(a * 1.5), round(b * 1.5)) for w, a, b in one["words"]] == [tuple(w) for w in two["words"]]
    assert (two["audio"][0] ** 2).mean() == pytest.approx((one["audio"] ** 2).mean(), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 2**32))
def test_draws_stay_below_their_limit(key, limit):
    draws = Draws(key)
    assert all(0 <= draws.below(limit) < limit for _ in range(20))
    assert all(-2 <= draws.between(-2, 3) <= 3 for _ in range(20))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: SpokenNumbers("all"), "unknown split 'all'.*'train' or 'test'"),
        (lambda: SpokenNumbers(num_samples=0), "num_samples is 0"),
        (lambda: SpokenNumbers(num_channels=6), "1 or 2 channels, not 6"),
        (lambda: join_words([]), "at least one"),
        (lambda: join_words(["seven", "cat"]), "'cat' was never recorded.*zulu"),
    ],
)
def test_errors_say_what_to_do(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
