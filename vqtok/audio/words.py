"""The embedded recordings: 138 English words of one speaker, 16 kHz, mono, as they were published.

They come from the core sounds of Asterisk, (c) 2003-2010 Allison Smith, CC-BY-SA 3.0; `spoken_numbers/` beside this file has
licence, attribution and the table, and `benchmarks/bundle_spoken_numbers.py` made it. All words but "november" were recorded
once. The recordings went through G.722 before they were published, so there is nothing above 7 kHz.
"""

import csv
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import open_file

SAMPLING_RATE = 16_000
FOLDER = Path(__file__).parent / "spoken_numbers"
# The spoken part begins and ends where a block of 10 ms is within 45 dB of the loudest one, and 20 ms more on each side.
_BLOCK, _QUIET_DB, _MARGIN = 160, 45, 320


class Recording(NamedTuple):
    """One recorded word.

    Args:
        word: what is said: "ninety", "o'clock", "b".
        file: the name of the file in the published collection.
        samples: int16 (n,), the whole recording. Read-only.
        start, stop: where the spoken part lies in it, in samples.
    """

    word: str
    file: str
    samples: np.ndarray
    start: int
    stop: int


@lru_cache(maxsize=1)
def recordings() -> tuple[Recording, ...]:
    """Return all recorded words in the order of their table, read and checked once per process.

    Raises:
        ImportError: if soundfile is missing.
        ValueError: if the files of the package are damaged.

    Example:
        >>> len(recordings()), recordings()[0].word, len(recordings()[0].samples)
        (138, 'zero', 13996)
    """
    with (FOLDER / "words.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open_file(FOLDER / "words.flac") as file:
        everything = file.read(dtype="int16")
    everything.setflags(write=False)
    found, place = [], 0
    for row in rows:
        samples = everything[place : place + int(row["num_samples"])]
        place += len(samples)
        if hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest() != row["sha256"]:
            raise ValueError(f"the recording of {row['word']!r} in {FOLDER} is damaged: install vqtok again")
        found.append(Recording(row["word"], row["file"], samples, *_spoken_part(samples)))
    return tuple(found)


@lru_cache(maxsize=1)
def recordings_of() -> dict[str, tuple[Recording, ...]]:
    """Return word -> its recordings, one each but for "november"."""
    found: dict[str, tuple[Recording, ...]] = {}
    for recording in recordings():
        found[recording.word] = (*found.get(recording.word, ()), recording)
    return found


def _spoken_part(samples: np.ndarray) -> tuple[int, int]:
    """Where speech begins and ends. Whole numbers decide, so every machine finds the same."""
    blocks = samples[: len(samples) // _BLOCK * _BLOCK].astype(np.int64).reshape(-1, _BLOCK)
    energy = (blocks**2).sum(axis=1)
    loud = np.flatnonzero(energy >= energy.max() // round(10 ** (_QUIET_DB / 10)))
    return max(0, int(loud[0]) * _BLOCK - _MARGIN), min(len(samples), (int(loud[-1]) + 1) * _BLOCK + _MARGIN)
