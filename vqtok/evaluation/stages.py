"""What the demos share: stages that are timed and not repeated, scripts that are launched, figures that reach the card.

Needs psutil, an extra (`pip install vqtok[demo]`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqtok.files import write_json, write_text
from vqtok.hub.card import pipeline_card


class Stages:
    """Seconds of each stage, kept in a file, so that a demo that was stopped still knows what it took.

    Args:
        path: of the file, which need not exist.

    Attributes:
        done: names of the stages that need not be repeated.
        spent: seconds by stage; "start" is what came before the first one, from the start of the process on.
    """

    def __init__(self, path: Path):
        import psutil

        self.path = path
        before = json.loads(path.read_text()) if path.exists() else {"done": [], "seconds": {}}
        self.done: list[str] = before["done"]
        self.spent: dict[str, float] = before["seconds"]
        # From the start of the process on: imports count too.
        self.spent["start"] = self.spent.get("start", 0.0) + time.time() - psutil.Process().create_time()

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(self.spent.values())

    def run(self, name: str, action: Callable[[], Any]) -> None:
        """Do it unless it is done."""
        if name not in self.done:
            with self.timed(name):
                action()
                self.done.append(name)

    def forget(self, *names: str) -> None:
        """Of stages that are done every time only the last time counts."""
        for name in names:
            self.spent.pop(name, None)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a stage that is done every time."""
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        try:
            yield
        finally:  # of a stage that was stopped too
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - start
            write_json(self.path, {"done": self.done, "seconds": self.spent})


def launch(script: Path, output_dir: Path, flags: Sequence[str], num_threads: int = 0, max_steps: int = 0) -> None:
    """Run a training script in a process of its own, as `accelerate launch` on one process does; end with its status if it fails.

    Args:
        script: its file.
        output_dir: its `--output_dir`.
        flags: all others.
        num_threads: of torch; 0 takes every core.
        max_steps: 0 takes the recipe's.
    """
    threads = str(num_threads or os.cpu_count() or 1)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads]
    command += [str(script), "--output_dir", str(output_dir), "--num_threads", threads, *flags]
    if max_steps:
        command += ["--max_steps", str(max_steps), "--warmup_steps", str(max(1, min(50, max_steps // 4)))]
    if code := subprocess.run(command).returncode:
        sys.exit(code)  # the script has said why


def record_judged(pipeline: Path, judged: Mapping[str, Any], prompt: str, modality: str = "image") -> None:
    """Add what was judged, and a prompt for the example, to the figures of a pipeline conditioned on text, and to its card.

    Args:
        pipeline: its folder, as `examples/train_prior.py` leaves it.
        judged: figures by name, see `vqtok.hub.card.pipeline_card`.
        prompt: that the pipeline takes.
        modality: of its media.
    """
    metrics, training = (json.loads((pipeline / f"{name}.json").read_text()) for name in ("metrics", "training"))
    metrics |= {"judged": dict(judged), "prompt": prompt}  # a push renders the card anew from here
    write_json(pipeline / "metrics.json", metrics)
    name = "/".join(pipeline.resolve().parts[-2:])
    write_text(pipeline / "README.md", pipeline_card(name, metrics, training, "text", modality))
