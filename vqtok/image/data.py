"""Pictures to train on and to measure with, from a folder, from any `datasets` data set, or embedded.

`load_images` gives a map-style data set of `{"image": picture, "text": str or None}`, where known with `"label": int`;
`CropDataset` draws random crops from one, for training on photographs.
"""

import struct
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from vqtok.sources.dataset import MediaDataset, open_source, refuse_options, skipped_summary

from .digits import CaptionedDigits
from .image_processing_image_vq import to_rgb
from .pictures import PICTURES

__all__ = ["CropDataset", "ImageDataset", "load_images", "skipped_summary"]


def load_images(
    source: Any,
    split: str = "train",
    *,
    caption_column: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    config_name: str | None = None,
    holdout: Sequence[str] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    verify: bool = True,
) -> "CaptionedDigits | ImageDataset":
    """Return a map-style data set with items `{"image": PIL RGB or uint8 (H, W, 3), "text": str or None}`.

    With labels, all items also have `"label"`, an int from 0. The data set's `label_names` lists their names; it is
    None for labels that are mere numbers, and without labels.

    Args:
        source: "digits", the embedded handwriting; a folder of pictures, searched recursively, with captions in a
            `metadata.csv` or `metadata.jsonl` beside them (columns `file_name` and `text`) or without; or what
            `datasets` opens: a name on the Hub, a folder of Parquet or Arrow files, one written by `save_to_disk`, a
            `Dataset`.
        split: "train", "test" or "all"; of a data set with splits of other names, also those. A folder with subfolders
            train/ and test/ (or validation/, val/) is split by them. Any other folder, and a data set with a train
            split alone, gives about a tenth to "test", by a hash of each file's path inside the folder or of each row's
            number.
        caption_column: the column of captions, which every picture must then have; None takes `text` where there is
            one.
        label_column: the column of labels, which every picture must then have: classes of `datasets`, whole numbers
            from 0, kept as they are, or names, numbered in sorted order over all splits of the source. None takes a
            data set's only `ClassLabel` column if it is complete; of a folder without captions the subfolders, if all
            pictures lie in one level of them (below train/ and test/) and they are two or more.
        image_column: of a data set with several columns of pictures, the one to use.
        config_name: which configuration of a data set on the Hub.
        holdout: of a folder, the files (by stem or name) that are "test"; all others are "train".
        num_samples: how many scenes of the digits (10,000 by default), or at most how many pictures.
        seed: of the digits.
        verify: read every picture once now, on threads, and leave out those that cannot be read, listed in `.skipped`
            as (name, reason). JPEG is decoded at an eighth of its size for this, which finds truncation at less than
            half the cost. False saves that time; then a broken picture raises ValueError when it is reached.

    Raises:
        ValueError: one sentence, naming value and remedy, for a folder that is missing, empty or has no readable
            picture; captions or labels asked for but missing; metadata naming a missing file; an unknown split, column,
            held-out file or data set; an option that the source does not have.
    """
    options = {
        "caption_column": caption_column,
        "label_column": label_column,
        "media_column": image_column,
        "config_name": config_name,
        "holdout": holdout,
    }
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: ask for at least 1")
    if isinstance(source, str) and source == "digits":
        refuse_options(PICTURES, "the embedded digits", options, allowed=("caption_column",))
        if caption_column not in (None, "text"):
            raise ValueError(f"the embedded digits have no column {caption_column!r}: their captions are in 'text'")
        return CaptionedDigits(split, 10_000 if num_samples is None else num_samples, seed)
    images = ImageDataset(open_source(PICTURES, source, split, options))
    images.keep(num_samples, verify)
    return images


class ImageDataset(MediaDataset):
    """Pictures that are read when asked for: items `{"image": PIL RGB, "text": str or None}`, maybe `"label": int`.

    `skipped` lists the pictures that were left out because they cannot be read, as (name, reason); `label_names` the
    names of the labels, None if they have none. Made by `load_images`.
    """

    medium = PICTURES

    def _read(self, source: Path | str | BytesIO) -> dict[str, Any]:
        with Image.open(source) as image:
            return {"image": to_rgb(image)}

    def keep(self, num_samples: int | None, verify: bool) -> None:
        # Set here and not in the threads, which share it: more pixels than PIL's limit are an error, not a line on
        # stderr.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            super().keep(num_samples, verify)

    def _complaint(self, position: int) -> str | None:
        """Why a picture cannot be read, or None."""
        try:
            with Image.open(self._source.open(position)) as image:
                if image.format == "JPEG":
                    image.draft("RGB", (1, 1))  # decode every byte, but only an eighth of the pixels each way
                    image.load()
                else:
                    to_rgb(image)
        except Exception as error:  # PIL's readers raise whatever broken bytes lead to: SyntaxError, struct.error, ...
            return self._reason(error)
        return None

    def _reason(self, error: Exception) -> str:
        if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            return f"it has more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}; make it smaller"
        if isinstance(error, UnidentifiedImageError):
            return "it is not a picture, or of a format that PIL does not read"
        if isinstance(error, (struct.error, EOFError)):
            return "it is truncated"
        return super()._reason(error)


class CropDataset(Dataset[dict[str, Any]]):
    """Random crops for training on photographs: item `draw` depends on (seed, draw) alone.

    The index is a number that counts on through the epochs, so a run that remembers how many items it has drawn resumes
    exactly, and any number of workers draws the same. Epoch `draw // len` visits every picture once.

    Args:
        images: a map-style data set with items `{"image": PIL or uint8 (H, W, 3), "text": ...}`.
        size: side of the square crop in pixels, or (height, width). A picture smaller than that is enlarged to fit.
        seed: any integer >= 0, of the order, the crops and the flips.
        flip: mirror every other crop left to right; not for pictures whose captions speak of left and right.
        shuffle: a new order of the pictures in each epoch; otherwise always picture `draw % len`.
        cache_bytes: decoded pictures are kept in memory until this many bytes are full; each worker has its own.

    Items: `{"image": uint8 (height, width, 3) in [0, 255], "text": of the picture}`.

    Raises:
        ValueError: if there are no pictures, or size or seed is out of range.
        IndexError: for a negative draw; there is no largest one. Iterating stops after one epoch.
    """

    medium = PICTURES
    takes_draws = True  # `vqtok.training.step_loader` then passes draws instead of picture numbers

    def __init__(
        self,
        images: Any,
        size: int | tuple[int, int],
        seed: int = 0,
        *,
        flip: bool = True,
        shuffle: bool = True,
        cache_bytes: int = 2**30,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"the crop size is {size}: use at least 1 pixel")
        if seed < 0:
            raise ValueError(f"the seed is {seed}: use 0 or more")
        if not len(images):
            raise ValueError("there are no pictures to crop from: give a data set with at least one")
        self.images = images
        self.size = (height, width)
        self.seed = seed
        self.flip = flip
        self.shuffle = shuffle
        self.cache_bytes = cache_bytes
        self.skipped: list[tuple[str, str]] = getattr(images, "skipped", [])
        self._cache: dict[int, tuple[np.ndarray, str | None]] = {}
        self._cached_bytes = 0
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[draw] for draw in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        # A worker fills its own cache: sending a gigabyte to each would take longer than decoding.
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0}

    def __getitem__(self, draw: int) -> dict[str, Any]:
        draw = int(draw)
        if draw < 0:
            raise IndexError(f"draw {draw} is negative: count from 0")
        epoch, position = divmod(draw, len(self.images))
        pixels, text = self._picture(int(self._order(epoch)[position]))
        height, width = self.size
        rng = np.random.default_rng((self.seed, draw))
        top = int(rng.integers(pixels.shape[0] - height + 1))
        left = int(rng.integers(pixels.shape[1] - width + 1))
        crop = pixels[top : top + height, left : left + width]
        if self.flip and rng.random() < 0.5:
            crop = crop[:, ::-1]
        return {"image": crop.copy(), "text": text}  # a copy, so that nobody writes into the cache

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # Batches meet at most two epochs at a time; the 1 sets the stream apart from those of the crops.
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            count = len(self.images)
            rng = np.random.default_rng((self.seed, epoch, 1))
            self._orders[epoch] = rng.permutation(count) if self.shuffle else np.arange(count)
        return self._orders[epoch]

    def _picture(self, index: int) -> tuple[np.ndarray, str | None]:
        """Pixels, at least as large as a crop, and caption."""
        if index in self._cache:
            return self._cache[index]
        item = self.images[index]
        pixels = np.asarray(item["image"])
        scale = max(self.size[0] / pixels.shape[0], self.size[1] / pixels.shape[1])
        if scale > 1:
            height, width = (max(s, round(scale * p)) for s, p in zip(self.size, pixels.shape[:2], strict=True))
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        if self._cached_bytes + pixels.nbytes <= self.cache_bytes:
            self._cache[index] = (pixels, item["text"])
            self._cached_bytes += pixels.nbytes
        return pixels, item["text"]
