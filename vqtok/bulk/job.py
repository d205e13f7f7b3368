"""The folder of codes while it is made: what is being made, which shards are finished, and the manifest at the end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from vqtok.codes import CodeLayout
from vqtok.files import read_json, write_json, write_text
from vqtok.fingerprint import check_fingerprint
from vqtok.prior.data import MANIFEST, shard_name, write_manifest
from vqtok.prior.shards import write_shard

try:
    import fcntl
except ImportError:  # of Windows
    fcntl = None  # type: ignore[assignment]

JOB = "job.json"
# What is compared first, because it says most.
_ORDER = ("fingerprint", "tokenizer", "preprocessing")


class Job:
    """A folder of codes and what is being made in it.

    Files: `job.json`, what is being made; for each unit `codes-00000.parquet`, maybe `codes-00000.skipped.jsonl`, and last
    `codes-00000.json`, the record of the finished shard; `manifest.json` when all are there. The bytes of all of them are a function
    of job and input.

    Args:
        folder: of the codes; made if it is not there.
        facts: of the job. `layout`, `fingerprint` and `source` with its `units` are among them.
        wait: for units that another process has, instead of leaving them to it.

    Raises:
        ValueError: the folder holds codes of another job: what differs is named with both values.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], wait: bool = False):
        self.folder, self.facts, self._wait = folder, facts, wait
        self._locks: IO[bytes] | None = None
        self.units: list[dict[str, Any]] = facts["source"]["units"]
        self.digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder for the codes")
        if not (folder / JOB).exists():
            others = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
            if others and not (folder / JOB).exists():  # another worker may have begun just now
                raise ValueError(f"{folder} is not empty, and holds no unfinished codes: name an empty or a new folder")
            write_json(folder / JOB, facts)
        self._check(read_json(folder / JOB))

    def _check(self, before: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.facts))
        for name in dict.fromkeys((*_ORDER, *now, *before)):
            old, new = before.get(name), now.get(name)
            if old == new:
                continue
            if name == "fingerprint":
                check_fingerprint(old, new, f"codes of this tokenizer, which do not go into {self.folder}:")
            difference = _difference(old, new)
            raise ValueError(
                f"{self.folder} holds codes that were made with another {name}: {difference}. Name another folder, or finish "
                "these as they were begun"
            )

    def names(self, number: int) -> tuple[Path, Path, Path]:
        """The files of a unit: shard, record, and what was left out."""
        shard = self.folder / shard_name(number)
        return shard, shard.with_suffix(".json"), shard.with_suffix(".skipped.jsonl")

    def record(self, number: int) -> dict[str, Any] | None:
        """The record of a finished shard; None if it is not finished, or its record is damaged.

        Raises:
            ValueError: it is of another job.
        """
        shard, path, _ = self.names(number)
        try:
            record = read_json(path)
        except (OSError, ValueError):
            return None
        if record.get("job") != self.digest:
            raise ValueError(
                f"{path} is the record of another job, which writes into the same folder: give each its own"
            )
        counts = [record.get(name) for name in ("num_samples", "num_skipped")]
        if not all(type(count) is int and count >= 0 for count in counts):
            return None
        wanted = {"file": shard.name, "num_bytes": int, "sha256": str} if record["num_samples"] else {"file": None}
        known = all(record.get(k) == v or isinstance(v, type) and type(record.get(k)) is v for k, v in wanted.items())
        return record if known else None

    def is_finished(self, number: int, thorough: bool = True) -> bool:
        """Whether a shard is there, whole, as its record says.

        Args:
            thorough: compare its checksum, too, and not only its size.
        """
        record = self.record(number)
        return record is not None and self._is_whole(number, record, thorough)

    def _is_whole(self, number: int, record: dict[str, Any], thorough: bool) -> bool:
        shard = self.names(number)[0]
        if not record["num_samples"]:
            return True
        if not shard.is_file() or shard.stat().st_size != record["num_bytes"]:
            return False
        if not thorough:
            return True
        with shard.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == record["sha256"]

    def claim(self, number: int, wait: bool | None = None) -> bool:
        """Whether this process may write a unit now: of all that want to, on whatever machine, one at a time may.

        It is a lock of the operating system on one byte of `job.json`, so that it leaves nothing behind and ends with the process,
        however that ends. Where the file system has no such locks everybody may: shards are then still whole, and of the same bytes.

        Args:
            number: of the unit.
            wait: until it is free; None is as the job was made.
        """
        if fcntl is None:
            return True
        flags = 0 if (self._wait if wait is None else wait) else fcntl.LOCK_NB
        while True:
            if self._locks is None:
                self._locks = (self.folder / JOB).open("r+b")
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | flags, 1, number)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    return True
                raise
            if os.path.samestat(os.fstat(self._locks.fileno()), os.stat(self.folder / JOB)):
                return True
            self._locks.close()  # it was replaced by a process that began at the same moment
            self._locks = None

    def release(self, number: int) -> None:
        """Let others write a unit that was claimed."""
        if fcntl is not None and self._locks is not None:
            with suppress(OSError):  # where there are no locks there is nothing to give back
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, number)

    def write(self, number: int, rows: list[dict[str, Any]], skipped: list[tuple[str, str]]) -> dict[str, Any]:
        """Write the shard of a unit that was claimed, what was left out of it, and last its record, which is returned.

        Raises:
            OSError: the disk is full, say. What is there is whole, and the same call starts this shard anew.
        """
        shard, path, aside = self.names(number)
        self._clear(f".{shard.stem}.*.tmp")
        if skipped:
            lines = (json.dumps({"name": name, "reason": reason}, ensure_ascii=False) for name, reason in skipped)
            write_text(aside, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace").decode())
        layout = CodeLayout.from_dict(self.facts["layout"])
        entry = write_shard(self.folder, shard.name, rows, layout) if rows else {"file": None, "num_samples": 0}
        record = {**entry, "source": self.units[number]["name"], "num_skipped": len(skipped), "job": self.digest}
        write_json(path, record)
        return record

    def _clear(self, pattern: str) -> None:
        """Remove what a process that was killed has left."""
        for stale in self.folder.glob(pattern):
            stale.unlink(missing_ok=True)

    def finish(self) -> tuple[int, dict[str, Any] | None]:
        """Return how many shards are there, and the manifest, which is written if these are all, else None.

        Raises:
            ValueError: no sample could be read.
        """
        found = [(number, self.record(number)) for number in range(len(self.units))]
        records = [record for number, record in found if record is not None and self._is_whole(number, record, False)]
        if len(records) < len(self.units):
            return len(records), None
        shards = [{k: v for k, v in record.items() if k != "job"} for record in records if record["num_samples"]]
        skipped = sum(record["num_skipped"] for record in records)
        if not shards:
            raise ValueError(
                f"none of {skipped} samples could be read: {self.folder} lists them with the reasons in codes-*.skipped.jsonl"
            )
        facts = {name: value for name, value in self.facts.items() if name not in ("layout", "fingerprint", "source")}
        source = {name: value for name, value in self.facts["source"].items() if name != "units"}
        facts |= {"source": {**source, "num_units": len(self.units)}, "num_skipped": skipped, "job": self.digest}
        layout = CodeLayout.from_dict(self.facts["layout"])
        last = len(self.units)
        self.claim(last, wait=True)
        try:
            self._clear(f".{MANIFEST}.*.tmp")
            self._clear(f".{JOB}.*.tmp")
            return len(records), write_manifest(self.folder, self.facts["fingerprint"], layout, shards, facts)
        finally:
            self.release(last)


def _difference(old: Any, new: Any) -> str:
    """The first place in which two values differ, with both."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                return f"{name} {_difference(old.get(name), new.get(name))}"
    if isinstance(old, list) and isinstance(new, list):
        for place in range(max(len(old), len(new))):
            one, other = (value[place] if place < len(value) else None for value in (old, new))
            if one != other:
                return f"{place} {_difference(one, other)}"
    return f"was {old!r} and is now {new!r}"
