"""A data set to a code cache: encode every sample and keep the codes beside their captions."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqtok.auto import VQTokenizer
from vqtok.codes import Codes
from vqtok.prior.data import write_code_cache


def encode_dataset(
    tokenizer: VQTokenizer, dataset: Any, folder: str | Path, batch_size: int = 256, facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the codes of a map-style data set of {"image": ..., "text": ..., "label": ...} to `folder`; return the manifest.

    Args:
        tokenizer: a saved one, because codes without a fingerprint cannot be told apart later.
        dataset: as `vqtok.image.data.load_images` returns it, or of {"audio": ..., "sampling_rate": ...}; `text` and `label` are
            kept where they are.
        folder: see `vqtok.prior.data.write_code_cache`.
        facts: more for the manifest.

    Raises:
        ValueError, FileExistsError, OSError: see `vqtok.prior.data.write_code_cache`.
    """
    if tokenizer.fingerprint is None:
        raise ValueError("this tokenizer was never saved, so its codes have no fingerprint: save_pretrained it first")
    known = {
        "dtype": str(tokenizer.model.dtype).removeprefix("torch."),
        "device": tokenizer.model.device.type,
        "date": date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "vqtok")},
        "label_names": getattr(dataset, "label_names", None),
        "skipped": [list(map(str, entry)) for entry in getattr(dataset, "skipped", [])],
    }
    manifest = write_code_cache(folder, _batches(tokenizer, dataset, batch_size), {**known, **(facts or {})})
    print(f"wrote {manifest['num_samples']} samples of codes to {folder}", file=sys.stderr)
    return manifest


def _batches(tokenizer: VQTokenizer, dataset: Any, batch_size: int) -> Iterator[tuple[Codes, list[dict[str, Any]]]]:
    for start in tqdm(range(0, len(dataset), batch_size), desc="encoding", unit="batch", disable=None):
        items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        extras = [{name: item[name] for name in ("text", "label") if name in item} for item in items]
        try:
            codes = tokenizer.encode([_medium(item) for item in items], batch_size=batch_size)
        except ValueError as error:
            raise ValueError(_with_name(tokenizer, dataset, start, items, error)) from error
        yield codes, extras


def _medium(item: dict[str, Any]) -> Any:
    """What the tokenizer takes of an item: its picture, or its sound with its rate."""
    return item["image"] if "image" in item else {name: item[name] for name in ("audio", "sampling_rate")}


def _with_name(tokenizer: VQTokenizer, dataset: Any, start: int, items: list[dict[str, Any]], error: ValueError) -> str:
    """The error of the first sample of a batch that cannot be prepared, with the name the data set has for it."""
    for index, item in enumerate(items, start):
        try:
            tokenizer.processor.prepare(_medium(item))
        except ValueError as own:
            return f"{dataset.name(index) if hasattr(dataset, 'name') else f'sample {index}'}: {own}"
    return str(error)
