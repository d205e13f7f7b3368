"""Sound files of any length to codes and back, in memory that does not grow with them."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from vqtok.chunks import decode_chunks, encode_chunks
from vqtok.codes import Codes
from vqtok.files import write_with

from .feature_extraction_audio_vq import AudioVQFeatureExtractor
from .files import file_format, load_soundfile, open_file, pcm, read_samples
from .modeling_audio_vq import AudioVQModel

# How far resampling looks to either side: its 64 zeros at 0.95 of the lower rate (`vqtok.audio.resampling`), in its periods.
_SINC_PERIODS = 68


class SoundFileReader:
    """Any stretch of a sound file, converted as the feature extractor would convert the whole.

    Args:
        path: of a file that soundfile reads.
        extractor: says rate, channels, and what may be converted.
        max_seconds: a longer file is refused; None means the extractor's bound.

    Attributes:
        num_samples: of the whole, at the extractor's rate.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `vqtok.audio.files.open_file`, `read_samples`; a rate that may not be converted.
    """

    def __init__(self, path: str | os.PathLike, extractor: AudioVQFeatureExtractor, max_seconds: int | None = None):
        self.extractor = extractor
        self.what = f"the file {path}"
        self.file = open_file(path, self.what, extractor.max_seconds if max_seconds is None else max_seconds)
        common = math.gcd(self.file.samplerate, extractor.sampling_rate)
        self.up, self.down = extractor.sampling_rate // common, self.file.samplerate // common
        self.num_samples = math.ceil(self.file.frames * self.up / self.down)

    def __enter__(self) -> SoundFileReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def read(self, start: int, end: int) -> Tensor:
        """Samples `start` to `end`, float32 `(1, C, end - start)`; silence beyond the end of the file."""
        stop = min(end, self.num_samples)
        if self.up == self.down:
            sound = self.extractor.convert(self._raw(start, stop), self.file.samplerate, self.what)
        else:
            # In whole periods of both rates, so that the filter meets each sample in the phase it has in the whole file.
            around = math.ceil(_SINC_PERIODS / min(self.up, self.down)) + 1
            first = max(0, start // self.up - around)
            last = -(-stop // self.up) + around
            raw = self._raw(first * self.down, min(last * self.down, self.file.frames))
            sound = self.extractor.convert(raw, self.file.samplerate, self.what)
            sound = sound[:, start - first * self.up : stop - first * self.up]
        return torch.nn.functional.pad(sound, (0, end - start - sound.shape[1]))[None]

    def _raw(self, start: int, end: int) -> Tensor:
        return torch.from_numpy(read_samples(self.file, start, end, self.what))


@torch.no_grad()
def encode_file(
    model: AudioVQModel, extractor: AudioVQFeatureExtractor, path: str | os.PathLike, max_seconds: int | None = None
) -> tuple[tuple[Tensor, ...], tuple[int]]:
    """The codes of one file, int64 `(1, Q, t)` of each level, on the CPU, and its size in samples; read and encoded in parts.

    Args:
        model: in eval mode.
        max_seconds: another bound than the extractor's.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `AudioVQFeatureExtractor.prepare`.
    """
    with SoundFileReader(path, extractor, max_seconds) as reader:
        padded = -(-reader.num_samples // extractor.stride) * extractor.stride
        parts = [
            tuple(level.cpu() for level in codes)
            for codes in encode_chunks(model, padded, lambda start, end: reader.read(start, end).to(model.device))
        ]
        return tuple(torch.cat(values, 2) for values in zip(*parts, strict=True)), (reader.num_samples,)


@torch.no_grad()
def decode_to_file(model: AudioVQModel, codes: Codes, path: str | os.PathLike) -> int:
    """Write the sound of one sample of codes to a file, part by part, whole or not at all; returns its number of samples.

    Args:
        model: in eval mode.
        codes: of one sample.

    Raises:
        ValueError: the suffix says no format that can be written, or there is not one sample.
        OSError: the disk is full, say.
    """
    if len(codes) != 1:
        raise ValueError(f"a file holds one clip, these codes are of {len(codes)}: write each to a file of its own")
    name, library = file_format(path), load_soundfile()
    size, config = int(codes.sizes[0, 0]), model.config

    def write(temporary: str) -> None:
        left = size
        with library.SoundFile(temporary, "w", config.sampling_rate, config.num_channels, format=name) as file:
            for sound in decode_chunks(model, codes.levels):
                part = sound[0, :, :left].float().cpu()
                file.write(pcm(part.numpy()))
                left -= part.shape[1]

    write_with(path, write)
    return size
