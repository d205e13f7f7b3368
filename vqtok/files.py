"""Files that are either whole or absent: what is written goes to a temporary neighbour and is renamed when it is complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MAX_JSON_BYTES = 1 << 26


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash or a full disk leaves either the old file or the new one, never a piece.

    Raises:
        OSError: as the system says it, naming `path`; the temporary file is gone and an older `path` is untouched.
    """
    write_with(path, lambda temporary: Path(temporary).write_bytes(data))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all (see `write_bytes`)."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all (see `write_bytes`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file that a stranger may have written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, or implausibly large; the file is named.
    """
    path = Path(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, more than {MAX_JSON_BYTES:,}: no such file of vqtok is that large"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): save or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}: save or download it again")
    return value


def write_with(path: str | Path, writer: Callable[[str], Any]) -> None:
    """Let `writer(temporary_path)` write a file and put it at `path` when it has returned.

    Raises:
        OSError: naming `path` and the system's reason (no space left, read-only folder).
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        writer(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if (named := _named(error, path, path, temporary)) is error:
            raise
        raise named from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    A folder that was at `path` is replaced only then, so a failed save keeps the previous one; a link stays a link. Only a
    process killed between the two renames leaves nothing at `path`: the previous folder is then its neighbour `.NAME.old`.

    Raises:
        OSError: naming `path`; the temporary folder is removed.
    """
    target, temporary = Path(os.path.realpath(path)), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of that name is in the way")
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent))
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        os.chmod(temporary, 0o777 & ~_umask())
        _put(temporary, target)
    except (OSError, SafetensorError) as error:
        if (named := _named(error, path, target, temporary)) is error:
            raise
        raise named from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, target: Path) -> None:
    """Rename a finished folder to `target`; a folder that was there goes, and comes back if the renaming fails."""
    if not target.exists():
        os.replace(temporary, target)
        return
    previous = target.with_name(f".{target.name}.old")
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(target, previous)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(previous, target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _named(error: Exception, path: str | Path, target: Path, temporary: str | Path | None) -> Exception:
    """`error` in one sentence that names `path`; as it is if it is about another file, which the writer failed to read."""
    while isinstance(error.__cause__, OSError):  # already put into a sentence, about a file of this folder
        error = error.__cause__
    filename = getattr(error, "filename", None)
    if temporary is not None and filename is not None and not str(filename).startswith((str(temporary), str(target))):
        return error
    reason = getattr(error, "strerror", None) or error
    sentence = f"could not write {path}: {reason}. Nothing was changed"
    number = getattr(error, "errno", None)
    return OSError(sentence) if number is None else OSError(number, sentence)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: str | Path) -> None:
    """Force the bytes to the disk before the rename, so that a power cut cannot leave an empty file under the new name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
