"""Spoken numbers: phrases out of recorded words, "ninety four thousand", "monday july third", joined to sound.

A small grammar says which words stand beside each other; `words.py` has the recordings. The phrases are real speech of one
voice, and nearly every word has one recording: what they can show is composition and intelligibility, not new voices.

- Split: every phrase belongs to "train" or "test" for good, by a hash of its text (10 % are test).
- Sound: the spoken parts of the recordings with faded edges, 30 to 120 ms of digital silence between them and 20 to 100 ms
  around. Each word is up to 1.5 dB louder or softer, the phrase up to 6 dB softer. The whole phrase is 5 % slower to 5 %
  faster in steps of 1 %, by resampling, which moves pitch and timbre along with the pace, hence the small range.
- Length: two to five words, at most `MAX_SECONDS`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from vqtok.sources.hashing import hash64, mix

from .files import RECORDINGS
from .resampling import match_channels, resample
from .words import SAMPLING_RATE, recordings, recordings_of

MAX_WORDS, MAX_SECONDS = 5, 4.0
SPEEDS = tuple(range(95, 106))  # percent
GAP_MS, EDGE_MS = (30, 120), (20, 100)
WORD_GAIN_DB, PHRASE_GAIN_DB = 1.5, 6.0
_FADE = 80  # samples, 5 ms

DIGITS, TEENS, TENS, ORDINALS, ORDINAL_TENS, SCALES, WEEKDAYS, MONTHS, LETTERS, ALPHABET = (
    tuple(words.split())
    for words in (
        "zero one two three four five six seven eight nine",
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
        "twenty thirty forty fifty sixty seventy eighty ninety",
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
        "fifteenth sixteenth seventeenth eighteenth nineteenth",
        "twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth",
        "thousand million billion",
        "sunday monday tuesday wednesday thursday friday saturday",
        "january february march april may june july august september october november december",
        "a b c d e f g h i j k l m n o p q r s t u v w x y z",
        "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo "
        "sierra tango uniform victor whiskey x-ray yankee zulu",
    )
)
DAYS = (*WEEKDAYS, "today", "tomorrow", "yesterday")


class SpokenWord(NamedTuple):
    """Where a word lies in a phrase.

    Args:
        word: what is said.
        start, stop: its samples, first and one past the last.
    """

    word: str
    start: int
    stop: int


class Draws:
    """Numbers from a key, one after another: the same for a key everywhere."""

    def __init__(self, key: int) -> None:
        self._state = mix(key)

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        self._state = mix(self._state)
        return self._state % limit

    def between(self, low: float, high: float) -> float:
        """A number in [low, high], one of 1001 steps."""
        return low + (high - low) * self.below(1001) / 1000

    def one_of(self, options: Sequence[str]) -> str:
        return options[self.below(len(options))]


def cardinal(number: int) -> list[str]:
    """Return the words of 0 to 999, without "and".

    Example:
        >>> cardinal(732), cardinal(40)
        (['seven', 'hundred', 'thirty', 'two'], ['forty'])
    """
    if number >= 100:
        return [DIGITS[number // 100], "hundred", *(cardinal(number % 100) if number % 100 else [])]
    if number >= 20:
        return [TENS[number // 10 - 2], *([DIGITS[number % 10]] if number % 10 else [])]
    return [(DIGITS + TEENS)[number]]


def ordinal(number: int) -> list[str]:
    """Return the words of "first" to "ninety ninth".

    Example:
        >>> ordinal(31), ordinal(20)
        (['thirty', 'first'], ['twentieth'])
    """
    if number < 20:
        return [ORDINALS[number - 1]]
    return [TENS[number // 10 - 2], ORDINALS[number % 10 - 1]] if number % 10 else [ORDINAL_TENS[number // 10 - 2]]


def _some(draws: Draws, options: Sequence[str], least: int, most: int) -> list[str]:
    return [draws.one_of(options) for _ in range(least + draws.below(most - least + 1))]


def _large_number(draws: Draws) -> list[str]:
    """ninety four thousand; minus seven million; two hundred thousand."""
    number = 1 + draws.below(99) if draws.below(3) else 100 * (1 + draws.below(9))
    return ["minus"] * (draws.below(4) == 0) + cardinal(number) + [draws.one_of(SCALES)]


def _number(draws: Draws) -> list[str]:
    """seven hundred thirty two; minus forty; sixty one dollars."""
    number = draws.below(100) if draws.below(2) else 100 + draws.below(900)
    sign = draws.below(6)
    return ["minus"] * (sign == 0) + cardinal(number) + ["dollars"] * (sign == 1)


def _ordinal(draws: Draws) -> list[str]:
    """sixty first; nine hundred eightieth."""
    hundreds = [DIGITS[1 + draws.below(9)], "hundred"] if draws.below(2) else []
    round_number = hundreds and draws.below(2)  # nothing else says "sixtieth"
    return hundreds + ordinal(10 * (2 + draws.below(8)) if round_number else 1 + draws.below(99))


def _date(draws: Draws) -> list[str]:
    """monday july third; tomorrow may twenty first."""
    day = [draws.one_of(DAYS)] if draws.below(4) else []
    return [*day, draws.one_of(MONTHS), *ordinal(1 + draws.below(31))]


def _time(draws: Draws) -> list[str]:
    """seven forty five; yesterday nine o'clock."""
    day = [draws.one_of(DAYS)] if draws.below(2) else []
    hour = cardinal(1 + draws.below(12))
    return [*day, *hour, *(cardinal(10 + draws.below(50)) if draws.below(3) else ["o'clock"])]


def _digits(draws: Draws) -> list[str]:
    """three one four one five; star six nine; two zero pound."""
    key, digits = draws.below(4), _some(draws, DIGITS, 2, MAX_WORDS - 1)
    return ["star"] * (key == 0) + digits + ["pound"] * (key == 1) + [draws.one_of(DIGITS)] * (key > 1)


def _letters(draws: Draws) -> list[str]:
    """m p q; b seven four."""
    letters = _some(draws, LETTERS, 2, 3)
    return letters + _some(draws, DIGITS if draws.below(3) == 0 else LETTERS, 0, 2)


def _alphabet(draws: Draws) -> list[str]:
    """tango kilo zulu; echo nine."""
    letters = _some(draws, ALPHABET, 1, 3)
    return letters + ([draws.one_of(DIGITS)] if len(letters) == 1 or draws.below(3) == 0 else [])


# Each as likely as its number of mentions.
_KINDS: tuple[Callable[[Draws], list[str]], ...] = (
    *(_large_number, _number, _number, _ordinal, _date, _date),
    *(_time, _digits, _digits, _letters, _letters, _alphabet),
)


def phrase_split(text: str) -> str:
    """Return "train" or "test": where a phrase belongs, by its text alone."""
    return "test" if hash64(text.encode()) % 10 == 0 else "train"


def longest(words: Sequence[str]) -> float:
    """Return how many seconds a phrase lasts at most, with the slowest speed and the longest gaps."""
    spoken = sum(max(r.stop - r.start for r in recordings_of()[word]) for word in words) / SAMPLING_RATE
    return spoken / (SPEEDS[0] / 100) + ((len(words) - 1) * GAP_MS[1] + 2 * EDGE_MS[1]) / 1000


def join_words(words: Sequence[str], key: int = 0) -> tuple[np.ndarray, tuple[SpokenWord, ...]]:
    """Return the sound of a phrase, float32 (samples,) at 16 kHz within [-1, 1], and where its words lie.

    Args:
        words: recorded words, in any order, also some that the grammar never puts together.
        key: decides gaps, gains, speed and, of "november", the recording.

    Raises:
        ValueError: if there is no word, or one was never recorded.

    Example:
        >>> audio, spoken = join_words("ninety four".split())
        >>> [word for word, _, _ in spoken], audio.dtype
        (['ninety', 'four'], dtype('float32'))
    """
    if not words:
        raise ValueError("there is no word to say: give at least one")
    known = recordings_of()
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"the word {unknown[0]!r} was never recorded: the words are {', '.join(sorted(known))}")
    draws = Draws(key)
    speed = SPEEDS[draws.below(len(SPEEDS))]
    gain = -draws.between(0, PHRASE_GAIN_DB)
    parts, spoken, place = [], [], 0

    def silence(limits: tuple[int, int]) -> None:
        nonlocal place
        parts.append(np.zeros(round(draws.between(*limits) * SAMPLING_RATE / 1000), np.float32))
        place += len(parts[-1])

    silence(EDGE_MS)
    for index, word in enumerate(words):
        if index:
            silence(GAP_MS)
        decibels = gain + draws.between(-WORD_GAIN_DB, WORD_GAIN_DB)
        sound = _spoken(word, draws.below(len(known[word])), speed) * np.float32(10 ** (decibels / 20))
        parts.append(sound)
        spoken.append(SpokenWord(word, place, place + len(sound)))
        place += len(sound)
    silence(EDGE_MS)
    return np.concatenate(parts), tuple(spoken)


@lru_cache(maxsize=2048)  # all words at all speeds, 50 MB: a phrase is then joined in a tenth of the time
def _spoken(word: str, number: int, speed: int) -> np.ndarray:
    """The spoken part of a word's recording, faded in and out, at a speed in percent. Read-only."""
    recording = recordings_of()[word][number]
    sound = recording.samples[recording.start : recording.stop].astype(np.float32) / 32768
    fade = (np.arange(_FADE, dtype=np.float32) + 1) / (_FADE + 1)
    sound[:_FADE] *= fade
    sound[-_FADE:] *= fade[::-1]
    sound = resample(sound[None], speed, 100)[0]
    sound.setflags(write=False)
    return sound


class SpokenNumbers(Dataset[dict[str, Any]]):
    """Spoken phrases: item i is joined in memory and depends on (seed, split, i) alone.

    Args:
        split: "train" or "test". They share no phrase; they share the recordings of the words.
        num_samples: length of the data set; a longer one starts with the items of a shorter one.
        seed: any integer.
        sampling_rate: of the items in Hz; all but the 16,000 of the recordings are resampled.
        num_channels: 1, or 2 with the same sound in both.

    Items: a dict of `audio`, float32 (num_channels, samples); `sampling_rate`; `text`, its words with spaces
    between them; `words`, a tuple of `SpokenWord`.

    Raises:
        ValueError: if the split is unknown, num_samples is below 1, or num_channels is neither 1 nor 2.
        ImportError: if soundfile is missing.

    Example:
        >>> item = SpokenNumbers("test", num_samples=8, seed=0)[0]
        >>> item["text"], item["audio"].shape[0], item["sampling_rate"]
        ('fourteen million', 1, 16000)
    """

    medium = RECORDINGS
    skipped: list[tuple[str, str]] = []  # nothing that is embedded can be unreadable
    label_names: list[str] | None = None  # as of every data set: a phrase has no class

    def __init__(
        self,
        split: str = "train",
        num_samples: int = 10_000,
        seed: int = 0,
        sampling_rate: int = SAMPLING_RATE,
        num_channels: int = 1,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"unknown split {split!r} of the spoken numbers: use 'train' or 'test'")
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least 1")
        if num_channels not in (1, 2) or sampling_rate < 1:
            raise ValueError(f"the spoken numbers have 1 or 2 channels, not {num_channels}, at a rate of at least 1 Hz")
        self.split = split
        self.sampling_rate, self.num_channels = sampling_rate, num_channels
        self.num_samples = num_samples
        self.seed = seed
        self._key = hash64(f"{seed} {split}".encode())
        recordings()  # say now, not in a worker, that soundfile is missing

    def __len__(self) -> int:
        return self.num_samples

    def words(self, index: int) -> list[str]:
        """Return the words of an item without making its sound."""
        return self._phrase(index)[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        words, key = self._phrase(index)
        audio, spoken = join_words(words, key)
        sound = match_channels(resample(audio[None], SAMPLING_RATE, self.sampling_rate), self.num_channels)
        scale = self.sampling_rate / SAMPLING_RATE
        spoken = tuple(SpokenWord(word, round(start * scale), round(stop * scale)) for word, start, stop in spoken)
        return {"audio": sound, "sampling_rate": self.sampling_rate, "text": " ".join(words), "words": spoken}

    def name(self, index: int) -> str:
        """Return what to call an item."""
        return f"phrase {index}"

    def _phrase(self, index: int) -> tuple[list[str], int]:
        """The words, and the key of their sound."""
        index = int(index)
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(f"item {index} of a data set of {self.num_samples}")
        draws = Draws(self._key ^ mix(index % self.num_samples))
        while True:  # one phrase in ten is test, so of test items ten on average are drawn
            words = _KINDS[draws.below(len(_KINDS))](draws)
            fits = 2 <= len(words) <= MAX_WORDS and longest(words) <= MAX_SECONDS
            if fits and phrase_split(" ".join(words)) == self.split:
                return words, draws.below(2**63)
