"""The start and the end of a training script, the same for every model."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from vqtok.files import write_json

from .arguments import TrainingArguments
from .loop import Stopped

_FOR_PEOPLE = (ValueError, OSError, FloatingPointError, StrictDataclassError, Stopped)


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """An `Accelerator` for `args`, with torch's threads set and the tracker started."""
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    tracked = args.report_to != "none"
    accelerator = Accelerator(
        # Without this, two processes on a machine without accelerator train apart, each believing itself alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        log_with=args.report_to if tracked else None,
        project_dir=args.output_dir if tracked else None,
        # Codebooks are equal on all processes by their own update; broadcasting rank 0's buffers would only hide a fault.
        # The other processes wait while the main one encodes a data set, evaluates or publishes.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )
    if tracked:
        settings = {name: value for name, value in asdict(args).items() if isinstance(value, int | float | str | bool)}
        accelerator.init_trackers("vqtok", config=settings)
    return accelerator


def best_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    # A build for CUDA names it as its accelerator on machines without one too.
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def model_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a config a run must not change between two calls: not the fingerprint of its result, not a version."""
    return {k: v for k, v in config.to_diff_dict().items() if k not in ("fingerprint", "transformers_version")}


def save_training(
    folder: str | Path, arguments: dict[str, Any], history: list[dict[str, float]], seconds: float
) -> None:
    """Write `training.json`: what was run, how it went and how long it took.

    Of paths only the last part stays; names on the Hub stay whole.
    """
    kept = {name: _without_folders(value) for name, value in arguments.items()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    value = {"arguments": kept, "versions": {**versions, "python": platform.python_version()}, "seconds": seconds}
    value["history"] = history
    write_json(Path(folder) / "training.json", value)


def _without_folders(value: Any) -> Any:
    is_path = isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists() or value.startswith("."))
    return Path(value).name if is_path else value


def finish(accelerator: Accelerator) -> None:
    """Wait for all processes and close trackers and process group."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def run_script(main: Callable[[], Any]) -> None:
    """Call `main`; an error that is meant for people ends the process with one line instead of a traceback."""
    try:
        main()
    except _FOR_PEOPLE as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
