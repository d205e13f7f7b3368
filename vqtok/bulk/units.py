"""One unit to the rows of one shard: reading and decoding on threads, ahead of the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vqtok.audio.files import read_file
from vqtok.auto import VQTokenizer
from vqtok.auto.batches import group_by_shape
from vqtok.codes import Codes
from vqtok.image.image_processing_image_vq import to_rgb
from vqtok.modeling import evaluating
from vqtok.prior.shards import code_row

from .inputs import Item, Source
from .job import Job
from .overlap import Results, ahead, in_order

# Batches never reach over this many samples, so that the rare ones of an odd size wait no longer.
WINDOW = 1024
# Sound and text up to this length are padded to lengths of a ladder and share batches; longer ones are encoded alone, in parts.
_MOST_TOGETHER = 1 << 18


class Settings(NamedTuple):
    """What decides the codes beside tokenizer and input; and `readers`, which decides nothing.

    Args:
        batch_size: samples at once; None means up to 64, fewer of large ones.
        image_size: pictures are shrunk or enlarged until the shorter side has this many pixels, and cut to a square in the middle.
        threads: of torch, in each process.
        readers: threads that decode, in each process.
    """

    batch_size: int | None
    image_size: int | None
    threads: int
    readers: int


class Batch(NamedTuple):
    """What the model takes at once. The last `len(media) - len(places)` of it repeat, and fill the shape."""

    places: list[int]
    media: Tensor
    sizes: Tensor


class Unit:
    """A unit while it is encoded: what was read of it, and the rows there are."""

    def __init__(self, number: int):
        self.number, self.is_mine = number, True
        self.extras: list[dict[str, Any]] = []
        self.skipped: list[tuple[str, str]] = []
        self._rows: dict[int, dict[str, Any]] = {}

    def add(self, tokenizer: VQTokenizer, batch: Batch, levels: Sequence[Tensor]) -> int:
        """Make the rows of a batch, and return how many these are."""
        levels = [level.cpu() for level in levels]
        if tokenizer.layout.ndim == 1:  # they may be padded beyond the longest
            grids = tokenizer.layout.grids([int(batch.sizes.max())])
            levels = [level[..., : grid[0]] for level, grid in zip(levels, grids, strict=True)]
        codes = Codes(tuple(levels), batch.sizes, tokenizer.layout, tokenizer.fingerprint)
        for index, place in enumerate(batch.places):
            self._rows[place] = code_row(codes[index], self.extras[place])
        return len(batch.places)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order of the items."""
        return [self._rows[place] for place in range(len(self.extras))]


def encode_units(
    tokenizer: VQTokenizer,
    source: Source,
    job: Job,
    settings: Settings,
    numbers: Iterable[int],
    report: Callable[[int], Any],
    done: Callable[[dict[str, Any] | None], Any],
) -> None:
    """Encode units one after another, each to its shard.

    What is next is read and decoded on threads while the model computes, beyond the end of a unit, too; rows are made and shards are
    written on one more. Batches have one of a few fixed shapes and are a function of the items of their unit alone, so the bytes of
    a shard do not depend on who writes it.

    Args:
        tokenizer: a saved one.
        source, job: where units come from, and where their shards go.
        settings: see there.
        numbers: of the units; the next one is asked for when the one before has been read.
        report: is called with the number of samples encoded since the last call.
        done: is called with the record of each shard, in order; with None for a unit that another process has, or had.

    Raises:
        OSError, ValueError: what stopped it. Finished shards are kept.
    """
    with (
        ahead(_batches(tokenizer, source, job, settings, numbers)) as ready,
        Results(report, done) as results,
        torch.no_grad(),
        evaluating(tokenizer.model),
    ):
        for unit, batch in ready:
            if batch is None:
                results.record(_write, job, unit)
            else:
                results.count(unit.add, tokenizer, batch, encode_batch(tokenizer, batch))


def _batches(
    tokenizer: VQTokenizer, source: Source, job: Job, settings: Settings, numbers: Iterable[int]
) -> Iterator[tuple[Unit, Batch | None]]:
    """Yield each unit with its batches and, at its end, with None."""
    for number in numbers:
        unit = Unit(number)
        # Another process may have it at this moment, or may have finished it in the meantime.
        unit.is_mine = job.claim(number) and not job.is_finished(number)
        if unit.is_mine:
            for batch in prepared_batches(tokenizer, source.read(number), settings, unit.extras, unit.skipped):
                if tokenizer.model.device.type == "cuda":  # from there a copy need not wait for what the GPU is doing
                    batch = batch._replace(media=batch.media.pin_memory())
                yield unit, batch
        yield unit, None


def _write(job: Job, unit: Unit) -> dict[str, Any] | None:
    record = job.write(unit.number, unit.rows, unit.skipped) if unit.is_mine else None
    job.release(unit.number)
    return record


def encode_batch(tokenizer: VQTokenizer, batch: Batch) -> tuple[Tensor, ...]:
    """The codes of a batch, as the model gives them."""
    model, media = tokenizer.model, batch.media.to(tokenizer.model.device, non_blocking=True)
    if tokenizer.layout.ndim == 1 and media.shape[-1] <= _MOST_TOGETHER:
        return model.encode(media, batch.sizes).codes
    return model.encode_long(media)


def prepared_batches(
    tokenizer: VQTokenizer,
    items: Iterable[Item],
    settings: Settings,
    extras: list[dict[str, Any]],
    skipped: list[tuple[str, str]],
) -> Iterator[Batch]:
    """Yield the batches of a unit; what is kept beside a sample goes to `extras`, what cannot be read to `skipped`."""
    ndim, first = tokenizer.layout.ndim, 0

    def good(decoded: Iterator[tuple[Item, Any]]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        for item, found in decoded:
            if isinstance(found, str):
                skipped.append((item.name, found))
                continue
            extras.append(item.extras)
            yield found

    with ThreadPoolExecutor(settings.readers) as pool, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        waiting = settings.readers + 2 * (settings.batch_size or 64)
        stream = good(in_order(pool, lambda item: (item, prepare(tokenizer, item, settings)), items, waiting))
        while window := _window(stream):
            count = 0
            for places, media, sizes in group_by_shape(window, settings.batch_size, ndim):
                count += len(places)
                full = _full(len(places), settings.batch_size)
                media = torch.cat([media, media[-1:].expand(full - len(places), *media.shape[1:])])
                sizes += sizes[-1:] * (full - len(places))
                yield Batch([first + place for place in places], media, torch.tensor(sizes))
            first += count


def _window(stream: Iterator[Any]) -> Iterator[Any] | None:
    """The next samples that may share batches; None at the end."""
    for head in stream:
        return _chained(head, islice(stream, WINDOW - 1))
    return None


def _chained(head: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield head
    yield from rest


def _full(count: int, batch_size: int | None) -> int:
    """How many samples a batch of `count` is filled up to: a power of two, or the batch size."""
    full = 1 << (count - 1).bit_length()
    return full if batch_size is None else max(count, min(full, batch_size))


def prepare(tokenizer: VQTokenizer, item: Item, settings: Settings) -> tuple[Tensor, tuple[int, ...]] | str:
    """What the model takes of an item, and its size; or why it cannot be used.

    Raises:
        OSError, MemoryError: the system could not read a file: the run must stop, because it may be good tomorrow.
    """
    if item.problem is not None:
        return item.problem
    try:
        tensor, size = tokenizer.processor.prepare(_decoded(tokenizer.modality, item, settings.image_size))
    except Exception as error:  # readers raise whatever broken bytes lead to
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        return _reason(error, item)
    if tokenizer.layout.ndim == 1:
        longer = ladder(tensor.shape[-1], tokenizer.processor.stride) - tensor.shape[-1]
        fill = tokenizer.processor.vocab_size if tokenizer.modality == "text" else 0
        tensor = torch.nn.functional.pad(tensor, (0, longer), value=fill)
    return tensor, size


def ladder(length: int, stride: int) -> int:
    """The length to which sound and text of `length` are padded: the next of about eight to each doubling.

    Example:
        >>> [ladder(n * 40, 40) // 40 for n in (1, 8, 9, 17, 100)]
        [1, 8, 9, 18, 104]
    """
    if length > _MOST_TOGETHER:
        return length
    steps = -(-length // stride)
    rung = 1 << max(0, (steps - 1).bit_length() - 4)
    return -(-steps // rung) * rung * stride


def _decoded(modality: str, item: Item, image_size: int | None) -> Any:
    medium = item.medium
    if modality == "text":
        return medium.decode() if isinstance(medium, bytes) else medium
    if modality == "audio":
        sound, rate = read_file(BytesIO(medium) if isinstance(medium, bytes) else medium)
        return {"audio": sound, "sampling_rate": rate}
    with Image.open(BytesIO(medium) if isinstance(medium, bytes) else medium) as picture:
        return to_rgb(picture) if image_size is None else square(to_rgb(picture), image_size)


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture, `side` pixels wide: its shorter side is brought to that first, bicubic and antialiased."""
    width, height = picture.size
    cut = min(width, height)
    left, top = (width - cut) / 2, (height - cut) / 2
    box = (left, top, left + cut, top + cut)
    return picture.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=None)


def _reason(error: Exception, item: Item) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"it has more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}"
    # Where an object lies in memory, or a file on this machine, must not stand in a file whose bytes are the same every time.
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not a picture, or of a format that PIL does not read"
    text = str(error)
    if isinstance(item.medium, Path):
        text = text.replace(str(item.medium), item.name)
    return " ".join(text.split()) or type(error).__name__
