"""Time and memory of calls, for the benchmarks: several contestants in turn in one process, memory in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqtok.evaluation.report import machine

MIB = 1 << 20
_SAMPLE_SECONDS = 0.02  # a shorter call is repeated until a sample of the clock lasts about this long
# A tensor above 64 KiB is a mapping of its own and goes back to the system when it is freed. So the resident memory of the process
# grows by what a call needs, and never hides in what an earlier one has left.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
}


@dataclass
class Timing:
    """Seconds of one call by round; `number` calls made up each sample."""

    number: int = 1
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median over rounds, in seconds."""
        return statistics.median(self.seconds.values())

    @property
    def least(self) -> float:
        """The fastest round, in seconds."""
        return min(self.seconds.values())

    def ratio(self, other: Timing) -> float:
        """The median of this over the median of `other`, of the rounds in which both ran."""
        both = self.seconds.keys() & other.seconds.keys()
        one, two = ([timing.seconds[i] for i in both] for timing in (self, other))
        return statistics.median(one) / statistics.median(two)


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, runs: Mapping[str, int], device: torch.device
) -> dict[str, Timing]:
    """Time the calls, one after another in every round, so that whatever else the machine does hits all alike.

    Args:
        calls: what to time, by name.
        rounds: how often.
        runs: of slow calls, in how many rounds they take part, evenly spread; these are not warmed up at full size.
        device: is waited for.
    """
    timings = {name: Timing() for name in calls}
    gc.collect()
    for name, call in calls.items():
        if name not in runs:
            _seconds(call, 1, device)
            once = _seconds(call, 1, device)
            timings[name].number = max(1, min(1000, math.ceil(_SAMPLE_SECONDS / max(once, 1e-7))))
    for index in range(rounds):
        for name, call in calls.items():
            some = min(rounds, runs.get(name, rounds))
            if index in {i * rounds // some for i in range(some)}:
                timings[name].seconds[index] = _seconds(call, timings[name].number, device)
    return timings


def _seconds(call: Callable[[], Any], number: int, device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(number):
        call()
    _wait_for(device)
    return (time.perf_counter() - start) / number


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most memory that `call` held beyond what was there before, its results included.

    On CUDA as torch's allocator counts it. On a CPU the growth of the resident memory: Linux forgets its peak (5 written to
    /proc/self/clear_refs), the call runs, and the new peak is read. Only right in a process started with `MALLOC`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = call()  # noqa: F841 (lives until the peak is read)
    return _status("VmHWM") - before


def peak_bytes() -> int:
    """The most memory that was ever resident in this process."""
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {name}: memory can be measured on Linux only")
    return int(found[1]) * 1024


def in_new_process(script: str, arguments: Sequence[str]) -> Any:
    """What the last line that `script` prints says, as JSON; it runs in a fresh process under `MALLOC`.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(arguments)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def in_fork(call: Callable[[], Any]) -> Any:
    """What `call()` gives in a copy of this process, None if that fails: imports are paid once, and no row sees another's memory.

    Only in a process that has not computed anything yet, because threads do not survive a fork.
    """
    here, there = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(there, json.dumps(call()).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(there)
    with os.fdopen(here) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def machine_line(device: torch.device, *packages: str) -> str:
    """Processor, cores, threads, device and versions in one line; no names of hosts and no paths."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *packages)]
    return ", ".join([*(f"{key} {value}" for key, value in machine(device).items()), *versions])


@dataclass(frozen=True)
class Asked:
    """A number that was asked for: `what` ("time" or "memory" as a share of the row `of`, or "bytes") is at most `most`."""

    what: str
    most: float
    of: str = ""


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        group: what is timed in turn with it, as the table says it.
        who: whose it is.
        make: `make(num)` gives the call for that many latents.
        num: latents.
        size: what else the table says about its size.
        numbers: numbers in a latent, for rows that are about the time per number; 0 for the others.
        against: the row of its group that it is compared with.
        slow: runs a few times only.
        memory: whether its memory is measured.
        search: `search(table)` gives `z -> codes`, for rows whose wrong codes are counted.
        shape: (K, D) of such a row's table.
        asked: what was asked of it.
    """

    group: str
    who: str
    make: Callable[[int], Callable[[], Any]]
    num: int
    size: str = ""
    numbers: int = 0
    against: str = ""
    slow: bool = False
    memory: bool = True
    search: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
    shape: tuple[int, int] = (0, 0)
    asked: tuple[Asked, ...] = ()

    @property
    def name(self) -> str:
        """Unique in the table."""
        return f"{self.group}/{self.who}/{self.size}/{self.num}"


@dataclass
class Row:
    """A measured row; `relative` is its time and `relative_memory` its memory as shares of the row it is compared with."""

    case: Case
    timing: Timing
    relative: float | None = None
    extra_bytes: int | None = None
    relative_memory: float | None = None
    wrong: float | None = None
    asked: list[tuple[Asked, bool]] = field(default_factory=list)


def _say(asked: Asked, short: Mapping[str, str]) -> str:
    if asked.what == "bytes":
        return f"extra at most {asked.most / MIB:.0f} MiB"
    share = f"1/{1 / asked.most:.0f}" if asked.most < 1 else f"{asked.most:g}"
    return f"{asked.what} at most {share} of {short.get(asked.of, asked.of)}"


def _of(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"1/{1 / ratio:.1f}" if ratio < 0.5 else f"{ratio:.2f}"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def speed_table(rows: Sequence[Row], short: Mapping[str, str]) -> str:
    """The Markdown table of the rows; `short` has shorter words for what rows are compared with."""
    head = [
        "what", "whose", "ms (median)", "ms (least)", "time, of", "extra MiB", "memory, of", "ns per latent",
        "ns per number", "wrong codes at +100", "asked",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * 8 + " --- |"]
    for row in rows:
        case = row.case
        what = f"{case.group}, N={case.num}, {case.size}" if case.numbers else case.group
        per_latent = 1e9 * row.timing.median / case.num
        cells = [
            what,
            f"**{case.who}**" if case.who.startswith("vqtok") else case.who,
            _time(row.timing.median),
            _time(row.timing.least),
            f"{_of(row.relative)} of {short.get(case.against, case.against)}" if row.relative is not None else "",
            f"{row.extra_bytes / MIB:.1f}" if row.extra_bytes is not None else "",
            f"{_of(row.relative_memory)} of {short.get(case.against, case.against)}"
            if row.relative_memory is not None
            else "",
            f"{per_latent:.4g}",
            f"{per_latent / case.numbers:.3g}" if case.numbers else "",
            f"{100 * row.wrong:.2f} %" if row.wrong is not None else "",
            "; ".join(f"{_say(asked, short)}: {'yes' if met else '**no**'}" for asked, met in row.asked),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain(row: Row) -> dict[str, Any]:
    """What JSON holds of a row."""
    case = row.case
    return {
        "group": case.group,
        "who": case.who,
        "size": case.size,
        "num": case.num,
        "median_s": row.timing.median,
        "least_s": row.timing.least,
        "runs": len(row.timing.seconds),
        "against": case.against,
        "relative_time": row.relative,
        "extra_bytes": row.extra_bytes,
        "relative_memory": row.relative_memory,
        "wrong_codes": row.wrong,
        "asked": [{**asdict(asked), "met": met} for asked, met in row.asked],
    }
