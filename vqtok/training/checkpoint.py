"""Checkpoints of one's own runs: accelerate's state, the averaged weights and one JSON, in a folder that is whole or absent.

They are trusted and never published: accelerate keeps optimizer states in torch's format.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vqtok.files import sync, write_json

from .arguments import FREE_ARGUMENTS
from .averaging import WeightAverage
from .sharding import set_whole, whole


def save_checkpoint(
    accelerator: Accelerator, folder: str | Path, state: dict[str, Any], average: WeightAverage | None, keep: int
) -> Path:
    """Write `folder/step-N` (N = state["step"]) and remove all but the `keep` newest.

    Raises:
        OSError: the disk is full, say; the earlier checkpoints are untouched and the half-written one is gone.
    """
    folder = Path(folder)
    target, partial = folder / f"step-{state['step']}", folder / f".step-{state['step']}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        averaged = {} if average is None else {name: whole(value) for name, value in average.values.items()}
        if accelerator.is_main_process:
            if average is not None:
                save_file(averaged, partial / "averaged.safetensors")
            write_json(partial / "state.json", {**state, "averaged_updates": 0 if average is None else average.updates})
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors have errors of their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write the checkpoint {target}: {error}. Earlier checkpoints are whole: if the disk is full, free some "
            "space; then start the same command again"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in partial.rglob("*"):  # sharded states are folders
            if file.is_file():
                sync(file)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(
    accelerator: Accelerator, folder: str | Path, arguments: dict[str, Any], average: WeightAverage | None
) -> dict[str, Any] | None:
    """Restore everything from the newest checkpoint in `folder`; None when there is none.

    Raises:
        ValueError: the run was started with other arguments (each is named with both values), or the checkpoint is damaged.
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        before = state["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(newest, error)) from error
    _check_arguments(before, arguments, newest)
    try:
        accelerator.load_state(str(newest))
        if average is not None:
            for name, value in load_file(newest / "averaged.safetensors").items():
                set_whole(average.values[name], value)
            average.updates = state["averaged_updates"]
    except (OSError, RuntimeError, KeyError, EOFError, SafetensorError) as error:
        raise ValueError(_damaged(newest, error)) from error
    return state


def _damaged(checkpoint: Path, error: Exception) -> str:
    return f"{checkpoint} cannot be read ({error}): delete it, and the same command continues from the one before it"


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in Path(folder).glob("step-*")]
    return [path for _, path in sorted((int(m[1]), p) for m, p in named if m and (p / "state.json").exists())]


def _check_arguments(before: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    changed = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(set(before) | set(now))
        if name not in FREE_ARGUMENTS and before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} is of a run with other arguments ({'; '.join(changed)}): give the old ones to continue it, or another "
            "--output_dir for a new run"
        )
