"""Sound to train on and to measure with, from a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from .feature_extraction_audio_vq import AudioVQFeatureExtractor

SUFFIXES = frozenset((".flac", ".wav", ".ogg"))


def load_audio(
    dataset: str | Path,
    sampling_rate: int,
    num_channels: int = 1,
    split: str = "train",
    num_samples: int | None = None,
    holdout: Sequence[str] | None = None,
    resample: bool = False,
) -> FolderAudio:
    """A map-style data set of `{"audio": float32 (channels, samples), "sampling_rate": int}` of a folder's sound files.

    Args:
        split: "train", or "test": the files named in `holdout`, else about a tenth, by a hash of their names.
    """
    folder = Path(dataset)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: check the path")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"the folder {folder} holds no sound file")

    def held_out(path: Path) -> bool:
        if holdout:
            return path.name in holdout or path.stem in holdout
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()[0] < 26

    chosen = [path for path in files if split == "all" or held_out(path) == (split == "test")]
    return FolderAudio(folder, chosen[:num_samples], sampling_rate, num_channels, resample)


class FolderAudio(Dataset[dict[str, Any]]):
    """See `load_audio`."""

    def __init__(self, folder: Path, files: list[Path], sampling_rate: int, num_channels: int, resample: bool):
        self.folder, self.files, self.skipped = folder, files, []
        self.extractor = AudioVQFeatureExtractor(
            stride=1, sampling_rate=sampling_rate, num_channels=num_channels, resample=resample, mix=True
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sound, _ = self.extractor.prepare(self.files[index])
        return {"audio": sound.numpy(), "sampling_rate": self.extractor.sampling_rate, "text": None}

    def name(self, index: int) -> str:
        return self.files[index].relative_to(self.folder).as_posix()
