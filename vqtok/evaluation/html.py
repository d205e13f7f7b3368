"""A page in one file: headings, words, tables, pictures and sounds, with nothing to load from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vqtok.audio.files import load_soundfile, pcm

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } .lead { color: #777; margin-top: 0; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #8884; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; }
.told figure { width: 9.5rem; } figure { margin: 0; } figcaption { font-size: .85rem; }
.sounds { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; } audio { width: 100%; }
img { max-width: 100%; height: auto; } img.pixels { image-rendering: pixelated; }
.missed { color: #c33; } .met { color: #292; }
"""


class Page:
    """Collects the parts of a page in order; `text` and `cells` are escaped."""

    def __init__(self, title: str, lead: str):
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>"]

    def heading(self, text: str) -> None:
        """A heading of a section."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are aligned right."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def picture(self, picture: Image.Image, alt: str) -> None:
        """A picture at its own size."""
        self.parts.append(f"<p>{_image(picture, alt)}</p>")

    def tiles(self, pictures: Sequence[Image.Image], captions: Sequence[str] = (), width: int = 128) -> None:
        """Small pictures, enlarged without smoothing, each with its caption or none of them."""
        figures = [
            f"<figure>{_image(picture, words, width)}<figcaption>{html.escape(words)}</figcaption></figure>"
            for picture, words in zip(pictures, captions or [""] * len(pictures), strict=True)
        ]
        kind = "tiles told" if captions else "tiles"
        self.parts.append(f"<div class='{kind}'>{''.join(figures)}</div>")

    def sounds(
        self,
        sounds: Sequence[np.ndarray],
        sampling_rate: int,
        captions: Sequence[str],
        pictures: Sequence[Image.Image] = (),
    ) -> None:
        """Players, each with its caption and maybe a picture above it. A sound is float (samples,) or (channels, samples).

        Raises:
            ValueError: a sound is empty or not finite.
            ImportError: if soundfile is missing.
        """
        above = [_image(picture, words) for picture, words in zip(pictures, captions, strict=True)] if pictures else []
        figures = [
            f"<figure>{above[i] if above else ''}{_audio(sound, sampling_rate)}"
            f"<figcaption>{html.escape(words)}</figcaption></figure>"
            for i, (sound, words) in enumerate(zip(sounds, captions, strict=True))
        ]
        self.parts.append(f"<div class=sounds>{''.join(figures)}</div>")

    def render(self) -> str:
        """The whole page."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(self.title)}</title>'
        return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(self.parts)}</body></html>\n'


def _cell(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    kind = "number" if number else {"met": "met", "missed": "missed"}.get(shown, "")
    return f"<td class='{kind}'>{html.escape(shown)}</td>"


def _image(picture: Image.Image, alt: str, width: int | None = None) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f' class=pixels width="{width}"' if width else ""
    return f'<img{size} alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def _audio(sound: np.ndarray, sampling_rate: int) -> str:
    """A player of 16-bit FLAC, which all browsers play, at half the size of WAV. What is beyond full scale is clipped."""
    if not np.size(sound):
        raise ValueError("a sound that is empty cannot be played: look at what made it")
    buffer = io.BytesIO()
    load_soundfile().write(buffer, pcm(sound), sampling_rate, format="FLAC", subtype="PCM_16")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/flac;base64,{data}"></audio>'
