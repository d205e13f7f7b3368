"""Processes of one machine: each encodes one unit after another, and whoever dies takes nothing with him but his unfinished shard."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from vqtok.auto import VQTokenizer

from .inputs import Source
from .job import Job
from .units import Settings, encode_units


class Work(NamedTuple):
    """All that a process needs; it is pickled."""

    tokenizer: VQTokenizer
    source: Source
    folder: Path
    facts: dict[str, Any]
    settings: Settings
    device: str
    wait: bool = False  # for units that another process has, instead of leaving them to it

    def placed(self, index: int) -> Work:
        """The work of process number `index`: on a machine with several GPUs each has its own."""
        if self.device != "cuda":
            return self
        return self._replace(device=f"cuda:{index % torch.cuda.device_count()}")

    def encode(
        self, numbers: Iterable[int], report: Callable[[int], Any], done: Callable[[dict[str, Any] | None], Any]
    ) -> None:
        """Encode the units of these numbers in this process; see `encode_units`."""
        tokenizer, job = self.tokenizer.to(self.device), Job(self.folder, self.facts, self.wait)
        with fixed_threads(self.settings.threads):
            encode_units(tokenizer, self.source, job, self.settings, numbers, report, done)


class Progress:
    """A line with samples, rate and the time that is left, on stderr; nothing where nobody looks."""

    def __init__(self, units: int, samples: int | None):
        self.bar = tqdm(total=samples, desc=f"0/{units} shards", unit=" samples", disable=None, smoothing=0.1)
        self.units, self.finished, self.skipped, self.samples, self.started = units, 0, 0, 0, time.perf_counter()

    def count(self, samples: int) -> None:
        self.samples += samples
        self.bar.update(samples)

    def finish_unit(self, record: dict[str, Any] | None) -> None:
        """Count a unit; None is one that another process has, or had."""
        if record is None:
            return
        self.finished += 1
        self.skipped += record["num_skipped"]
        left = (time.perf_counter() - self.started) / self.finished * (self.units - self.finished)
        note = f", {self.skipped} left out" if self.skipped else ""
        self.bar.set_description_str(f"{self.finished}/{self.units} shards{note}")
        if self.bar.total is None:  # the samples are not known beforehand, so the shards tell the time
            self.bar.set_postfix_str(f"{left / 60:.0f} min left")

    def close(self) -> None:
        self.bar.close()


def run_here(work: Work, numbers: Sequence[int], progress: Progress) -> None:
    """Encode units in this process, one after another."""
    work.placed(0).encode(numbers, progress.count, progress.finish_unit)


def run_in_processes(work: Work, numbers: Sequence[int], processes: int, progress: Progress) -> None:
    """Encode units in fresh processes, which are given the next one when they are done with one.

    Raises:
        OSError, ValueError: what stopped one of them; the others are stopped, too. RuntimeError: one was killed.
    """
    context = multiprocessing.get_context("spawn")
    waiting, busy = iter(numbers), {}
    members = []
    try:
        for index in range(min(processes, len(numbers))):
            here, there = context.Pipe()
            process = context.Process(target=_member, args=(work.placed(index), there), daemon=True)
            process.start()
            there.close()
            members.append((process, here))
            busy[here] = process
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                _hear(connection, busy, waiting, progress)
    finally:
        for process, here in members:
            here.close()
            process.join(5 if not busy else 0)
            if process.is_alive():
                process.kill()  # shards are whole or absent whenever that happens
                process.join()


def _hear(connection: Connection, busy: dict[Any, Any], waiting: Iterator[int], progress: Progress) -> None:
    try:
        kind, value = connection.recv()
        if kind == "next":
            connection.send(next(waiting, None))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        process = busy[connection]
        process.join(5)
        code = process.exitcode
        reason = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        hint = " (out of memory? use fewer processes)" if code == -signal.SIGKILL else ""
        raise RuntimeError(
            f"a process that encodes was {reason}{hint}: its finished shards are kept, start again to go on"
        ) from None
    if kind == "count":
        progress.count(value)
    elif kind == "record":
        progress.finish_unit(value)
    elif kind == "end":
        del busy[connection]
    elif kind == "error":
        error, message, errno = value
        raise OSError(errno, message) if issubclass(error, OSError) and errno else error(message)


def _member(work: Work, connection: Connection) -> None:
    """The life of a process: it asks for numbers until there are none, and tells counts and records."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started us; his end of the pipe closes
    talking = threading.Lock()

    def say(kind: str, value: Any = None) -> None:
        with talking:  # numbers are asked for by the thread that reads
            connection.send((kind, value))

    def numbers() -> Iterator[int]:
        say("next")
        while (number := connection.recv()) is not None:
            yield number
            say("next")

    try:
        work.encode(numbers(), lambda count: say("count", count), lambda record: say("record", record))
        say("end")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # nobody listens any more
    except Exception as error:
        kind = next(
            kind for kind in (OSError, ValueError, ImportError, RuntimeError, Exception) if isinstance(error, kind)
        )
        text = str(error) if kind is not Exception else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror
        print(f"a process that encodes stopped: {text}", file=sys.stderr)
        say("error", (RuntimeError if kind is Exception else kind, text, getattr(error, "errno", None)))


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """torch with this many threads: products of matrices may round differently with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
