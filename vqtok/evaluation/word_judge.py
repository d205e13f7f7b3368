"""A judge of spoken numbers: which words does a sound say?

It knows the real recordings of the 138 words, nothing else: no reconstruction and no generated sound ever trained or tuned
it, and no grammar helps it, since any word may follow any other. So what it says of generated speech can be set beside what
it says of real joins of the same words. It knows this one voice and no other words: of other speech it says nothing useful.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vqtok.audio.phrases import SpokenNumbers
from vqtok.audio.resampling import resample
from vqtok.audio.words import SAMPLING_RATE, recordings

# Range, penalties and the smoothing over frames were chosen on 40 phrases of the train split, clean and disturbed.
_HOP, _WINDOW, _FFT = 160, 400, 512  # samples: 10 ms, 25 ms, and the length of the transform
_BANDS, _LOWEST, _HIGHEST = 40, 100.0, 7000.0  # the recordings hold nothing above 7 kHz
_SPEEDS = (95, 100, 105)  # percent, of the templates
_RANGE_DB = 40.0  # what is softer than the loudest band by more than this counts as silence
_LEVEL_WEIGHT = 2.0  # of a frame's mean level against its shape; of a plain distance it would be sqrt(bands) = 6.3
_STAY, _SKIP, _WORD = 2.0, 2.0, 30.0  # dB: for a template frame held or passed over, and for every word


class _Templates(NamedTuple):
    """All words at all speeds, frame after frame in one row; the last frame is silence.

    Args:
        features: float32 (S, bands + 1).
        first, last: int (W,), the frames where each template begins and ends.
        words: W words; of silence "".
    """

    features: np.ndarray
    first: np.ndarray
    last: np.ndarray
    words: list[str]


class _Penalties(NamedTuple):
    """In dB: float32 (S,) to hold a frame of a template, step on to it or skip to it; (W,) to begin a template."""

    hold: np.ndarray
    step: np.ndarray
    skip: np.ndarray
    enter: np.ndarray


class WordJudge:
    """Recognises connected words by dynamic programming over spectrograms (one-stage DP, Ney 1984).

    Frames of 25 ms every 10 ms become 40 mel bands in dB, over three frames, at most 40 dB below the loudest band of the sound; their mean
    is taken off and kept apart with a small weight, so that loudness matters little. The distance of two frames is the root
    mean square of the differences in dB. A path visits templates, the spoken parts of the real recordings at 95, 100 and
    105 % of their speed, and silence, in any order. It may hold a template frame or pass over one, so that the pace can
    differ up to twofold, and pays for that and for every word. The cheapest path over all frames of the sound says the words.

    Raises:
        ImportError: if soundfile is missing.

    Example:
        >>> from vqtok.audio.phrases import SpokenNumbers
        >>> items = [SpokenNumbers("test", num_samples=4)[i] for i in range(4)]
        >>> scores = WordJudge().judge([item["audio"] for item in items], [item["text"] for item in items], 16000)
        >>> scores["word_accuracy"], scores["num_phrases"]
        (1.0, 4)
    """

    def __init__(self) -> None:
        features, words = [], []
        for recording in recordings():
            spoken = recording.samples[recording.start : recording.stop].astype(np.float32) / 32768
            for speed in _SPEEDS:
                features.append(_features(resample(spoken[None], speed, 100)[0]))
                words.append(recording.word)
        features.append(np.zeros((1, _BANDS + 1), np.float32))
        words.append("")
        ends = np.cumsum([len(part) for part in features])
        first, last = np.concatenate(([0], ends[:-1])), ends - 1
        self._templates = _Templates(np.concatenate(features), first, last, words)
        hold, step, skip = (np.full(ends[-1], price, np.float32) for price in (_STAY, 0.0, _SKIP))
        enter = np.full(len(words), _WORD, np.float32)
        hold[-1] = enter[-1] = 0  # silence is no word and lasts as long as it likes
        step[first] = skip[first] = np.inf  # nothing comes before a first frame but another word,
        skip[np.minimum(first + 1, last)] = np.inf  # and nothing two before a second one
        self._penalties = _Penalties(hold, step, skip, enter)

    def read(self, audio: Sequence[np.ndarray], sampling_rate: int) -> list[list[str]]:
        """Return the words of each sound, in their order.

        Args:
            audio: float arrays (samples,) or (channels, samples), whose channels are averaged.
            sampling_rate: of all of them, in Hz.

        Raises:
            ValueError: if a sound has another shape or is not finite.
        """
        return [self._read(_mono(sound, sampling_rate)) for sound in audio]

    def judge(self, audio: Sequence[np.ndarray], texts: Sequence[str], sampling_rate: int) -> dict[str, float | int]:
        """Return how well the words asked for are heard.

        Args:
            audio, sampling_rate: see `read`.
            texts: what each sound should say, words with spaces between them.

        Returns:
            `word_accuracy`, 1 - (substitutions + deletions + insertions) / words, by the cheapest edits, negative if
            there are too many insertions; `words_recognised`, the share of the words asked for that are matched;
            `phrase_accuracy`, the share of sounds that are right as a whole; and the counts `num_words`, `num_phrases`,
            `num_substitutions`, `num_deletions`, `num_insertions`.

        Raises:
            ValueError: if there are no sounds, their number differs from the texts', or see `read`.
        """
        if len(audio) != len(texts):
            raise ValueError(f"{len(audio)} sounds and {len(texts)} texts: give one text per sound")
        if not any(text.split() for text in texts):
            raise ValueError("there is nothing to judge: give at least one sound and a text with words")
        return word_scores(texts, self.read(audio, sampling_rate))

    def _read(self, sound: np.ndarray) -> list[str]:
        templates, penalties = self._templates, self._penalties
        distances = _distances(_features(sound), templates.features)
        num_frames, num_states = distances.shape
        # Two places more in front, so that a state's predecessors are slices. begun: where the template of a state's best
        # path began.
        cost, begun = np.full(num_states + 2, np.inf, np.float32), np.zeros(num_states + 2, np.int32)
        best_end, ends = np.float32(0), []  # cheapest path that ended a template one frame before; how, per frame
        for frame in range(num_frames):
            held, stepped, skipped = cost[2:] + penalties.hold, cost[1:-1] + penalties.step, cost[:-2] + penalties.skip
            cheapest = np.minimum(np.minimum(held, stepped), skipped)
            start = np.where(cheapest == stepped, begun[1:-1], np.where(cheapest == held, begun[2:], begun[:-2]))
            entering = best_end + penalties.enter
            enters = entering < cheapest[templates.first]
            cheapest[templates.first[enters]] = entering[enters]
            start[templates.first[enters]] = frame
            np.add(cheapest, distances[frame], out=cost[2:])
            begun[2:] = start
            last_costs = cost[2:][templates.last]
            end = int(np.argmin(last_costs))
            best_end = last_costs[end]
            ends.append((end, int(start[templates.last[end]])))
        words, frame = [], num_frames - 1
        while frame >= 0:
            end, began = ends[frame]
            words.append(templates.words[end])
            frame = began - 1
        return [word for word in reversed(words) if word]


def word_scores(texts: Sequence[str], heard: Sequence[Sequence[str]]) -> dict[str, float | int]:
    """Return what `WordJudge.judge` does, of words that were heard already.

    Example:
        >>> word_scores(["two four six"], [["two", "six", "six"]])["word_accuracy"]
        0.6666666666666667
    """
    wanted = [text.lower().split() for text in texts]
    edits = np.array([word_edits(*pair) for pair in zip(wanted, heard, strict=True)])
    substitutions, deletions, insertions = (int(total) for total in edits.sum(axis=0))
    num_words = sum(map(len, wanted))
    return {
        "word_accuracy": 1 - (substitutions + deletions + insertions) / num_words,
        "words_recognised": 1 - (substitutions + deletions) / num_words,
        "phrase_accuracy": float((edits.sum(axis=1) == 0).mean()),
        "num_words": num_words,
        "num_phrases": len(texts),
        "num_substitutions": substitutions,
        "num_deletions": deletions,
        "num_insertions": insertions,
    }


def scores_by_word(texts: Sequence[str], heard: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Return word -> how often it was recognised and how often it was asked for, in the order of the alphabet.

    Example:
        >>> scores_by_word(["two four", "two six"], [["two", "four"], ["four", "six"]])
        {'four': (1, 1), 'six': (1, 1), 'two': (1, 2)}
    """
    count: dict[str, tuple[int, int]] = {}
    for text, words in zip(texts, heard, strict=True):
        for word, other in align_words(text.lower().split(), words):
            if word:
                right, asked = count.get(word, (0, 0))
                count[word] = right + (word == other), asked + 1
    return dict(sorted(count.items()))


def word_edits(wanted: Sequence[str], heard: Sequence[str]) -> tuple[int, int, int]:
    """Return the substitutions, deletions and insertions of the cheapest edits from one to the other.

    Example:
        >>> word_edits("two four six".split(), "two fourth six six".split())
        (1, 0, 1)
    """
    pairs = align_words(wanted, heard)
    deletions, insertions = sum(not other for _, other in pairs), sum(not word for word, _ in pairs)
    return sum(word != other for word, other in pairs) - deletions - insertions, deletions, insertions


def align_words(wanted: Sequence[str], heard: Sequence[str]) -> list[tuple[str, str]]:
    """Return the words of both beside each other, "" where one has none, by the cheapest edits (Levenshtein).

    Example:
        >>> align_words("two four six".split(), "two six six six".split())
        [('two', 'two'), ('', 'six'), ('four', 'six'), ('six', 'six')]
    """
    # row[j] = (cost, substitutions, deletions, insertions, pairs) from the words seen so far to the first j heard.
    row: list[Any] = [(j, 0, 0, j, tuple(("", word) for word in heard[:j])) for j in range(len(heard) + 1)]
    for i, word in enumerate(wanted, start=1):
        above, row = row, [(i, 0, i, 0, tuple((each, "") for each in wanted[:i]))]
        for j, other in enumerate(heard, start=1):
            wrong = int(word != other)
            cost, s, d, n, pairs = above[j - 1]
            options = [(cost + wrong, s + wrong, d, n, (*pairs, (word, other)))]
            cost, s, d, n, pairs = above[j]
            options.append((cost + 1, s, d + 1, n, (*pairs, (word, ""))))
            cost, s, d, n, pairs = row[j - 1]
            options.append((cost + 1, s, d, n + 1, (*pairs, ("", other))))
            row.append(min(options))
    return list(row[-1][-1])


def judge_speech(pipeline: Any, tokenizer: Any, number: int, seed: int = 1) -> dict[str, Any]:
    """Let phrases of the test split be spoken, and judge them beside the real joins and what the codec makes of these.

    Args:
        pipeline: a `VQPipeline` that was trained on `SpokenNumbers`.
        tokenizer: its `VQTokenizer`.
        number: different phrases.
        seed: of the joins, and of the samples that are drawn.

    Returns:
        `texts`; `words`, where those of the real joins lie; `seconds_per_second`, how much sound is spoken in a second; and
        for `real`, `reconstructed` and `spoken` a dict of `sounds`, the words `heard`, `scores` and `by_word` (see
        `word_scores` and `scores_by_word`).
    """
    rate = tokenizer.processor.sampling_rate
    phrases = SpokenNumbers("test", 20 * number, seed, rate)
    items: dict[str, dict[str, Any]] = {}
    for index in range(len(phrases)):  # some short phrases come several times
        item = phrases[index]
        items.setdefault(item["text"], item)
        if len(items) == number:
            break
    texts, real = list(items), [item["audio"][0] for item in items.values()]
    start = time.monotonic()
    spoken = pipeline(texts, seed=seed)
    seconds = time.monotonic() - start
    made = {"real": real, "reconstructed": tokenizer.reconstruct(real, sampling_rate=rate), "spoken": spoken}
    judge, out = WordJudge(), {"texts": texts, "words": [item["words"] for item in items.values()]}
    out["seconds_per_second"] = sum(map(len, spoken)) / rate / seconds
    for name, sounds in made.items():
        heard = judge.read(sounds, rate)
        scores, by_word = word_scores(texts, heard), scores_by_word(texts, heard)
        out[name] = {"sounds": sounds, "heard": heard, "scores": scores, "by_word": by_word}
    return out


def _mono(sound: Any, sampling_rate: int) -> np.ndarray:
    """(samples,) float32 at 16 kHz."""
    array = np.asarray(sound, dtype=np.float32)
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] > array.shape[1]) or not array.size:
        raise ValueError(f"a sound of shape {array.shape} cannot be judged: give (samples,) or (channels, samples)")
    if not np.isfinite(array).all():
        raise ValueError("a sound with NaN or infinite samples cannot be judged: look at what made it")
    array = array if array.ndim == 2 else array[None]
    return resample(array.mean(axis=0, keepdims=True), sampling_rate, SAMPLING_RATE)[0]


def _features(sound: np.ndarray) -> np.ndarray:
    """(samples,) -> (frames, bands + 1): the shape of each frame in dB, and its weighted mean level."""
    sound = np.pad(sound, _WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(sound, _WINDOW)[::_HOP]
    power = np.abs(np.fft.rfft(frames * _HANN, _FFT)) ** 2 @ _FILTERS
    power = _smooth(power)
    floor = max(float(power.max()), 1e-6) * 10 ** (-_RANGE_DB / 10)
    level = 10 * np.log10(np.maximum(power, floor) / floor)
    mean = level.mean(axis=1, keepdims=True)
    return np.concatenate((level - mean, _LEVEL_WEIGHT * mean), axis=1).astype(np.float32)


def _smooth(power: np.ndarray) -> np.ndarray:
    """Each frame with half of both its neighbours, which takes out much of the chatter of a coarse codec."""
    padded = np.pad(power, ((1, 1), (0, 0)))
    return (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4


def _distances(frames: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """(F, D), (S, D) -> (F, S): the root of the mean over bands of the squared differences."""
    squares = (frames**2).sum(axis=1)[:, None] + (templates**2).sum(axis=1) - 2 * frames @ templates.T
    return np.sqrt(np.maximum(squares, 0) / _BANDS)


def _mel_filters() -> np.ndarray:
    """(FFT / 2 + 1, bands): triangles on the mel scale of O'Shaughnessy, 2595 log10(1 + f / 700)."""
    mels = np.linspace(*(2595 * np.log10(1 + np.array((_LOWEST, _HIGHEST)) / 700)), _BANDS + 2)
    corners = 700 * (10 ** (mels / 2595) - 1)
    bins = np.arange(_FFT // 2 + 1)[:, None] * SAMPLING_RATE / _FFT
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


_HANN = np.hanning(_WINDOW + 1)[:-1]
_FILTERS = _mel_filters()
