"""A folder of codes to a data set on the Hub, with a card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoFile

from .card import BEGIN, END, front
from .checks import check_file
from .errors import HUB_ERRORS, explain
from .folders import check_revision
from .merge import merge_cards

_OURS = re.compile(r"codes-\d+\.(parquet|json|skipped\.jsonl)|manifest\.json|job\.json")


def code_card(name: str, manifest: Mapping[str, Any], license: str | None = None) -> str:
    """The README.md of a data set of codes: what made them, how they lie, how they are read.

    Args:
        name: of the repository.
        manifest: of the code cache.
        license: as given; it is that of the media, of which the codes are a copy.
    """
    tokenizer, rows = manifest.get("tokenizer"), []
    known = tokenizer if isinstance(tokenizer, Mapping) else {"folder": tokenizer}
    made_by = known.get("repo") or known.get("folder") or "a folder"
    for label, value in (
        ("tokenizer", made_by),
        ("revision", known.get("revision")),
        ("fingerprint", f"`{manifest['fingerprint']}`"),
        ("samples", f"{manifest['num_samples']:,}, {manifest.get('num_skipped', 0):,} left out"),
        ("shards", f"{len(manifest['shards']):,}"),
        ("precision", manifest.get("dtype")),
        ("preprocessing", ", ".join(f"{k} {v}" for k, v in manifest.get("preprocessing", {}).items())),
    ):
        if value:
            rows.append(f"| {label} | {value} |")
    layout = manifest["layout"]
    for index, level in enumerate(layout["levels"]):
        area = "x".join([str(level["stride"])] * layout["ndim"])
        rows.append(f"| level {index} | {level['num_codebooks']} of {level['codebook_size']} per {area} |")
    fields: dict[str, Any] = {"tags": ["vqtok", "vq-vae", "codes"]}
    if license:
        fields = {"license": license, **fields}
    fields["configs"] = [{"config_name": "default", "data_files": "codes-*.parquet"}]
    body = f"""{BEGIN}
# {name}

Discrete codes of a data set, made by [vqtok](https://pypi.org/project/vqtok/). They mean something to the tokenizer of this fingerprint
alone. Each row holds the flattened codes of every level, `(codebooks, *grid)`, the size of the medium, and what was kept beside it.

```python
from huggingface_hub import snapshot_download

from vqtok.prior.data import CodeDataset

data = CodeDataset(snapshot_download("{name}", repo_type="dataset"))
print(len(data), [tuple(level.shape) for level in data[0]["codes"]])
```

A prior trains on the folder with `examples/train_prior.py --codes FOLDER`; `datasets.load_dataset("{name}")` reads the rows.

| what | value |
| --- | --- |
{chr(10).join(rows)}
{END}
"""
    return front(fields) + "\n" + body


def publish_codes(
    folder: Path,
    repo_id: str,
    manifest: Mapping[str, Any],
    names: Sequence[str],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with vqtok",
    create_pr: bool = False,
    license: str | None = None,
) -> str:
    """Upload the files `names` of a folder of codes and a card in one commit, and return the commit's address.

    Args:
        folder, manifest, names: a finished code cache, and its files.
        repo_id, private, token, revision, commit_message, create_pr, license: see `vqtok.hub.publish.publish`.

    Raises:
        ValueError: a file may not be published, or a public repository where a private one was asked for.
        OSError: the Hub refuses or cannot be reached.
    """
    check_revision(revision)
    known = get_token() if token in (None, True) else token
    for name in names:
        if not name.endswith(".parquet"):
            check_file(folder / name, name, [str(known).encode()] if known else [])
    api = HfApi(token=token)
    kind: dict[str, Any] = {"repo_type": "dataset"}
    try:
        name = repo_id if create_pr else api.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
        if private and api.repo_info(name, **kind).private is False:
            raise ValueError(
                f"{name} exists already and is public: make it private on the Hub first, or choose another name"
            )
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True, **kind)
        there = api.repo_info(name, revision=revision, **kind)
        tree = api.list_repo_tree(name, recursive=True, revision=there.sha, **kind)
        files = {file.path for file in tree if isinstance(file, RepoFile)}
        remote = None
        if "README.md" in files:
            with tempfile.TemporaryDirectory() as cache:
                path = api.hf_hub_download(name, "README.md", revision=there.sha, cache_dir=cache, **kind)
                remote = Path(path).read_text(encoding="utf-8")
        local = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else None
        card = merge_cards(code_card(name, manifest, license), local, remote)
        additions = [CommitOperationAdd(each, folder / each) for each in names]
        additions.append(CommitOperationAdd("README.md", card.encode()))
        stale = [each for each in sorted(files - set(names)) if _OURS.fullmatch(each)]
        commit = api.create_commit(
            name,
            [*additions, *(CommitOperationDelete(each) for each in stale)],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else there.sha,
            **kind,
        )
    except HUB_ERRORS as error:
        raise OSError(f"{repo_id} was not pushed: {explain(error, 'push')}. No commit was confirmed") from error
    return commit.pr_url or commit.commit_url
