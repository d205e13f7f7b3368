"""A finished code cache, ready to be published as a data set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from vqtok.hub.code_sets import publish_codes
from vqtok.prior.data import MANIFEST, read_manifest

from .job import JOB


class PublishedCodes:
    """A code cache whose shards are all there, as the manifest says.

    Raises:
        ValueError: it is not finished, or a shard is not what the manifest says; the remedy is said.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} is not finished (it has no {MANIFEST}): run vqtok tokenize again until it is")
        self.manifest = read_manifest(folder)
        self.names = [MANIFEST, *([JOB] if (folder / JOB).is_file() else [])]
        for shard in self.manifest["shards"]:
            path = folder / shard["file"]
            if not path.is_file():
                raise ValueError(f"{path} is missing: run vqtok tokenize again")
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if shard.get("sha256", found) != found:
                raise ValueError(
                    f"{path} is not what the manifest says (its checksum differs): run vqtok tokenize again"
                )
            self.names.append(path.name)
        self.names += sorted(path.name for path in folder.glob("codes-*.skipped.jsonl"))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload in one commit with a card, and return the commit's address.

        Args:
            repo_id: "owner/name" of a data set, or "name" of one's own; made if it is not there.
            options: see `vqtok.hub.code_sets.publish_codes`.

        Raises:
            ValueError, OSError: see there.
        """
        return publish_codes(self.folder, repo_id, self.manifest, self.names, **options)
