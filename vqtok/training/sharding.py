"""Weights that are sharded over processes (FSDP2): their own piece, the whole, and from a whole back into pieces.

Plain tensors pass through, so that nobody else needs to ask which kind a weight is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether `accelerator.prepare` will shard a model.

    Raises:
        ValueError: it would by a scheme that vqtok does not know.
    """
    if accelerator.distributed_type in (DistributedType.NO, *_WHOLE):
        return False
    if accelerator.is_fsdp2:
        return True
    raise ValueError(
        f"vqtok trains on one process, on several with whole copies of the model, or with FSDP2, not with "
        f"{accelerator.distributed_type.value} as configured: for FSDP set fsdp_version to 2 (examples/accelerate/fsdp2.yaml)"
    )


_WHOLE = [kind for kind in DistributedType if kind.value.startswith("MULTI_")]


def local(value: Tensor) -> Tensor:
    """The piece of a weight that this process holds; writing into it writes into the weight. Call it without gradients."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """All of a weight, gathered from all processes, which must call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def set_whole(target: Tensor, value: Tensor) -> None:
    """Write a whole weight, which every process has, into `target`, which may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(value.to_local())
    else:
        target.copy_(value)


@torch.no_grad()
def gather_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give `model`, which is not sharded, the weights `values`, one after another; all processes must call this together."""
    for name, target in model.state_dict().items():
        target.copy_(whole(values[name]))
