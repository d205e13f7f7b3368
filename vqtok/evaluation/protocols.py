"""How pictures are compared, under a name: numbers are comparable only between results of one protocol.

vqtok-eval v1: both pictures as 8-bit RGB, the reconstruction clamped and rounded half up. PSNR and SSIM of each picture alone,
then the mean over pictures, never over batches or pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PROTOCOL = "vqtok-eval v1"
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
# Stands in the results beside the numbers.
DESCRIPTION = {
    "psnr": "8-bit RGB in [0, 1], range 1, mean over pictures of finite values; perfect pictures are counted apart",
    "ssim": "gaussian 11x11, sigma 1.5, range 1, mean over channels and over windows that lie inside the picture, then over "
    "pictures, in float32; pictures with a side below 11 have no window and are counted apart",
    "bits_per_pixel": "codes times log2 K over pixels, padding included",
}


def unit_rgb(image: Image.Image) -> Tensor:
    """The picture as float64 `(1, 3, H, W)` in [0, 1]; grey becomes RGB."""
    array = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].double() / 255


def psnr(reconstruction: Image.Image, original: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB, -10 log10(mean squared difference); infinite for equal pictures.

    Raises:
        ValueError: pictures of different sizes.

    Example:
        >>> white, black = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
        >>> psnr(white, black), psnr(white, white)
        (0.0, inf)
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_sizes(reconstruction, original)
    value = float(peak_signal_noise_ratio(unit_rgb(reconstruction), unit_rgb(original), data_range=1.0))
    return value + 0.0  # -0.0 becomes 0.0


def ssim(reconstruction: Image.Image, original: Image.Image) -> float | None:
    """Structural similarity (Wang et al. 2004), 1 for equal pictures; None if no 11x11 window lies inside the picture.

    Raises:
        ValueError: pictures of different sizes.

    Example:
        >>> ssim(Image.new("L", (16, 16)), Image.new("L", (16, 16))), ssim(Image.new("L", (9, 16)), Image.new("L", (9, 16)))
        (1.0, None)
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_sizes(reconstruction, original)
    if min(original.size) < SSIM_WINDOW:
        return None
    # In float32, as everybody has it: float64 is 30 times slower and differs by up to 1e-3, in bright flat areas.
    _, everywhere = structural_similarity_index_measure(
        unit_rgb(reconstruction).float(),
        unit_rgb(original).float(),
        gaussian_kernel=True,
        sigma=SSIM_SIGMA,
        kernel_size=SSIM_WINDOW,
        data_range=1.0,
        return_full_image=True,
    )
    # torchmetrics also puts windows across the border, over reflected pixels; the paper and scikit-image do not.
    border = SSIM_WINDOW // 2
    return float(everywhere[..., border:-border, border:-border].mean())


def mean_psnr(values: Iterable[float]) -> float | None:
    """The mean of the finite values; None if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _check_sizes(reconstruction: Image.Image, original: Image.Image) -> None:
    if reconstruction.size != original.size:
        raise ValueError(
            f"cannot compare pictures of {reconstruction.size} and {original.size} pixels: give equal sizes"
        )
