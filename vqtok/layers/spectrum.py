"""Sound to features of its spectra and back on `(B, C, T)`: what lets a codec compute at the rate of frames alone.

Fourier transforms of overlapping frames stand where convolutions at the rate of samples would. What `waveform.py` promises holds here
too: zero padding, masks, state, and results that do not depend on what a clip is padded with. Hence the frames are added up with one
constant everywhere, also at the ends of a clip, where fewer of them overlap.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from .waveform import StreamState, TimeConv, continued, zero_beyond

_FLOOR = 1e-2  # of amplitudes; below it features are linear in the sound, and rounding stays small
_QUIET = -4.0  # log amplitude of what a fresh head says
_LOUDEST = 4.6  # log amplitude, far above that of any sound in [-1, 1]


class TimeSpectrum(nn.Module):
    """Features of spectra, then a convolution over them: `(B, C, T)` -> `(B, D, T / hop)`.

    Each frame is a Hann window of `window` samples every `hop` ones. The features of a bin S are log(1 + |S| / floor) and the same in the
    direction of S, two numbers: amplitude and phase, compressed as ears do, and zero for silence.

    Args:
        in_channels: of the sound.
        out_channels: of the features.
        window: samples of a frame, a multiple of `hop`.
        hop: samples between two frames.
        causal: no frame sees a sample after its own hop.
    """

    def __init__(self, in_channels: int, out_channels: int, window: int, hop: int, causal: bool = False):
        super().__init__()
        self.window, self.stride, self.causal = window, (hop,), causal
        self.conv = TimeConv(3 * in_channels * (window // 2 + 1), out_channels, 1)
        reach = window - hop
        self.sees = (reach, 0) if causal else (reach // 2, reach - reach // 2)

    def forward(self, x_BCT: Tensor, lengths: Tensor | None = None, state: StreamState | None = None) -> Tensor:
        """`lengths` int64 `(B,)` are in samples."""
        hop, before = self.stride[0], self.sees[0]
        x = functional.pad(x_BCT, self.sees) if state is None else continued(self, x_BCT, before, state)
        with torch.autocast(x.device.type, enabled=False):
            frames_BCtW = x.float().unfold(-1, self.window, hop) * _hann(self.window).to(x.device)
            spectra = torch.fft.rfft(frames_BCtW, norm="ortho")
            size = spectra.abs()
            level = (size / _FLOOR).log1p()
            direction = torch.view_as_real(spectra) * (level / size.clamp_min(1e-12))[..., None]
            features = torch.stack([level, *direction.unbind(-1)], 2)  # (B, C, 3, t, F)
        y = features.transpose(3, 4).flatten(1, 3).to(x_BCT.dtype)
        return self.conv(y, None if lengths is None else lengths // hop)


class TimeSynthesis(nn.Module):
    """Sound from spectra that a convolution predicts, logarithms of amplitudes and phases (Vocos, Siuzdak 2023).

    `(B, D, t)` -> `(B, C, t * hop)`: inverse Fourier transforms of frames, Hann windows on them, and their sum.

    Args:
        in_channels: of the features.
        out_channels: of the sound.
        window: samples of a frame, a multiple of `hop` and at least three of them.
        hop: samples between two frames.
        causal: the sound of a hop comes from its own frame and those before.
    """

    def __init__(self, in_channels: int, out_channels: int, window: int, hop: int, causal: bool = False):
        super().__init__()
        self.window, self.stride, self.causal = window, (hop,), causal
        self.conv = TimeConv(in_channels, 2 * out_channels * (window // 2 + 1), 1)
        self.skipped = 0 if causal else (window - hop) // 2

    def seen(self, steps: int, side: int) -> int:
        """How many steps of the input the result sees before (side 0) or after (1) its own, given `steps` more of the result."""
        hop = self.stride[0]
        if side == 0:
            return -((self.skipped - steps + hop - self.window) // hop)
        return (hop - 1 + steps + self.skipped) // hop

    def forward(self, x_BDt: Tensor, lengths: Tensor | None = None, state: StreamState | None = None) -> Tensor:
        """`lengths` int64 `(B,)` are in steps of the input."""
        hop, steps, skipped = self.stride[0], x_BDt.shape[-1], self.skipped
        y = self.conv(x_BDt)
        with torch.autocast(y.device.type, enabled=False):
            level, phase = y.float().unflatten(1, (-1, 2, self.window // 2 + 1)).unbind(2)  # (B, C, F, t) each
            spectra = torch.polar((level + _QUIET).clamp(max=_LOUDEST).exp(), phase).transpose(2, 3)
            shape = _hann(self.window).to(y.device)
            frames = torch.fft.irfft(spectra, self.window, norm="ortho") * (shape * hop / shape.square().sum())
        frames = frames.transpose(2, 3).flatten(1, 2)  # (B, C * W, t)
        if lengths is not None:
            frames = zero_beyond(frames, lengths)
        if state is not None:  # frames, not features: before the start there are none
            frames = continued(self, frames, self.window // hop - 1, state)
            skipped = self.window - hop
        sound = _added(frames.unflatten(1, (-1, self.window // hop, hop)))[..., skipped : skipped + steps * hop]
        sound = sound.to(x_BDt.dtype)
        return sound if lengths is None else zero_beyond(sound, lengths * hop)


def _added(parts_BCRHt: Tensor) -> Tensor:
    """Frames of R parts, each starting a part after the one before, added up: `(B, C, (t + R - 1) * H)`."""
    parts = parts_BCRHt.permute(0, 1, 2, 4, 3)  # (B, C, R, t, H)
    number = parts.shape[2]
    rows = [functional.pad(parts[:, :, r], (0, 0, r, number - 1 - r)) for r in range(number)]
    return sum(rows[1:], rows[0]).flatten(2)


@lru_cache(maxsize=64)
def _hann(window: int) -> Tensor:
    """Hann's window between the samples, so that none is zero."""
    return (math.pi * (torch.arange(window) + 0.5) / window).sin().square()
