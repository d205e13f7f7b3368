"""From one sampling rate and number of channels to another, in one place."""

import math

import numpy as np
import torch

# Coefficients of the filter, one row per phase: 44,100 to 16,000 Hz has 160 x 441, 44,101 to 16,000 Hz would have 700 million.
_MOST_COEFFICIENTS = 1 << 24


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Return the same sound at another rate, float32 (channels, ceil(samples * to_rate / from_rate)).

    By torchaudio's windowed sinc (Hann, 64 zeros, 0.95 of the lower band edge): 64 zeros instead of its default of 6 keep the band
    flat to within 0.5 dB up to 0.9 of the edge.

    Args:
        audio: float32 (channels, samples).
        from_rate, to_rate: in Hz, or any other unit.

    Raises:
        ValueError: the rates have too small a common divisor, so that the filter would fill the memory.
    """
    if from_rate == to_rate:
        return audio
    common = math.gcd(from_rate, to_rate)
    if (from_rate // common) * (to_rate // common) > _MOST_COEFFICIENTS:
        raise ValueError(
            f"{from_rate} Hz cannot be brought to {to_rate} Hz here, their common divisor is only {common}: "
            "resample it with another program"
        )
    from torchaudio.functional import resample as windowed_sinc  # here, because vqtok works without torchaudio

    sound = windowed_sinc(torch.from_numpy(audio), from_rate, to_rate, lowpass_filter_width=64, rolloff=0.95)
    return sound.numpy()


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
