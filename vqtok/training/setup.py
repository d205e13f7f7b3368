"""The start and the end of a training script, the same for every model."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from huggingface_hub.errors import StrictDataclassError

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
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if tracked:
        accelerator.init_trackers("vqtok")
    return accelerator


def save_training(folder: str | Path, arguments: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Write `training.json`: what was run and how it went. Paths of the machine stay out."""
    private = ("output_dir", "tokenizer", "codes", "dataset", "text_tokenizer")
    kept = {
        name: Path(value).name if name in private and isinstance(value, str) else value
        for name, value in arguments.items()
    }
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    value = {"arguments": kept, "versions": {**versions, "python": platform.python_version()}, "history": history}
    write_json(Path(folder) / "training.json", value)


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
