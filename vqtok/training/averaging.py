"""The running average of a model's weights, which is what gets published."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import local


class WeightAverage:
    """Average parameters, copy buffers: decay min(d, (1 + n) / (10 + n)) after n updates. Of sharded weights each process has its piece.

    Not to be confused with the EMA of a codebook, which is part of the model.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._averaged = {name for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model` as they are now; call it after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = model.state_dict()
        names = [name for name in state if name in self._averaged]
        torch._foreach_lerp_([local(self.values[n]) for n in names], [local(state[n]) for n in names], 1 - decay)
        for name, value in state.items():
            if name not in self._averaged:
                local(self.values[name]).copy_(local(value))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let `model` have the averaged weights inside the block."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        _copy(model, self.values)
        try:
            yield
        finally:
            _copy(model, own)


@torch.no_grad()
def _copy(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        local(value).copy_(local(values[name]))
