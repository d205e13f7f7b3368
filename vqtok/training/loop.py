"""The loop: when to step, log, evaluate, save and stop. What a step does is in steps.py."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from .arguments import TrainingArguments
from .checkpoint import load_checkpoint, save_checkpoint
from .steps import OptimizerStep

Evaluate = Callable[[int], dict[str, float]]
MakeLoader = Callable[[int], Any]


class Stopped(Exception):  # noqa: N818 (no error: the run did what it was asked)
    """The run was asked to stop (Ctrl-C, SIGTERM); a checkpoint was written and the same command continues."""


def fit(
    accelerator: Accelerator,
    step: OptimizerStep,
    loader: MakeLoader,
    args: TrainingArguments,
    *,
    evaluate: Evaluate | None = None,
    extra_arguments: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train for `args.max_steps` optimizer steps, from the newest checkpoint in `args.output_dir` if there is one.

    Every step seeds torch from (seed, step, process), data order is a function of the step, the learning rate too: so a run that
    was stopped anywhere and started again ends with the weights of one that never stopped.

    Args:
        step: does one optimizer step.
        loader: `loader(start)` gives the micro-batches from step `start` on, `args.gradient_accumulation_steps` for each step.
        evaluate: `evaluate(step)` returns metrics of the published weights; the key "loss" (smaller is better) decides at the
            end whether the averaged or the raw weights are kept in the model. Called on the main process only.
        extra_arguments: more that must not change between two calls of the same run (data set, config); JSON-able.

    Returns:
        The model is left in eval mode. The history: one dict of floats per log line or evaluation, with the key "step".

    Raises:
        Stopped: Ctrl-C or SIGTERM; a checkpoint of the last whole step was written.
        ValueError: other arguments than the run was started with.
        FloatingPointError: the loss or the gradient is not finite; the weights are not touched, the last checkpoint is whole.
        OSError: a checkpoint could not be written; earlier ones are whole.
    """
    folder = Path(args.output_dir) / "checkpoints"
    arguments = {**dataclasses.asdict(args), **(extra_arguments or {}), "num_processes": accelerator.num_processes}
    # As a file gives them back (whole-number keys become words, tuples lists), so that equal arguments compare equal.
    arguments = json.loads(json.dumps(arguments))
    state = load_checkpoint(accelerator, folder, arguments, step.average)
    start, history = (state["step"], state["history"]) if state else (0, [])
    begin = time.monotonic() - (state.get("seconds", 0.0) if state else 0.0)

    def save(number: int) -> None:
        save_checkpoint(
            accelerator,
            folder,
            {"step": number, "arguments": arguments, "history": history, "seconds": time.monotonic() - begin},
            step.average,
            args.keep_checkpoints,
        )

    if state:
        accelerator.print(
            f"continuing {args.output_dir} at step {start} of {args.max_steps}", file=sys.stderr, flush=True
        )
    else:
        step.begin(itertools.islice(loader(0), args.init_steps * args.gradient_accumulation_steps))
    progress = _Progress(accelerator, args, start)
    micro_batches = iter(loader(start))
    parts = args.gradient_accumulation_steps
    with _stop_signals() as stop_asked:
        for number in range(start + 1, args.max_steps + 1):
            batches = [next(micro_batches) for _ in range(parts)]
            torch.manual_seed(hash((args.seed, number, accelerator.process_index)) % (1 << 63))
            step.prepared.train()
            metrics = step(batches, learning_rate(number, args))
            progress.add(metrics)
            if number % args.log_every == 0 or number == args.max_steps:
                history.append(progress.log(number, step.health()))
                progress.warn(step.warnings())
                accelerator.log({k: v for k, v in history[-1].items() if k != "step"}, step=number)
            if evaluate is not None and args.eval_every and number % args.eval_every == 0 and number < args.max_steps:
                _evaluate(accelerator, step, evaluate, number, history)
            if _any_process(accelerator, bool(stop_asked)):
                save(number)
                raise Stopped(f"stopped after step {number}; the same command continues from there")
            if number % args.save_every == 0 and number < args.max_steps:
                save(number)
    step.seconds = time.monotonic() - begin
    progress.close()
    if start < args.max_steps:
        save(args.max_steps)
    # Takes accelerate's autocast off the model's forward.
    accelerator.unwrap_model(step.prepared, keep_fp32_wrapper=False)
    _publish(accelerator, step, evaluate, args.max_steps, history)
    return history


def learning_rate(number: int, args: TrainingArguments) -> float:
    """Linear warm-up to the peak, then a cosine to `final_learning_rate` of it; `number` counts from 1."""
    if number <= args.warmup_steps:
        return args.learning_rate * number / args.warmup_steps
    done = (number - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    low = args.final_learning_rate
    return args.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _evaluate(
    accelerator: Accelerator, step: OptimizerStep, evaluate: Evaluate, number: int, history: list[dict[str, float]]
) -> None:
    measured = _measure(accelerator, step, evaluate, number, step.average is not None)
    if accelerator.is_main_process:
        record = {"step": number, **{f"eval_{name}": float(value) for name, value in measured.items()}}
        history.append(record)
        words = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        tqdm.write(f"step {number}  {words}", file=sys.stderr)
        accelerator.log({k: v for k, v in record.items() if k != "step"}, step=number)
    accelerator.wait_for_everyone()


def _publish(
    accelerator: Accelerator,
    step: OptimizerStep,
    evaluate: Evaluate | None,
    number: int,
    history: list[dict[str, float]],
) -> None:
    """Leave in the model the averaged weights, unless they measure worse than the raw ones."""
    keep_average = torch.tensor(float(step.average is not None), device=accelerator.device)
    if evaluate is not None and step.average is not None:
        raw, averaged = (_measure(accelerator, step, evaluate, number, kind) for kind in (False, True))
        if accelerator.is_main_process:
            if averaged["loss"] > raw["loss"]:
                keep_average.zero_()
            history.append(
                {"step": number, "eval_loss_raw": float(raw["loss"]), "eval_loss_averaged": float(averaged["loss"])}
            )
        if accelerator.num_processes > 1:
            torch.distributed.broadcast(keep_average, 0)
    step.publish(averaged=bool(keep_average))


@torch.no_grad()
def _measure(
    accelerator: Accelerator, step: OptimizerStep, evaluate: Evaluate, number: int, averaged: bool
) -> dict[str, float]:
    """Metrics on the main process, {} on the others, which may be needed to gather the weights."""
    with step.weights(averaged):
        if not accelerator.is_main_process:
            return {}
        step.model.eval()
        return evaluate(number)


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor(float(flag), device=accelerator.device)
    torch.distributed.all_reduce(value)
    return bool(value)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step; the second one is obeyed at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nfinishing this step and writing a checkpoint; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A bar on a terminal, plain lines elsewhere; means of the metrics since the last line."""

    def __init__(self, accelerator: Accelerator, args: TrainingArguments, start: int):
        self.shown = accelerator.is_main_process
        self.terminal = self.shown and sys.stderr.isatty()
        self.total, self.begin, self.done, self.since = args.max_steps, time.monotonic(), start, start
        self.bar = tqdm(total=args.max_steps, initial=start, disable=not self.terminal, unit="step", dynamic_ncols=True)
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0
        self.told: set[str] = set()

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        self.sums = {name: self.sums.get(name, 0) + value.float() for name, value in metrics.items()}
        self.count, self.done = self.count + 1, self.done + 1
        self.bar.update()

    def log(self, number: int, health: dict[str, float]) -> dict[str, float]:
        means = {**{name: float(value) / self.count for name, value in self.sums.items()}, **health}
        self.sums, self.count = {}, 0
        rate = (number - self.since) / (time.monotonic() - self.begin)
        if self.shown:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
            if self.terminal:
                self.bar.set_postfix_str(shown)
            else:
                left = (self.total - number) / rate
                print(
                    f"step {number}/{self.total}  {shown}  {rate:.1f} steps/s  {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
        return {"step": number, **means}

    def warn(self, sentences: list[str]) -> None:
        """Say each thing once; a sentence begins with what it is about and a colon."""
        for sentence in sentences:
            about = sentence.partition(":")[0]
            if self.shown and about not in self.told:
                self.bar.write(f"warning: {sentence}", file=sys.stderr)
            self.told.add(about)

    def close(self) -> None:
        self.bar.close()
