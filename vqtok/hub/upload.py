"""One commit to one repository on the Hub, whatever is in it: a repository that is made if need be, and what it holds before."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoFile

from .checks import check_words
from .errors import HUB_ERRORS, explain
from .folders import check_revision

_OPTIONS = ("private", "token", "revision", "commit_message", "create_pr", "license")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse an option of `push_to_hub` that nobody knows, before anything is saved.

    Raises:
        ValueError: naming it.
    """
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ValueError(f"push_to_hub has no option {unknown[0]!r}: it takes {', '.join(_OPTIONS)}")


def secrets(token: str | bool | None) -> list[str]:
    """Words that no published file may hold: the token in use."""
    known = get_token() if token in (None, True) else token
    return [known] if isinstance(known, str) and known else []


def read_text(path: Path, where: str) -> str:
    """A text that a person may have written.

    Raises:
        ValueError: it is no UTF-8; `where` is named.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no UTF-8 ({error.reason} at byte {error.start}): mend it first") from None


def read_local_card(folder: Path) -> str | None:
    """The README.md of a folder, if it has one."""
    return read_text(folder / "README.md", "the folder's README.md") if (folder / "README.md").is_file() else None


class Target:
    """A repository that is about to be written to.

    Attributes:
        api: the client.
        name: "owner/name".
        files: what it holds, by path.
        card: its README.md, None if it has none.
    """

    def __init__(self, api: HfApi, name: str, repo_type: str, revision: str | None, create_pr: bool):
        self.api, self.name, self._kind, self._revision, self._create_pr = api, name, repo_type, revision, create_pr
        there = api.repo_info(name, revision=revision, repo_type=repo_type)
        self._sha = there.sha
        tree = api.list_repo_tree(name, recursive=True, revision=there.sha, repo_type=repo_type)
        self.files = {file.path: file for file in tree if isinstance(file, RepoFile)}
        self.card = None
        if "README.md" in self.files:
            with tempfile.TemporaryDirectory() as cache:
                path = api.hf_hub_download(
                    name, "README.md", revision=there.sha, repo_type=repo_type, cache_dir=Path(cache)
                )
                self.card = read_text(Path(path), "README.md on the Hub")

    def commit(self, additions: Sequence[CommitOperationAdd], stale: Sequence[str], message: str) -> str:
        """Add and delete in one commit, and return its address, or that of the pull request. If nothing changes there is none."""
        commit = self.api.create_commit(
            self.name,
            [*additions, *(CommitOperationDelete(each) for each in stale)],
            commit_message=message,
            revision=self._revision,
            create_pr=self._create_pr,
            repo_type=self._kind,
            parent_commit=None if self._create_pr else self._sha,
        )
        return commit.pr_url or commit.commit_url


@contextmanager
def target(
    repo_id: str,
    repo_type: str = "model",
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> Iterator[Target]:
    """Yield the repository, which is made if it is not there; errors of the Hub inside the block become one sentence.

    Args:
        repo_id, private, token, revision, create_pr: see `vqtok.hub.publish.publish`.
        repo_type: "model" or "dataset".

    Raises:
        ValueError: a public repository where a private one was asked for.
        OSError: the Hub refuses or cannot be reached; the sentence says why and what to do.
    """
    check_revision(revision)
    api, kind = HfApi(token=token), {"repo_type": repo_type}
    try:
        name = repo_id if create_pr else api.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
        if private and api.repo_info(name, **kind).private is False:
            raise ValueError(
                f"{name} exists already and is public: make it private on the Hub first, or choose another name"
            )
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True, **kind)
        yield Target(api, name, repo_type, revision, create_pr)
    except HUB_ERRORS as error:
        raise OSError(f"{repo_id} was not pushed: {explain(error, 'push')}. No commit was confirmed") from error


def add_card(additions: list[CommitOperationAdd], card: str, words: Sequence[str]) -> None:
    """Add a README.md to what is committed.

    Raises:
        ValueError: it holds a secret or a path of a home folder.
    """
    check_words(card.encode(), "README.md", [word.encode() for word in words])
    additions.append(CommitOperationAdd("README.md", card.encode()))
