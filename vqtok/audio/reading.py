"""One recording from a file, through soundfile: any rate and depth that libsndfile reads, checked before it is used."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from vqtok.sources.medium import Medium

from .resampling import resample as change_rate

RECORDINGS = Medium(
    "recording",
    "recordings",
    frozenset((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf", ".rf64")),
    ".wav, .flac or .ogg",
    "Audio",
    "audio_column",
    "spoken-numbers",
)


class WrongRateError(ValueError):
    """A recording has another sampling rate, and nobody asked to resample."""


def soundfile() -> Any:
    """Return the module soundfile.

    Raises:
        ImportError: with the remedy, if it is missing.
    """
    try:
        import soundfile as module
    except ImportError as error:
        raise ImportError(
            "audio is read and written with soundfile: install it with pip install 'vqtok[audio]'"
        ) from error
    return module


def read_audio(
    source: str | Path | BytesIO,
    sampling_rate: int | None = None,
    num_channels: int | None = None,
    *,
    resample: bool = False,
    max_seconds: float | None = None,
) -> tuple[np.ndarray, int]:
    """Return a recording as float32 (channels, samples), full scale at 1, and its sampling rate in Hz.

    Args:
        source: a file, or its bytes.
        sampling_rate: the rate it must have; None takes any.
        num_channels: see `match_channels`; None takes any.
        resample: bring another rate to `sampling_rate` instead of raising.
        max_seconds: longer recordings are refused before they are decoded; None takes any.

    A WAV file that ends before its header says is read up to its end, as libsndfile does.

    Raises:
        WrongRateError: another rate.
        ValueError: no recording, an unknown format, a broken or truncated file, no samples, NaN or infinite samples, too
            many channels, or too long.
        ImportError: if soundfile is missing.
    """
    library = soundfile()
    try:
        with library.SoundFile(source) as file:
            rate, frames = file.samplerate, file.frames
            if frames < 1:
                raise ValueError("it holds no sound")
            if max_seconds is not None and frames > max_seconds * rate:
                raise ValueError(f"it lasts {frames / rate:.1f} s, longer than max_seconds={max_seconds:g}: cut it")
            if sampling_rate is not None and rate != sampling_rate and not resample:
                raise WrongRateError(
                    f"it is sampled at {rate} Hz, not {sampling_rate}: set resample=True, or convert it"
                )
            audio = file.read(dtype="float32", always_2d=True).T
    except library.LibsndfileError as error:
        raise ValueError(
            f"it is broken, or of a format that libsndfile does not read ({error.error_string})"
        ) from error
    if audio.shape[1] < frames:
        raise ValueError(f"it is truncated: {audio.shape[1]} of {frames} samples can be read")
    if not np.isfinite(audio).all():
        raise ValueError("it has NaN or infinite samples: write it again")
    audio = match_channels(audio, num_channels or len(audio))
    if sampling_rate is not None:
        audio, rate = change_rate(audio, rate, sampling_rate), sampling_rate
    return np.ascontiguousarray(audio), rate


def match_channels(audio: np.ndarray, num_channels: int) -> np.ndarray:
    """Return audio with the channels asked for: two become one as their mean, one becomes two as itself twice.

    Args:
        audio: (channels, samples).
        num_channels: 1, 2, or what the audio has.

    Raises:
        ValueError: for any other change.
    """
    if len(audio) == num_channels:
        return audio
    if (len(audio), num_channels) == (2, 1):
        return audio.mean(axis=0, keepdims=True)
    if (len(audio), num_channels) == (1, 2):
        return np.repeat(audio, 2, axis=0)
    raise ValueError(f"it has {len(audio)} channels, not {num_channels}: mix it down to 1 or 2")
