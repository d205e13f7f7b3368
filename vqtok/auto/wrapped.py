"""Published codecs as tokenizers: from their own folder, from a folder that names them, or from one that holds their weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from vqtok.audio.feature_extraction_wrapped_audio import WrappedAudioFeatureExtractor
from vqtok.audio.wrapped import CODECS, WrappedAudioModel
from vqtok.files import read_json
from vqtok.fingerprint import check_fingerprint
from vqtok.hub.folders import HUB_ID, fetch_folder, is_revision, replace_files
from vqtok.hub.weights import INDEX, WEIGHTS

from .rooms import FILES, WRAPPED, load_config, load_model, load_processor, quiet

# How huggingface_hub names the folder of a commit in its cache, in which a pipeline has its tokenizer.
_SNAPSHOT = re.compile(r"/snapshots/[0-9a-f]{40}(/|$)")


def is_codec(folder: Path) -> bool:
    """Whether a folder is of a published codec as its authors made it."""
    return read_json(folder / "config.json").get("model_type") in CODECS


def open_wrapped(
    folder: Path, place: dict[str, str], downloaded: bool, dtype: Any, **hub: Any
) -> tuple[WrappedAudioModel, WrappedAudioFeatureExtractor]:
    """Model and processor of a folder, whose room is `WRAPPED`. Of a codec's own folder the fingerprint is computed.

    Args:
        folder: of a codec, or one that `save_pretrained` wrote.
        place: what to note as the source of a codec's own folder.
        downloaded: whether it came from the Hub.
        dtype: of the weights.
        hub: token, cache_dir and local_files_only, for a codec that the folder only names.

    Raises:
        OSError: the codec that it names is not where it was.
        ValueError: the codec there is another one, or cannot keep the promises.
    """
    if is_codec(folder):
        model = _from_codec(folder, place)
        _check_preprocessing(folder, model)
        config = model.config
        processor = WrappedAudioFeatureExtractor(model.layout.stride, config.sampling_rate, config.num_channels)
        config.fingerprint = model.code_fingerprint(processor.code_fields)
        return _in_dtype(model, dtype), processor
    config, processor = load_config(folder, WRAPPED), load_processor(folder, WRAPPED)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return load_model(folder, WRAPPED, config, dtype), processor  # type: ignore[return-value]
    model = _from_codec(_fetch(folder, config.source, downloaded, hub), config.source)
    found = model.code_fingerprint(processor.code_fields)
    what = f"the codec that {folder / 'config.json'} names ({place_of(config.source)}) is not the one that was saved: its codes"
    check_fingerprint(config.fingerprint, found, what)
    if config.decoder_fingerprint not in (None, model.config.decoder_fingerprint):
        raise ValueError(f"{what.removesuffix(' its codes')} its decoder has other weights. Save the tokenizer again")
    model.config.fingerprint = found
    return _in_dtype(model, dtype), processor


def place_of(source: dict[str, str]) -> str:
    """A source in words."""
    if "folder" in source:
        return f"the folder {source['folder']}"
    return f"{source['repo']} at revision {source['revision']}"


def check_unchanged(model: WrappedAudioModel, processor: Any) -> None:
    """Refuse to save by name what is no longer what lies there.

    Raises:
        ValueError: there is no such place, the model is not in float32, or its weights have changed.
    """
    config = model.config
    remedy = "save it with weights=True and the license of the weights"
    if config.source is None:
        raise ValueError(
            f"nothing is known of where this codec's weights lie, and they are saved on request only: {remedy}"
        )
    if model.dtype != torch.float32:
        raise ValueError(f"this codec was loaded in {model.dtype}: load it in float32 to save it")
    now = (model.code_fingerprint(processor.code_fields), model.compute_decoder_fingerprint())
    if now != (config.fingerprint, config.decoder_fingerprint):
        raise ValueError(f"this codec has changed since it was loaded from {place_of(config.source)}: {remedy}")


def write_wrapped(
    model: WrappedAudioModel, processor: Any, folder: Path, weights: bool | None, license: str | None
) -> None:
    """Write a codec by name, or with its weights; see `VQTokenizer.save_pretrained`."""
    config = model.config
    weights = config.license is not None if weights is None else weights
    license = license or config.license
    if weights and not license:
        raise ValueError(
            f"the weights of {_origin(config.source)} are somebody's, and go on under their license only: look it up on its page, and say "
            "license='mit', say"
        )
    if not weights:
        check_unchanged(model, processor)
        if held := [name for name in (WEIGHTS, INDEX) if (folder / name).exists()]:
            raise ValueError(
                f"{folder} holds weights ({held[0]}), and this would be saved without: name another folder"
            )
    known = {name: getattr(config, name) for name in ("fingerprint", "decoder_fingerprint", "license", "source")}
    written = False
    try:
        config.fingerprint = model.code_fingerprint(processor.code_fields)
        config.decoder_fingerprint = model.compute_decoder_fingerprint()
        config.license = license if weights else None
        if weights and "folder" in (config.source or {}):
            config.source = None  # where it lay on this machine is nobody's business, and not needed any more
        with replace_files(folder, last="config.json") as staging, quiet():
            (model if weights else config).save_pretrained(staging)
            processor.save_pretrained(staging)
        written = True
    finally:
        now = {name: getattr(config, name) for name in ("fingerprint", "decoder_fingerprint")}
        for name, value in {**known, **(now if written and not model.training else {})}.items():
            setattr(config, name, value)


def check_pushable(model: WrappedAudioModel) -> None:
    """Refuse to publish what nobody else could load.

    Raises:
        ValueError: the codec lies in a folder of this machine, and its weights are not to be saved.
    """
    source = model.config.source or {}
    if model.config.license is None and "repo" not in source:
        raise ValueError(
            f"this tokenizer wraps {_origin(source)}, which nobody else has: load the codec from the Hub, or save it with weights=True and "
            "their license, and push what was saved"
        )


def card_facts(model: WrappedAudioModel) -> dict[str, Any]:
    """What `vqtok.hub.card.render` wants to know besides."""
    config = model.config
    facts: dict[str, Any] = {
        "wraps": config.wrapped.name,
        "license": config.license,
        "holds_weights": config.license is not None,
    }
    if "repo" in (source := config.source or {}):
        facts["base_model"] = {"repo": source["repo"], "revision": source["revision"]}
    return facts


def describe(model: WrappedAudioModel) -> str:
    """What is wrapped, in a line."""
    config = model.config
    license = f", its weights under {config.license}" if config.license else ""
    return f"wraps {config.wrapped.name}, {_origin(config.source)}{license}"


def _origin(source: dict[str, str] | None) -> str:
    return place_of(source) if source else "from a place that is not known"


def _from_codec(folder: Path, source: dict[str, str]) -> WrappedAudioModel:
    with quiet():
        return WrappedAudioModel.from_codec(folder, source)


def _in_dtype(model: WrappedAudioModel, dtype: Any) -> WrappedAudioModel:
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return model if dtype == torch.float32 else model.to(dtype)


def _fetch(folder: Path, source: dict[str, str] | None, downloaded: bool, hub: dict[str, Any]) -> Path:
    path = folder / "config.json"
    if source is None:
        raise FileNotFoundError(
            f"{folder} holds no weights, and its config.json does not say where they lie: save it again"
        )
    if "folder" in source:
        if downloaded or _SNAPSHOT.search(folder.resolve().as_posix()):
            raise ValueError(
                f"{path} names a folder of another machine ({source['folder']}): ask its author for the weights"
            )
        if not os.path.isdir(source["folder"]):
            raise FileNotFoundError(
                f"{path} names the codec in the folder {source['folder']}, which is gone: put it back, or load the codec from where "
                "it is now and save the tokenizer again"
            )
        return Path(source["folder"])
    if not HUB_ID.fullmatch(source["repo"]) or not is_revision(source["revision"]):
        raise ValueError(f"{path}: source {source} is no repository and revision of the Hub: save the tokenizer again")
    if os.path.exists(source["repo"]):
        raise ValueError(f"{source['repo']} is a repository on the Hub, and a folder of that name is in the way here")
    try:
        found, _ = fetch_folder(
            source["repo"], FILES, revision=source["revision"], subfolder=source.get("subfolder", ""), **hub
        )
    except OSError as error:
        raise OSError(f"{path} names the codec {place_of(source)}, which cannot be fetched: {error}") from error
    return found


def _check_preprocessing(folder: Path, model: WrappedAudioModel) -> None:
    """Refuse a codec whose own feature extractor does more than is known here."""
    path, config = folder / "preprocessor_config.json", model.config
    if not path.is_file():
        return
    fields = read_json(path)
    wanted = {
        "sampling_rate": config.sampling_rate,
        "feature_size": config.num_channels,
        "hop_length": model.layout.stride,
    }
    wanted |= {"chunk_length_s": None, "overlap": None, "padding_value": 0}
    for name, value in wanted.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"{path}: {name} is {fields[name]!r} and not {value!r}, as config.json has it: mend the files"
            )
