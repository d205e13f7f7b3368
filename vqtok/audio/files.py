"""Sound files, read and written with soundfile: any rate and depth that libsndfile reads, checked before it is used."""

from __future__ import annotations

import math
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from vqtok.files import write_with
from vqtok.sources.medium import Medium

RECORDINGS = Medium(
    "recording",
    "recordings",
    frozenset((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf", ".rf64")),
    ".wav, .flac or .ogg",
    "Audio",
    "audio_column",
    "spoken-numbers",
)
MAX_SAMPLES = 1 << 29  # of all channels, in memory at once: 2 GiB as float32
_BLOCK = 1 << 22  # what is asked for at once: a header may promise what the file does not hold
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}  # what can be written


def open_file(source: str | os.PathLike | BytesIO, what: str = "it", max_seconds: float = math.inf) -> Any:
    """The open `soundfile.SoundFile` of a file, whose header has been read.

    Args:
        source: a file, or its bytes.
        what: how to call it in errors.
        max_seconds: longer sound is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no sound, broken, of an unknown format, empty, or longer than `max_seconds`.
        ImportError: soundfile is not installed.
    """
    library = load_soundfile()
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"{source} is an address, and nothing is downloaded here: download it and give its path")
    if not isinstance(source, BytesIO):
        source = Path(source).expanduser()
        if not source.exists():
            raise FileNotFoundError(f"there is no file {source}: check the path")
        if source.is_dir():
            raise ValueError(f"{source} is a folder: name a sound file in it")
    try:
        file = library.SoundFile(source)
    except (RuntimeError, TypeError) as error:  # TypeError: by the suffix, such as .raw, samples without a header
        raise ValueError(
            f"{what} is no sound, is broken, or of a format that libsndfile does not read "
            f"({getattr(error, 'error_string', error)})"
        ) from error
    try:
        if file.frames < 1:
            raise ValueError(f"{what} holds no sound")
        check_length(file.frames, file.samplerate, max_seconds, what)
    except ValueError:
        file.close()
        raise
    return file


def check_length(frames: int, rate: int, max_seconds: float, what: str = "it") -> None:
    """Refuse sound that is too long.

    Raises:
        ValueError: `frames` at `rate` Hz last longer than `max_seconds`.
    """
    if frames > max_seconds * rate:
        raise ValueError(
            f"{what} lasts {frames / rate:.1f} s, longer than max_seconds={max_seconds:g}: cut it, or give a larger max_seconds"
        )


def check_samples(channels: int, samples: float, what: str = "it") -> None:
    """Refuse sound that would fill the memory.

    Raises:
        ValueError: more than `MAX_SAMPLES` in all channels.
    """
    if channels * samples > MAX_SAMPLES:
        raise ValueError(
            f"{what} has {channels * samples:,.0f} samples in all channels, more than the {MAX_SAMPLES:,} that are held at once: cut it"
        )


def read_samples(file: Any, start: int, stop: int, what: str = "it") -> np.ndarray:
    """Float32 `(channels, stop - start)` of an open file, full scale at 1. Memory is taken as the file turns out to have it.

    Args:
        file: of `open_file`.
        start, stop: within `file.frames`.
        what: how to call it in errors.

    A WAV file that ends before its header says is as long as what is there, as libsndfile sees it.

    Raises:
        ValueError: it is broken or truncated, has NaN or infinite samples, or more than `MAX_SAMPLES`.
    """
    check_samples(file.channels, stop - start, what)
    blocks, most, left = [], max(1, _BLOCK // file.channels), stop - start
    try:
        if file.tell() != start:
            file.seek(start)
        while left > 0 or not blocks:
            blocks.append(file.read(min(left, most), dtype="float32", always_2d=True).T)
            left -= blocks[-1].shape[1]
            if not blocks[-1].size:
                break
    except RuntimeError as error:  # what soundfile's own errors are
        raise ValueError(f"{what} is broken, its sound cannot be read ({error}): get a complete copy") from error
    if left > 0:
        raise ValueError(
            f"{what} is truncated: {stop - left} of {file.frames} samples can be read; get a complete copy"
        )
    sound = np.ascontiguousarray(blocks[0]) if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    if not np.isfinite(sound).all():
        raise ValueError(f"{what} has NaN or infinite samples: write it again")
    return sound


def read_file(
    source: str | os.PathLike | BytesIO, what: str = "it", max_seconds: float = math.inf
) -> tuple[np.ndarray, int]:
    """The samples of a whole file as float32 `(channels, samples)`, full scale at 1, and its rate in Hz.

    Args:
        source, what, max_seconds: see `open_file`.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `open_file` and `read_samples`.
    """
    with open_file(source, what, max_seconds) as file:
        return read_samples(file, 0, file.frames, what), file.samplerate


def file_format(path: str | os.PathLike) -> str:
    """The format that the suffix of a path to write says.

    Raises:
        ValueError: it says none that can be written.
    """
    name = FORMATS.get(Path(path).suffix.lower())
    if name is None:
        raise ValueError(
            f"{path} has no suffix of a sound format that can be written: name a file such as {Path(path).with_suffix('.wav')}"
        )
    return name


def write_file(path: str | os.PathLike, sound: np.ndarray, sampling_rate: int) -> None:
    """Write sound `(samples,)` or `(channels, samples)`, whole or not at all, as `pcm` makes it.

    Raises:
        ValueError: the suffix says no format that can be written, or samples are NaN or infinite.
        OSError: the disk is full, say.
        ImportError: soundfile is not installed.
    """
    name, library = file_format(path), load_soundfile()
    write_with(path, lambda temporary: library.write(temporary, pcm(sound), sampling_rate, format=name))


def pcm(sound: np.ndarray) -> np.ndarray:
    """Sound `(samples,)` or `(channels, samples)` as 16 bits, int16 `(samples, channels)`; what is beyond full scale is clipped.

    Rounded here: libsndfile would cut towards zero, and what was read from 16 bits should be written as it was. Floats as they
    are would be read as noise by half of the players.

    Raises:
        ValueError: samples are NaN or infinite.

    Example:
        >>> pcm(np.array([0.5, -1.0, 3.0])).T
        array([[ 16384, -32768,  32767]], dtype=int16)
    """
    samples = np.atleast_2d(np.asarray(sound, dtype=np.float32)).T
    if not np.isfinite(samples).all():
        raise ValueError("a sound with NaN or infinite samples cannot be played or written: look at what made it")
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def load_soundfile() -> Any:
    """The library; it is an extra.

    Raises:
        ImportError: it is not installed, and how to install it.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            "audio is read and written with soundfile: install it with pip install 'vqtok[audio]'"
        ) from error
    return soundfile
