"""Every quantizer in the same encoder and decoder, at about equal bits per latent and for equally many steps.

    python benchmarks/quantizers_learning.py --threads 2 --report docs/quantizers_learning.md
    python benchmarks/quantizers_learning.py --images photos/ --holdout calla elephants --report docs/quantizers_learning_photos.md

A row that is done is kept in --cache; the same command continues with the next one.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine_line
from PIL import Image
from torch import Tensor

from vqtok.evaluation.pictures import contact_sheet
from vqtok.evaluation.protocols import PROTOCOL, mean_psnr, psnr
from vqtok.files import write_json, write_text, write_with
from vqtok.image import ImageVQConfig, ImageVQModel
from vqtok.image.data import CropDataset, load_images
from vqtok.outputs import QuantizerOutput
from vqtok.quantizers import HierarchicalQuantizer, Quantizer, code_counts, perplexity, quantizer_config, usage
from vqtok.training import parse_arguments
from vqtok.training.setup import run_script

try:
    import vector_quantize_pytorch as peer
except ImportError:  # its rows say so then
    peer = None

PEER = "vector-quantize-pytorch"
BITS = 10  # per latent
STRIDE = 4
MODEL = {"strides": [STRIDE], "latent_size": 16, "hidden_size": 64, "residual_size": 32, "num_residual_layers": 2}
_INITIAL_BATCHES = 16
_SHOWN = 8
# In a state dict, but not needed to know what codes mean.
_BOOKKEEPING = ("counts", "updates", "initialised", "mean_use", "cluster_size", "embed_avg", "initted", "zero")


@dataclass
class LearningArguments:
    """What to train on, for how long, and where to write the result."""

    steps: int = field(default=600, metadata={"help": "Optimizer steps of each row."})
    batch: int = field(default=32, metadata={"help": "Pictures of a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak of AdamW's; 50 steps up, then a cosine to 0."})
    seed: int = field(default=0, metadata={"help": "Of weights, data and noise."})
    eval_samples: int = field(default=512, metadata={"help": "Held-out pictures."})
    images: str | None = field(
        default=None, metadata={"help": "Folder of photographs to crop from; else the embedded digits."}
    )
    holdout: list[str] = field(default_factory=list, metadata={"help": "Its held-out files, by name."})
    image_size: int = field(default=64, metadata={"help": "Side of the crops."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    only: list[str] = field(default_factory=list, metadata={"help": "Only rows whose name contains one of these."})
    cache: str = field(default="out/quantizers_learning", metadata={"help": "Folder where finished rows are kept."})
    report: str | None = field(
        default=None, metadata={"help": "Markdown file to write, with .json and .png beside it."}
    )


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Args:
        name: as the table has it.
        quantizer: a configuration of vqtok, or with `is_peer` the options of the other library's `VectorQuantize`.
        initialise: k-means (or what the quantizer has in its place) before the first step.
        is_peer: whether it is the other library's.
    """

    name: str
    quantizer: dict[str, Any]
    initialise: bool = True
    is_peer: bool = False


def entries(steps: int, latents: int) -> list[Entry]:
    """The rows, in the order of the table; `latents` is how many of them a step sees."""
    size = 2**BITS
    half = {"type": "vector", "codebook_size": 2 ** (BITS // 2)}
    vector = {"type": "vector", "codebook_size": size}
    gradient = {**vector, "update": "gradient"}
    cosine = {"metric": "cosine", "codebook_dim": 8}
    scales = [1, 2, 4, 8]
    codes = sum((scale / scales[-1]) ** 2 for scale in scales)  # per latent
    few = math.floor(2 ** (BITS / codes))
    same = {"decay": 0.99, "commitment_weight": 0.25, "rotation_trick": False, "kmeans_init": True}
    return [
        Entry("VQ, EMA", vector),
        Entry("VQ, EMA, no k-means, no revival", {**vector, "revival_threshold": 0}, initialise=False),
        Entry("VQ, gradient", gradient),
        Entry("VQ, cosine, codebook_dim 8, EMA", {**vector, **cosine}),
        Entry("VQ, cosine, codebook_dim 8, gradient", {**gradient, **cosine}),
        Entry("VQ, EMA, rotation", {**vector, "gradient": "rotation"}),
        Entry(
            "IBQ (inner product, entropy 0.05 at 0.01)",  # as published
            {**gradient, "metric": "inner_product", "entropy_weight": 0.05, "entropy_temperature": 0.01},
        ),
        Entry("SimVQ", {"type": "sim", "codebook_size": size}),
        Entry("Gumbel", {"type": "gumbel", "codebook_size": size, "anneal_steps": max(1, steps * 3 // 4)}),
        Entry("FSQ 8 5 5 5", {"type": "fsq", "scalar_levels": [8, 5, 5, 5]}),
        Entry("LFQ", {"type": "lfq", "bits": BITS}),
        Entry("BSQ", {"type": "bsq", "bits": BITS}),
        Entry(f"residual, 2 x {2 ** (BITS // 2)}", {"type": "residual", "num_codebooks": 2, "layer": half}),
        Entry(f"product, 2 x {2 ** (BITS // 2)}", {"type": "product", "num_codebooks": 2, "layer": half}),
        Entry(
            f"multi-scale {' '.join(map(str, scales))}, K={few}",
            {"type": "multi_scale", "scales": scales, "layer": {**vector, "codebook_size": few}},
        ),
        Entry(f"{PEER}, defaults", {"codebook_size": size}, is_peer=True),
        Entry(
            f"{PEER}, k-means, dead codes below 2",
            {"codebook_size": size, "kmeans_init": True, "threshold_ema_dead_code": 2},
            is_peer=True,
        ),
        Entry(
            f"{PEER}, our options",
            {"codebook_size": size, **same, "threshold_ema_dead_code": 0.05 * latents / size},
            is_peer=True,
        ),
    ]


class PeerQuantizer(Quantizer):
    """`VectorQuantize` of vector-quantize-pytorch behind our contract; it updates itself in its forward pass.

    Args:
        dim: width of the latents.
        codebook_size: K.
        options: of `VectorQuantize`.
    """

    def __init__(self, dim: int, codebook_size: int, **options: Any):
        super().__init__(dim, quantizer_config({"type": "vector", "codebook_size": codebook_size}))
        self.peer = peer.VectorQuantize(dim, codebook_size=codebook_size, **options)

    def _quantize(self, z: Tensor, learn: bool) -> QuantizerOutput:
        self.peer.train(learn)
        quantized, codes, loss = self.peer(z.flatten(1, -2))
        codes = codes.view(z.shape[0], 1, *z.shape[1:-1])
        quantized = quantized.view(z.shape) if learn else self._embed(codes)
        loss = loss.sum() if learn else None  # with its weight already
        losses = {} if loss is None else {"commitment_loss": loss}
        return QuantizerOutput(quantized=quantized, codes=codes, latents=z.float(), losses=losses, loss=loss)

    def _embed(self, codes: Tensor) -> Tensor:
        return self.peer.get_output_from_indices(codes[:, 0])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train every row, print the table, write the report; returns the rows."""
    (args,) = parse_arguments([LearningArguments], argv, description=__doc__)
    torch.set_num_threads(args.threads)
    train, test = _pictures(args)
    side = test.shape[-1]
    if side % (8 * STRIDE):
        raise ValueError(f"--image_size must be a multiple of {8 * STRIDE}, for the grids of multi-scale, got {side}")
    latents = args.batch * (side // STRIDE) ** 2
    rows, strips = [], [_to_pil(test[:_SHOWN])]
    for entry in entries(args.steps, latents):
        if args.only and not any(part in entry.name for part in args.only):
            continue
        row, strip = _cached(entry, args, train, test)
        rows.append(row)
        strips.append(strip)
        print(_table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    table = _table(rows)
    print(table)
    if args.report:
        _write(args, rows, strips, table, latents)
    return rows


# -- one row


def _cached(entry: Entry, args: LearningArguments, train: Tensor, test: Tensor) -> tuple[dict[str, Any], list[Any]]:
    """The row and its pictures, from the cache if it was done under the same settings."""
    decisive = {name: value for name, value in asdict(args).items() if name not in ("only", "cache", "report")}
    if args.images:
        decisive["images"] = Path(args.images).name
    settings = {**decisive, "model": MODEL, **asdict(entry)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(args.cache) / f"{key}.json"
    if path.exists() and path.with_suffix(".png").exists():
        with Image.open(path.with_suffix(".png")) as strip:
            return json.loads(path.read_text(encoding="utf-8")), _cut(strip.convert("RGB"), test.shape[-1])
    row: dict[str, Any] = {"name": entry.name, "settings": settings}
    try:
        measures, pictures = run(entry, args, train, test)
    except Exception as error:  # a row that fails is a result, and the others go on
        traceback.print_exc()
        return {**row, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}, []
    row = {**row, **measures}
    strip = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures[:_SHOWN]], 1))
    write_with(path.with_suffix(".png"), lambda temporary: strip.save(temporary, format="PNG"))
    write_json(path, row)
    return row, pictures[:_SHOWN]


def run(entry: Entry, args: LearningArguments, train: Tensor, test: Tensor) -> tuple[dict[str, Any], list[Image.Image]]:
    """Train one row and measure it on the held-out pictures.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = torch.device(args.device)
    model = build(entry, args.seed).to(device)

    def batch(step: int) -> Tensor:
        first = step * args.batch
        return _to_float(train[first : first + args.batch]).to(device)

    if entry.initialise:
        model.init_codebooks([batch(step) for step in range(min(_INITIAL_BATCHES, args.steps))])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    seconds: list[float] = []
    model.train()
    for step in range(args.steps):
        pixels = batch(step)
        torch.manual_seed(args.seed * 1_000_003 + step)  # noise and dead codes
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, args)
        start = time.perf_counter()
        loss = _step(model, optimizer, trained, pixels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step + 1}")
    return _measures(model.eval(), test, statistics.median(seconds))


def build(entry: Entry, seed: int) -> ImageVQModel:
    """The model of one row: encoder and decoder start with the same weights in every row."""
    torch.manual_seed(seed)
    start = ImageVQModel(ImageVQConfig(**MODEL, quantizer={"type": "fsq"}))
    torch.manual_seed(seed + 1)
    if entry.is_peer:
        if peer is None:
            raise ImportError(f"{PEER} is not installed: pip install 'vqtok[parity]'")
        vector = {"type": "vector", "codebook_size": entry.quantizer["codebook_size"]}
        model = ImageVQModel(ImageVQConfig(**MODEL, quantizer=vector))
        model.quantizer = HierarchicalQuantizer([PeerQuantizer(MODEL["latent_size"], **entry.quantizer)])
    else:
        model = ImageVQModel(ImageVQConfig(**MODEL, quantizer=entry.quantizer))
    model.encoder.load_state_dict(start.encoder.state_dict())
    model.decoder.load_state_dict(start.decoder.state_dict())
    return model


def _step(model: ImageVQModel, optimizer: torch.optim.Optimizer, trained: list[Any], pixels: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    output = model(pixels)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    model.update_codebooks()
    return float(output.loss.detach())


def _learning_rate(step: int, args: LearningArguments) -> float:
    warm = min(50, args.steps // 4)
    if step < warm:
        return args.learning_rate * (step + 1) / warm
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


@torch.no_grad()
def _measures(model: ImageVQModel, test: Tensor, seconds_per_step: float) -> tuple[dict[str, Any], list[Image.Image]]:
    height, width = test.shape[-2:]
    levels = model.layout.levels
    counts = [torch.zeros(level.num_codebooks, level.codebook_size, dtype=torch.int64) for level in levels]
    pictures: list[Image.Image] = []
    for part in test.split(64):
        codes = model.encode(_to_float(part).to(model.device)).codes
        for level, tally in zip(codes, counts, strict=True):
            tally += torch.stack([code_counts(level[:, q].cpu(), tally.shape[1]) for q in range(tally.shape[0])])
        decoded = model.decode(codes).reconstruction.float().cpu()
        pictures += _to_pil(((decoded.clamp(-1, 1) + 1) * 127.5 + 0.5).floor().to(torch.uint8))
    if getattr(model.config.quantizers[0], "shared", False) and len(levels) > 1:
        counts = [torch.stack([tally.sum(0) for tally in counts]).sum(0, keepdim=True)]  # one table, one histogram
    tables = torch.cat(counts)  # all of one size here
    bits = model.layout.bits([height, width])
    pairs = zip(pictures, _to_pil(test), strict=True)
    stored = model.quantizer.state_dict().items()
    return {
        "psnr_db": mean_psnr(psnr(*pair) for pair in pairs),
        "bits_per_picture": bits,
        "bits_per_pixel": bits / (height * width),
        "codebook_size": [level.codebook_size for level in levels],
        "usage": statistics.mean(usage(row) for row in tables),
        "perplexity": statistics.mean(perplexity(row) for row in tables),
        "seconds_per_step": seconds_per_step,
        "quantizer_numbers": sum(v.numel() for name, v in stored if name.rpartition(".")[2] not in _BOOKKEEPING),
    }, pictures


# -- data


def _pictures(args: LearningArguments) -> tuple[Tensor, Tensor]:
    """uint8 `(n, 3, H, W)`: the pictures of all steps in their order, and the held-out ones."""
    if args.images is None:
        count = args.steps * args.batch
        load: Callable[[str, int], Any] = lambda split, n: load_images("digits", split, num_samples=n, seed=args.seed)  # noqa: E731
        return _stack(load("train", count), count), _stack(load("test", args.eval_samples), args.eval_samples)
    train = load_images(args.images, "train", holdout=args.holdout or None)
    test = load_images(args.images, "test", holdout=args.holdout or None)
    crops = CropDataset(train, args.image_size, seed=args.seed)
    held_out = CropDataset(test, args.image_size, seed=args.seed, flip=False, shuffle=False)
    return _stack(crops, args.steps * args.batch), _stack(held_out, args.eval_samples)


def _stack(images: Any, count: int) -> Tensor:
    pixels = np.stack([np.asarray(images[index]["image"]) for index in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _to_pil(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).numpy()]


def _cut(strip: Image.Image, side: int) -> list[Image.Image]:
    return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]


# -- saying it


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["quantizer", "PSNR dB", "bits/pixel", "bits/picture", "usage %", "perplexity", "of K", "ms/step", "numbers"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = [row["name"]]
        if "error" in row:
            cells += [row["error"].replace("|", "\\|"), *[""] * (len(head) - 2)]
        else:
            cells += [
                "perfect" if row["psnr_db"] is None else f"{row['psnr_db']:.2f}",
                f"{row['bits_per_pixel']:.4f}",
                f"{row['bits_per_picture']:.1f}",
                f"{100 * row['usage']:.1f}",
                f"{row['perplexity']:.1f}",
                f"{row['codebook_size'][0]}",
                f"{1e3 * row['seconds_per_step']:.1f}",
                f"{row['quantizer_numbers']:,}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _write(args: LearningArguments, rows: list[dict[str, Any]], strips: list[Any], table: str, latents: int) -> None:
    path = Path(args.report)
    shown = [strip for strip in strips if strip]
    sheet = contact_sheet(shown, tile=64)
    write_with(path.with_suffix(".png"), lambda temporary: sheet.save(temporary, format="PNG"))
    write_json(path.with_suffix(".json"), rows)
    packages = [] if peer is None else [PEER]
    data = (
        "the embedded digits (`CaptionedDigits`, 32x32 pixels)"
        if args.images is None
        else f"crops of {args.image_size} pixels from the photographs of `{Path(args.images).name}`"
    )
    names = ", ".join(row["name"] for row in rows if "error" not in row)
    write_text(
        path,
        f"# Quantizers: what they learn\n\n"
        f"One encoder and decoder (stride {STRIDE}, latents of {MODEL['latent_size']} numbers, the same initial weights), one data "
        f"set, {data}, {args.steps} steps of {args.batch} pictures in the same order, one optimizer (AdamW, {args.learning_rate:g}, "
        f"gradients clipped at 1), fp32, seed {args.seed}; only the quantizer differs, at about {BITS} bits per latent. Every "
        f"quantizer has its defaults but for what its name says; none was tuned to these data. A step sees {latents} latents. Written "
        f"by `benchmarks/quantizers_learning.py` on {date.today().isoformat()} "
        f"({machine_line(torch.device(args.device), *packages)}; protocol {PROTOCOL}).\n\n"
        f"PSNR, usage and perplexity are of {args.eval_samples} held-out pictures; with several codebooks usage and perplexity are "
        f"means over them, with a shared one of all its codes. *ms/step* is the median of whole training steps, encoder and decoder "
        f"included, rows one after another. *numbers*: all that the quantizer stores to know what codes mean: tables and "
        f"projections.\n\n{table}\n\n"
        f"![held-out pictures]({path.with_suffix('.png').name})\n\nFrom above: held-out originals; {names}.\n\n"
        f"`{PEER}`, defaults: decay 0.8, commitment 1, rotation trick; the row below as its README advises against dead codes; "
        f"our options: decay 0.99, commitment 0.25, straight-through, k-means, dead codes below 0.05 of uniform use.\n",
    )


if __name__ == "__main__":
    run_script(main)
