"""Contact sheets: rows of pictures beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from vqtok.image.image_processing_image_vq import to_rgb


def contact_sheet(rows: Sequence[Sequence[Any]], tile: int | None = None, gap: int = 2) -> Image.Image:
    """One RGB picture of rows of pictures.

    Args:
        rows: PIL pictures or uint8 arrays; a row may be shorter than the others.
        tile: longest side of every tile in pixels, enlarged without smoothing or reduced; None picks a readable one.
        gap: pixels between tiles.

    Raises:
        ValueError: there is no picture.
    """
    pictures = [[to_rgb(picture) for picture in row] for row in rows]
    if not any(pictures):
        raise ValueError("a contact sheet needs at least one picture")
    longest = max(max(picture.size) for row in pictures for picture in row)
    tile = tile or (max(1, 96 // longest) * longest if longest < 256 else 256)
    scaled = [[_scale(picture, tile) for picture in row] for row in pictures]
    width = max(len(row) for row in scaled) * (tile + gap) + gap
    sheet = Image.new("RGB", (width, len(scaled) * (tile + gap) + gap), (96, 96, 96))
    for y, row in enumerate(scaled):
        for x, picture in enumerate(row):
            sheet.paste(picture, (gap + x * (tile + gap), gap + y * (tile + gap)))
    return sheet


def _scale(picture: Image.Image, tile: int) -> Image.Image:
    factor = tile / max(picture.size)
    size = tuple(max(1, round(n * factor)) for n in picture.size)
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
