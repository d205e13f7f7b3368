"""The fingerprint of a code space: equal exactly when the same media become the same codes with the same meaning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (64 hex digits) over canonical JSON of `fields` and over every tensor's name, shape and values.

    Tensors count as fp32 in little-endian byte order, in the order of their names, so dtype of storage, device and file
    layout do not matter. Integer and bool tensors count as int64.

    Args:
        fields: JSON-able values that decide codes (layout, architecture, preprocessing). No versions, no paths.
        tensors: the encoder's weights and the quantizer's tables, by name. No decoder, no EMA state.
    """
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        value = value.to(torch.float32) if value.is_floating_point() else value.to(torch.int64)
        kind = "<f4" if value.is_floating_point() else "<i8"
        digest.update(f"\n{name}:{tuple(value.shape)}:{kind}\n".encode())
        digest.update(value.contiguous().numpy().astype(kind).tobytes())
    return digest.hexdigest()


def stamp(model: nn.Module) -> Any:
    """What changes when a tensor of a model is written to (torch counts) or replaced, or the model is another one."""
    try:
        tensors = model.state_dict(keep_vars=True).values()
        return id(model), [(str(value.dtype), value.data_ptr(), value._version) for value in tensors]
    except RuntimeError:  # tensors made under inference_mode are not counted
        return object()


def check_fingerprint(expected: str | None, found: str | None, what: str) -> None:
    """Refuse to mix code spaces.

    Args:
        expected: the code space this object was made for; None asks for nothing.
        found: the code space of what it was given.
        what: names the given thing in the message ("codes", "the tokenizer out/vq").

    Raises:
        ValueError: both fingerprints are named, with the remedy.
    """
    if expected is not None and expected != found:
        raise ValueError(
            f"{what} belong to the code space {_short(found)}, but {_short(expected)} is expected. Codes of one tokenizer mean "
            "nothing to another: use the tokenizer they were made with, or encode again"
        )


def _short(value: str | None) -> str:
    return "of an unsaved tokenizer (no fingerprint)" if value is None else value
