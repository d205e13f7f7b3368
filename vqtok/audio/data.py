"""Recordings to train on and to measure with, from a folder, from any `datasets` data set, or embedded.

`load_audio` gives a map-style data set of `{"audio": samples, "sampling_rate": int, "text": str or None}`, where known with
`"label": int`.
"""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from vqtok.sources.dataset import MediaDataset, open_source, refuse_options, skipped_summary

from .files import RECORDINGS, load_soundfile, open_file, read_samples
from .phrases import SpokenNumbers
from .resampling import match_channels
from .resampling import resample as change_rate
from .words import SAMPLING_RATE

__all__ = ["AudioDataset", "SpokenNumbers", "load_audio", "skipped_summary"]


def load_audio(
    source: Any,
    sampling_rate: int,
    num_channels: int = 1,
    split: str = "train",
    *,
    num_samples: int | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    audio_column: str | None = None,
    config_name: str | None = None,
    holdout: Sequence[str] | None = None,
    resample: bool = False,
    max_seconds: float | None = 3600.0,
    seed: int = 0,
    verify: bool = True,
) -> "SpokenNumbers | AudioDataset":
    """Return a map-style data set with items `{"audio": float32 (channels, samples), "sampling_rate": int, "text": str or None}`.

    With labels, all items also have `"label"`, an int from 0; the data set's `label_names` lists their names, None for mere
    numbers and without labels.

    Args:
        source: "spoken-numbers", the embedded speech; a folder of .wav, .flac, .ogg and other files that libsndfile reads,
            searched recursively, with transcripts in a `metadata.csv` or `metadata.jsonl` beside them (columns `file_name`
            and `text`) or without; or what `datasets` opens, with a column of `Audio`: a name on the Hub, a folder of
            Parquet or Arrow files, one written by `save_to_disk`, a `Dataset`.
        sampling_rate: of the items in Hz. A recording of another rate is an error, not a skip, unless `resample` is set.
        num_channels: 1 or 2. Stereo becomes mono as the mean, mono stereo as itself twice; more channels are left out.
        split: "train", "test" or "all" (not of the spoken numbers); see `vqtok.image.data.load_images`, which shares the
            rules of splits, captions and labels.
        num_samples: how many phrases of the spoken numbers (10,000 by default), or at most how many recordings.
        caption_column: the column of transcripts, which every recording must then have; None takes `text` where there is
            one.
        label_column: the column of labels, which every recording must then have. None takes a data set's only complete
            `ClassLabel` column; of a folder without transcripts the subfolders.
        audio_column: of a data set with several columns of recordings, the one to use.
        config_name: which configuration of a data set on the Hub.
        holdout: of a folder, the files (by stem or name) that are "test"; all others are "train".
        resample: bring recordings of other rates to `sampling_rate`.
        max_seconds: longer recordings are left out; None takes any. An item is decoded whole.
        seed: of the spoken numbers.
        verify: decode every recording once now, on threads, and leave out those that cannot be read, listed in `.skipped`
            as (name, reason). False saves that time; then a broken one raises ValueError when it is reached.

    Raises:
        ValueError: one sentence, naming value and remedy, for a folder that is missing, empty or has no readable recording;
            a wrong rate; transcripts or labels asked for but missing; an unknown split, column, file or data set.
        ImportError: if soundfile is missing.

    Example:
        >>> load_audio("spoken-numbers", 16000, 1, "test", num_samples=3)[1]["text"]
        'three eight zero pound'
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: ask for at least 1")
    if num_channels not in (1, 2):
        raise ValueError(f"num_channels is {num_channels}: use 1 or 2")
    if sampling_rate < 1:
        raise ValueError(f"the sampling rate is {sampling_rate} Hz: use at least 1")
    load_soundfile()  # say now, not in a worker, that it is missing
    options = {
        "caption_column": caption_column,
        "label_column": label_column,
        "media_column": audio_column,
        "config_name": config_name,
        "holdout": holdout,
    }
    if isinstance(source, str) and source == RECORDINGS.embedded:
        refuse_options(RECORDINGS, "the spoken numbers", options, allowed=("caption_column",))
        if caption_column not in (None, "text"):
            raise ValueError(f"the spoken numbers have no column {caption_column!r}: their transcripts are in 'text'")
        if sampling_rate != SAMPLING_RATE and not resample:
            raise ValueError(
                f"the spoken numbers are sampled at {SAMPLING_RATE} Hz, not {sampling_rate}: set resample=True"
            )
        number = 10_000 if num_samples is None else num_samples
        return SpokenNumbers(split, number, seed, sampling_rate, num_channels)
    dataset = AudioDataset(
        open_source(RECORDINGS, source, split, options),
        sampling_rate,
        num_channels,
        resample,
        math.inf if max_seconds is None else max_seconds,
    )
    dataset.keep(num_samples, verify)
    return dataset


class WrongRateError(ValueError):
    """A recording has another sampling rate, and nobody asked to resample."""


class AudioDataset(MediaDataset):
    """Recordings that are read when asked for: items as of `load_audio`, which makes it.

    `skipped` lists the recordings that were left out because they cannot be read, as (name, reason); `label_names` the
    names of the labels, None if they have none.
    """

    medium = RECORDINGS

    def __init__(self, source: Any, sampling_rate: int, num_channels: int, resample: bool, max_seconds: float) -> None:
        super().__init__(source)
        self.sampling_rate, self.num_channels = sampling_rate, num_channels
        self._resample, self._max_seconds = resample, max_seconds

    def _read(self, source: Path | str | BytesIO) -> dict[str, Any]:
        with open_file(source, max_seconds=self._max_seconds) as file:
            rate = file.samplerate
            if rate != self.sampling_rate and not self._resample:
                raise WrongRateError(
                    f"it is sampled at {rate} Hz, not {self.sampling_rate}: set resample=True, or convert it"
                )
            audio = match_channels(read_samples(file, 0, file.frames), self.num_channels)
        audio = np.ascontiguousarray(change_rate(audio, rate, self.sampling_rate))
        return {"audio": audio, "sampling_rate": self.sampling_rate}

    def _complaint(self, position: int) -> str | None:
        try:
            self._read(self._source.open(position))
        except WrongRateError as error:
            # A setting of the run is wrong, not a file: leaving out what has another rate would hide it.
            raise ValueError(f"{self._source.name(position)} cannot be used as it is: {error}") from error
        except Exception as error:  # whatever broken bytes lead to
            return self._reason(error)
        return None
