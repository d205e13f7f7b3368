"""What may be published: safetensors, JSON, texts, pictures and sounds, without a secret and without a path of one's machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
_TEXTS = (".json", ".jsonl", ".txt", ".md", ".yaml", ".csv", ".jinja")
_ALLOWED = (*_TEXTS, *PICTURES, *SOUNDS, ".safetensors", ".model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
# Learned from data, so that what looks like a path in them is a token.
_LEARNED = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")

_SECRETS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36,}",
    "a W&B or other API key": rb"(?i)(?:api|secret)_?key[\"']?\s*[:=]\s*[\"'][A-Za-z0-9_\-]{24,}[\"']",
}
MACHINE = "a path of a machine"
_PATHS = {
    "a path of a home folder": rb"(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})[A-Za-z0-9_.\-]+",
    MACHINE: rb"(?<![\w.:/\-])/(?:root|tmp|mnt|scratch|work|data|private|var/folders|workspace)/[\w.\-]+",
}


def without_paths(value: Any) -> Any:
    """A JSON value in which every absolute path is its last part: where files lay on one's machine is nobody's business."""
    if isinstance(value, Mapping):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if isinstance(value, str) and re.match(r"(/|~|[A-Za-z]:[\\/]|\\\\)", value) and "\n" not in value:
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def publishable_files(folder: Path, secrets: Iterable[str] = ()) -> list[str]:
    """The files of a folder, sorted, if every one of them may be published. Hidden files are left out.

    Args:
        secrets: words that no file may hold, such as the token in use.

    Raises:
        ValueError: a file that may not be published: a pickle, a link, an unknown kind, damaged weights, or one that holds a
            secret or a path of a machine. It is named, with what to do.
    """
    folder, names = Path(folder), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_symlink():
            raise ValueError(f"{name} is a link, and only files are published: replace it by what it points to")
        if path.is_file():
            check_file(path, name, [secret.encode() for secret in secrets if secret])
            names.append(name)
    return names


def check_file(path: Path, name: str, secrets: list[bytes]) -> None:
    """Refuse a file that may not be published, as `publishable_files` does."""
    suffix = path.suffix.lower()
    with path.open("rb") as stream:
        start = stream.read(4)
    is_pickle = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and suffix != ".safetensors"
    if name.split("/")[0] == "checkpoints":
        raise ValueError(f"{name} is part of a checkpoint, which is never published: remove it from what is pushed")
    if suffix in _PICKLES or is_pickle or start == b"PK\x03\x04":
        raise ValueError(f"{name} is a pickle or an archive, and neither is ever published: remove it")
    if suffix not in _ALLOWED and not re.fullmatch(r"LICENSE|NOTICE", path.name):
        raise ValueError(f"{name} is of a kind that is not published ({', '.join(_ALLOWED)}): remove it")
    if suffix == ".safetensors":
        try:
            with safe_open(path, framework="np") as weights:
                data = json.dumps(weights.metadata() or {}).encode()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is no complete safetensors file ({error}): save it again") from None
    else:
        data = path.read_bytes()
    check_words(data, name, secrets)


def check_words(data: bytes, name: str, secrets: list[bytes]) -> None:
    """Refuse a text that holds a secret or a path of a machine, as `publishable_files` does."""
    if any(secret in data for secret in secrets):
        raise ValueError(
            f"{name} holds the token that you push with: remove it, and renew the token if it was ever shared"
        )
    paths = {} if name.split("/")[-1] in _LEARNED else dict(_PATHS)
    if name.endswith(".md"):  # a person may well write of /data; one's home is still nobody's business
        paths.pop(MACHINE)
    patterns = {**_SECRETS, **paths}
    for what, pattern in patterns.items():
        if match := re.search(pattern, data):
            line = data[: match.start()].count(b"\n") + 1
            shown = f" {match[0].decode(errors='replace')!r}" if pattern in _PATHS.values() else ""
            raise ValueError(f"{name}, line {line}, holds {what}{shown}: remove it before pushing")
