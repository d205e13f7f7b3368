"""The audio tokenizer: convolutions on the waveform in the manner of SEANet and DAC, with codes at one rate or at several.

Sources: SoundStream (Zeghidour et al. 2021), EnCodec (Défossez et al. 2022), DAC (Kumar et al. 2023), SNAC (Siuzdak et al. 2024),
and for levels VQ-VAE-2 (Razavi et al. 2019) and Jukebox (Dhariwal et al. 2020).

Axis letters: B batch, C channels, T samples, t steps of a level, D code dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqtok.chunks import decode_chunks, encode_chunks
from vqtok.layers import (
    ResidualUnits,
    StreamState,
    TimeConv,
    TimeSpectrum,
    TimeSynthesis,
    TimeUpsample,
    activation,
    zero_beyond,
)
from vqtok.modeling import VQPreTrainedModel
from vqtok.quantizers import build_hierarchy

from .configuration_audio_vq import AudioVQConfig
from .losses import spectral_losses

CHUNK_SECONDS = 20


class Features(NamedTuple):
    """What the encoder knows of a batch, coarse to fine, and what later layers need to go on.

    Attributes:
        levels: `(B, D, t)` of each stride.
        lengths: int64 `(B,)`, samples of each clip with its own padding; None where clips are not padded to each other.
        state: of a stream; None otherwise.
    """

    levels: list[Tensor]
    lengths: Tensor | None = None
    state: StreamState | None = None


class AudioEncoder(nn.Module):
    """Everything that decides codes before the quantizers: features of each level and the way down from coarse to fine.

    Attributes:
        context: how many samples the latents of a step of the coarsest level see before and after its own.
    """

    def __init__(self, config: AudioVQConfig):
        super().__init__()
        self.ratios, self.strides = list(config.downsampling_ratios), list(config.strides)
        widths, causal = list(config.hidden_sizes), config.causal
        self.stages = nn.ModuleList()
        for ratio, before, width in zip(self.ratios, [config.num_channels, *widths], widths, strict=False):
            kernel = config.kernel_size if ratio == 1 else 2 * ratio
            act = activation(config.activation, before) if len(self.stages) else nn.Identity()
            if config.encoder_front == "stft" and not len(self.stages):
                down: nn.Module = TimeSpectrum(before, width, config.spectral_window, ratio, causal)
            else:
                down = TimeConv(before, width, kernel, ratio, causal=causal)
            self.stages.append(nn.ModuleList([act, down, _units(config, width)]))
        at = [list(accumulate(self.ratios, mul)).index(stride) for stride in self.strides]  # the stage of each level
        # conditions[i] brings what level i knows to the grid of level i + 1.
        self.conditions = nn.ModuleList()
        for index, (coarse, fine) in enumerate(zip(at, at[1:], strict=False)):
            inputs = config.latent_size + (widths[coarse] if index else 0)
            self.conditions.append(_Condition(config, inputs, widths, self.ratios, coarse, fine))
        self.heads = nn.ModuleList()
        for index, stage in enumerate(at):
            inputs = widths[stage] * (2 if index else 1)
            head = TimeConv(inputs, config.latent_size, 3, causal=causal)
            self.heads.append(nn.ModuleList([activation(config.activation, inputs), head]))
        self.at = at
        self.context = tuple(max(self._seen(level, 0, side) for level in range(len(at))) for side in (0, 1))

    def _seen(self, level: int, steps: int, side: int) -> int:
        """How many samples `steps` steps of the latents of a level see, on one side."""
        steps += self.heads[level][1].sees[side]
        coarser = self._seen(level - 1, self.conditions[level - 1].seen(steps, side), side) if level else 0
        for _, down, units in reversed(self.stages[: self.at[level] + 1]):
            steps = (steps + units.sees[side]) * down.stride[0] + down.sees[side]
        return max(steps, coarser)

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: StreamState | None = None) -> Features:
        """Features of each level of sound `(B, C, T)`."""
        levels, at_rate = [], lengths
        for index, (act, down, units) in enumerate(self.stages):
            x = down(act(x), at_rate, state)
            at_rate = _slower(at_rate, self.ratios[index])
            x = units(x, at_rate, state)
            if index in self.at:
                levels.append(x)
        return Features(levels[::-1], lengths, state)

    def latents(self, features: Features, level: int, quantized: Sequence[Tensor]) -> Tensor:
        """Latents `(B, D, t)` of `level`, given the quantized latents `(B, D, t)` of the coarser ones."""
        # The blocks of the coarser levels run anew for each finer one, so in a stream each level has a memory of its own.
        state = None if features.state is None else features.state.setdefault(level, {})
        condition: Tensor | None = None
        for block, value, stride in zip(self.conditions, quantized, self.strides, strict=False):
            at_rate = _slower(features.lengths, stride)
            known = value if at_rate is None else zero_beyond(value, at_rate)  # a code is never zero
            known = known if condition is None else torch.cat([known, condition], 1)
            condition = block(known, at_rate, state)
        own = features.levels[level]
        act, head = self.heads[level]
        x = act(own if condition is None else torch.cat([own, condition], 1))
        return head(x, _slower(features.lengths, self.strides[level]), state)


class _Condition(nn.Module):
    """From the latents of one level to features on the grid of the next finer one."""

    def __init__(
        self, config: AudioVQConfig, inputs: int, widths: list[int], ratios: list[int], coarse: int, fine: int
    ):
        super().__init__()
        self.first = TimeConv(inputs, widths[coarse], 3, causal=config.causal)
        self.units = _units(config, widths[coarse])
        self.ups = nn.ModuleList(
            nn.ModuleList(
                [
                    activation(config.activation, widths[stage]),
                    TimeUpsample(widths[stage], widths[stage - 1], ratios[stage], config.causal),
                ]
            )
            for stage in range(coarse, fine, -1)
        )

    def seen(self, steps: int, side: int) -> int:
        """How many steps of the input `steps` steps of the result see, on one side."""
        for _, up in reversed(self.ups):
            steps = up.seen(steps, side)
        return steps + self.units.sees[side] + self.first.sees[side]

    def forward(self, x: Tensor, lengths: Tensor | None, state: StreamState | None) -> Tensor:
        x = self.units(self.first(x, lengths, state), lengths, state)
        for act, up in self.ups:
            x = up(act(x), lengths, state)
            lengths = None if lengths is None else lengths * up.stride[0]
        return x


class AudioDecoder(nn.Module):
    """Sound from quantized latents, coarse to fine. A level that is not given is replaced by a learned vector.

    Attributes:
        context: how many samples before and after its own the sound of a step of the coarsest level depends on.
    """

    def __init__(self, config: AudioVQConfig):
        super().__init__()
        self.ratios, self.strides = list(config.downsampling_ratios), list(config.strides)
        widths, causal = list(config.decoder_hidden_sizes or config.hidden_sizes), config.causal
        self.first = TimeConv(config.latent_size, widths[-1], config.kernel_size, causal=causal)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        rate = self.strides[0]
        for index in reversed(range(len(widths))):
            if index + 1 < len(widths) and rate in self.strides:
                self.merges.append(TimeConv(widths[index] + config.latent_size, widths[index], 3, causal=causal))
            outputs = widths[index - 1] if index else config.num_channels
            ratio = self.ratios[index]
            up: nn.Module
            if config.decoder_head == "istft" and not index:
                up = TimeSynthesis(widths[index], outputs, config.spectral_window, ratio, causal)
            elif ratio == 1:
                up = TimeConv(widths[index], outputs, config.kernel_size, causal=causal)
            else:
                up = TimeUpsample(widths[index], outputs, ratio, causal)
            act = activation(config.activation, widths[index])
            self.stages.append(nn.ModuleList([_units(config, widths[index]), act, up]))
            rate //= ratio
        # Row i stands for level i + 1; with one level there is none, as DDP does not forgive a parameter that is never used.
        levels = len(self.strides)
        self.null = nn.Parameter(torch.zeros(levels - 1, config.latent_size)) if levels > 1 else None
        self.context = (self._seen(0), self._seen(1))

    def _seen(self, side: int) -> int:
        """How many samples one side of a step of the coarsest level depends on, by the steps of each rate, fine to coarse."""
        steps, rate, merges = 0, 1, list(zip(self.strides[1:], self.merges, strict=True))
        for units, _, up in reversed(self.stages):
            steps = steps + up.sees[side] if isinstance(up, TimeConv) else up.seen(steps, side)
            rate *= up.stride[0]
            steps += units.sees[side]
            steps += sum(merge.sees[side] for stride, merge in merges if stride == rate)
        return (steps + self.first.sees[side]) * rate

    def forward(
        self,
        quantized: Sequence[Tensor],
        keep: Tensor | None = None,
        lengths: Tensor | None = None,
        state: StreamState | None = None,
    ) -> Tensor:
        """Sound `(B, C, T)` from a prefix of levels `(B, D, t)`; `keep` `(B,)` shortens the prefix per sample."""
        rate, level = self.strides[0], 0
        x = self.first(quantized[0], _slower(lengths, rate), state)
        for (units, act, up), ratio in zip(self.stages, reversed(self.ratios), strict=True):
            at_rate = _slower(lengths, rate)
            if level + 1 < len(self.strides) and rate == self.strides[level + 1]:
                level += 1
                x = self.merges[level - 1](torch.cat([x, self._level(quantized, level, keep, x)], 1), at_rate, state)
            x = up(act(units(x, at_rate, state)), at_rate, state)
            rate //= ratio
        return x

    def _level(self, quantized: Sequence[Tensor], level: int, keep: Tensor | None, x: Tensor) -> Tensor:
        null = self.null[level - 1].to(x.dtype)[:, None]
        if level >= len(quantized):
            return null.expand(x.shape[0], -1, x.shape[2])
        return quantized[level] if keep is None else torch.where((keep > level)[:, None, None], quantized[level], null)


class AudioVQModel(VQPreTrainedModel):
    """Sound to codes and back.

    `forward` and `encode` take `input_values`, float `(B, C, T)` nominally in [-1, 1], T a multiple of the largest stride (the
    feature extractor pads; `VQTokenizer` takes clips of any length). Codes are a tuple over levels, each int64 `(B, Q, t)`.
    `encode` and `decode` take `sizes` `(B, 1)`, the samples of each clip, where clips were padded to each other.

    Example:
        >>> config = AudioVQConfig(strides=[320], hidden_sizes=[8, 8, 16], latent_size=8)
        >>> model = AudioVQModel(config).eval()
        >>> codes = model.encode(torch.zeros(1, 1, 3200)).codes
        >>> [tuple(level.shape) for level in codes], tuple(model.decode(codes).reconstruction.shape)
        ([(1, 4, 10)], (1, 1, 3200))
    """

    config: AudioVQConfig
    config_class = AudioVQConfig
    main_input_name = "input_values"
    input_modalities = ("audio",)

    @property
    def chunk_units(self) -> int:
        """Samples of long sound that are computed at once, beside what they see around them."""
        return CHUNK_SECONDS * self.config.sampling_rate

    def __init__(self, config: AudioVQConfig):
        super().__init__(config)
        self.encoder = AudioEncoder(config)
        self.quantizer = build_hierarchy(config.quantizers, config.latent_size, ndim=1)
        self.decoder = AudioDecoder(config)
        self.post_init()

    def forward(self, input_values: Tensor):  # type: ignore[no-untyped-def]
        """See `VQPreTrainedModel.forward`; `input_values` is float `(B, C, T)`, nominally in [-1, 1]."""
        return super().forward(input_values)

    def check_media(self, media: Tensor) -> Tensor:
        """Refuse anything but finite floats `(B, C, T)` with T a multiple of the largest stride."""
        channels, stride = self.config.num_channels, self.layout.stride
        if not isinstance(media, Tensor) or media.ndim != 3 or media.shape[1] != channels:
            shape = tuple(media.shape) if isinstance(media, Tensor) else type(media).__name__
            raise ValueError(f"input_values must be a float tensor (B, {channels}, T), got {shape}")
        if not media.is_floating_point():
            raise ValueError(f"input_values must be floats in [-1, 1], got {media.dtype}: use the feature extractor")
        if not media.shape[2] or media.shape[2] % stride:
            raise ValueError(
                f"input_values of {media.shape[2]} samples do not fit the largest stride {stride}: use the feature extractor, "
                "which pads, or VQTokenizer.encode"
            )
        return media.to(self.dtype)

    def check_sizes(self, sizes: Tensor, batch: int, grid: Sequence[int]) -> Tensor:
        """Refuse anything but int64 `(B, 1)` from 1 to the samples of the batch."""
        most = grid[0] * self.layout.stride
        if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64 or tuple(sizes.shape) != (batch, 1):
            shape = f"{sizes.dtype} {tuple(sizes.shape)}" if isinstance(sizes, Tensor) else type(sizes).__name__
            raise ValueError(f"sizes must be int64 ({batch}, 1), the samples of each clip, got {shape}")
        if bool((sizes < 1).any() | (sizes > most).any()):
            raise ValueError(f"sizes must be from 1 to the {most} samples of the batch, got {sizes.flatten().tolist()}")
        return sizes

    def extract(self, media: Tensor, sizes: Tensor | None = None, state: StreamState | None = None) -> Features:
        """Features of each level, coarse to fine; of each clip beyond its size the sound is taken for silence."""
        if sizes is None:
            return self.encoder(media, None, state)
        return self.encoder(zero_beyond(media, sizes[:, 0]), self._padded(sizes, media), state)

    def propose(self, features: Features, level: int, quantized: Sequence[Tensor]) -> Tensor:
        """Channel-last latents `(B, t, D)` of `level`."""
        coarser = [value.transpose(1, 2).to(features.levels[0].dtype) for value in quantized]
        return self.encoder.latents(features, level, coarser).transpose(1, 2)

    def synthesise(
        self,
        quantized: Sequence[Tensor],
        keep: Tensor | None = None,
        sizes: Tensor | None = None,
        state: StreamState | None = None,
    ) -> Tensor:
        """Sound `(B, C, T)` from channel-last quantized latents; zero beyond each clip with its own padding."""
        grids, keep = self.quantizer.merge(quantized, keep)
        values = [value.transpose(1, 2).to(self.dtype) for value in grids]
        lengths = None if sizes is None else self._padded(sizes, values[0])
        if lengths is not None:
            pairs = zip(values, self.config.strides, strict=False)
            values = [zero_beyond(value, lengths // stride) for value, stride in pairs]
        return self.decoder(values, keep, lengths, state)

    def reconstruction_losses(self, reconstruction: Tensor, media: Tensor) -> dict[str, Tensor]:
        """The mean absolute difference of the waveforms and the spectral terms that have a weight, in fp32."""
        config = self.config
        own, other = reconstruction.float(), media.float()
        wanted = [name for name in ("mel", "stft") if getattr(config, f"{name}_weight")]
        spectral = spectral_losses(own, other, config.sampling_rate, config.loss_windows, wanted, config.loss_floor)
        return {"reconstruction_loss": (own - other).abs().mean(), **spectral}

    @torch.no_grad()
    def encode_long(self, media: Tensor) -> tuple[Tensor, ...]:
        """The codes of `encode`, chunk by chunk (see `vqtok.chunks`)."""
        media = self.check_media(media)
        parts = encode_chunks(self, media.shape[2], lambda start, end: media[..., start:end])
        return tuple(torch.cat(values, 2) for values in zip(*parts, strict=True))

    @torch.no_grad()
    def decode_long(self, codes: Sequence[Tensor]) -> Tensor:
        """The sound of `decode`, chunk by chunk (see `vqtok.chunks`)."""
        self._check_codes(codes)
        return torch.cat(list(decode_chunks(self, codes)), 2)

    def _padded(self, sizes: Tensor, like: Tensor) -> Tensor:
        """The samples of each clip with the padding it has alone."""
        stride = self.layout.stride
        return (-(-sizes[:, 0] // stride) * stride).to(like.device)


def _units(config: AudioVQConfig, width: int) -> ResidualUnits:
    inner = math.ceil(width / config.compress)
    return ResidualUnits(width, inner, config.residual_kernel_size, config.dilations, config.activation, config.causal)


def _slower(lengths: Tensor | None, stride: int) -> Tensor | None:
    """Lengths in steps of `stride`; they are multiples of it."""
    return None if lengths is None else lengths // stride
