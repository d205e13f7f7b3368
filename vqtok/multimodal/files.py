"""The folder of a processor: the text tokenizer's files, `multimodal.json`, and the VQ tokenizers or where they are."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vqtok.auto import VQTokenizer
from vqtok.auto.rooms import FILES as TOKENIZER_FOLDER
from vqtok.auto.rooms import quiet
from vqtok.files import read_json, write_json
from vqtok.fingerprint import check_fingerprint
from vqtok.hub.folders import HUB_ID, fetch_folder, is_revision, replace_files
from vqtok.prior.text import TOKENIZER_FILES, load_text_tokenizer

from .vocabulary import MultimodalVocabulary

FORMAT = 1
MULTIMODAL_FILE = "multimodal.json"
FILES = (MULTIMODAL_FILE, *TOKENIZER_FILES, *(f"vq_*/{name}" for name in TOKENIZER_FOLDER))


def save_parts(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vqs: Mapping[str, VQTokenizer],
    vocabulary: MultimodalVocabulary,
    copy: bool,
) -> MultimodalVocabulary:
    """Write a processor; returns the vocabulary with the fingerprints of what was written."""
    sources = {name: vq.source for name, vq in vqs.items()}
    if not copy and (here := [name for name, source in sources.items() if source is None]):
        raise ValueError(
            f"the VQ tokenizer for {here[0]!r} was not loaded from the Hub, so nobody would find it: save with copy=True, or push it and "
            "load it from there"
        )
    with replace_files(folder, last=MULTIMODAL_FILE) as staging, quiet():
        tokenizer.save_pretrained(staging)
        places: dict[str, Any] = {}
        for name, vq in vqs.items():
            source = sources[name]
            if copy:
                # Through another facade, so that the one in use does not remember the staging folder as its home.
                VQTokenizer(vq.model, vq.processor).save_pretrained(staging / f"vq_{name}")
                places[name] = f"vq_{name}"
            elif source is not None:
                places[name] = {"repo": source["repo"], "revision": source["revision"]}
        modalities = tuple(
            dataclasses.replace(modality, fingerprint=vqs[modality.name].fingerprint)
            for modality in vocabulary.modalities
        )
        vocabulary = dataclasses.replace(vocabulary, modalities=modalities)
        write_json(
            staging / MULTIMODAL_FILE,
            {"format": FORMAT, "vocabulary": vocabulary.to_dict(), "vq_tokenizers": places},
        )
    return vocabulary


def load_parts(
    id_or_folder: str | os.PathLike, revision: str | None, subfolder: str, hub: Mapping[str, Any]
) -> tuple[PreTrainedTokenizerBase, dict[str, VQTokenizer], MultimodalVocabulary]:
    """What `save_parts` wrote, with the fingerprints compared."""
    folder, _ = fetch_folder(id_or_folder, FILES, revision=revision, subfolder=subfolder, **hub)
    path = folder / MULTIMODAL_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MULTIMODAL_FILE}: name a folder that MultimodalProcessor.save_pretrained wrote"
        )
    facts = read_json(path)
    try:
        version, places = facts["format"], facts["vq_tokenizers"]
        vocabulary = MultimodalVocabulary.from_dict(facts["vocabulary"])
        if type(version) is not int or not isinstance(places, dict) or set(places) != set(vocabulary.blocks):
            raise ValueError("a field has the wrong form")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} makes no sense ({type(error).__name__}: {error}): save the processor again") from None
    if version > FORMAT:
        raise ValueError(f"{path} has format {version}, this vqtok knows {FORMAT}: upgrade vqtok")
    vqs = {}
    for modality in vocabulary.modalities:
        vqs[modality.name] = _vq_tokenizer(folder, modality.name, places[modality.name], hub)
        found = vqs[modality.name].fingerprint
        check_fingerprint(modality.fingerprint, found, f"the codes of the VQ tokenizer for {modality.name!r}")
    return load_text_tokenizer(folder), vqs, vocabulary


def _vq_tokenizer(folder: Path, name: str, place: Any, hub: Mapping[str, Any]) -> VQTokenizer:
    """The VQ tokenizer of a modality: a folder beside, or a repository at a commit."""
    if place == f"vq_{name}":
        if not (folder / place).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {place!r} with the VQ tokenizer: save the processor again")
        return VQTokenizer.from_pretrained(folder / place, **hub)
    strings = (
        isinstance(place, dict)
        and set(place) == {"repo", "revision"}
        and all(isinstance(v, str) for v in place.values())
    )
    if not strings or not HUB_ID.fullmatch(place["repo"]) or not is_revision(place["revision"]):
        raise ValueError(
            f"{folder / MULTIMODAL_FILE}: the VQ tokenizer for {name!r} must be the folder 'vq_{name}' or a repository with its revision, "
            f"got {place!r}"
        )
    if Path(place["repo"]).exists():
        raise ValueError(f"{place['repo']} is a repository on the Hub, and a folder of that name is in the way here")
    return VQTokenizer.from_pretrained(place["repo"], revision=place["revision"], **hub)
