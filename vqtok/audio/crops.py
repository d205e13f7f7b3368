"""Random crops of sound for training."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .files import RECORDINGS


class AudioCropDataset(Dataset[dict[str, Any]]):
    """Random crops of one length: item `draw` depends on (seed, draw) alone.

    The index is a number that counts on through the epochs, so a run that remembers how many items it has drawn resumes exactly,
    and any number of workers draws the same. Clip `draw % len` is cropped at a place of the draw's own; one that is shorter than
    the crop lies somewhere in silence.

    Args:
        clips: a map-style data set of `{"audio": float32 (C, T), "sampling_rate": int}`.
        num_samples: length of the crops.
        seed: any integer >= 0.
        gain_db: loudness changes by up to that many decibels either way, but never into clipping.
        cache_bytes: clips are kept in memory until this many bytes are full; each worker has its own.

    Items: `{"audio": float32 (C, num_samples), "sampling_rate": int}`. `skipped` is that of the clips.

    Raises:
        ValueError: there are no clips, or a number is out of range.
        IndexError: for a negative draw; there is no largest one. Iterating stops after one epoch.

    Example:
        >>> clips = [{"audio": np.ones((1, 50), np.float32), "sampling_rate": 8000}]
        >>> AudioCropDataset(clips, 80)[7]["audio"].shape
        (1, 80)
    """

    medium = RECORDINGS
    takes_draws = True  # `vqtok.training.step_loader` then passes draws instead of clip numbers

    def __init__(
        self, clips: Any, num_samples: int, seed: int = 0, *, gain_db: float = 6.0, cache_bytes: int = 1 << 30
    ) -> None:
        if not len(clips):
            raise ValueError("there is no clip to crop: give a data set with at least one")
        if num_samples < 1 or seed < 0 or not 0 <= gain_db <= 60:
            raise ValueError(
                f"crops need num_samples >= 1, seed >= 0 and gain_db from 0 to 60, got {num_samples}, {seed} and {gain_db}"
            )
        self.clips, self.num_samples, self.seed, self.gain_db = clips, num_samples, seed, gain_db
        self.skipped: list[tuple[str, str]] = getattr(clips, "skipped", [])
        self._free, self._kept = cache_bytes, {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        if draw < 0:
            raise IndexError(f"a draw counts from 0, got {draw}")
        sound, rate = self._clip(draw % len(self.clips))
        rng = np.random.default_rng([self.seed, 3, draw])
        place, loudness = rng.random(), rng.uniform(-1, 1)
        crop = np.zeros((sound.shape[0], self.num_samples), np.float32)
        spare = sound.shape[1] - self.num_samples
        start = int(place * (abs(spare) + 1))
        if spare >= 0:
            crop[:] = sound[:, start : start + self.num_samples]
        else:
            crop[:, start : start + sound.shape[1]] = sound
        gain = 10 ** (self.gain_db * loudness / 20)
        peak = float(np.abs(crop).max())
        if gain > 1 and peak > 0:
            gain = max(1.0, min(gain, 1 / peak))
        return {"audio": crop * np.float32(gain), "sampling_rate": rate}

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (self[draw] for draw in range(len(self)))

    def _clip(self, index: int) -> tuple[np.ndarray, int]:
        if index in self._kept:
            return self._kept[index]
        item = self.clips[index]
        clip = np.asarray(item["audio"], np.float32), int(item["sampling_rate"])
        if clip[0].nbytes <= self._free:
            self._free -= clip[0].nbytes
            self._kept[index] = clip
        return clip
