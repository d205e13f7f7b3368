"""Pictures of sound: spectrograms under one another. Needs matplotlib, an extra (`pip install vqtok[demo]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .plots import save_figure

_WINDOW_SECONDS, _HOPS = 0.032, 4
_RANGE_DB = 70.0


def spectrograms(
    sounds: Mapping[str, np.ndarray],
    sampling_rate: int,
    words: Mapping[str, Sequence[Any]] | None = None,
    width: float = 8.0,
) -> Image.Image:
    """Spectrograms of sounds under one another, with one axis of time and one scale of loudness.

    Each is the squared magnitude of Hann windows of 32 ms every 8 ms in dB, from the loudest point of all down to 70 dB below.

    Args:
        sounds: title -> float (samples,) or (channels, samples), whose channels are averaged.
        sampling_rate: of all of them, in Hz.
        words: title -> (word, start, stop) in samples, as the spoken numbers give them, to be marked.
        width: of the picture in inches, 110 pixels each.

    Raises:
        ValueError: there is no sound, or one is empty.
    """
    if not sounds or not all(np.size(sound) for sound in sounds.values()):
        raise ValueError("there is no sound to draw: give at least one with samples")
    from matplotlib.figure import Figure

    mono = {title: np.atleast_2d(np.asarray(sound, np.float32)).mean(axis=0) for title, sound in sounds.items()}
    levels = {title: _decibels(sound, sampling_rate) for title, sound in mono.items()}
    top = max(float(level.max()) for level in levels.values())
    longest = max(len(sound) for sound in mono.values()) / sampling_rate
    figure = Figure(figsize=(width, 0.5 + 1.7 * len(levels)), layout="constrained")
    panels = figure.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, level) in zip(panels, levels.items(), strict=True):
        extent = (0, len(mono[title]) / sampling_rate, 0, sampling_rate / 2000)
        picture = axes.imshow(
            level, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=top - _RANGE_DB, vmax=top
        )
        axes.set_title(title, fontsize=9, loc="left")
        axes.set(ylabel="kHz", xlim=(0, longest))
        for word, start, stop in (words or {}).get(title, ()):
            axes.axvline(start / sampling_rate, color="white", linewidth=0.6, alpha=0.7)
            axes.axvline(stop / sampling_rate, color="white", linewidth=0.6, alpha=0.7, linestyle=":")
            middle, height = (start + stop) / 2 / sampling_rate, 0.92 * sampling_rate / 2000
            box = {"facecolor": "black", "alpha": 0.6, "pad": 1, "linewidth": 0}
            axes.text(middle, height, word, color="white", fontsize=8, ha="center", va="top", bbox=box)
    panels[-1].set_xlabel("seconds")
    figure.colorbar(picture, ax=list(panels), label="dB", fraction=0.03, pad=0.01)
    return save_figure(figure)


def _decibels(sound: np.ndarray, sampling_rate: int) -> np.ndarray:
    """(samples,) -> (frequencies, frames)."""
    window = max(16, 2 * round(_WINDOW_SECONDS * sampling_rate / 2))
    spectrum = torch.stft(
        torch.from_numpy(sound),
        window,
        window // _HOPS,
        window=torch.hann_window(window),
        pad_mode="constant",
        return_complex=True,
    )
    return 20 * np.log10(np.maximum(spectrum.abs().numpy(), 1e-6))
