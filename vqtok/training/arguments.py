"""Arguments of a training run: one dataclass, from flags, from a recipe's training.json, or both."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


@dataclass
class TrainingArguments:
    """What a run does, whatever it trains. A step is one optimizer step.

    Raises:
        ValueError: a value is out of range, named with the range.
    """

    output_dir: str = field(
        metadata={"help": "Folder of the result and of the checkpoints; the same command continues there."}
    )
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(
        default=64, metadata={"help": "Samples per optimizer step, over all processes and accumulation."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Parts that a process cuts its batch into."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    final_learning_rate: float = field(
        default=0.0, metadata={"help": "Share of the peak left at the end of the cosine."}
    )
    init_steps: int = field(default=16, metadata={"help": "Steps whose data fresh codebooks are initialised from."})
    warmup_steps: int = field(default=50, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's decay, on matrices and kernels only."})
    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping; 0 switches it off."})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, bf16 or fp16.", "choices": ["no", "bf16", "fp16"]}
    )
    average_decay: float = field(
        default=0.999, metadata={"help": "Decay of the weight average that is published; 0 for none."}
    )
    seed: int = field(default=0, metadata={"help": "Decides initial weights, data order, crops and dropout."})
    log_every: int = field(default=50, metadata={"help": "Steps between two log lines."})
    eval_every: int = field(default=0, metadata={"help": "Steps between two evaluations; 0 evaluates at the end only."})
    save_every: int = field(default=500, metadata={"help": "Steps between two checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints stay."})
    num_workers: int = field(default=0, metadata={"help": "Processes that load data."})
    num_threads: int = field(default=0, metadata={"help": "Threads of torch per process; 0 leaves torch's choice."})
    report_to: str = field(
        default="none", metadata={"help": "A tracker of accelerate (tensorboard, trackio, wandb, ...) or none."}
    )

    def __post_init__(self) -> None:
        positive = (
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "init_steps",
            "log_every",
            "save_every",
            "keep_checkpoints",
        )
        for name in positive:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "warmup_steps",
            "eval_every",
            "num_workers",
            "num_threads",
            "max_grad_norm",
            "weight_decay",
            "seed",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(0 < self.learning_rate < 10, "learning_rate", self.learning_rate, "between 0 and 10")
        _require(
            0 <= self.final_learning_rate <= 1, "final_learning_rate", self.final_learning_rate, "a share in [0, 1]"
        )
        for name in ("average_decay", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")


# What may differ between the first and a later call of the same run: it changes no number, the threads but for rounding.
FREE_ARGUMENTS = frozenset(
    [
        "output_dir",
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "num_workers",
        "num_threads",
        "report_to",
    ]
)


def parse_arguments(
    classes: Sequence[type],
    argv: Sequence[str] | None,
    recipe: dict[str, Any] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """The dataclasses `classes`, filled from `recipe` and then from the flags in `argv`.

    Raises:
        ValueError: the recipe has a key or `argv` a flag that no class knows; the nearest known name is said.
        SystemExit: a flag has a value of a wrong type or a required one is missing, as argparse reports it.
    """
    parser = HfArgumentParser(list(classes), description=description)
    if recipe:
        known = {f.name for cls in classes for f in dataclasses.fields(cls)}
        for key in recipe:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
                raise ValueError(f"the recipe has an unknown argument {key!r}. Did you mean {near[0]!r}?")
    argv = sys.argv[1:] if argv is None else list(argv)
    # As flags before the others: argparse then checks the types of a recipe too, and the later flag wins.
    *filled, rest = parser.parse_args_into_dataclasses(
        args=[*_flags(recipe or {}), *argv], return_remaining_strings=True
    )
    if rest:
        near = difflib.get_close_matches(rest[0], [f"--{action.dest}" for action in parser._actions], n=1, cutoff=0.0)
        raise ValueError(f"unknown argument {rest[0]}. Did you mean {near[0]}?")
    return tuple(filled)


def _flags(recipe: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in recipe.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """The content of `folder/training.json`, {} when there is none.

    Raises:
        ValueError: the file is no JSON object, or is of a trained folder.
    """
    path = Path(folder) / "training.json"
    if not path.exists():
        return {}
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold a JSON object of training arguments, got {type(recipe).__name__}")
    if "arguments" in recipe:
        raise ValueError(
            f"{folder} is a trained folder, not a recipe: continue from it with --tokenizer, or name its recipe"
        )
    return recipe


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ValueError(f"--{name} must be {wanted}, got {value!r}")
