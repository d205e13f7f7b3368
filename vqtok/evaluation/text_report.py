"""What a tokenizer keeps of texts, how well it uses its codes and how fast it is: one dict that JSON can hold.

vqtok-text-eval v1: each text alone, its units (bytes, or tokens) compared place by place with those of the reconstruction; the bytes
of a token are right where the token is. A text is cut into chunks of 64 bytes, the last one shorter; a unit belongs to the chunk that
it begins in, and a chunk is exact if all its units are right.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vqtok import __version__
from vqtok.auto import VQTokenizer, bits_per_unit
from vqtok.container import unframe
from vqtok.modeling import evaluating
from vqtok.quantizers import code_counts, entropy_bits, perplexity, usage

from .report import machine

PROTOCOL = "vqtok-text-eval v1"
CHUNK_BYTES = 64
_TEXTS_AT_ONCE = 64
DESCRIPTION = {
    "unit_accuracy": "share of units that come back right, over all texts; a unit is a byte, or a token",
    "byte_accuracy": "share of bytes whose unit comes back right",
    "exact_chunks": f"share of chunks of {CHUNK_BYTES} bytes without an error",
    "bits_per_byte": "codes times log2 K over the bytes of UTF-8, padding included; of files: bytes of the container's payload, and "
    "of the whole file, of each text alone",
    "code_entropy": "of each codebook's codes alone, in bits per code",
}


def evaluate(
    tokenizer: VQTokenizer, texts: Any, *, batch_size: int | None = None, name: str | None = None
) -> dict[str, Any]:
    """The measures of one tokenizer on one set of texts, after "vqtok-text-eval v1".

    Args:
        tokenizer: of text.
        texts: a map-style data set of `{"text": str}`, as `load_text` gives it.
        batch_size: see `VQTokenizer.encode`.
        name: what to call the tokenizer in tables; None takes the folder it came from.

    Returns:
        A dict that JSON can hold, among others:
        `unit_accuracy`, `byte_accuracy`, `exact_chunks`: see `DESCRIPTION`;
        `bits_per_byte`: `nominal`, `payload` and `file`, the bytes that are written;
        `usage`, `perplexity`, `entropy_bits`: per level a list with one number per codebook, over the whole set;
        `speed`: bytes per second of encoding and of decoding.

    Raises:
        ValueError: there are no texts.
    """
    if not len(texts):
        raise ValueError("there are no texts to evaluate on: give at least one")
    tally = _Tally(tokenizer)
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    for start in tqdm(starts, "evaluating", delay=2, leave=False, disable=None):
        items = [texts[i]["text"] for i in range(start, min(start + _TEXTS_AT_ONCE, len(texts)))]
        if not start:
            tokenizer.decode(tokenizer.encode(items[:1]))  # the first call of everything is slow
        tally.add(items, batch_size)
    model = tokenizer.model
    return {
        "name": name or Path(model.config.name_or_path).name or type(model).__name__,
        "protocol": PROTOCOL,
        **tally.results(),
        "tokenizer": {
            "class": type(model).__name__,
            "fingerprint": tokenizer.fingerprint,
            "layout": tokenizer.layout.to_dict(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "unit": tokenizer.processor.unit,
            "nominal_bits_per_unit": bits_per_unit(tokenizer.layout),
        },
        "data": {**tally.data(), "num_skipped": len(getattr(texts, "skipped", ()))},
        "machine": machine(next(model.parameters(), torch.empty(0)).device),
        "versions": {"vqtok": __version__, **{package: version(package) for package in ("torch", "transformers")}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol_description": DESCRIPTION,
    }


def compare(tokenizers: Mapping[str, VQTokenizer], texts: Any, **options: Any) -> list[dict[str, Any]]:
    """The results of `evaluate` for each tokenizer, by name, on the same texts; `options` go to `evaluate`."""
    return [evaluate(tokenizer, texts, name=name, **options) for name, tokenizer in tokenizers.items()]


def to_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table with one row per result of `evaluate`, best read beside others of the same data."""
    header = ["tokenizer", "bits per byte", "of files", "bytes right %", "exact chunks %", "usage %", "perplexity"]
    header += ["kB/s enc.", "dec.", "M par."]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for result in results:
        rows.append(
            [
                result["name"].replace("|", "\\|"),
                f"{result['bits_per_byte']['nominal']:.2f}",
                f"{result['bits_per_byte']['file']:.2f}",
                f"{100 * result['byte_accuracy']:.2f}",
                f"{100 * result['exact_chunks']:.1f}",
                " / ".join(" ".join(f"{100 * share:.0f}" for share in level) for level in result["usage"]),
                " / ".join(" ".join(f"{value:.0f}" for value in level) for level in result["perplexity"]),
                f"{result['speed']['encode_bytes_per_second'] / 1000:.0f}",
                f"{result['speed']['decode_bytes_per_second'] / 1000:.0f}",
                f"{result['tokenizer']['parameters'] / 1e6:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def count_right(original: Tensor, reconstruction: Tensor, unit_bytes: Tensor) -> tuple[int, int, int, int]:
    """How many of the ids `(T,)` agree, how many bytes these have, how many chunks are exact, and how many there are.

    Example:
        >>> one = torch.zeros(70, dtype=torch.long)
        >>> other = one.clone()
        >>> other[3] = 1
        >>> count_right(one, other, torch.ones_like(one)), count_right(one[:4], other[:4], torch.tensor([60, 3, 2, 1]))
        ((69, 69, 1, 2), (3, 65, 1, 2))
    """
    same = original == reconstruction
    begins = unit_bytes.cumsum(0) - unit_bytes
    _, chunk_of = (begins // CHUNK_BYTES).unique_consecutive(return_inverse=True)
    wrong = torch.bincount(chunk_of, weights=(~same).double())
    return int(same.sum()), int(unit_bytes[same].sum()), int((wrong == 0).sum()), len(wrong)


class _Tally:
    """Sums over the whole set."""

    def __init__(self, tokenizer: VQTokenizer):
        self.tokenizer = tokenizer
        levels = tokenizer.layout.levels
        self.counts = [torch.zeros(level.num_codebooks, level.codebook_size, dtype=torch.int64) for level in levels]
        self.num_texts = self.num_bytes = self.num_units = 0
        self.right = self.right_bytes = self.exact = self.chunks = 0
        self.bits = {"nominal": 0.0, "payload": 0.0, "file": 0.0}
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self.digest = hashlib.sha256()

    def add(self, texts: list[str], batch_size: int | None) -> None:
        """Encode, decode and compare some texts."""
        start = time.perf_counter()
        codes = self.tokenizer.encode(texts, batch_size=batch_size)
        middle = time.perf_counter()
        self.tokenizer.decode(codes, batch_size)
        self.seconds["decode"] += time.perf_counter() - middle
        self.seconds["encode"] += middle - start
        model, processor = self.tokenizer.model, self.tokenizer.processor
        for text, one in zip(texts, codes, strict=True):
            ids, (size,) = processor.prepare(text)
            with evaluating(model), torch.no_grad():
                back = model.decode_long([level.to(model.device) for level in one.levels])[0, :size].cpu()
            right, right_bytes, exact, chunks = count_right(ids[:size].long(), back, processor.unit_bytes(text))
            self.right, self.right_bytes = self.right + right, self.right_bytes + right_bytes
            self.exact, self.chunks = self.exact + exact, self.chunks + chunks
            for counts, level in zip(self.counts, one.levels, strict=True):
                counts += torch.stack([code_counts(row, counts.shape[1]) for row in level[0]])
            data, written = one.to_bytes(), text.encode()
            self.bits["nominal"] += self.tokenizer.layout.bits((size,))
            self.bits["payload"] += 8 * len(unframe(data)[1])
            self.bits["file"] += 8 * len(data)
            self.num_units += size
            self.num_bytes += len(written)
            self.digest.update(len(written).to_bytes(8, "little") + written)
        self.num_texts += len(texts)

    def results(self) -> dict[str, Any]:
        return {
            "unit_accuracy": self.right / self.num_units,
            "byte_accuracy": self.right_bytes / self.num_bytes,
            "exact_chunks": self.exact / self.chunks,
            "bits_per_byte": {key: bits / self.num_bytes for key, bits in self.bits.items()},
            "usage": self._per_codebook(usage),
            "perplexity": self._per_codebook(perplexity),
            "entropy_bits": self._per_codebook(entropy_bits),
            "speed": {
                f"{what}_bytes_per_second": self.num_bytes / max(seconds, 1e-9)
                for what, seconds in self.seconds.items()
            },
        }

    def data(self) -> dict[str, Any]:
        return {
            "num_texts": self.num_texts,
            "bytes": self.num_bytes,
            "units": self.num_units,
            "sha256": self.digest.hexdigest(),
        }

    def _per_codebook(self, measure: Any) -> list[list[float]]:
        return [[float(measure(row)) for row in counts] for counts in self.counts]
