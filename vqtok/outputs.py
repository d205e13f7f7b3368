"""What models return: always the same named fields; what is absent is None (docs/design.md, law 5)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class VQEncoderOutput(ModelOutput):
    """Codes of a batch.

    Attributes:
        codes: coarse to fine, each int64 `(B, Q, *grid)`.
        latents: coarse to fine, each float `(B, *grid, D)`: what was quantized.
        quantized: coarse to fine, each float `(B, *grid, D)`: the table rows of `codes`.
    """

    codes: tuple[Tensor, ...] | None = None
    latents: tuple[Tensor, ...] | None = None
    quantized: tuple[Tensor, ...] | None = None


@dataclass
class VQDecoderOutput(ModelOutput):
    """Media of a batch of codes.

    Attributes:
        reconstruction: float, the shape of the model's input: `(B, C, H, W)` in [-1, 1] nominally for images; of text the logits
            `(B, T, vocab_size)` of ids `(B, T)`.
    """

    reconstruction: Tensor | None = None


@dataclass
class VQModelOutput(ModelOutput):
    """One pass of training or evaluation.

    Attributes:
        loss: 0-dim float32, the sum of `losses` with the weights of the configuration (each level's its own).
        reconstruction: float, the shape of the input; of text logits, with one more axis.
        codes: coarse to fine, each int64 `(B, Q, *grid)`.
        latents: coarse to fine, each float `(B, *grid, D)`.
        quantized: coarse to fine, each float `(B, *grid, D)`.
        losses: each term before its weight, 0-dim float32, by name (`reconstruction_loss`, `commitment_loss`, ...); a quantizer's
            is the mean over levels, where a level without it counts as zero.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: tuple[Tensor, ...] | None = None
    latents: tuple[Tensor, ...] | None = None
    quantized: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None


@dataclass
class QuantizerOutput(ModelOutput):
    """One level, quantized.

    Attributes:
        quantized: float `(B, *grid, D)`; in eval exactly the table rows, in training with a gradient path to the latents.
        codes: int64 `(B, Q, *grid)`.
        latents: float32 `(B, *grid, D)`, the input.
        losses: terms before their weights, 0-dim float32, by name; empty in eval.
        loss: 0-dim float32, the sum of `losses` with the weights of the configuration; None in eval.
    """

    quantized: Tensor | None = None
    codes: Tensor | None = None
    latents: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    loss: Tensor | None = None


@dataclass
class CodePriorOutput(ModelOutput):
    """One pass of a prior.

    Attributes:
        loss: 0-dim float32, mean nats per predicted code (and size token); with a `text_loss_weight` w, (1 - w) of that and w of
            `text_loss`.
        nats_per_code: float32 `(num_levels,)`, mean nats per code of each level, coarse to fine.
        logits: float `(B, P, V)`, present only for calls with `input_ids` (the transformers `generate` path).
        past_key_values: the backbone's cache.
        text_loss: 0-dim float32, mean nats per token of the texts; None without a `text_loss_weight`.
    """

    loss: Tensor | None = None
    nats_per_code: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: object | None = None
    text_loss: Tensor | None = None
