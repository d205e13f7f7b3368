"""One folder to one commit on the Hub."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from vqtok.files import write_json

from .card import render
from .checks import PICTURES, SOUNDS, publishable_files, without_paths
from .errors import HUB_ERRORS, explain
from .merge import merge_cards

# What training leaves beside what `save_pretrained` writes, and what belongs to a publication. Never checkpoints.
EXTRAS = (
    *("README.md", "LICENSE*", "NOTICE*", "metrics.json", "training.json", "training/*.json", "training/*.safetensors"),
    *(f"samples/*{suffix}" for suffix in (*PICTURES, *SOUNDS)),
)
_PROGRESS = "samples/step-*"  # sheets drawn while training
_MOST_SHOWN = 4
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def copy_extras(home: Path, folder: Path) -> None:
    """Copy what stands beside the saved files in `home` and belongs to a publication (`EXTRAS`) to `folder`."""
    for pattern in EXTRAS:
        for path in sorted(home.glob(pattern)):
            name = path.relative_to(home).as_posix()
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

    What is published is checked before the first request (see `vqtok.hub.checks`). Files of weights in the repository that the
    folder no longer has are removed in the same commit. If nothing has changed there is no commit.

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
        ValueError: something that may not be published, or a public repository where a private one was asked for.
        OSError: the Hub refuses or cannot be reached; the sentence says why and what to do.
    """
    known = get_token() if token in (None, True) else token
    metrics, training = (_read_json(folder / f"{name}.json") for name in ("metrics", "training"))
    local = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else None
    # Before anything is sent; the card is checked once more when it is written.
    names = [name for name in publishable_files(folder, [known or ""]) if name != "README.md"]
    api = HfApi(token=token)
    with _explained(repo_id), tempfile.TemporaryDirectory() as scratch:
        name = repo_id if create_pr else api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and api.repo_info(name).private is False:
            raise ValueError(
                f"{name} exists already and is public: make it private on the Hub first, or choose another name"
            )
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.repo_info(name, revision=revision)
        files = {file.rfilename for file in there.siblings or []}
        remote = None
        if "README.md" in files:
            path = api.hf_hub_download(name, "README.md", revision=there.sha, cache_dir=Path(scratch) / "cache")
            remote = Path(path).read_text(encoding="utf-8")
        data = _dataset(api, training)
        known_facts = {**facts, "license": license, "datasets": [data] if data else None}
        known_facts["prompt"] = metrics.get("prompt") or facts.get("prompt")
        samples = [each for each in names if each.startswith("samples/")][:_MOST_SHOWN]
        card = merge_cards(render(name, known_facts, metrics, training, samples), local, remote)
        (Path(scratch) / "card").mkdir()
        (Path(scratch) / "card" / "README.md").write_text(card, encoding="utf-8")
        publishable_files(Path(scratch) / "card", [known or ""])
        additions = [CommitOperationAdd(each, folder / each) for each in names]
        additions.append(CommitOperationAdd("README.md", card.encode()))
        stale = [each for each in sorted(files - set(names)) if any(fnmatch.fnmatch(each, p) for p in _WEIGHTS)]
        commit = api.create_commit(
            name,
            [*additions, *(CommitOperationDelete(each) for each in stale)],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else there.sha,
        )
    return commit.pr_url or commit.commit_url


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the way to it, in one sentence."""
    try:
        yield
    except HUB_ERRORS as error:
        raise OSError(f"{repo_id} was not pushed: {explain(error, 'push')}. No commit was confirmed") from error


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


class PublishedModel:
    """A model of transformers whose `push_to_hub` writes our card, and one commit."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # transformers' own writes a card of its own over ours
        """Upload `config.json` and weights in one commit, with a card, and return the commit's address.

        The facade's `push_to_hub` also uploads what prepares the media, and figures and pictures.

        Args:
            repo_id: "owner/name", or "name" of one's own.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr`, `license` of `vqtok.hub.publish.publish`.

        Raises:
            OSError: the Hub refuses or cannot be reached.
            ValueError: something may not be published; it is named.
        """
        model: Any = self
        facts = {"kind": "model", "modality": model.config.model_type.rpartition("_")[2], "class": type(model).__name__}
        facts |= {"fingerprint": model.config.fingerprint, "parameters": sum(p.numel() for p in model.parameters())}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return publish(Path(folder), repo_id, facts, **options)
