"""What one training step does: a tokenizer's, a prior's. When it happens is the loop's business."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqtok.quantizers import CodebookHealth, update_all

from .arguments import TrainingArguments
from .averaging import WeightAverage
from .sharding import gather_into, is_sharded, whole


class OptimizerStep:
    """One AdamW step over the micro-batches of a step: forward, backward, clipping, update, weight average.

    A subclass says what a micro-batch is: `compute(batch) -> (loss, metrics)`, and what follows the update: `after_update()`.

    Attributes:
        model: the bare model, which is measured and published; `prepared` is what accelerate made of it.
        trained: the bare model that learns. It is `model`, but where accelerate shards it (FSDP2): `model` is then a whole copy,
            on the CPU, that `weights` and `publish` fill.
        average: the running average of the weights, None when switched off.
        seconds: after a run how long its steps, evaluations and checkpoints took, those before an interruption included.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, args: TrainingArguments):
        self.accelerator, self.model, self.args = accelerator, model, args
        self.trained = model
        self.seconds = 0.0
        if is_sharded(accelerator):
            self.trained = copy.deepcopy(model)
            # The copy that is measured stays on the CPU, where only these kinds of attention run.
            if getattr(model.config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
                model.set_attn_implementation("sdpa")
        optimizer = torch.optim.AdamW(
            _parameter_groups(self.trained, args.weight_decay),
            lr=args.learning_rate,
            betas=(0.9, args.adam_beta2),
            fused=True,
        )
        self.prepared, self.optimizer = accelerator.prepare(self.trained, optimizer)
        self.average = WeightAverage(self.trained, args.average_decay) if args.average_decay else None

    def __call__(self, micro_batches: Sequence[Any], learning_rate: float) -> dict[str, Tensor]:
        """Do one optimizer step and return its metrics, averaged over the micro-batches of this process."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        collected: list[dict[str, Tensor]] = []
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                with self.accelerator.autocast():
                    loss, metrics = self.compute(batch)
                self.accelerator.backward(loss / len(micro_batches))
            collected.append({"loss": loss.detach(), **metrics})
        metrics = {name: torch.stack([part[name] for part in collected]).mean(0) for name in collected[0]}
        norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.args.max_grad_norm or float("inf"))
        norm = metrics["grad_norm"] = whole(norm.detach())
        # Checked before the update, so that the weights stay finite. With fp16 the gradient scaler skips such steps itself.
        if self.args.mixed_precision != "fp16" and not bool(torch.isfinite(norm) & torch.isfinite(metrics["loss"])):
            raise FloatingPointError(
                f"the loss is {float(metrics['loss'])} and the gradient's norm {float(norm)}: lower --learning_rate, or use "
                "--mixed_precision no. The last checkpoint is whole"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.accelerator.optimizer_step_was_skipped:
            self.after_update()
            if self.average is not None:
                self.average.update(self.trained)
        return metrics

    @contextmanager
    def weights(self, averaged: bool) -> Iterator[None]:
        """Let `model` have the averaged or the trained weights inside the block; all processes enter together."""
        if self.trained is not self.model:
            gather_into(self.model, self.average.values if averaged else self.trained.state_dict())
            yield
        elif averaged:
            with self.average.applied(self.model):
                yield
        else:
            yield

    def publish(self, averaged: bool) -> None:
        """Leave the averaged or the trained weights in `model`, in eval mode; all processes call it together."""
        if averaged or self.trained is not self.model:
            gather_into(self.model, self.average.values if averaged else self.trained.state_dict())
        self.model.eval()

    def begin(self, micro_batches: Iterator[Any]) -> None:
        """What must happen once, before the first step of a run that does not continue another; some data to do it with."""

    def compute(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, and what to log."""
        raise NotImplementedError

    def after_update(self) -> None:
        """Whatever must follow the optimizer's update."""

    def health(self) -> dict[str, float]:
        """Numbers about the model itself, for the log line and the trackers."""
        return {}

    def warnings(self) -> list[str]:
        """Sentences that start with what they are about and a colon; the loop says each such thing once."""
        return []


class TokenizerStep(OptimizerStep):
    """A step of a VQ model: its losses, then the update of its codebooks. A batch is the tensor that the model takes.

    Args:
        epoch_size: samples in the data set, for the use of codes over an epoch; None when there is no end to it.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, args: TrainingArguments, epoch_size: int | None = None
    ):
        if is_sharded(accelerator):
            raise ValueError(
                "tokenizers are trained with whole copies of the model, not with FSDP2: launch without its config"
            )
        super().__init__(accelerator, model, args)
        self.codebooks = CodebookHealth(model.quantizer, epoch_size=epoch_size).to(accelerator.device)
        accelerator.register_for_checkpointing(self.codebooks)

    def begin(self, micro_batches: Iterator[Tensor]) -> None:
        """Initialise fresh codebooks from data; where all are frozen they stay so from then on."""
        quantizer = self.model.quantizer
        if not quantizer.is_initialised:
            if frozen := quantizer.frozen:
                quantizer.freeze(False)
            self.model.init_codebooks(batch.to(self.accelerator.device) for batch in micro_batches)
            if frozen:
                quantizer.freeze()

    def compute(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.prepared(batch.to(self.accelerator.device))
        self.codebooks.observe(output.codes)
        return output.loss, {name: value.detach() for name, value in output.losses.items()}

    def after_update(self) -> None:
        update_all([*self.model.quantizer.accumulators, self.codebooks])

    def health(self) -> dict[str, float]:
        """Use and perplexity of each level's codes over the last 65,536 of them, and how many codes were revived."""
        return self.codebooks.summary()

    def warnings(self) -> list[str]:
        return self.codebooks.warnings()


class PriorStep(OptimizerStep):
    """A step of a prior: mean nats per predicted token. A batch is the dict of keyword arguments that the model takes."""

    def compute(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.prepared(**to_device(batch, self.accelerator.device))
        nats = {f"nats_level_{i}": value for i, value in enumerate(output.nats_per_code.detach())}
        if output.text_loss is not None:
            nats["text_loss"] = output.text_loss.detach()
        return output.loss, nats


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch of a prior with every tensor, also in tuples, on `device`."""
    return {
        name: tuple(v.to(device) for v in value) if isinstance(value, tuple) else value.to(device)
        for name, value in batch.items()
    }


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; none for biases, norms, embeddings, codebooks and other learned vectors."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    kernels = {id(getattr(module, "weight", None)) for module in layers}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing to train: every parameter of this model is frozen")
    decayed = [p for p in trained if p.ndim >= 2 and id(p) in kernels]
    rest = [p for p in trained if not (p.ndim >= 2 and id(p) in kernels)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
