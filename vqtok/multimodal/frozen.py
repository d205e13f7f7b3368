"""Old rows that stay: embeddings and heads of which only the rows of codes learn, whatever the optimizer does.

Hiding the gradient of a row is not enough: weight decay moves a row without gradient, and so does momentum from before. So the
rows are also put back after every step of every optimizer of torch that holds them. What is put back is what was there when the step
began, so weights may be loaded, moved and saved in between; and the model stays an ordinary one, with nothing of this in its files.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class FrozenRows:
    """The first rows of some parameters do not learn, until `remove()`, or until the parameters are gone.

    A copy of the model (`copy.deepcopy`), and one that was saved and loaded, learns everything again: freeze it anew. Parameters that are
    cut into pieces over processes (FSDP, ZeRO-3) are other parameters than these, and are refused.

    Args:
        parameters: each with its rows along the first axis.
        rows: how many of the first rows stay.

    Raises:
        ValueError: a parameter with fewer rows, that does not learn at all, or that is a piece of one.
    """

    def __init__(self, parameters: list[nn.Parameter], rows: int):
        for parameter in parameters:
            if type(parameter.data) is not Tensor or parameter.is_meta or len(parameter) < rows or rows < 1:
                raise ValueError(
                    f"of a parameter of shape {tuple(parameter.shape)} ({type(parameter.data).__name__} on {parameter.device}) {rows} rows "
                    "cannot be frozen: freeze before the model is sharded, with the vocabulary that it was extended with"
                )
            if not parameter.requires_grad:
                raise ValueError("this model's embedding does not learn at all: call requires_grad_(True) on it first")
        self.rows = rows
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        handles = [parameter.register_hook(self._without_old_rows) for parameter in parameters]
        myself = weakref.WeakMethod(self._keep), weakref.WeakMethod(self._put_back)
        handles += [
            register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _call(myself[0], optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, args, kwargs: _call(myself[1], optimizer)),
        ]
        self._handles = handles  # the hooks of the parameters hold this object, which holds no parameter: it lives as long as they do

    def remove(self) -> None:
        """Let the rows learn again."""
        for handle in self._handles:
            handle.remove()

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", []):
            handle.remove()

    def _living(self) -> Iterator[nn.Parameter]:
        return (parameter for reference in self._parameters if (parameter := reference()) is not None)

    def _without_old_rows(self, gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[: self.rows]), gradient[self.rows :]])

    @torch.no_grad()
    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._kept = [(p, p[: self.rows].clone()) for p in self._living() if id(p) in held]

    @torch.no_grad()
    def _put_back(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, rows in self._kept:
            parameter[: self.rows] = rows
        self._kept = []


def freeze_old_rows(model: nn.Module, rows: int) -> FrozenRows:
    """Freeze the rows of the text in the embedding and the head (and its bias) of a language model.

    Args:
        model: a causal language model of transformers, of which the embedding learns.
        rows: `text_size` of the vocabulary that it was extended with.

    Returns:
        A handle; its `remove()` lets them learn again.

    Raises:
        ValueError: see `FrozenRows`.
    """
    return FrozenRows(vocabulary_parameters(model), rows)


def vocabulary_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters with one row per id: the embedding, the head if it is another one, and the head's bias.

    Raises:
        ValueError: the model has no head over the vocabulary.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no head over the vocabulary: take the model ...ForCausalLM")
    found = [model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


def _call(method: Any, optimizer: torch.optim.Optimizer) -> None:
    if (bound := method()) is not None:
        bound(optimizer)
