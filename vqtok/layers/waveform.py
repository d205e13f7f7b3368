"""Convolutions along time on `(B, C, T)`, causal or not, whose results do not depend on what a clip is padded with.

Zero padding only, no norms. With `lengths`, what lies beyond a clip's end is set to zero after every convolution, which is what the
padding of the clip alone would have been. With `state`, a causal stack continues where the chunk before it ended.

A layer tells in `sees` (or `seen`) how many steps of its input an output sees before and after its own: what a chunk needs around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# What the layers of one causal stack remember between two chunks: the last steps of their input. Parts that run several times on one
# chunk have a dict of their own in it for each time.
StreamState = dict[Any, Any]


class TimeConv(nn.Conv1d):
    """A convolution that gives exactly `T / stride` steps for `T`, a multiple of the stride.

    Output j of a causal one sees no input after step `(j + 1) * stride - 1`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        causal: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation=dilation, groups=groups)
        reach = (kernel_size - 1) * dilation + 1 - stride
        assert reach >= 0, "a kernel shorter than the stride skips input"
        self.causal = causal
        self.sees = (reach, 0) if causal else (reach // 2, reach - reach // 2)

    def forward(self, x_BDt: Tensor, lengths: Tensor | None = None, state: StreamState | None = None) -> Tensor:
        """`(B, D, t)` -> `(B, D', t / stride)`; `lengths` int64 `(B,)` are in steps of the input."""
        before, after = self.sees
        padding = 0
        if state is not None and before:
            x_BDt = continued(self, x_BDt, before, state)
        elif before == after:
            padding = before  # by the convolution itself, which copies nothing
        else:
            x_BDt = functional.pad(x_BDt, self.sees)
        y = functional.conv1d(x_BDt, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return y if lengths is None else zero_beyond(y, lengths // self.stride[0])


class TimeUpsample(nn.ConvTranspose1d):
    """A transposed convolution of kernel `2 * stride` that gives exactly `T * stride` steps for `T`.

    Output step `j * stride + i` of a causal one sees inputs j and j - 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, causal: bool = False):
        super().__init__(in_channels, out_channels, 2 * stride, stride)
        self.causal = causal
        self.skipped = 0 if causal else stride // 2

    def seen(self, steps: int, side: int) -> int:
        """How many steps of the input the result sees before (side 0) or after (1) its own, given `steps` more of the result."""
        stride = self.stride[0]
        return 1 - (self.skipped - steps) // stride if side == 0 else (stride - 1 + steps + self.skipped) // stride

    def forward(self, x_BDt: Tensor, lengths: Tensor | None = None, state: StreamState | None = None) -> Tensor:
        """`(B, D, t)` -> `(B, D', t * stride)`; `lengths` int64 `(B,)` are in steps of the input."""
        stride, steps = self.stride[0], x_BDt.shape[-1]
        skipped = self.skipped
        if state is not None:
            x_BDt = continued(self, x_BDt, 1, state)
            skipped = stride
        y = super().forward(x_BDt)[..., skipped : skipped + steps * stride]
        return y if lengths is None else zero_beyond(y, lengths * stride)


class Snake(nn.Module):
    """x + sin(a x)^2 / a with a learned a > 0 per channel (Ziyin et al. 2020, eq. 3): a bias towards what repeats."""

    def __init__(self, channels: int):
        super().__init__()
        self.log_frequency = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.log_frequency)

    def forward(self, x_BDt: Tensor) -> Tensor:
        frequency = self.log_frequency.exp()[:, None].to(x_BDt.dtype)
        waves = frequency * x_BDt
        if not torch.is_grad_enabled():  # the same numbers, in one piece of new memory instead of five
            return waves.sin_().square_().div_(frequency).add_(x_BDt)
        return x_BDt + waves.sin().square() / frequency


def activation(name: str, channels: int) -> nn.Module:
    """The layer "snake" or "elu"; both keep zero at zero, so that what was masked stays masked."""
    return Snake(channels) if name == "snake" else nn.ELU()


class ResidualUnits(nn.Module):
    """Blocks x + conv1(act(conv_k(act(x)))), one per dilation, at one rate (DAC, Kumar et al. 2023, section 3.1)."""

    def __init__(
        self, channels: int, inner: int, kernel_size: int, dilations: Sequence[int], act: str, causal: bool = False
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    activation(act, channels),
                    TimeConv(channels, inner, kernel_size, dilation=dilation, causal=causal),
                    activation(act, inner),
                    TimeConv(inner, channels, 1),
                ]
            )
            for dilation in dilations
        )
        for block in self.blocks:
            block[-1].starts_at_zero = True  # every block starts as the identity, so that depth costs nothing at first
        self.sees = tuple(sum(block[1].sees[side] for block in self.blocks) for side in (0, 1))

    def forward(self, x_BDt: Tensor, lengths: Tensor | None = None, state: StreamState | None = None) -> Tensor:
        for before, wide, between, narrow in self.blocks:
            y = wide(before(x_BDt), lengths, state)
            x_BDt = x_BDt + narrow(between(y), lengths, state)
        return x_BDt


def zero_beyond(x_BDt: Tensor, lengths: Tensor) -> Tensor:
    """`x` with zeros from step `lengths` `(B,)` of each sample on."""
    beyond = torch.arange(x_BDt.shape[-1], device=x_BDt.device) >= lengths.to(x_BDt.device)[:, None]
    return x_BDt.masked_fill(beyond[:, None], 0.0)


def continued(layer: nn.Module, x_BDt: Tensor, steps: int, state: StreamState) -> Tensor:
    """`x` after the last `steps` of the chunk before, zeros at the start; remembers its own last ones."""
    assert layer.causal, "only causal layers can be continued"
    before = state.get(layer)
    if before is None:
        before = x_BDt.new_zeros(*x_BDt.shape[:2], steps)
    x_BDt = torch.cat([before, x_BDt], -1)
    state[layer] = x_BDt[..., x_BDt.shape[-1] - steps :].clone()
    return x_BDt
