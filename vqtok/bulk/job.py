"""The folder of codes while it is made: what is being made, which shards are finished, and the manifest at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqtok.codes import CodeLayout
from vqtok.files import read_json, write_json, write_text
from vqtok.fingerprint import check_fingerprint
from vqtok.prior.data import MANIFEST, shard_name, write_manifest
from vqtok.prior.shards import write_shard

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

    Raises:
        ValueError: the folder holds codes of another job: what differs is named with both values.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder, self.facts = folder, facts
        self.units: list[dict[str, Any]] = facts["source"]["units"]
        self.digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder for the codes")
        if not (folder / JOB).exists():
            if folder.exists() and any(path.name != JOB and not path.name.startswith(".") for path in folder.iterdir()):
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
        """The record of a finished shard; None if it is not finished.

        Raises:
            ValueError: it is of another job.
        """
        path = self.names(number)[1]
        try:
            record = read_json(path)
        except (OSError, ValueError):
            return None
        if record.get("job") != self.digest:
            raise ValueError(
                f"{path} is the record of another job, which writes into the same folder: give each its own"
            )
        return record

    def is_finished(self, number: int, thorough: bool = True) -> bool:
        """Whether a shard is there, whole, as its record says.

        Args:
            thorough: compare its checksum, too, and not only its size.
        """
        record = self.record(number)
        if record is None:
            return False
        shard = self.names(number)[0]
        if not record["num_samples"]:
            return True
        if not shard.is_file() or shard.stat().st_size != record["num_bytes"]:
            return False
        if not thorough:
            return True
        with shard.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == record["sha256"]

    def write(self, number: int, rows: list[dict[str, Any]], skipped: list[tuple[str, str]]) -> dict[str, Any]:
        """Write the shard of a unit, what was left out of it, and last its record, which is returned.

        Raises:
            OSError: the disk is full, say. What is there is whole, and the same call starts this shard anew.
        """
        shard, path, aside = self.names(number)
        for stale in self.folder.glob(f".{shard.stem}.*.tmp"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        if skipped:
            lines = (json.dumps({"name": name, "reason": reason}, ensure_ascii=False) for name, reason in skipped)
            write_text(aside, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace").decode())
        layout = CodeLayout.from_dict(self.facts["layout"])
        entry = write_shard(self.folder, shard.name, rows, layout) if rows else {"file": None, "num_samples": 0}
        record = {**entry, "source": self.units[number]["name"], "num_skipped": len(skipped), "job": self.digest}
        write_json(path, record)
        return record

    def finish(self) -> dict[str, Any] | None:
        """Write the manifest if all shards are there, and return it; None if some are missing.

        Raises:
            ValueError: no sample could be read.
        """
        if not all(self.is_finished(number, thorough=False) for number in range(len(self.units))):
            return None
        records = list(self._records())
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
        return write_manifest(self.folder, self.facts["fingerprint"], layout, shards, facts)

    def _records(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self.units)):
            record = self.record(number)
            assert record is not None
            yield record

    @property
    def has_manifest(self) -> bool:
        return (self.folder / MANIFEST).is_file()


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
