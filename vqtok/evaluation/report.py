"""What a tokenizer keeps of pictures, how well it uses its codes, how stable they are, and how fast it is: one JSON-able dict."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vqtok import __version__
from vqtok.auto import VQTokenizer, bits_per_unit
from vqtok.codes import Codes
from vqtok.image.image_processing_image_vq import to_rgb
from vqtok.quantizers import code_counts, entropy_bits, perplexity, usage

from .protocols import DESCRIPTION, PROTOCOL, mean_psnr, psnr, ssim

# Pictures that are in memory together, at most.
_CHUNK_PICTURES, _CHUNK_PIXELS = 64, 1 << 24
# bfloat16 is slow on many processors: pictures beyond this are left out of its test.
_STABILITY_PIXELS = 1 << 21


def evaluate(
    tokenizer: VQTokenizer,
    images: Any,
    *,
    batch_size: int | None = None,
    name: str | None = None,
    stability_samples: int = 16,
) -> dict[str, Any]:
    """The measures of one tokenizer on one set of pictures, after the protocol "vqtok-eval v1" (see `protocols`).

    Args:
        tokenizer: of images.
        images: what `load_images` gives, or pictures (PIL or uint8 arrays). Read once, a few dozen at a time.
        batch_size: see `VQTokenizer.encode`.
        name: what to call the tokenizer in tables; None takes the folder it came from.
        stability_samples: how many pictures at most are encoded again, alone and in bfloat16; 0 for none.

    Returns:
        A dict that JSON can hold, among others:
        `psnr_db` (None if every reconstruction is perfect), `ssim`, `bits_per_pixel`;
        `usage`, `perplexity`, `entropy_bits`, `codes_per_entry`: one number per level over the whole set, means over the level's
        codebooks; `psnr_db_by_levels`: from the first level alone to all;
        `code_stability`: share of equal codes per level, in [0, 1];
        `speed`: pictures and megapixels per second, preparation of the pictures included.

    Raises:
        ValueError: there are no pictures, or one is smaller than the stride.
    """
    tally = _Tally(tokenizer)
    sample: list[Image.Image] = []
    for chunk in _chunks(images, tokenizer.processor.stride):
        if not tally.num_images:
            tokenizer.reconstruct(chunk[:1])  # the first call of everything is slow
        for picture in chunk:
            if len(sample) < stability_samples and sum(p.width * p.height for p in sample) < _STABILITY_PIXELS:
                sample.append(picture)
        tally.add(chunk, batch_size)
    if not tally.num_images:
        raise ValueError("there are no pictures to evaluate on: give at least one")
    model = tokenizer.model
    return {
        "name": name or Path(model.config.name_or_path).name or type(model).__name__,
        "protocol": PROTOCOL,
        **tally.results(),
        "code_stability": code_stability(tokenizer, sample) if sample else None,
        "tokenizer": {
            "class": type(model).__name__,
            "fingerprint": tokenizer.fingerprint,
            "layout": tokenizer.layout.to_dict(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "nominal_bits_per_pixel": bits_per_unit(tokenizer.layout),
        },
        "data": {**tally.data(), "num_skipped": len(getattr(images, "skipped", ()))},
        "machine": machine(model.device),
        "versions": {
            "vqtok": __version__,
            **{p: version(p) for p in ("torch", "torchmetrics", "transformers", "pillow")},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol_description": DESCRIPTION,
    }


def compare(tokenizers: Mapping[str, VQTokenizer], images: Any, **options: Any) -> list[dict[str, Any]]:
    """The results of `evaluate` for each tokenizer, by name, on the same pictures; `options` go to `evaluate`."""
    return [evaluate(tokenizer, images, name=name, **options) for name, tokenizer in tokenizers.items()]


def code_stability(tokenizer: VQTokenizer, images: Sequence[Any]) -> dict[str, Any]:
    """Share of codes, per level, that stay when a picture is encoded alone, and when the model is in bfloat16.

    Differences of the first kind should be near-ties only; those of the second say what `dtype=torch.bfloat16` costs.
    """
    together = tokenizer.encode(images)
    alone = Codes.cat([tokenizer.encode(image) for image in images])
    rounded = VQTokenizer(copy.deepcopy(tokenizer.model).to(torch.bfloat16), tokenizer.processor)
    shares = {"batch_and_alone": alone, "float32_and_bfloat16": rounded.encode(images)}
    return {
        "num_images": len(images),
        **{key: _equal_shares(together, other) for key, other in shares.items()},
    }


def to_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table with one row per result of `evaluate`, best read beside others of the same data.

    Raises:
        ValueError: results of different protocols.
    """
    protocols = sorted({result["protocol"] for result in results})
    if len(protocols) > 1:
        raise ValueError(f"results of different protocols are not comparable: {', '.join(protocols)}")
    rows = [
        [
            "tokenizer",
            "PSNR dB",
            "SSIM",
            "bits/pixel",
            "usage %",
            "perplexity",
            "of K",
            "encode MP/s",
            "decode MP/s",
            "M par.",
        ]
    ]
    for result in results:
        sizes = [level["codebook_size"] for level in result["tokenizer"]["layout"]["levels"]]
        rows.append(
            [
                result["name"].replace("|", "\\|"),
                "perfect" if result["psnr_db"] is None else f"{result['psnr_db']:.2f}",
                "-" if result["ssim"] is None else f"{result['ssim']:.4f}",
                f"{result['bits_per_pixel']:.4g}",
                " / ".join(f"{100 * share:.1f}" for share in result["usage"]),
                " / ".join(f"{value:.1f}" for value in result["perplexity"]),
                " / ".join(str(size) for size in sizes),
                f"{result['speed']['encode_megapixels_per_second']:.3g}",
                f"{result['speed']['decode_megapixels_per_second']:.3g}",
                f"{result['tokenizer']['parameters'] / 1e6:.2f}",
            ]
        )
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine(device: torch.device) -> dict[str, Any]:
    """What the speeds were measured on: processor, cores, threads of torch, device."""
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = [
            line for line in info.read_text(encoding="utf-8", errors="replace").splitlines() if "model name" in line
        ]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


class _Tally:
    """Sums over the whole set."""

    def __init__(self, tokenizer: VQTokenizer):
        self.tokenizer = tokenizer
        levels = tokenizer.layout.levels
        self.counts = [torch.zeros(level.num_codebooks, level.codebook_size, dtype=torch.int64) for level in levels]
        self.psnr: list[list[float]] = [[] for _ in levels]  # by number of levels, less one
        self.ssim: list[float | None] = []
        self.num_images = self.num_pixels = 0
        self.bits = 0.0
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self.digest = hashlib.sha256()

    def add(self, pictures: list[Image.Image], batch_size: int | None) -> None:
        """Encode, decode and compare some pictures."""
        layout = self.tokenizer.layout
        start = time.perf_counter()
        codes = self.tokenizer.encode(pictures, batch_size=batch_size)
        middle = time.perf_counter()
        decoded = self.tokenizer.decode(codes, batch_size)
        self.seconds["decode"] += time.perf_counter() - middle
        self.seconds["encode"] += middle - start
        by_levels = [self.tokenizer.decode(codes.prefix(n), batch_size) for n in range(1, len(layout.levels))] + [
            decoded
        ]
        originals = [picture.convert(other.mode) for picture, other in zip(pictures, decoded, strict=True)]
        for values, reconstructions in zip(self.psnr, by_levels, strict=True):
            values += [psnr(*pair) for pair in zip(reconstructions, originals, strict=True)]
        self.ssim += [ssim(*pair) for pair in zip(decoded, originals, strict=True)]
        for one in codes:  # each alone, so that no padding of the grid is counted
            for counts, level in zip(self.counts, one.levels, strict=True):
                counts += torch.stack([code_counts(row, counts.shape[1]) for row in level[0]])
            self.bits += layout.bits(one.sizes[0].tolist())
        for picture in pictures:
            self.num_pixels += picture.width * picture.height
            self.digest.update(f"{picture.size}".encode() + picture.tobytes())
        self.num_images += len(pictures)

    def results(self) -> dict[str, Any]:
        inside = [value for value in self.ssim if value is not None]
        return {
            "psnr_db": mean_psnr(self.psnr[-1]),
            "psnr_perfect": sum(math.isinf(value) for value in self.psnr[-1]),
            "ssim": sum(inside) / len(inside) if inside else None,
            "ssim_too_small": len(self.ssim) - len(inside),
            "psnr_db_by_levels": [mean_psnr(values) for values in self.psnr],
            "bits_per_pixel": self.bits / self.num_pixels,
            "usage": self._per_level(usage),
            "perplexity": self._per_level(perplexity),
            "entropy_bits": self._per_level(entropy_bits),
            "codes_per_entry": self._per_level(lambda counts: float(counts.sum()) / len(counts)),
            "speed": {
                f"{what}_{unit}_per_second": amount / max(seconds, 1e-9)
                for what, seconds in self.seconds.items()
                for unit, amount in (("images", self.num_images), ("megapixels", self.num_pixels / 1e6))
            },
        }

    def data(self) -> dict[str, Any]:
        return {"num_images": self.num_images, "num_pixels": self.num_pixels, "sha256": self.digest.hexdigest()}

    def _per_level(self, measure: Any) -> list[float]:
        return [sum(measure(row) for row in counts) / len(counts) for counts in self.counts]


def _chunks(images: Any, stride: int) -> Iterator[list[Image.Image]]:
    """RGB pictures, a few dozen at a time."""
    chunk: list[Image.Image] = []
    pixels = 0
    places: Iterable[int] = range(len(images))
    for place in tqdm(places, "evaluating", delay=2, leave=False, disable=None):
        item = images[place]
        picture = to_rgb(item["image"] if isinstance(item, Mapping) else item)
        if min(picture.size) < stride:
            label = images.name(place) if hasattr(images, "name") else place
            raise ValueError(
                f"picture {label} has {picture.width}x{picture.height} pixels, a side smaller than the stride of {stride}: enlarge "
                "it or take it out"
            )
        chunk.append(picture)
        pixels += picture.width * picture.height
        if len(chunk) == _CHUNK_PICTURES or pixels >= _CHUNK_PIXELS:
            yield chunk
            chunk, pixels = [], 0
    if chunk:
        yield chunk


def _equal_shares(one: Codes, other: Codes) -> list[float]:
    """Per level, over the codes that are no padding of the grid."""
    shares = []
    for index in range(len(one.levels)):
        equal: list[Tensor] = [(a.levels[index] == b.levels[index]).flatten() for a, b in zip(one, other, strict=True)]
        shares.append(float(torch.cat(equal).double().mean()))
    return shares
