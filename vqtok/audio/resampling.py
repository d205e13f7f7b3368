"""From one sampling rate to another, in one place."""

import numpy as np
import torch


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Return the same sound at another rate, float32 (channels, ceil(samples * to_rate / from_rate)).

    By torchaudio's windowed sinc (Hann, 64 zeros, 0.95 of the lower band edge): 64 zeros instead of its default of 6 keep the band
    flat to within 0.5 dB up to 0.9 of the edge.

    Args:
        audio: float32 (channels, samples).
        from_rate, to_rate: in Hz, or any other unit.
    """
    if from_rate == to_rate:
        return audio
    from torchaudio.functional import resample as windowed_sinc  # here, because vqtok works without torchaudio

    sound = windowed_sinc(torch.from_numpy(audio), from_rate, to_rate, lowpass_filter_width=64, rolloff=0.95)
    return sound.numpy()
