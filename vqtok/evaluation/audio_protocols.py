"""How recordings are compared, under a name: numbers are comparable only between results of one protocol.

vqtok-audio-eval v1: each recording alone, original and reconstruction of equal length, never shifted against each other, then the
mean over recordings. What cannot be measured is counted and left out of the mean, never replaced by a number.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vqtok.audio.resampling import resample

PROTOCOL = "vqtok-audio-eval v1"
SPEECH_RATE = 16_000  # of PESQ-WB
MEL_BANDS, MEL_WINDOWS, MEL_FLOOR = (5, 10, 20, 40, 80, 160, 320), (32, 64, 128, 256, 512, 1024, 2048), 1e-5
# Stands in the results beside the numbers.
DESCRIPTION = {
    "pesq_wb": "ITU-T P.862.2 of the package pesq, both sounds resampled to 16 kHz and averaged to mono; 1.04 to 4.64",
    "stoi": "Taal et al. 2011 of the package pystoi, not extended, in mono",
    "si_sdr_db": "scale-invariant signal-to-distortion ratio (Le Roux et al. 2019) with means removed, mean over channels, then over "
    "recordings of finite values; perfect ones are counted apart",
    "mel_distance": "sum over 7 scales of the mean absolute difference of log10 mel magnitudes, floor 1e-5: windows 32 to 2048 "
    "samples (Hann, hop a quarter), 5 to 320 bands (Slaney), mean over channels; the scales of DAC's loss, other code may differ",
    "kbps": "codes times log2 K over duration, padding included; of files: bytes of the container's payload, and of the whole "
    "file, of each recording alone",
    "failures": "counted per measure and left out of its mean",
}


class MeasureError(ValueError):
    """A measure is not defined for a pair of sounds; the sentence says why."""


def pesq_wb(original: np.ndarray, reconstruction: np.ndarray, sampling_rate: int) -> float:
    """The wide-band PESQ of one recording, from about 1.04 to 4.64, higher is better.

    Args:
        original, reconstruction: float (channels, samples), equal shapes.
        sampling_rate: in Hz.

    Raises:
        MeasureError: no speech is found, or the sound is too short.
        ImportError: if pesq is missing.
    """
    try:
        from pesq import PesqError, pesq
    except ImportError as error:
        raise ImportError("PESQ is measured with pesq: install it with pip install 'vqtok[speech]'") from error
    pair = [
        resample(sound.mean(axis=0, keepdims=True).astype(np.float32), sampling_rate, SPEECH_RATE)[0]
        for sound in _pair(original, reconstruction)
    ]
    if not pair[1].any():
        raise MeasureError("the reconstruction is silent")
    try:
        value = float(pesq(SPEECH_RATE, *pair, "wb"))
    except PesqError as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise MeasureError(reason.decode() if isinstance(reason, bytes) else str(reason)) from error
    return _finite(value)


def stoi(original: np.ndarray, reconstruction: np.ndarray, sampling_rate: int) -> float:
    """The short-time objective intelligibility of one recording, at most 1; arguments as of `pesq_wb`.

    Raises:
        MeasureError: silence, or less than about 0.4 s of sound.
        ImportError: if pystoi is missing.
    """
    try:
        from pystoi import stoi as measure
    except ImportError as error:
        raise ImportError("STOI is measured with pystoi: install it with pip install 'vqtok[speech]'") from error
    pair = [sound.mean(axis=0).astype(np.float64) for sound in _pair(original, reconstruction)]
    if not pair[0].any():
        raise MeasureError("the original is silent")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # it warns and returns 1e-5 for what is too short
        try:
            return _finite(float(measure(*pair, sampling_rate)))
        except (RuntimeWarning, ValueError, IndexError) as error:
            raise MeasureError("too little is left when silent frames are taken out") from error


def si_sdr(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """The scale-invariant signal-to-distortion ratio in dB, the mean over channels; infinite for equal sounds.

    With s the original and x the reconstruction, means removed, and a = <x, s> / <s, s>: 10 log10(|a s|^2 / |x - a s|^2).

    Raises:
        MeasureError: a channel of either is constant.

    Example:
        >>> s = np.array([[1.0, -1.0, 1.0, -1.0]])
        >>> round(si_sdr(s, 3 * s + 0.3 * np.array([[1.0, 1.0, -1.0, -1.0]])), 6)  # 10 log10(3^2 / 0.3^2)
        20.0
    """
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    pair = [torch.from_numpy(sound).double() for sound in _pair(original, reconstruction)]
    for what, sound in zip(("original", "reconstruction"), pair, strict=True):
        if (sound == sound[:, :1]).all(dim=-1).any():
            raise MeasureError(f"a channel of the {what} is silent")
    if np.array_equal(original, reconstruction):
        return math.inf  # torchmetrics adds its precision to both sums, and would say some 180 dB
    return _finite(float(scale_invariant_signal_distortion_ratio(pair[1], pair[0], zero_mean=True).mean()))


def mel_distance(original: np.ndarray, reconstruction: np.ndarray, sampling_rate: int) -> float:
    """The distance of mel spectrograms at seven scales, 0 for equal sounds; see `DESCRIPTION`.

    Args:
        original, reconstruction: float (channels, samples), equal shapes.
        sampling_rate: in Hz.
    """
    pair = [torch.from_numpy(sound).float() for sound in _pair(original, reconstruction)]
    total = 0.0
    for window, bands in zip(MEL_WINDOWS, MEL_BANDS, strict=True):
        one, other = (_log_mel(sound, window, bands, sampling_rate) for sound in pair)
        total += float((one - other).abs().mean())
    return total


def _log_mel(sound: Tensor, window: int, bands: int, sampling_rate: int) -> Tensor:
    """(channels, samples) -> (channels, frames, bands)."""
    # Zeros and not reflection at the ends: a sound may be shorter than half a window.
    spectrum = torch.stft(
        sound, window, window // 4, window=torch.hann_window(window), pad_mode="constant", return_complex=True
    )
    return (spectrum.abs().mT @ _filters(window, bands, sampling_rate)).clamp(min=MEL_FLOOR).log10()


@lru_cache(maxsize=32)
def _filters(window: int, bands: int, sampling_rate: int) -> Tensor:
    """(window / 2 + 1, bands)."""
    from torchaudio.functional import melscale_fbanks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some bands of the short windows hold no bin, in DAC's loss too
        return melscale_fbanks(
            window // 2 + 1, 0.0, sampling_rate / 2, bands, sampling_rate, norm="slaney", mel_scale="slaney"
        )


def _pair(original: np.ndarray, reconstruction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if original.shape != reconstruction.shape or original.ndim != 2 or not original.size:
        raise ValueError(
            f"cannot compare sounds of the shapes {original.shape} and {reconstruction.shape}: give (channels, samples), equal"
        )
    return original, reconstruction


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise MeasureError(f"the result is {value}")
    return value
