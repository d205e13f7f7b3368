"""Folders of configurations and weights: found in the package, fetched from the Hub, replaced whole or not at all."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from .errors import HUB_ERRORS, explain

_PACKAGE = Path(__file__).resolve().parents[1]
# Inside the wheel, and at the top of a checkout.
_CONFIG_ROOTS = (_PACKAGE / "tokenizers_configs", _PACKAGE.parent / "tokenizers_configs")
# "name" or "owner/name".
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_REVISION = re.compile(r"\w[\w./-]*")


def config_folder(name: str | os.PathLike) -> Path:
    """The folder of a configuration that comes with vqtok, such as "image/vqvae2-digits", or the folder itself if it is one.

    Raises:
        ValueError: there is none of this name; near names are said.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    for root in _CONFIG_ROOTS:
        if (root / name).is_dir() and any((root / name).glob("*.json")):
            return root / name
    names = config_names()
    near = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    raise ValueError(
        f"there is no folder and no configuration {str(name)!r}: {hint}The configurations are {', '.join(names)}"
    )


def config_names() -> list[str]:
    """The names of all configurations that come with vqtok."""
    found = {path.parent.relative_to(root).as_posix() for root in _CONFIG_ROOTS for path in root.glob("*/*/*.json")}
    return sorted(found)


def is_revision(value: object) -> bool:
    """Whether it may name a branch, a tag or a commit. The client makes a path of it in the cache."""
    return isinstance(value, str) and _REVISION.fullmatch(value) is not None and ".." not in value


def check_revision(revision: str | None) -> None:
    """Refuse what can be no revision.

    Raises:
        ValueError: naming it.
    """
    if revision is not None and not is_revision(revision):
        raise ValueError(f"revision must name a branch, a tag or a commit, such as 'main', got {revision!r}")


def fetch_folder(
    id_or_folder: str | os.PathLike,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> tuple[Path, str | None]:
    """A local folder with the wanted files, all of one commit.

    Args:
        id_or_folder: a folder, or "owner/name" of a model repository on the Hub.
        patterns: what to download, with * as in a shell; below `subfolder`.
        revision, token, cache_dir, local_files_only: see `huggingface_hub.snapshot_download`.
        subfolder: where in it the files lie.

    Returns:
        The folder, `subfolder` included, and the commit (None for a local folder).

    Raises:
        OSError: there is no such folder, and no such repository can be read.
        ValueError: `revision` cannot be one.
    """
    check_revision(revision)
    folder = Path(id_or_folder).expanduser()
    if folder.is_file():
        raise OSError(f"{folder} is a file: name the folder it lies in")
    commit = None
    if not folder.is_dir():
        if isinstance(id_or_folder, os.PathLike) or not HUB_ID.fullmatch(id_or_folder):
            raise FileNotFoundError(f"there is no folder {folder}: check the path")
        try:
            snapshot = snapshot_download(
                id_or_folder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns],
            )
        except (*HUB_ERRORS, ValueError) as error:
            of = f" at revision {revision!r}" if revision else ""
            raise OSError(
                f"there is no folder {id_or_folder!r} here, and the Hub repository of that name{of} cannot be read: "
                f"{explain(error, 'load')}"
            ) from error
        folder = Path(snapshot)
        commit = folder.name
    if subfolder and not (folder / subfolder).is_dir():
        raise FileNotFoundError(f"{id_or_folder} has no subfolder {subfolder!r}: check its name")
    return folder / subfolder, commit


def file_digests(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """The sha256 of every file of a folder that one of `patterns` names, by its path in the folder."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    digests = {}
    for path in found:
        with path.open("rb") as stream:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


@contextmanager
def replace_files(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """Yield an empty folder; when the block ends, its files replace those of the same names in `folder`. Other files stay.

    Everything is on the disk before the first file is renamed, so a full disk changes nothing.

    Args:
        folder: is made if it is not there.
        last: the name of the file that is renamed last: who finds it may count on the others.

    Raises:
        OSError: naming `folder` and the system's reason; the files there are as they were.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is a file: name a folder to save to")
    is_new = not folder.exists()
    staging = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))  # inside, so that renaming never crosses disks
        yield staging
        files = sorted((path for path in staging.rglob("*") if path.is_file()), key=lambda p: (p.name == last, p))
        for path in files:
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        for path in files:
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    except (OSError, SafetensorError) as error:  # safetensors has a kind of its own for a full disk
        number = getattr(error, "errno", None)
        message = f"could not write {folder}: {getattr(error, 'strerror', None) or error}. What was there is unchanged"
        raise (OSError(number, message) if number else OSError(message)) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
