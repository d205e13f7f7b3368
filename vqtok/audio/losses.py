"""Losses of sound: distances of spectra, and those of a codec that plays against discriminators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

FLOOR = 1e-5  # amplitudes below count as silence, unless said otherwise


def spectral_losses(
    reconstruction: Tensor,
    sound: Tensor,
    sampling_rate: int,
    windows: Sequence[int],
    wanted: Sequence[str] = ("mel", "stft"),
    floor: float = FLOOR,
) -> dict[str, Tensor]:
    """Distances of spectrograms, each the mean over windows (Hann, a hop of a quarter), by name and 0-dim fp32.

    - `mel_loss`: mean |log10 m - log10 m'| of mel amplitudes, floored; round(window / 6.4) bands, at most 160, fewer where
      a band would hold no bin (DAC, Kumar et al. 2023, section 3.5, which adds up its windows instead).
    - `stft_loss`: |S - S'|_F / |S|_F of each clip plus mean |ln S - ln S'| (Yamamoto et al. 2020, eq. 4 to 6).

    Args:
        reconstruction, sound: `(B, C, T)`, nominally in [-1, 1].
        sampling_rate: in Hz.
        windows: samples of each window.
        wanted: which of "mel" and "stft".
        floor: amplitudes below count as silence (a sine of amplitude 1 has 1 / 2).

    Example:
        >>> sorted(spectral_losses(torch.zeros(1, 1, 800), torch.ones(1, 1, 800), 16_000, [256]))
        ['mel_loss', 'stft_loss']
    """
    terms: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with torch.autocast(sound.device.type, enabled=False):
        for window in windows if wanted else ():
            x, y = amplitudes(reconstruction.float(), window), amplitudes(sound.float(), window)
            if "mel" in terms:
                bank = mel_bank(sampling_rate, window).to(x.device)
                logs = [(bank @ each).clamp_min(floor).log10() for each in (x, y)]
                terms["mel"].append(functional.l1_loss(*logs))
            if "stft" in terms:
                norms = [each.square().sum((1, 2)).clamp_min(1e-12).sqrt() for each in (x - y, y)]
                logs = [each.clamp_min(floor).log() for each in (x, y)]
                # Of silence the ratio means nothing: below the floor it is the plain distance.
                ratio = norms[0] / norms[1].clamp_min(floor * y[0].numel() ** 0.5)
                terms["stft"].append(ratio.mean() + functional.l1_loss(*logs))
    return {f"{name}_loss": torch.stack(values).mean() for name, values in terms.items()}


def amplitudes(sound: Tensor, window: int) -> Tensor:
    """The amplitudes `(B * C, window / 2 + 1, frames)` of `(B, C, T)`: a sine of amplitude 1 has a peak of 1 / 2."""
    shape = _hann(window).to(sound.device)
    spectrum = torch.stft(
        sound.flatten(0, 1),
        window,
        window // 4,
        window=shape,
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    return spectrum.abs() / shape.sum()


@lru_cache(maxsize=64)
def mel_bank(sampling_rate: int, window: int) -> Tensor:
    """Triangular filters `(bands, window / 2 + 1)` on the mel scale of HTK, from 0 Hz to half the rate; none is empty."""
    import torchaudio.functional as audio

    bands = min(160, max(5, round(window / 6.4)))
    while True:
        # The warning of torchaudio about empty bands is what the loop is there for.
        bank = _quietly(
            lambda n=bands: audio.melscale_fbanks(window // 2 + 1, 0.0, sampling_rate / 2, n, sampling_rate)
        ).T
        if bool((bank.sum(1) > 0).all()) or bands == 1:
            return bank.contiguous()
        bands -= 1


@lru_cache(maxsize=64)
def _hann(window: int) -> Tensor:
    return torch.hann_window(window)


def _quietly(call: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call()


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor], kind: str) -> Tensor:
    """What discriminators are trained with: the mean over them of a real clip's and a made clip's term.

    hinge: max(0, 1 - d(x)) + max(0, 1 + d(x'));  least_squares: (1 - d(x))^2 + d(x')^2  (Mao et al. 2017)

    Args:
        real, fake: one tensor of logits per discriminator, of the same clips.
        kind: "hinge" or "least_squares".
    """
    terms = []
    for x, y in zip(real, fake, strict=True):
        x, y = x.float(), y.float()
        if kind == "hinge":
            terms.append(functional.relu(1 - x).mean() + functional.relu(1 + y).mean())
        else:
            terms.append((1 - x).square().mean() + y.square().mean())
    return torch.stack(terms).mean()


def adversarial_loss(fake: Sequence[Tensor], kind: str) -> Tensor:
    """What the codec is trained with: the mean over discriminators of -d(x') (hinge) or (1 - d(x'))^2 (least_squares)."""
    terms = [-y.float().mean() if kind == "hinge" else (1 - y.float()).square().mean() for y in fake]
    return torch.stack(terms).mean()


def feature_matching_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """The mean over layers of |f(x) - f(x')|_1 / |f(x)|_1: relative, so that no layer drowns the others (EnCodec, eq. 3)."""
    terms = []
    for layers, others in zip(real, fake, strict=True):
        for x, y in zip(layers, others, strict=True):
            x, y = x.detach().float(), y.float()
            terms.append((x - y).abs().mean() / x.abs().mean().clamp_min(1e-6))
    return torch.stack(terms).mean()
