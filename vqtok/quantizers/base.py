"""What every quantizer is: channel-last latents in, codes and the rows they stand for out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqtok.codes import check_range
from vqtok.outputs import QuantizerOutput

from .codebook import Codebook
from .collective import Accumulator, FP32Module, update_all
from .configuration import QuantizerConfig
from .functional import full_precision, rotate, straight_through

_WEIGHT_OF = {
    "commitment_loss": "commitment_weight",
    "codebook_loss": "codebook_loss_weight",
    "entropy_loss": "entropy_weight",
    "kl_loss": "kl_weight",
}


class Updatable(FP32Module):
    """A module with tables in it: one update, one freeze for all of them.

    Attributes:
        frozen: nothing changes any more, also in `train()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False

    def update(self) -> None:
        """Apply what training passes accumulated, with one collective; call it after `optimizer.step()`."""
        update_all(self.accumulators)

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or allow) every change of tables and projections, also in `train()`."""
        for parameter in self.parameters():
            parameter.requires_grad_(not frozen)
        for module in self.modules():
            if isinstance(module, Updatable):
                module.frozen = frozen
            elif isinstance(module, Accumulator):
                module.freeze(frozen)

    def count_pass(self) -> None:
        """Count a training pass: many without an update raise a warning."""
        for accumulator in self.accumulators:
            accumulator.count_pass()

    @property
    def is_initialised(self) -> bool:
        """Whether every table was started from data (there may be none to start)."""
        flags = (value for name, value in self.named_buffers() if name.rpartition(".")[2] == "initialised")
        return all(bool(flag) for flag in flags)

    @property
    def accumulators(self) -> list[Accumulator]:
        """Everything in it that an update changes."""
        return [module for module in self.modules() if isinstance(module, Accumulator)]

    @property
    def codebooks(self) -> list[Codebook]:
        """Every stored table that learns by counts, level by level."""
        return [module for module in self.modules() if isinstance(module, Codebook)]


class Quantizer(Updatable):
    """The contract of all quantizers on one grid.

    - `forward(z)`: quantize `(B, *grid, dim)`. In training with gradients, losses and statistics for `update()`; in eval
      `quantized` is exactly `embed_codes(codes)` and nothing changes.
    - `encode(z)`: the same in eval, and without changing any state in train mode either.
    - `embed_codes(codes)`: `(B, Q, *grid)` -> `(B, *grid, dim)`.
    - `initialise(z)`: start the tables from data, before the first step. `update()`: after `optimizer.step()`. `freeze()`.

    All of it is computed in fp32, whatever the latents' dtype, the autocast and the dtype of the model around it.

    Attributes:
        dim: width of the latents.
        config: the typed configuration, with every argument.
        is_straight: whether the gradient to the latents is exactly that of the identity, and none goes to the tables.
    """

    is_straight: bool = False

    def __init__(self, dim: int, config: QuantizerConfig):
        super().__init__()
        check_dim(dim)
        self.dim, self.config = dim, config

    # -- what a subclass supplies

    def _quantize(self, z: Tensor, learn: bool) -> QuantizerOutput:
        raise NotImplementedError

    def _embed(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def initialise(self, z: Tensor) -> None:
        """Start the tables from the latents `z` `(*, dim)` of all processes; nothing to do without tables."""

    # -- the contract

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize `z` `(B, *grid, dim)`.

        Returns:
            `quantized` `(B, *grid, dim)` and `codes` int64 `(B, Q, *grid)`; in training also `losses` by name, and `loss`, their
            sum with the weights of the configuration.

        Raises:
            ValueError: latents of another width, or NaN or infinite ones.
        """
        self._check(z)
        if self.training:
            self.count_pass()
        return self._quantize(z, learn=self.training)

    @torch.no_grad()
    def encode(self, z: Tensor) -> QuantizerOutput:
        """The codes of `z` and the rows they stand for. Never changes state, in train mode neither."""
        self._check(z)
        return self._quantize(z, learn=False)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """The quantized latents of `codes` int64 `(B, Q, *grid)`: fp32 `(B, *grid, dim)`.

        Raises:
            ValueError: codes of another dtype, number of codebooks or range.
        """
        self._check_codes(codes)
        return self._embed(codes)

    def _check(self, z: Tensor) -> None:
        if z.ndim < 2 or z.shape[-1] != self.dim or not z.is_floating_point():
            raise ValueError(
                f"latents must be floats, channel-last (B, *grid, {self.dim}), got {z.dtype} of shape {tuple(z.shape)}"
            )

    def _check_codes(self, codes: Tensor) -> None:
        depth = self.config.depth
        if codes.dtype != torch.int64 or codes.ndim < 2 or not self._takes_depth(codes.shape[1]):
            raise ValueError(
                f"codes must be int64 (B, {depth}, *grid), got {codes.dtype} of shape {tuple(codes.shape)}"
            )
        if not torch.compiler.is_compiling():
            check_range(codes, self.config.size, "codes")

    def _takes_depth(self, depth: int) -> bool:
        return depth == self.config.depth

    def _output(
        self, z: Tensor, quantized: Tensor, codes: Tensor, losses: Mapping[str, Tensor] | None = None
    ) -> QuantizerOutput:
        loss = None
        if losses is not None:
            weighted = [value * getattr(self.config, _WEIGHT_OF[name]) for name, value in losses.items()]
            loss = sum(weighted, torch.zeros((), dtype=torch.float32, device=z.device))
        return QuantizerOutput(
            quantized=quantized, codes=codes, latents=z.float(), losses=dict(losses or {}), loss=loss
        )

    def extra_repr(self) -> str:
        values = {name: value for name, value in self.config.to_dict().items() if name != "layer"}
        return f"{self.dim}, " + ", ".join(f"{name}={value!r}" for name, value in values.items())


class SingleQuantizer(Quantizer):
    """One code per position: project, find the code, take its row, project back.

    A subclass supplies `_search` and `_rows`, and may extend `_prepare` and `_learn`.

    Args:
        dim: width of the latents.
        inner_dim: width of the rows; another than `dim` adds a linear projection in and one out.
        config: the typed configuration.
    """

    def __init__(self, dim: int, inner_dim: int, config: QuantizerConfig):
        super().__init__(dim, config)
        projected = inner_dim != dim
        self.project_in: nn.Module = _linear(dim, inner_dim) if projected else nn.Identity()
        self.project_out: nn.Module = _linear(inner_dim, dim) if projected else nn.Identity()

    def prepare(self, z: Tensor) -> Tensor:
        """What is compared with the rows: `(*, dim)` -> fp32 `(*, inner_dim)`, projected (and normalised for cosine)."""
        with torch.autocast(z.device.type, enabled=False):
            return self._prepare(project(self.project_in, z))

    def _quantize(self, z: Tensor, learn: bool) -> QuantizerOutput:
        latents = self.prepare(z)
        with torch.autocast(z.device.type, enabled=False):
            if not learn:
                codes, rows = self._find(latents)
                return self._output(z, project(self.project_out, rows), codes[:, None])
            codes = self._search(latents)
            rows, losses = self._learn(latents, codes)
            return self._output(z, project(self.project_out, rows), codes[:, None], losses)

    def _embed(self, codes: Tensor) -> Tensor:
        return project(self.project_out, self._rows(codes[:, 0]))

    def _prepare(self, latents: Tensor) -> Tensor:
        return latents

    def _search(self, latents: Tensor) -> Tensor:
        """Codes `(*)` int64 of prepared latents `(*, inner_dim)`."""
        raise NotImplementedError

    def _rows(self, codes: Tensor) -> Tensor:
        """Rows `(*, inner_dim)` of codes `(*)`."""
        raise NotImplementedError

    def _find(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and their rows: the same bits as `_search` and `_rows` give."""
        codes = self._search(latents)
        return codes, self._rows(codes)

    def _learn(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows with a gradient to the latents, and the losses of a training pass."""
        rows = self._rows(codes)
        return straight_through(latents, rows), {"commitment_loss": commitment_loss(latents, rows)}


def _linear(inputs: int, outputs: int) -> nn.Linear:
    # fp32 also while transformers builds a model under another default dtype.
    return nn.Linear(inputs, outputs, dtype=torch.float32)


def commitment_loss(latents: Tensor, rows: Tensor) -> Tensor:
    """mean (z - sg[e])^2: moves the encoder towards its codes (van den Oord et al. 2017, eq. 3, the term with beta)."""
    return nn.functional.mse_loss(latents, rows.detach())


def codebook_loss(latents: Tensor, rows: Tensor) -> Tensor:
    """mean (e - sg[z])^2: moves the codes towards the encoder (van den Oord et al. 2017, eq. 3, the middle term)."""
    return nn.functional.mse_loss(rows, latents.detach())


def pass_gradient(latents: Tensor, rows: Tensor, gradient: str) -> Tensor:
    """The values of `rows` with a gradient to the latents: "straight_through" or "rotation"."""
    return rotate(latents, rows) if gradient == "rotation" else straight_through(latents, rows)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """The fp32 result of a projection, whatever the autocast: the same latents get the same codes."""
    if isinstance(layer, nn.Linear):
        with full_precision(x.device.type):
            return layer(x.to(layer.weight.dtype))
    return x.float()


def check_dim(dim: int) -> None:
    """Refuse a width that is no positive integer."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim, the width of the latents, must be a positive integer, got {dim!r}")


def mean_losses(outputs: Sequence[QuantizerOutput]) -> dict[str, Any]:
    """The keyword arguments `losses` and `loss` of an output made of several: means; a part without a term counts as zero."""
    each = [out.losses or {} for out in outputs]
    names = sorted({name for terms in each for name in terms})
    losses = {name: torch.stack([terms[name] for terms in each if name in terms]).sum() / len(each) for name in names}
    weighted = [out.loss for out in outputs if out.loss is not None]
    return {"losses": losses, "loss": torch.stack(weighted).mean() if weighted else None}
