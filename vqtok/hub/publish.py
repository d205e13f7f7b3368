"""One folder to one commit on the Hub."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile

from vqtok.files import read_json, write_json

from .card import render
from .checks import PICTURES, SOUNDS, publishable_files, without_paths
from .merge import merge_cards, read_card
from .upload import add_card, check_options, read_local_card, secrets, target

# What training leaves beside what `save_pretrained` writes, and what belongs to a publication. Never checkpoints.
EXTRAS = (
    *("README.md", "LICENSE*", "NOTICE*", "metrics.json", "training.json", "training/*.json", "training/*.safetensors"),
    *(f"samples/*{suffix}" for suffix in (*PICTURES, *SOUNDS)),
)
_PROGRESS = "samples/step-*"  # sheets drawn while training
_MOST_SHOWN = 4
_PIPELINE = "pipeline.json"
# Names that transformers gives; other weights in a repository are somebody's own.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def copy_extras(home: Path, folder: Path) -> None:
    """Copy what stands beside the saved files in `home` and belongs to a publication (`EXTRAS`) to `folder`.

    Raises:
        ValueError: one is a link, or lies in a linked folder: what it points to may be anything.
    """
    for pattern in EXTRAS:
        for path in sorted(home.glob(pattern)):
            name = path.relative_to(home).as_posix()
            if any(each.is_symlink() for each in (path, *path.parents[: name.count("/")])):
                raise ValueError(f"{name} is a link, and only files are published: replace it by what it points to")
            if path.is_file() and not fnmatch.fnmatch(name, _PROGRESS) and not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)


def publish(
    folder: Path,
    repo_id: str,
    facts: Mapping[str, Any],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with vqtok",
    create_pr: bool = False,
    license: str | None = None,
) -> str:
    """Upload a folder in one commit, with our card, and return the address of the commit or of the pull request.

    What is published is checked before the first request (see `vqtok.hub.checks`). In the same commit goes what would be false
    beside the new files: old shards in the folders that are written, and, if the weights are others, the figures and samples
    that an earlier push brought. If nothing has changed there is no commit.

    Args:
        folder: everything in it is published; `training.json` and `metrics.json` lose the folders that their paths lie in.
        repo_id: "owner/name", or "name" of one's own. Made if it is not there.
        facts: see `vqtok.hub.card.render`.
        private: make it a private repository; one that exists and is public is refused.
        token: None takes the one of `hf auth login`.
        revision: a branch, made if it is not there; None is the main one.
        commit_message: of the commit.
        create_pr: open a pull request instead of writing to the branch; the repository must exist.
        license: for the card, such as "apache-2.0"; None keeps the one that the card has.

    Raises:
        ValueError: something that may not be published, a public repository where a private one was asked for, or one that holds
            a pipeline and would lose it.
        OSError: the Hub refuses or cannot be reached; the sentence says why and what to do.
    """
    words = secrets(token)
    metrics, training = (_read_json(folder / f"{name}.json") for name in ("metrics", "training"))
    local = read_local_card(folder)
    # Before anything is sent; the card is checked when it is written.
    names = [name for name in publishable_files(folder, words) if name != "README.md"]
    with target(repo_id, private=private, token=token, revision=revision, create_pr=create_pr) as repo:
        if _PIPELINE in repo.files and _PIPELINE not in names:
            raise ValueError(
                f"{repo.name} holds a pipeline, which this would overwrite: choose another name, or push the pipeline as a whole"
            )
        data = _dataset(repo.api, training)
        known_facts = {**facts, "license": license or facts.get("license"), "datasets": [data] if data else None}
        known_facts["prompt"] = metrics.get("prompt") or facts.get("prompt")
        samples = [each for each in names if each.startswith("samples/")][:_MOST_SHOWN]
        card = merge_cards(render(repo.name, known_facts, metrics, training, samples), local, repo.card)
        additions = [CommitOperationAdd(each, folder / each) for each in names]
        add_card(additions, card, words)
        stale = _stale(repo.files, {each.path_in_repo: each for each in additions}, repo.card)
        return repo.commit(additions, stale, commit_message)


def _stale(files: Mapping[str, RepoFile], additions: Mapping[str, CommitOperationAdd], remote: str | None) -> list[str]:
    """What of the repository's files would be false beside the new ones."""
    gone = sorted(set(files) - set(additions))
    weights = [PurePosixPath(name) for name in additions if _WEIGHTS.fullmatch(PurePosixPath(name).name)]
    written = {path.parent for path in weights}
    stale = [
        name for name in gone if _WEIGHTS.fullmatch(PurePosixPath(name).name) and PurePosixPath(name).parent in written
    ]
    if not stale and all(_holds(files.get(str(path)), additions[str(path)]) for path in weights):
        return []  # the same weights: what was measured of them is still true
    ours = (read_card(remote, "README.md on the Hub").ours or "") if remote else ""
    generated = ("metrics.json", "training.json", "training/*.json", "training/*.safetensors")
    generated += ("samples/samples.*", "samples/reconstructions.*")
    for name in gone:
        shown = name.startswith("samples/") and (f"({name})" in ours or f'"{name}"' in ours)
        if shown or any(fnmatch.fnmatch(name, pattern) for pattern in generated):
            stale.append(name)
    return stale


def _holds(there: RepoFile | None, new: CommitOperationAdd) -> bool:
    return there is not None and there.lfs is not None and there.lfs.sha256 == new.upload_info.sha256.hex()


def _read_json(path: Path) -> dict[str, Any]:
    """The file's mapping, without absolute paths; it is written again if it had some."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({error}): remove it, or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object: remove it, or write it again")
    clean = without_paths(value)
    if clean != value:
        write_json(path, clean)
    return clean


def _dataset(api: HfApi, training: Mapping[str, Any]) -> str | None:
    """The data set of the training if it is one on the Hub: a folder may be called like one."""
    name = training.get("arguments", {}).get("dataset")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return None
    return name if api.repo_exists(name, repo_type="dataset") else None


class PublishedFacade:
    """Parts that one folder holds: `_write` writes it, `home` has it as it is now, if any does, and `card_facts` tells of it."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload in one commit, with a card, and return the commit's address. The repository is made if it is not there.

        What training left beside the saved files, if nothing changed since they were loaded or saved, goes with it: figures, arguments,
        samples, and what a person wrote in the card. Of a card on the Hub everything that is not ours stays.

        Args:
            repo_id: "owner/name", or "name" of one's own.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr`, `license` of `vqtok.hub.publish.publish`.

        Raises:
            OSError: the Hub refuses or cannot be reached.
            ValueError: something may not be published; it is named.
        """
        check_options(options)
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            if (home := self.home) is not None:
                copy_extras(home, Path(folder))
            return publish(Path(folder), repo_id, self.card_facts(), **options)


class PublishedModel:
    """A model of transformers whose `push_to_hub` writes our card, and one commit."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As transformers does; its own upload, without our checks and card, is refused.

        Raises:
            ValueError: `push_to_hub` is asked for.
        """
        if push_to_hub or any(args[2:3]):
            raise ValueError("save_pretrained does not push: call push_to_hub, which checks what is sent")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # transformers' own writes a card of its own over ours
        """Upload `config.json` and weights in one commit, with a card, and return the commit's address.

        The facade's `push_to_hub` also uploads what prepares the media, and figures and pictures. A VQ model alone does not know its
        preprocessing, so that its code space is not known either: it is pushed without a fingerprint.

        Args:
            repo_id: "owner/name", or "name" of one's own.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr`, `license` of `vqtok.hub.publish.publish`.

        Raises:
            OSError: the Hub refuses or cannot be reached.
            ValueError: something may not be published; it is named.
        """
        model: Any = self
        facts = {"kind": "model", "modality": model.config.model_type.rpartition("_")[2], "class": type(model).__name__}
        facts |= {"parameters": sum(p.numel() for p in model.parameters())}
        check_options(options)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            if hasattr(model, "code_fingerprint"):
                config = read_json(Path(folder) / "config.json")
                write_json(Path(folder) / "config.json", {k: v for k, v in config.items() if k != "fingerprint"})
            else:
                facts["fingerprint"] = model.config.fingerprint
            return publish(Path(folder), repo_id, facts, **options)
