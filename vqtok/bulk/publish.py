"""A finished code cache, ready to be published as a data set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from vqtok.hub.code_sets import publish_codes
from vqtok.prior.data import MANIFEST, read_manifest

from .job import JOB

_AGAIN = "run vqtok tokenize again"


class PublishedCodes:
    """A code cache whose shards are all there, as the manifest says.

    Raises:
        ValueError: it is not finished, or a shard is not what the manifest says; the remedy is said.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} is not finished (it has no {MANIFEST}): {_AGAIN} until it is")
        self.manifest = read_manifest(folder)
        for shard in self.manifest["shards"]:
            _check_shard(folder / shard["file"], shard.get("sha256"))
        self.names = [MANIFEST, *([JOB] if (folder / JOB).is_file() else [])]
        self.names += [shard["file"] for shard in self.manifest["shards"]]
        self.names += sorted(path.name for path in folder.glob("codes-*.skipped.jsonl"))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload in one commit with a card, and return the commit's address.

        Args:
            repo_id: "owner/name" of a data set, or "name" of one's own; made if it is not there.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr`, `license` of `vqtok.hub.publish.publish`.

        Raises:
            ValueError, OSError: see `vqtok.hub.code_sets.publish_codes`.
        """
        return publish_codes(self.folder, repo_id, self.manifest, self.names, **options)


def _check_shard(path: Path, sha256: str | None) -> None:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is missing, or a link, and only files are published: {_AGAIN}")
    with path.open("rb") as stream:
        is_parquet = stream.read(4) == b"PAR1"
        stream.seek(0)
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not is_parquet or found != (sha256 or found):
        raise ValueError(f"{path} is not what the manifest says (its checksum differs): {_AGAIN}")
