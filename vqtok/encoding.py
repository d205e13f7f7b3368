"""The data set that a tokenizer takes, and from there to a code cache: every sample encoded, the codes beside their captions."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqtok.audio.data import load_audio
from vqtok.auto import VQTokenizer
from vqtok.auto.rooms import MEDIA
from vqtok.codes import Codes
from vqtok.image.data import load_images
from vqtok.prior.data import write_code_cache
from vqtok.text.data import load_text

# Which options are of one medium alone.
_OWN = {"image": {"image_column"}, "audio": {"audio_column", "resample"}, "text": {"text_column"}}


def load_media(tokenizer: VQTokenizer, source: Any = None, split: str = "train", **options: Any) -> Any:
    """The data set of `load_images`, `load_audio` or `load_text`, whichever the tokenizer takes, at its rate and with its channels.

    Args:
        source: see there; None takes the embedded data, "digits", "spoken-numbers" or "python-prose".
        options: those of `load_images`, `load_audio` or `load_text`. None and False are as if left out.

    Raises:
        ValueError: an option or the embedded data of another medium; and what these three raise.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    modality, processor = tokenizer.modality, tokenizer.processor
    for other, names in _OWN.items():
        if other != modality and (unused := sorted(names & given.keys())):
            raise ValueError(f"{unused[0]} does not go with a tokenizer of {modality}: leave it out")
    own, source = MEDIA[modality], source or MEDIA[modality].embedded
    for medium in MEDIA.values():
        if medium is not own and source == medium.embedded and not Path(source).exists():
            raise ValueError(f"{source} has {medium.many}, this tokenizer takes {own.many}: give {own.embedded}, say")
    if modality == "image":
        return load_images(source, split, **given)
    if modality == "text":
        if "caption_column" in given:
            raise ValueError(
                "caption_column does not go with a tokenizer of text, whose texts have no captions: leave it out"
            )
        return load_text(source, split, **given)
    return load_audio(source, processor.sampling_rate, processor.num_channels, split, **given)


def encode_dataset(
    tokenizer: VQTokenizer, dataset: Any, folder: str | Path, batch_size: int = 256, facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the codes of a map-style data set of {"image" or "audio" or, of text, nothing: ..., "text", "label"}; return the manifest.

    Args:
        tokenizer: a saved one, because codes without a fingerprint cannot be told apart later.
        dataset: as `load_media` returns it; `text` and `label` are kept where they are.
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
    """What the tokenizer takes of an item: its picture, its sound with its rate, or its text."""
    if "audio" in item:
        return {name: item[name] for name in ("audio", "sampling_rate")}
    return item["image"] if "image" in item else item["text"]


def _with_name(tokenizer: VQTokenizer, dataset: Any, start: int, items: list[dict[str, Any]], error: ValueError) -> str:
    """The error of the first sample of a batch that cannot be prepared, with the name the data set has for it."""
    for index, item in enumerate(items, start):
        try:
            tokenizer.processor.prepare(_medium(item))
        except ValueError as own:
            return f"{dataset.name(index) if hasattr(dataset, 'name') else f'sample {index}'}: {own}"
    return str(error)
