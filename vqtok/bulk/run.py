"""`tokenize_dataset`: a data set of any size to a code cache."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vqtok.auto import VQTokenizer
from vqtok.auto.rooms import MEDIA

from .inputs import Source, open_input
from .job import Job
from .on_ray import run_on_ray
from .share import check_share
from .tables import Columns
from .units import Settings
from .workers import Progress, Work, run_here, run_in_processes

ENGINES = ("local", "ray")
# Fields of a processor that decide what a medium becomes, beside those of the code space.
_CONVERSIONS = ("resample", "mix", "max_pixels", "max_seconds")


class Tokenized(NamedTuple):
    """What is in the folder after a call.

    Args:
        folder: of the codes.
        num_shards: finished.
        num_units: of the whole input. As long as shards are missing, other workers are at it, or have to be started.
        num_samples, num_skipped: encoded, and left out, in this call.
        manifest: None as long as shards are missing.
    """

    folder: Path
    num_shards: int
    num_units: int
    num_samples: int
    num_skipped: int
    manifest: dict[str, Any] | None

    def summary(self, worker: int = 0, num_workers: int = 1) -> str:
        """What to say at the end of a run."""
        share = f"worker {worker} of {num_workers}: " if num_workers > 1 else ""
        left_out = f", {self.num_skipped} left out (see codes-*.skipped.jsonl)" if self.num_skipped else ""
        lines = [f"{share}encoded {self.num_samples} samples{left_out}"]
        if self.manifest is None:
            lines.append(f"{self.num_shards} of {self.num_units} shards are there: the other workers write the rest")
        else:
            skipped = self.manifest["num_skipped"]
            lines.append(
                f"{self.folder} is complete: {self.manifest['num_samples']} samples in {len(self.manifest['shards'])} shards, "
                f"{skipped} left out"
            )
        return "\n".join(lines)


def tokenize_dataset(
    source: Any,
    output: str | os.PathLike,
    tokenizer: VQTokenizer | str | os.PathLike,
    *,
    revision: str | None = None,
    media_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    keep: tuple[str, ...] = (),
    split: str | None = None,
    config_name: str | None = None,
    data_revision: str | None = None,
    streaming: bool = False,
    resample: bool = False,
    image_size: int | None = None,
    batch_size: int | None = None,
    rows_per_shard: int = 4096,
    processes: int = 1,
    threads: int = 1,
    readers: int = 2,
    worker: int = 0,
    num_workers: int = 1,
    engine: str = "local",
    device: str | None = None,
) -> Tokenized:
    """Encode a data set, one input shard to one Parquet shard of codes, and return what is in the folder now.

    The folder is a code cache when all shards are there. The same call again goes on where the last one stopped, wherever that was,
    with the same bytes; finished shards are not written again. Samples that cannot be read are listed beside their shard.

    Args:
        source: a folder of media; a folder of .parquet or of .tar (WebDataset) shards, or one such file; the name of a data set on
            the Hub; or a `datasets.Dataset` or `IterableDataset`.
        output: the folder of the codes.
        tokenizer: a saved one, or its folder or name on the Hub, at `revision`.
        media_column: where there are several columns of media.
        caption_column, label_column: kept as `text` and `label`; None keeps columns of these names.
        keep: more columns to keep beside the codes.
        split: of a data set on the Hub ("train" by default), or of a folder of media (all by default).
        config_name, data_revision, streaming: of a data set on the Hub; streamed, it is never stored here.
        resample: bring sound of other rates to the tokenizer's.
        image_size: cut the middle square out of each picture, this many pixels wide; None takes pictures as they are.
        batch_size: samples at once; None means up to 64, fewer of large ones.
        rows_per_shard: where there are no input shards.
        processes: on this machine; with GPUs, one for each is right.
        threads: of torch in each process. The bytes hold for one number of them.
        readers: threads that decode in each process.
        worker, num_workers: this call does every `num_workers`-th unit, beginning with number `worker`.
        engine: "local", or "ray" for the cluster that Ray is connected to.
        device: None means cuda where there is one.

    Raises:
        ValueError: one sentence about what is wrong with source, options or folder; a folder of another job is refused, and what
            differs is named.
        OSError: the disk is full, say; what is finished stays, and the same call goes on.
        RuntimeError: a process was killed.

    Example:
        >>> from vqtok import tokenize_dataset
        >>> tokenize_dataset("photos", "codes", "me/my-image-vq", image_size=256, processes=8)  # doctest: +SKIP
    """
    numbers = {"batch_size": batch_size, "image_size": image_size, "rows_per_shard": rows_per_shard}
    numbers |= {"processes": processes, "threads": threads, "readers": readers}
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    check_share(worker, num_workers)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if not isinstance(tokenizer, VQTokenizer):
        tokenizer = VQTokenizer.from_pretrained(tokenizer, revision=revision)
    if tokenizer.fingerprint is None:
        raise ValueError("this tokenizer was never saved, so its codes have no fingerprint: save_pretrained it first")
    if image_size is not None and tokenizer.modality != "image":
        raise ValueError(f"image_size is for pictures, this tokenizer is for {tokenizer.modality}: leave it out")
    if resample and tokenizer.modality != "audio":
        raise ValueError(f"resample is for sound, this tokenizer is for {tokenizer.modality}: leave it out")
    if any(source == each.embedded for each in MEDIA.values()) and not Path(source).exists():
        raise ValueError(f"{source} comes with vqtok, already in memory: encode it with examples/encode_dataset.py")
    columns = Columns(media_column, caption_column, label_column, tuple(keep))
    medium = MEDIA[tokenizer.modality]
    found = open_input(source, medium, columns, rows_per_shard, split, config_name, data_revision, streaming)
    settings = Settings(batch_size, image_size, threads, readers)
    device = device or _best_device()
    facts = _facts(tokenizer, source, found, settings, device)
    work = Work(tokenizer, found, Path(output), facts, settings, device)
    with _resampling(tokenizer, resample):
        if resample:
            facts["preprocessing"]["resample"] = True
        return _run(work, worker, num_workers, processes, engine)


def _run(work: Work, worker: int, num_workers: int, processes: int, engine: str) -> Tokenized:
    job = Job(work.folder, work.facts)
    mine = range(worker, len(job.units), num_workers)
    # Checksums of a large job that goes on take minutes.
    checked = tqdm(mine, desc="what is there", unit=" shards", delay=1, leave=False, disable=None)
    missing = [number for number in checked if not job.is_finished(number)]
    if len(missing) < len(mine):
        print(f"{len(mine) - len(missing)} of {len(mine)} shards are there already", file=sys.stderr)
    known = [job.units[number].get("samples") for number in missing]
    progress = Progress(len(missing), None if None in known else sum(known))
    try:
        _encode(work, missing, processes, engine, progress)
        # Those that another process had, which may have been killed since.
        left = [number for number in missing if not job.is_finished(number, thorough=False)]
        _encode(work._replace(wait=True), left, processes, engine, progress)
    except OSError as error:
        text = f"{error.strerror or error}. {progress.finished} shards were finished and are kept: start again to go on"
        raise (OSError(error.errno, text) if error.errno else OSError(text)) from error
    finally:
        progress.close()
    done, manifest = job.finish()
    return Tokenized(work.folder, done, len(job.units), progress.samples, progress.skipped, manifest)


def _encode(work: Work, numbers: Sequence[int], processes: int, engine: str, progress: Progress) -> None:
    if not numbers:
        return
    if engine == "ray":
        run_on_ray(work, numbers, processes, progress)
    elif processes == 1 or len(numbers) < 2:
        run_here(work, numbers, progress)
    else:
        run_in_processes(work, numbers, processes, progress)


@contextmanager
def _resampling(tokenizer: VQTokenizer, resample: bool) -> Iterator[None]:
    """The tokenizer with a processor that resamples; afterwards it is as it was."""
    before = getattr(tokenizer.processor, "resample", None)
    if resample:
        tokenizer.processor.resample = True
    try:
        yield
    finally:
        if resample:
            tokenizer.processor.resample = before


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _facts(tokenizer: VQTokenizer, given: Any, source: Source, settings: Settings, device: str) -> dict[str, Any]:
    """What is made, of what and how: all that the bytes depend on, and nothing of this machine's paths."""
    processor, origin = tokenizer.processor, tokenizer.source
    own = {name: getattr(processor, name) for name in _CONVERSIONS if hasattr(processor, name)}
    packages = ["torch", "transformers", "vqtok", "pyarrow", "pillow" if tokenizer.modality == "image" else "numpy"]
    home = tokenizer.home
    is_path = isinstance(given, (str, os.PathLike))
    # A name on the Hub stays as it is, of a folder only its own name.
    title = (Path(given).name if Path(given).expanduser().exists() else str(given)) if is_path else type(given).__name__
    return {
        "fingerprint": tokenizer.fingerprint,
        "tokenizer": origin or {"folder": home.name if home else None},
        "layout": tokenizer.layout.to_dict(),
        "modality": tokenizer.modality,
        "preprocessing": {**processor.code_fields, **own, "image_size": settings.image_size},
        "dtype": str(tokenizer.model.dtype).removeprefix("torch."),
        "device": device.split(":")[0],
        "batch_size": settings.batch_size,
        "threads": settings.threads,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "label_names": source.label_names,
        "source": {"name": title, "kind": source.kind, "units": source.units},
    }
