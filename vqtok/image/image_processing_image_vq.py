"""Pictures of any kind to RGB, to the tensors of the model, and back."""

import difflib
import os
import struct
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

# What PIL itself takes for an attack: twice Image.MAX_IMAGE_PIXELS.
MAX_PIXELS = 178_956_970
# Keys that transformers writes into preprocessor_config.json beside the state.
_SERVICE_KEYS = frozenset(("image_processor_type", "processor_class", "feature_extractor_type", "auto_map"))

# Modes whose colours are already multiplied by the opacity, and the plain mode of each.
_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """Return any picture as an upright 8-bit RGB picture; the given one is not changed.

    EXIF rotation is applied, and dropped. Transparent parts are laid on white, the paper on which most such pictures
    are drawn. Grey, bilevel, palette, CMYK and YCbCr become RGB; 16-bit grey is scaled to 8 bits (0..65535 to 0..255,
    rounded), and so is the 32-bit integer mode, in which PIL keeps 16-bit values. Colour profiles are not applied. Of
    an animation this is the current frame.

    Args:
        image: a PIL picture of any mode but F, or a uint8 array (H, W), (H, W, 1), (H, W, 3) or, with opacity last,
            (H, W, 4), in [0, 255].

    Returns:
        A PIL picture of mode RGB.

    Raises:
        TypeError: if it is neither a PIL picture nor an array.
        ValueError: if the array is not uint8, has another shape or no pixel; if the mode is F or has no conversion to
            RGB; if integers lie outside 16 bits.
        OSError: from PIL, if the file behind a picture not yet read is broken.

    Example:
        >>> to_rgb(np.zeros((24, 32), np.uint8)).size
        (32, 24)
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    elif not isinstance(image, Image.Image):
        raise TypeError(
            f"a picture is a PIL image or a uint8 array, not {type(image).__name__}: open files with PIL first"
        )
    image.load()  # a broken file fails here, not in the reading of its EXIF data, which may be broken harmlessly
    try:
        image = ImageOps.exif_transpose(image)  # a new picture, rotated or not
    except (SyntaxError, struct.error, ValueError, TypeError, KeyError, OverflowError):
        image = image.copy()  # unreadable EXIF data says nothing about rotation
    if image.mode == "F":
        raise ValueError(
            "a picture of mode F (floats) has no known range: scale it to 0..255 and convert it with image.convert('L')"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _sixteen_bits_to_eight(image)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ValueError(
            f"PIL cannot turn a picture of mode {image.mode} into RGB: save it as an RGB PNG first"
        ) from error


def _sixteen_bits_to_eight(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"a picture of mode {image.mode} holds values from {values.min()} to {values.max()}, outside 16 bits: "
            "scale it to 0..255 and convert it with image.convert('L')"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257; rounds to nearest


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(
            f"an array of dtype {array.dtype} has no known range: "
            "scale it to 0..255 and use array.round().astype('uint8')"
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ValueError(
            f"an array of shape {array.shape} is no picture: "
            "give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), channels last"
        )
    if 0 in array.shape:
        raise ValueError(f"an array of shape {array.shape} has no pixel: give a picture of at least 1x1")
    return Image.fromarray(np.ascontiguousarray(array))


class ImageVQImageProcessor(BaseImageProcessor):
    """Pictures of any kind and size to `pixel_values` and back. Nothing is ever resized.

    Pixels x in [0, 255] become x / 127.5 - 1. A side that is no multiple of `stride` is continued on the right or at the
    bottom with its last column or row; `postprocess` cuts that off again.

    Args:
        stride: the largest stride of the model's layout: both sides are padded to a multiple of it.
        num_channels: 3 (RGB) or 1 (grey).
        max_pixels: a picture with more is refused before it is decoded.

    Raises:
        ValueError: an impossible value, or a name that is none of these (the nearest one is said).

    Example:
        >>> processor = ImageVQImageProcessor(stride=8)
        >>> pixels, size = processor.prepare(Image.new("RGB", (30, 21)))
        >>> tuple(pixels.shape), size
        ((3, 24, 32), (21, 30))
        >>> processor.postprocess(pixels[None], [size])[0].size
        (30, 21)
    """

    model_input_names = ["pixel_values", "sizes"]  # noqa: RUF012 (the name and form transformers reads)

    def __init__(self, stride: int = 8, num_channels: int = 3, max_pixels: int = MAX_PIXELS, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in _SERVICE_KEYS and not key.startswith("_"):
                near = difflib.get_close_matches(key, ("stride", "num_channels", "max_pixels"), n=1, cutoff=0.0)
                raise ValueError(f"ImageVQImageProcessor has no field {key!r}. Did you mean {near[0]!r}?")
        super().__init__()
        for name, value in (("stride", stride), ("num_channels", num_channels), ("max_pixels", max_pixels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ImageVQImageProcessor.{name} must be a positive integer, got {value!r}")
        if num_channels not in (1, 3):
            raise ValueError(f"ImageVQImageProcessor.num_channels must be 3 (RGB) or 1 (grey), got {num_channels}")
        self.stride, self.num_channels, self.max_pixels = stride, num_channels, max_pixels

    @property
    def code_fields(self) -> dict[str, Any]:
        """What decides codes, for the fingerprint; the bound on pixels does not."""
        return {
            "stride": self.stride,
            "num_channels": self.num_channels,
            "range": [-1, 1],
            "padding": "edge, right and bottom",
            "colours": "8 bits, opacity on white, EXIF rotation applied",
        }

    def prepare(
        self, image: Image.Image | np.ndarray | str | os.PathLike, max_pixels: int | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """One picture as the model wants it.

        Args:
            image: a PIL picture, a uint8 array (see `to_rgb`), or the path of a file that PIL reads; of an animation its first
                frame. Nothing is downloaded.
            max_pixels: another bound than the processor's, for this call.

        Returns:
            pixels: float32 `(C, H', W')` in [-1, 1], sides padded to multiples of the stride.
            size: `(H, W)` before padding.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no picture or is truncated (the file is named); the picture has a side smaller than the
                stride or more pixels than `max_pixels`; or see `to_rgb`.
            TypeError: anything else than a picture, an array or a path.
        """
        most = self.max_pixels if max_pixels is None else max_pixels
        what = f"the picture {image}" if isinstance(image, (str, os.PathLike)) else "a picture"
        if isinstance(image, (str, os.PathLike)):
            picture = self._read(image, most)
        else:
            _check_pixels(image, what, most)
            picture = to_rgb(image)
        width, height = picture.size
        if min(width, height) < self.stride:
            raise ValueError(
                f"{what} has {width}x{height} pixels, a side smaller than the stride of {self.stride}: enlarge it to at least "
                f"{self.stride}x{self.stride}, or use a tokenizer with a smaller stride"
            )
        if self.num_channels == 1:
            picture = picture.convert("L")
        array = np.asarray(picture).reshape(height, width, self.num_channels)
        padding = [(0, -height % self.stride), (0, -width % self.stride), (0, 0)]
        if -height % self.stride or -width % self.stride:
            array = np.pad(array, padding, mode="edge")
        pixels = torch.from_numpy(array.transpose(2, 0, 1).copy()).float().div_(127.5).sub_(1)
        return pixels, (height, width)

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """A batch of pictures of one padded size, in the form of transformers.

        Args:
            images: one picture or a list (see `prepare`).
            return_tensors: "pt" for tensors, "np" for arrays.

        Returns:
            pixel_values: float32 `(B, C, H', W')` in [-1, 1].
            sizes: int64 `(B, 2)`, height and width before padding.

        Raises:
            ValueError: pictures of different padded sizes, or see `prepare`.
        """
        batch = list(images) if isinstance(images, (list, tuple)) else [images]
        if not batch:
            raise ValueError("there are no pictures: give at least one")
        prepared = [self.prepare(image) for image in batch]
        shapes = sorted({tuple(pixels.shape[1:]) for pixels, _ in prepared})
        if len(shapes) > 1:
            raise ValueError(
                f"pictures of one batch must have one padded size, got {', '.join(f'{h}x{w}' for h, w in shapes)}: "
                "VQTokenizer.encode takes mixed sizes"
            )
        data = {
            "pixel_values": torch.stack([pixels for pixels, _ in prepared]),
            "sizes": torch.tensor([size for _, size in prepared], dtype=torch.int64),
        }
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors must be 'pt' or 'np', got {return_tensors!r}")
        return BatchFeature(data if return_tensors == "pt" else {name: value.numpy() for name, value in data.items()})

    def postprocess(self, pixels: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> list[Image.Image]:
        """Pictures of the given sizes, of mode RGB or, with one channel, L.

        Args:
            pixels: float `(B, C, H', W')`, nominally in [-1, 1]: clamped, then rounded half up.
            sizes: `(B, 2)`, height and width of each picture without its padding.
        """
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        # floor(127.5 x + 128) is 127.5 (x + 1) rounded half up; x = 1 would become 255 + 1/2, which the floor takes down.
        rounded = pixels.detach().float().clamp(-1, 1).mul(127.5).add_(128).floor_().to(torch.uint8).cpu()
        arrays = rounded.permute(0, 2, 3, 1).numpy()
        cut = [array[:height, :width] for array, (height, width) in zip(arrays, sizes, strict=True)]
        return [
            Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)) for array in cut
        ]

    def _read(self, path: str | os.PathLike, most: int) -> Image.Image:
        """The first frame of a file, as RGB."""
        if isinstance(path, str) and path.startswith(("http://", "https://")):
            raise ValueError(
                f"{path} is an address, and nothing is downloaded here: download the picture and give its path"
            )
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}: check the path")
        try:
            # The warning about large pictures would come below our own bound, which is an error and names both numbers.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with _open(path, most) as image:
                    _check_pixels(image, "it", most)
                    return to_rgb(image)
        except IsADirectoryError:
            raise ValueError(f"{path} is a folder: name a picture in it") from None
        except UnidentifiedImageError:
            raise ValueError(f"cannot read {path}: it is no picture, or of a format that PIL does not read") from None
        except (struct.error, EOFError) as error:
            raise ValueError(f"cannot read the picture {path}: it is truncated; get a complete copy") from error
        except Exception as error:  # PIL's readers raise whatever broken bytes lead to
            reason = str(error) or type(error).__name__
            raise ValueError(f"cannot read the picture {path}: {reason}") from error


# PIL's own bound is one number for the whole process. It is lifted only while a file with a higher one is opened.
_PIL_BOUND = threading.Lock()


def _open(path: Path, most: int) -> Image.Image:
    """The picture of a file, not yet decoded."""
    if most <= MAX_PIXELS:
        return Image.open(path)
    with _PIL_BOUND:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, most
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_pixels(image: Any, what: str, most: int) -> None:
    if isinstance(image, Image.Image):
        width, height = image.size
    elif isinstance(image, np.ndarray) and image.ndim >= 2:
        height, width = image.shape[:2]
    else:
        return
    if width * height > most:
        raise ValueError(
            f"{what} has {width}x{height} = {width * height:,} pixels, more than the limit of {most:,}: "
            "make it smaller, or raise max_pixels in this call"
        )
