"""Pictures to train on and to measure with, from a folder, from any `datasets` data set, or embedded.

`load_images` gives a map-style data set of `{"image": picture, "text": str or None}`, where known with `"label": int`;
`CropDataset` draws random crops from one, for training on photographs.
"""

import os
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .digits import CaptionedDigits
from .folder import Labels, choose_split, picture_labels, read_metadata, walk
from .image_processing_image_vq import to_rgb
from .tables import Table, is_saved_dataset, open_table

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm")
    + (".tga", ".tif", ".tiff", ".webp")
)
# What a folder of `datasets` may consist of when it holds no pictures of its own.
_TABLES = frozenset((".parquet", ".arrow", ".tar"))
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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
        "image_column": image_column,
        "config_name": config_name,
        "holdout": holdout,
    }
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: ask for at least 1")
    if isinstance(source, str) and source == "digits":
        _refuse_options("the embedded digits", options, allowed=("caption_column",))
        if caption_column not in (None, "text"):
            raise ValueError(f"the embedded digits have no column {caption_column!r}: their captions are in 'text'")
        return CaptionedDigits(split, 10_000 if num_samples is None else num_samples, seed)
    images: ImageDataset
    folder = _existing_folder(source)
    files = [] if folder is None or is_saved_dataset(folder) else walk(folder)
    if folder is not None and any(path.suffix.lower() in SUFFIXES for path in files):
        _refuse_options(f"the folder {folder}", options, allowed=("caption_column", "label_column", "holdout"))
        images = _folder_images(folder, files, split, caption_column, label_column, holdout)
    elif folder is not None and not is_saved_dataset(folder) and not any(path.suffix in _TABLES for path in files):
        raise ValueError(
            f"the folder {folder} holds no picture: put files like .png, .jpg or .webp into it, or name another"
        )
    else:
        _refuse_options(
            "a data set", options, allowed=("caption_column", "label_column", "image_column", "config_name")
        )
        images = _TableImages(open_table(source, split, caption_column, label_column, image_column, config_name))
    images.keep(num_samples, verify)
    return images


class ImageDataset(Dataset[dict[str, Any]]):
    """Pictures that are read when asked for: items `{"image": PIL RGB, "text": str or None}`, maybe `"label": int`.

    `skipped` lists the pictures that were left out because they cannot be read, as (name, reason); `label_names` the
    names of the labels, None if they have none. Made by `load_images`.
    """

    skipped: list[tuple[str, str]]
    label_names: list[str] | None

    def __init__(self, title: str, texts: list[str | None], labels: Labels | None) -> None:
        self.title = title
        self.skipped = []
        self.label_names = None if labels is None else labels.names
        self._texts, self._labels = texts, labels
        self._kept = list(range(len(texts)))

    def _source(self, position: int) -> Path | str | BytesIO:
        """What PIL opens."""
        raise NotImplementedError

    def _name(self, position: int) -> str:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self._kept[index]
        try:
            with Image.open(self._source(position)) as image:
                picture = to_rgb(image)
        except Exception as error:  # see _complaint
            raise ValueError(
                f"cannot read the picture {self._name(position)} ({_reason(error)}): "
                "replace it, or load with verify=True to leave it out"
            ) from error
        label = {} if self._labels is None else {"label": self._labels.numbers[position]}
        return {"image": picture, "text": self._texts[position], **label}

    def name(self, index: int) -> str:
        """Return the name of one picture: its path inside the folder, or its row."""
        return self._name(self._kept[index])

    def keep(self, num_samples: int | None, verify: bool) -> None:
        """Keep at most the first `num_samples` pictures and, to verify, of these the ones that can be read.

        Raises:
            ValueError: if none is left.
        """
        self._kept = self._kept[:num_samples]
        if not verify:
            return
        # Set here and not in the threads, which share it: more pixels than PIL's limit are an error, not a line on
        # stderr.
        with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            checked = tqdm(
                pool.map(self._complaint, self._kept),
                "checking pictures",
                len(self._kept),
                delay=2,
                leave=False,
                disable=None,
            )
            complaints = list(checked)
        self.skipped = [(self._name(i), why) for i, why in zip(self._kept, complaints, strict=True) if why]
        self._kept = [i for i, why in zip(self._kept, complaints, strict=True) if not why]
        if not self._kept:
            name, why = self.skipped[0]
            raise ValueError(
                f"none of the {len(self.skipped)} pictures of {self.title} can be read, "
                f"the first, {name}, because: {why}; replace them"
            )

    def _complaint(self, position: int) -> str | None:
        """Why a picture cannot be read, or None."""
        try:
            with Image.open(self._source(position)) as image:
                if image.format == "JPEG":
                    image.draft("RGB", (1, 1))  # decode every byte, but only an eighth of the pixels each way
                    image.load()
                else:
                    to_rgb(image)
        except Exception as error:  # PIL's readers raise whatever broken bytes lead to: SyntaxError, struct.error, ...
            return _reason(error)
        return None


class _FolderImages(ImageDataset):
    def __init__(
        self, folder: Path, files: list[Path], texts: list[str | None], labels: Labels | None, title: str
    ) -> None:
        super().__init__(title, texts, labels)
        self._folder, self._files = folder, files

    def _source(self, position: int) -> Path:
        return self._files[position]

    def _name(self, position: int) -> str:
        return self._files[position].relative_to(self._folder).as_posix()


class _TableImages(ImageDataset):
    def __init__(self, table: Table) -> None:
        super().__init__(table.title, table.texts, table.labels)
        self._rows, self._column = table.rows, table.image_column

    def _source(self, position: int) -> str | BytesIO:
        cell = self._rows[position][self._column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the row has no picture")
        return cell["path"] if cell["bytes"] is None else BytesIO(cell["bytes"])

    def _name(self, position: int) -> str:
        return f"row {position}"


def skipped_summary(dataset: Any) -> str:
    """Return the lines to show at the end of a run about the pictures that were left out, "" when there are none.

    Args:
        dataset: any data set; one without `skipped` has left out nothing.
    """
    skipped = getattr(dataset, "skipped", [])
    if not skipped:
        return ""
    count = "1 picture was" if len(skipped) == 1 else f"{len(skipped)} pictures were"
    return "\n".join([f"{count} skipped:", *(f"  {name}: {reason}" for name, reason in skipped)])


def _reason(error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"it has more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return "it is not a picture, or of a format that PIL does not read"
    if isinstance(error, (struct.error, EOFError)):
        return "it is truncated"
    return str(error) or type(error).__name__


def _refuse_options(kind: str, options: dict[str, Any], allowed: tuple[str, ...]) -> None:
    for name, value in options.items():
        if value is not None and name not in allowed:
            raise ValueError(f"{kind} cannot use {name}={value!r}: leave it out")


def _existing_folder(source: Any) -> Path | None:
    """The folder that a source names, or None if it names a data set."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()  # without "..", so that every file below has one spelling
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name the folder of the pictures")
    if isinstance(source, os.PathLike) or not _HUB_NAME.fullmatch(source):
        raise ValueError(f"there is no folder {folder}: check the path")
    return None


def _folder_images(
    folder: Path,
    files: list[Path],
    split: str,
    caption_column: str | None,
    label_column: str | None,
    holdout: Sequence[str] | None,
) -> ImageDataset:
    entries = read_metadata(files, caption_column, label_column)
    # What the metadata names is a picture whatever its suffix; whether it can be read, reading will tell.
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES or path in entries]
    chosen = choose_split(folder, pictures, split, holdout)
    without = [path for path in chosen if path not in entries]  # a row lacks nothing that was asked for
    for what, column in (("captions", caption_column), ("labels", label_column)):
        if column is not None and without:
            raise ValueError(
                f"{what} were asked for, but {len(without)} of {len(chosen)} pictures have none, first {without[0]}: "
                f"add it to {folder / 'metadata.csv'} with the columns 'file_name' and {column!r}"
            )
    texts = [entries[path].text if path in entries else None for path in chosen]
    labels = picture_labels(folder, pictures, chosen, entries, label_column)
    return _FolderImages(folder, chosen, texts, labels, f"{folder}, split {split!r}")


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
