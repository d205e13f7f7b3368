"""State that training passes add to and an update applies: the protocol, and every collective about codes.

A pass in training only accumulates; `update_all`, called once after `optimizer.step()`, sums what all processes accumulated with
one packed all-reduce, and every module applies the sums, alike on every process. So gradient accumulation equals the large
batch, a forward pass has no collectives (but one for an entropy penalty), and nothing changes in eval or when frozen. Whether
there is a process group is asked when it matters, never when a module is built.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PASSES_BEFORE_WARNING = 200


class FP32Module(nn.Module):
    """A module whose numbers keep their dtype: `.half()` and `.to(dtype)` move it, and leave it and its children in fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Accumulator(FP32Module):
    """What `update_all` updates. A subclass accumulates in training passes and implements the three hooks.

    Attributes:
        frozen: nothing is accumulated and nothing changes, also in `train()`.
        updates: int64, number of updates so far.
    """

    updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self._passes = 0
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or allow) every change, also in `train()`."""
        self.frozen = frozen
        self.drop_pending()

    def packed(self, rank: int, world_size: int) -> list[Tensor]:
        """fp32 tensors to be summed over the processes, of the same shapes on each, whether or not there was a pass."""
        raise NotImplementedError

    def apply_sums(self, *sums: Tensor) -> None:
        """Change the state by what `packed` gave, summed."""
        raise NotImplementedError

    def drop_pending(self) -> None:
        """Forget what was accumulated since the last update."""
        self._passes = 0

    def count_pass(self) -> None:
        """Count a training pass, however often it accumulated: many without an update raise a warning."""
        self._passes += not self.frozen
        if self._passes == _PASSES_BEFORE_WARNING:
            warnings.warn(
                f"{_PASSES_BEFORE_WARNING} training passes without an update: call quantizer.update() (of a model: "
                "update_codebooks()) after optimizer.step(), or quantizer.freeze() if the codes shall stay",
                stacklevel=3,
            )

    def _load_from_state_dict(self, *args: Any) -> None:
        self.drop_pending()  # it was seen with other values
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.drop_pending()  # it may lie on another device
        return super()._apply(fn, recurse)


@torch.no_grad()
def update_all(modules: Sequence[Accumulator]) -> None:
    """Apply what all processes accumulated since the last call, with one packed all-reduce.

    Every process must call it equally often, after `optimizer.step()`. Frozen modules are left alone.
    """
    active = [module for module in modules if not module.frozen]
    rank, world = process_rank(), num_processes()
    parts = [module.packed(rank, world) for module in active]
    if world > 1 and any(parts):
        flat = torch.cat([tensor.reshape(-1) for part in parts for tensor in part])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for part in parts for tensor in part]
        pieces = iter(flat.split(sizes))
        parts = [[next(pieces).view(tensor.shape) for tensor in part] for part in parts]
    for module, part in zip(active, parts, strict=True):
        module.apply_sums(*part)
        module.updates += 1
        module.drop_pending()


def check_not_frozen(frozen: bool) -> None:
    """Refuse to start a frozen table anew."""
    if frozen:
        raise ValueError(
            "this quantizer is frozen, its codes must not change: freeze(False) first, or do not initialise it"
        )


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, joined in rank order; processes may hold different numbers of rows."""
    if num_processes() == 1:
        return rows
    length = torch.tensor([len(rows)], device=rows.device)
    lengths = [torch.zeros_like(length) for _ in range(num_processes())]
    dist.all_gather(lengths, length)
    most = int(torch.stack(lengths).max())
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.zeros_like(padded) for _ in range(num_processes())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, lengths, strict=True)])


def from_first(tensor: Tensor) -> Tensor:
    """The tensor of process 0, on every process (in place)."""
    if num_processes() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of the tensors of all processes (in place)."""
    if num_processes() > 1:
        dist.all_reduce(tensor)
        tensor /= num_processes()
    return tensor


def num_processes() -> int:
    """1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
