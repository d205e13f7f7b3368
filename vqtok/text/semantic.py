"""One short code per sentence: residual codebooks on vectors, for retrieval and clustering.

Sources: the semantic ids of TIGER (Rajput et al. 2023) and the coarse-to-fine levels of HRQ-VAE (Hosking et al. 2022). The vectors
come from any frozen sentence encoder, or from the encoder of a `TextVQModel` (`pooled_vectors`).
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqtok.files import read_json, write_json, write_with
from vqtok.quantizers import ResidualQuantizer, code_counts, entropy_bits, perplexity, usage

from .modeling_text_vq import TextVQModel

MIN_UNIQUE, MIN_ENTROPY = 0.5, 0.5  # below these shares of what is possible, codes have collapsed


class SentenceCodes(nn.Module):
    """Vectors `(N, dim)` to codes `(N, levels)`, coarse to fine, and back.

    Vectors are centred and divided by their common spread, then each level codes by k-means what the levels before left over.

    Args:
        dim: width of the vectors.
        num_levels: codes per sentence.
        codebook_size: K of each level.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
        >>> codes = SentenceCodes(8, num_levels=3, codebook_size=8).fit(vectors).encode(vectors)
        >>> codes.shape, sentence_code_report(codes, 8)["collapsed"]
        ((200, 3), [])
    """

    def __init__(self, dim: int, num_levels: int = 3, codebook_size: int = 256):
        super().__init__()
        layer = {"type": "vector", "codebook_size": codebook_size}
        self.quantizer = ResidualQuantizer(dim, num_codebooks=num_levels, layer=layer).eval()
        self.dim, self.num_levels, self.codebook_size = dim, num_levels, codebook_size
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(()))

    @torch.no_grad()
    def fit(self, vectors: np.ndarray | Tensor) -> SentenceCodes:
        """Set the codebooks from vectors `(N, dim)`; returns itself. Warns when their codes collapse.

        Raises:
            ValueError: vectors of another width, NaN or infinite ones, fewer than a codebook has entries, or all alike.
        """
        x = self._checked(vectors)
        if len(x) < self.codebook_size:
            raise ValueError(
                f"{len(x)} vectors are too few for {self.codebook_size} codes: give more, or a smaller codebook_size"
            )
        self.mean = x.mean(0)
        self.spread = (x - self.mean).square().mean().sqrt()
        if not float(self.spread) > 1e-12:
            raise ValueError("the vectors are all alike: the sentence encoder tells nothing apart")
        self.quantizer.initialise((x - self.mean) / self.spread)
        collapsed = sentence_code_report(self.encode(x), self.codebook_size)["collapsed"]
        if collapsed:
            warnings.warn("these sentence codes collapse: " + "; ".join(collapsed), stacklevel=3)
        return self

    @torch.no_grad()
    def encode(self, vectors: np.ndarray | Tensor) -> np.ndarray:
        """Codes int64 `(N, levels)` of vectors `(N, dim)`."""
        z = (self._checked(vectors) - self.mean) / self.spread
        return self.quantizer.encode(z).codes.cpu().numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray | Tensor) -> np.ndarray:
        """The vectors float32 `(N, dim)` that codes `(N, 1 to levels)` stand for."""
        quantized = self.quantizer.embed_codes(torch.as_tensor(codes, dtype=torch.int64))
        return (quantized * self.spread + self.mean).numpy()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `sentence_codes.json` and `sentence_codes.safetensors` to a folder."""
        settings = {"dim": self.dim, "num_levels": self.num_levels, "codebook_size": self.codebook_size}
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        path = Path(folder, "sentence_codes.safetensors")
        write_with(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
        write_json(Path(folder, "sentence_codes.json"), settings)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> SentenceCodes:
        """What `save_pretrained` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files do not fit each other.
        """
        settings, path = read_json(Path(folder, "sentence_codes.json")), Path(folder, "sentence_codes.safetensors")
        try:
            with torch.device("meta"):  # a small file cannot ask for large tables
                wanted = {name: list(value.shape) for name, value in cls(**settings).state_dict().items()}
            with safe_open(path, framework="pt") as file:
                held = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            wrong = [name for name in sorted({*held, *wanted}) if held.get(name) != wanted.get(name)]
            if wrong:
                raise TypeError(f"{wrong[0]} of shape {held.get(wrong[0])} instead of {wanted.get(wrong[0])}")
            made = cls(**settings)
            made.load_state_dict(load_file(path))
        except (TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the sentence codes in {folder} do not fit together ({error}): save them again") from None
        return made

    def _checked(self, vectors: np.ndarray | Tensor) -> Tensor:
        x = torch.as_tensor(vectors)
        if x.ndim != 2 or x.shape[1] != self.dim or not x.is_floating_point() or not len(x):
            raise ValueError(f"vectors must be floats (N, {self.dim}), got {x.dtype} of shape {tuple(x.shape)}")
        if not bool(x.isfinite().all()):
            raise ValueError("the vectors hold NaN or infinite values: look at the sentences that gave them")
        return x.float()


def sentence_code_report(codes: np.ndarray, codebook_size: int) -> dict[str, Any]:
    """How well sentence codes tell sentences apart.

    Args:
        codes: int64 `(N, levels)`.
        codebook_size: K of each level.

    Returns:
        `unique_ratio`: different codes per sentence; `usage`, `perplexity`, `entropy_bits`: per level; `largest_group`: sentences
        that share the commonest code; `collapsed`: a sentence for each thing that has gone wrong, [] if none has.
    """
    number, levels = codes.shape
    counts = [code_counts(torch.from_numpy(np.ascontiguousarray(codes[:, i])), codebook_size) for i in range(levels)]
    _, groups = np.unique(codes, axis=0, return_counts=True)
    entropies = [max(0.0, float(entropy_bits(each))) for each in counts]
    unique, most = len(groups) / number, float(np.log2(min(codebook_size, number)))
    possible = min(1.0, float(codebook_size) ** levels / number)
    collapsed = [
        f"level {i} has {value:.2f} bits of {most:.2f}"
        for i, value in enumerate(entropies)
        if value < MIN_ENTROPY * most
    ]
    if unique < MIN_UNIQUE * possible:
        collapsed.append(
            f"only {unique:.1%} of the sentences have a code of their own, the commonest is shared by {groups.max()}"
        )
    return {
        "num_sentences": number,
        "unique_ratio": unique,
        "largest_group": int(groups.max()),
        "usage": [float(usage(each)) for each in counts],
        "perplexity": [float(perplexity(each)) for each in counts],
        "entropy_bits": entropies,
        "collapsed": collapsed,
    }


def prefix_neighbours(codes: np.ndarray, query: Sequence[int], at_least: int = 1) -> list[int]:
    """The sentences whose codes share the longest prefix with `query`, at least so many levels of it; [] if there are none.

    Example:
        >>> prefix_neighbours(np.array([[1, 2, 3], [1, 2, 4], [1, 0, 0], [0, 2, 3]]), [1, 2, 9])
        [0, 1]
    """
    found: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(codes.tolist()):
        shared = next((i for i, (a, b) in enumerate(zip(row, query, strict=True)) if a != b), len(row))
        found[shared].append(index)
    best = max(found, default=0)
    return found[best] if best >= at_least else []


@torch.no_grad()
def pooled_vectors(model: TextVQModel, processor: Any, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
    """A vector of each text: the mean over its steps of what the encoder knows at the coarsest level, float32 `(N, C)`.

    Nothing of the model learned meaning: these vectors tell spelling and subject words apart, not what a sentence says. Vectors of a
    sentence encoder do that better.
    """
    found = []
    for start in range(0, len(texts), batch_size):
        batch = processor(list(texts[start : start + batch_size]))
        sizes = batch["sizes"]
        features = model.extract(model.check_media(batch["input_ids"]).to(model.device), sizes).levels[0]
        steps = (-(-sizes // model.layout.stride)).to(features.device)
        inside = (torch.arange(features.shape[2], device=features.device) < steps)[:, None]
        found.append(((features * inside).sum(2) / steps).float().cpu().numpy())
    return np.concatenate(found)
