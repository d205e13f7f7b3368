"""A folder of codes to a data set on the Hub, with a card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from .card import BEGIN, END, front, table
from .checks import check_file
from .merge import merge_cards
from .upload import add_card, check_options, read_local_card, secrets, target

_OURS = re.compile(r"codes-\d+\.(parquet|json|skipped\.jsonl)|manifest\.json|job\.json")


def code_card(name: str, manifest: Mapping[str, Any], license: str | None = None) -> str:
    """The README.md of a data set of codes: what made them, how they lie, how they are read.

    Args:
        name: of the repository.
        manifest: of the code cache.
        license: as given; it is that of the media, of which the codes are a copy.
    """
    fields: dict[str, Any] = {"tags": ["vqtok", "vq-vae", "codes"]}
    fields["configs"] = [{"config_name": "default", "data_files": "codes-*.parquet"}]
    if license:  # last, where one that the card has already is kept, so that the same push makes the same card
        fields["license"] = license
    body = f"""{BEGIN}
# {name}

Discrete codes of a data set, made by vqtok. They mean something to the tokenizer of this fingerprint
alone. Each row holds the flattened codes of every level, `(codebooks, *grid)`, the size of the medium, and what was kept beside it.

```python
from huggingface_hub import snapshot_download

from vqtok.prior.data import CodeDataset

data = CodeDataset(snapshot_download("{name}", repo_type="dataset"))
print(len(data), [tuple(level.shape) for level in data[0]["codes"]])
```

A prior trains on the folder with `examples/train_prior.py --codes FOLDER`; `datasets.load_dataset("{name}")` reads the rows.

{table(["what", "value"], _facts(manifest))}
{END}
"""
    return front(fields) + "\n" + body


def _facts(manifest: Mapping[str, Any]) -> list[list[str]]:
    tokenizer, layout = manifest.get("tokenizer"), manifest["layout"]
    known = tokenizer if isinstance(tokenizer, Mapping) else {"folder": tokenizer}
    shown = {
        "tokenizer": known.get("repo") or known.get("folder"),
        "revision": known.get("revision"),
        "fingerprint": f"`{manifest['fingerprint']}`",
        "samples": f"{manifest['num_samples']:,}, {manifest.get('num_skipped', 0):,} left out",
        "shards": f"{len(manifest['shards']):,}",
        "precision": manifest.get("dtype"),
        "preprocessing": ", ".join(f"{key} {value}" for key, value in manifest.get("preprocessing", {}).items()),
    }
    for index, level in enumerate(layout["levels"]):
        area = "x".join([str(level["stride"])] * layout["ndim"])
        shown[f"level {index}"] = f"{level['num_codebooks']} of {level['codebook_size']} per {area}"
    return [[label, value] for label, value in shown.items() if value]


def publish_codes(
    folder: Path,
    repo_id: str,
    manifest: Mapping[str, Any],
    names: Sequence[str],
    *,
    commit_message: str = "Upload with vqtok",
    license: str | None = None,
    **options: Any,
) -> str:
    """Upload the files `names` of a folder of codes and a card in one commit, and return the commit's address.

    Shards of an earlier push that are no more go in the same commit. If nothing has changed there is none.

    Args:
        folder, manifest, names: a finished code cache, and its files.
        repo_id, commit_message, license, options: see `vqtok.hub.publish.publish`.

    Raises:
        ValueError: a file may not be published, or a public repository where a private one was asked for.
        OSError: the Hub refuses or cannot be reached.
    """
    check_options(options)
    where = {name: options.get(name) for name in ("private", "token", "revision")}
    words, local = secrets(where["token"]), read_local_card(folder)
    for name in names:
        if not name.endswith(
            ".parquet"
        ):  # shards are codes: their checksums were compared, and nothing in them is ours to judge
            check_file(folder / name, name, [word.encode() for word in words])
    with target(repo_id, "dataset", create_pr=bool(options.get("create_pr")), **where) as repo:
        card = merge_cards(code_card(repo.name, manifest, license), local, repo.card)
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        add_card(additions, card, words)
        stale = [name for name in sorted(set(repo.files) - set(names)) if _OURS.fullmatch(name)]
        return repo.commit(additions, stale, commit_message)
