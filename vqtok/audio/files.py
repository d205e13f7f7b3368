"""Sound files, read and written with soundfile."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from vqtok.files import write_with

# What can be written, and how: floats as they are would be read as noise by half of the players.
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}


def read_file(path: str | os.PathLike, max_seconds: float = math.inf) -> tuple[np.ndarray, int]:
    """The samples of a sound file as float32 `(channels, samples)`, and its rate.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no sound, broken, truncated, empty, or longer than `max_seconds`; the file is named.
        ImportError: soundfile is not installed.
    """
    with open_file(path) as file:
        if file.frames > max_seconds * file.samplerate:
            raise ValueError(
                f"{path} lasts {file.frames / file.samplerate:.0f} s, longer than the limit of {max_seconds:.0f} s: cut it, or "
                "raise max_seconds of the processor"
            )
        wanted = file.frames
        try:
            sound = file.read(dtype="float32", always_2d=True)
        except Exception as error:  # soundfile's own errors are RuntimeErrors
            raise ValueError(f"cannot read the sound of {path}: {error}") from error
        if len(sound) < wanted:
            raise ValueError(f"{path} is truncated: {len(sound)} of {wanted} samples are there; get a complete copy")
        if not len(sound):
            raise ValueError(f"{path} has no sample")
        return np.ascontiguousarray(sound.T), file.samplerate


def open_file(path: str | os.PathLike) -> Any:
    """The open `soundfile.SoundFile` of a path.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `read_file`.
    """
    library = load_soundfile()
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        raise ValueError(f"{path} is an address, and nothing is downloaded here: download it and give its path")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a sound file in it")
    try:
        return library.SoundFile(path)
    except Exception as error:
        reason = str(getattr(error, "error_string", "")) or str(error)
        raise ValueError(f"cannot read {path}: it is no sound file, or is broken ({reason})") from error


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
    """Write sound `(samples,)` or `(channels, samples)`, whole or not at all; 16 bits, what is beyond [-1, 1] clipped.

    Raises:
        ValueError: the suffix says no format that can be written.
        OSError: the disk is full, say.
        ImportError: soundfile is not installed.
    """
    name, library = file_format(path), load_soundfile()
    samples = np.clip(np.atleast_2d(sound).T, -1.0, 1.0)
    write_with(path, lambda temporary: library.write(temporary, samples, sampling_rate, format=name))


def load_soundfile() -> Any:
    """The library; it is an extra.

    Raises:
        ImportError: it is not installed, and how to install it.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading and writing sound needs soundfile: pip install vqtok[audio]") from error
    return soundfile
