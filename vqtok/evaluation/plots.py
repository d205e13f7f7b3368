"""Pictures of numbers: loss curves, codebook use, maps of codes. Needs matplotlib, an extra (`pip install vqtok[demo]`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


def curves(
    history: Sequence[Mapping[str, float]], names: Mapping[str, str], ylabel: str, log: bool = False
) -> Image.Image:
    """Lines over steps.

    Args:
        history: as `fit` returns it.
        names: key in the history -> words in the legend; keys that never occur are left out.
        ylabel: of the vertical axis, with its unit.
        log: logarithmic vertical axis.
    """

    def draw(axes: Any) -> None:
        for key, label in names.items():
            points = [(record["step"], record[key]) for record in history if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.6)
        axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
        axes.legend(frameon=False)

    return _figure(draw, (6, 3))


def usage_bars(counts: Sequence[Tensor], titles: Sequence[str]) -> Image.Image:
    """How often each code was used, most used first, one panel per codebook; the dashed line is uniform use."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(counts), 2.6), layout="constrained")
    for axes, count, title in zip(np.atleast_1d(figure.subplots(1, len(counts))), counts, titles, strict=True):
        ordered = np.sort(count.numpy())[::-1]
        axes.bar(np.arange(len(ordered)), ordered, width=1.0)
        axes.axhline(ordered.mean(), color="black", linestyle="--", linewidth=1)
        axes.set(title=title, xlabel="code, most used first", ylabel="hits", yscale="symlog")
    return save_figure(figure)


def code_map(codes: Tensor, codebook_size: int) -> Image.Image:
    """A grid of codes `(h, w)` as a picture of `w` x `h` pixels, one colour per code."""
    import matplotlib

    order = np.random.default_rng(0).permutation(codebook_size)  # neighbours in the table get unlike colours
    colours = matplotlib.colormaps["turbo"](order[codes.cpu().numpy()] / max(1, codebook_size - 1))
    return Image.fromarray((colours[..., :3] * 255).astype(np.uint8))


def _figure(draw: Any, size: tuple[float, float]) -> Image.Image:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    return save_figure(figure)


def save_figure(figure: Any) -> Image.Image:
    """A matplotlib figure as an RGB picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return Image.open(buffer).convert("RGB")
