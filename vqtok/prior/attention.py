"""How a backbone computes the same: its attention back end, refused when it is chosen if it cannot run, and what it keeps in memory."""

from __future__ import annotations

import torch

from .network import CodePriorPreTrainedModel
from .sequence import SHIFTED

BACK_ENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def set_attention(prior: CodePriorPreTrainedModel, name: str, device: torch.device | None = None) -> None:
    """Let the backbone compute attention by `name`; a prior whose choice is refused stays as it was.

    Args:
        name: "eager" (plain products) or "sdpa" (torch's fused kernels), which run anywhere; "flex_attention", "flash_attention_2" or
            "flash_attention_3", which need an accelerator, and the last two their own package.
        device: where the prior will run; None is where it is.

    Raises:
        ValueError: an unknown name, or one that this machine, this installation or this backbone cannot run.
    """
    if name not in BACK_ENDS:
        raise ValueError(f"attention must be one of {', '.join(BACK_ENDS)}, got {name!r}")
    if name not in ("eager", "sdpa") and (device or prior.device).type == "cpu":
        raise ValueError(f"attention {name!r} does not train on a CPU: use 'sdpa' or 'eager' there")
    if name.startswith("flash") and prior.config.order not in SHIFTED:
        raise ValueError(
            f"attention {name!r} knows no order in which tokens see later ones, as {prior.config.order!r}: use 'flex_attention' or 'sdpa'"
        )
    try:
        prior.backbone.set_attn_implementation(name)  # it refuses; the prior itself would let anything through
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"attention {name!r} cannot be used here ({reason}): use 'sdpa' or 'eager'") from error
    prior.set_attn_implementation(name)


def checkpoint_activations(prior: CodePriorPreTrainedModel) -> None:
    """Let the backbone keep the input of each layer only and compute the rest again going backward: less memory, the same gradients."""
    # Newer versions of transformers warn of the older name.
    enable = getattr(prior, "activation_checkpointing_enable", None) or prior.gradient_checkpointing_enable
    enable()
