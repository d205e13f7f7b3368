"""A tokenizer trained against discriminators: a step that owns two optimizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .arguments import TrainingArguments
from .steps import TokenizerStep


@dataclass
class AdversarialArguments:
    """How a tokenizer plays against discriminators; without any, these have no effect."""

    adversarial_weight: float = field(default=1.0, metadata={"help": "Of fooling the discriminators."})
    feature_matching_weight: float = field(default=2.0, metadata={"help": "Of looking alike to their layers."})
    adversarial_start: int = field(default=0, metadata={"help": "Steps before the discriminators join."})
    discriminator_rate: float = field(default=1.0, metadata={"help": "Their learning rate, as a share of the other."})


class AdversarialStep(TokenizerStep):
    """A step of a tokenizer and of its discriminators: both see the same batch, and both move at its end.

    Args:
        discriminator: gives `own_loss(real, fake)` and `codec_losses(real, fake)` of its outputs.
        play: weights and start.

    Attributes:
        raw: after a run the weights as the optimizer left them, on the CPU, to continue from; None before.

    Raises:
        ValueError: fp16, whose scaled gradients one loss scale cannot serve twice.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        args: TrainingArguments,
        epoch_size: int | None,
        discriminator: nn.Module,
        play: AdversarialArguments,
    ):
        if args.mixed_precision == "fp16":
            raise ValueError("--mixed_precision fp16 does not go with discriminators: use bf16 or no")
        super().__init__(accelerator, model, args, epoch_size)
        self.raw: dict[str, Tensor] | None = None
        self.discriminator, self.play = discriminator, play
        # The first beta of HiFi-GAN and its heirs: what the codec does changes under the discriminators' feet.
        optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr=args.learning_rate, betas=(0.8, args.adam_beta2), weight_decay=0.0, fused=True
        )  # fmt: skip
        self.prepared_discriminator, self.discriminator_optimizer = accelerator.prepare(discriminator, optimizer)
        self.steps = _Steps()
        accelerator.register_for_checkpointing(self.steps)

    @property
    def plays(self) -> bool:
        """Whether the discriminators have joined."""
        return int(self.steps.done) >= self.play.adversarial_start

    def compute(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        real_sound = batch.to(self.accelerator.device)
        output = self.prepared(real_sound)
        self.codebooks.observe(output.codes)
        metrics = {name: value.detach() for name, value in output.losses.items()}
        if not self.plays:
            zero = torch.zeros((), device=self.accelerator.device)
            names = ("discriminator_loss", "adversarial_loss", "feature_matching_loss")
            return output.loss, {**metrics, **dict.fromkeys(names, zero)}
        # One pass for both kinds: DDP counts each parameter once per backward.
        both = self.prepared_discriminator(torch.cat([real_sound, output.reconstruction.detach().to(real_sound)]))
        real, fake = _halves(both)
        own = self.discriminator.own_loss(real, fake)
        self.accelerator.backward(own / self.args.gradient_accumulation_steps)
        self.discriminator.requires_grad_(False)  # the codec's loss moves the codec alone
        seen = self.discriminator(output.reconstruction.to(real_sound))
        self.discriminator.requires_grad_(True)
        terms = self.discriminator.codec_losses(real, seen)
        loss = output.loss + self.play.adversarial_weight * terms["adversarial_loss"]
        loss = loss + self.play.feature_matching_weight * terms["feature_matching_loss"]
        detached = {name: value.detach() for name, value in {"discriminator_loss": own, **terms}.items()}
        return loss, {**metrics, **detached}

    def after_update(self) -> None:
        super().after_update()
        if self.plays:
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = self.optimizer.param_groups[0]["lr"] * self.play.discriminator_rate
            parameters = self.prepared_discriminator.parameters()
            norm = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm or float("inf"))
            if not bool(torch.isfinite(norm)):
                raise FloatingPointError(
                    f"the discriminators' gradient has the norm {float(norm)}: lower --discriminator_rate or --learning_rate. "
                    "The last checkpoint is whole"
                )
            self.discriminator_optimizer.step()
            self.discriminator_optimizer.zero_grad(set_to_none=True)
        self.steps.done += 1

    def publish(self, averaged: bool) -> None:
        """As for every step; what is not published stays in `raw`."""
        self.raw = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        super().publish(averaged)


class _Steps(nn.Module):
    """How many steps were done, for checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))


def _halves(output: Any) -> tuple[Any, Any]:
    """The output for the first and for the second half of a batch."""
    count = len(output.logits[0]) // 2
    return tuple(
        type(output)(
            logits=tuple(each[part] for each in output.logits),
            features=tuple(tuple(layer[part] for layer in layers) for layers in output.features),
        )
        for part in (slice(0, count), slice(count, None))
    )
