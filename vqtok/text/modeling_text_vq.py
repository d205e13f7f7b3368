"""The text tokenizer: convolutions along bytes or tokens, codes of long and short spans, and a decoder that writes all units at once.

Sources: the shortening and the parallel decoder of the latent transformer (Kaiser et al. 2018), levels as in VQ-VAE-2 (Razavi et al.
2019), samples that skip the quantizer from improved semantic hashing (Kaiser and Bengio 2018).

Axis letters: B batch, T units (bytes or tokens), V different units, t steps of a level, D code dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqtok.chunks import decode_chunks, encode_chunks
from vqtok.layers import TimeConv, TimeUpsample, zero_beyond
from vqtok.modeling import VQPreTrainedModel
from vqtok.quantizers import ContinuousStart, build_hierarchy

from .configuration_text_vq import TextVQConfig

MOST_LOGITS = 1 << 26  # numbers that decoding makes at once, beside what a chunk sees around it


class Features(NamedTuple):
    """What the encoder knows of a batch.

    Attributes:
        levels: `(B, C, t)` of each stride, coarse to fine.
        lengths: int64 `(B,)`, units of each text with its own padding; None where texts are not padded to each other.
    """

    levels: list[Tensor]
    lengths: Tensor | None = None


class Norm(nn.Module):
    """Root mean square norm over the channels of each step of `(B, C, t)` alone; zero stays zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gain[:, None]


class Blocks(nn.Module):
    """Residual blocks x + conv1(gelu(conv_k(norm(x)))) at one rate; every other one reaches twice as far."""

    def __init__(self, channels: int, config: TextVQConfig, number: int):
        super().__init__()
        inner = math.ceil(channels / config.compress)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    Norm(channels),
                    TimeConv(channels, inner, config.kernel_size, dilation=1 + index % 2),
                    TimeConv(inner, channels, 1),
                ]
            )
            for index in range(number)
        )
        for block in self.blocks:
            block[-1].starts_at_zero = True  # every block starts as the identity, so that depth costs nothing at first
        self.sees = sum(block[1].sees[1] for block in self.blocks)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        for norm, wide, narrow in self.blocks:
            x = x + narrow(functional.gelu(wide(norm(x), lengths)), lengths)
        return x


class TextEncoder(nn.Module):
    """Everything that decides codes before the quantizers: features of each level and the way down from coarse to fine.

    Attributes:
        context: at most how many units the latents of a step of the coarsest level see before and after its own.
    """

    def __init__(self, config: TextVQConfig):
        super().__init__()
        self.ratios, self.strides = list(config.downsampling_ratios), list(config.strides)
        self.vocab_size, self.bound = config.vocab_size, config.latent_bound
        widths = list(config.hidden_sizes)
        products = list(accumulate(self.ratios, mul))
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.stages = nn.ModuleList()
        seen, rate = 0, 1
        for ratio, before, width in zip(self.ratios, [config.embedding_size, *widths], widths, strict=False):
            down, blocks = TimeConv(before, width, 3 * ratio, ratio), Blocks(width, config, config.num_blocks)
            # A fresh encoder knows the own span alone: equal spans have equal latents, of which a codebook can start ("commonest").
            down.starts_with = slice(ratio, 2 * ratio)
            self.stages.append(nn.ModuleList([down, blocks]))
            seen += rate * (max(down.sees) + ratio * blocks.sees)
            rate *= ratio
        self.at = [products.index(stride) for stride in self.strides]  # the stage of each level
        # conditions[i] brings what level i knows to the grid of level i + 1.
        self.conditions, self.heads = nn.ModuleList(), nn.ModuleList()
        for level, stage in enumerate(self.at):
            width, stride = widths[stage], self.strides[level]
            if level:
                ratio, above = self.strides[level - 1] // stride, widths[self.at[level - 1]]
                known = config.latent_size + (above if level > 1 else 0)
                self.conditions.append(nn.ModuleList([TimeUpsample(known, width, ratio), Blocks(width, config, 1)]))
                seen += 2 * ratio * stride + self.conditions[-1][1].sees * stride
            mix = TimeConv(2 * width if level else width, width, 1)
            head = [mix, Blocks(width, config, 1), Norm(width), TimeConv(width, config.latent_size, 1)]
            self.heads.append(nn.ModuleList(head))
            seen += head[1].sees * stride
        self.context = (seen, seen)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Features:
        """Features of each level; ids of `vocab_size` are padding, and zero."""
        padding = ids >= self.vocab_size
        x = self.embedding(ids.masked_fill(padding, 0)).masked_fill(padding[..., None], 0.0).transpose(1, 2)
        levels, at_rate = [], lengths
        for index, (down, blocks) in enumerate(self.stages):
            x = down(x, at_rate)
            at_rate = _slower(at_rate, self.ratios[index])
            x = blocks(x, at_rate)
            if index in self.at:
                levels.append(x)
        return Features(levels[::-1], lengths)

    def latents(self, features: Features, level: int, quantized: Sequence[Tensor]) -> Tensor:
        """Latents `(B, D, t)` of `level`, given the quantized latents `(B, D, t)` of the coarser ones."""
        condition: Tensor | None = None
        pairs = zip(self.conditions, quantized, self.strides, self.strides[1:], strict=False)
        for (up, blocks), value, coarse, fine in pairs:
            at_rate = _slower(features.lengths, coarse)
            known = value if at_rate is None else zero_beyond(value, at_rate)  # a code is never zero
            known = known if condition is None else torch.cat([known, condition], 1)
            condition = blocks(up(known, at_rate), _slower(features.lengths, fine))
        own = features.levels[level]
        mix, blocks, norm, out = self.heads[level]
        at_rate = _slower(features.lengths, self.strides[level])
        x = mix(own if condition is None else torch.cat([own, condition], 1), at_rate)
        x = out(norm(blocks(x, at_rate)), at_rate)
        return x.tanh() if self.bound == "tanh" else functional.normalize(x, dim=1) if self.bound == "unit" else x


class TextDecoder(nn.Module):
    """Logits of all units from quantized latents, coarse to fine. A level that is not given is replaced by a learned vector.

    Attributes:
        context: at most how many units before and after its own the text of a step of the coarsest level depends on.
    """

    def __init__(self, config: TextVQConfig):
        super().__init__()
        self.ratios, self.strides = list(config.downsampling_ratios), list(config.strides)
        widths, number = list(config.hidden_sizes), config.decoder_num_blocks
        self.first = TimeConv(config.latent_size, widths[-1], 3)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        rate = self.strides[0]
        seen = rate
        for index in reversed(range(len(widths))):
            if index + 1 < len(widths) and rate in self.strides:
                self.merges.append(TimeConv(widths[index] + config.latent_size, widths[index], 3))
                seen += rate
            outputs, ratio = widths[index - 1] if index else 2 * config.embedding_size, self.ratios[index]
            blocks, norm = Blocks(widths[index], config, number), Norm(widths[index])
            self.stages.append(nn.ModuleList([blocks, norm, TimeUpsample(widths[index], outputs, ratio)]))
            seen += blocks.sees * rate + 2 * rate
            rate //= ratio
        width = 2 * config.embedding_size
        self.units = nn.ModuleList([Blocks(width, config, 1), Norm(width), TimeConv(width, config.vocab_size, 1)])
        seen += self.units[0].sees
        # Row i stands for level i + 1; with one level there is none, as DDP does not forgive a parameter that is never used.
        levels = len(self.strides)
        self.null = nn.Parameter(torch.zeros(levels - 1, config.latent_size)) if levels > 1 else None
        self.context = (seen, seen)

    def forward(self, quantized: Sequence[Tensor], keep: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits `(B, V, T)` from a prefix of levels `(B, D, t)`; `keep` `(B,)` shortens the prefix per sample."""
        rate, level = self.strides[0], 0
        x = self.first(quantized[0], _slower(lengths, rate))
        for (blocks, norm, up), ratio in zip(self.stages, reversed(self.ratios), strict=True):
            at_rate = _slower(lengths, rate)
            if level + 1 < len(self.strides) and rate == self.strides[level + 1]:
                level += 1
                x = self.merges[level - 1](torch.cat([x, self._level(quantized, level, keep, x)], 1), at_rate)
            x = up(norm(blocks(x, at_rate)), at_rate)
            rate //= ratio
        blocks, norm, out = self.units
        return out(norm(blocks(functional.gelu(x), lengths)), lengths)

    def _level(self, quantized: Sequence[Tensor], level: int, keep: Tensor | None, x: Tensor) -> Tensor:
        null = self.null[level - 1].to(x.dtype)[:, None]
        if level >= len(quantized):
            return null.expand(x.shape[0], -1, x.shape[2])
        return quantized[level] if keep is None else torch.where((keep > level)[:, None, None], quantized[level], null)


class TextVQModel(VQPreTrainedModel):
    """Text to codes and back.

    `forward` and `encode` take `input_ids`, integers `(B, T)` from 0 to `vocab_size`, which itself is padding, T a multiple of the
    largest stride (the processor pads; `VQTokenizer` takes texts of any length). Codes are a tuple over levels, each int64
    `(B, Q, t)`; `reconstruction` is the logits `(B, T, vocab_size)`. `encode` and `decode` take `sizes` `(B, 1)`, the units of each
    text, where texts were padded to each other.

    Example:
        >>> config = TextVQConfig(strides=[8, 4], hidden_sizes=[16, 16], embedding_size=8, latent_size=4)
        >>> model = TextVQModel(config).eval()
        >>> codes = model.encode(torch.zeros(1, 32, dtype=torch.long)).codes
        >>> [tuple(level.shape) for level in codes], tuple(model.decode(codes).reconstruction.shape)
        ([(1, 2, 4), (1, 2, 8)], (1, 32, 256))
    """

    config: TextVQConfig
    config_class = TextVQConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    chunk_units = 1 << 15  # of a long text that are computed at once, beside what they see around them

    def __init__(self, config: TextVQConfig):
        super().__init__(config)
        self.encoder = TextEncoder(config)
        self.quantizer = build_hierarchy(config.quantizers, config.latent_size, ndim=1)
        if config.continuous_steps or config.continuous_share:
            self.quantizer.start = ContinuousStart(config.continuous_steps, config.continuous_share)
        self.decoder = TextDecoder(config)
        self.post_init()

    def forward(self, input_ids: Tensor):  # type: ignore[no-untyped-def]
        """See `VQPreTrainedModel.forward`; `input_ids` are integers `(B, T)`, `vocab_size` where there is padding."""
        return super().forward(input_ids)

    def check_media(self, media: Tensor) -> Tensor:
        """Refuse anything but integers `(B, T)` from 0 to `vocab_size` with T a multiple of the largest stride."""
        stride, size = self.layout.stride, self.config.vocab_size
        if not isinstance(media, Tensor) or media.ndim != 2:
            shape = tuple(media.shape) if isinstance(media, Tensor) else type(media).__name__
            raise ValueError(f"input_ids must be a tensor of integers (B, T), got {shape}")
        if media.is_floating_point() or media.is_complex() or media.dtype == torch.bool:
            raise ValueError(f"input_ids must be integers, got {media.dtype}: use the processor")
        if not media.shape[1] or media.shape[1] % stride:
            raise ValueError(
                f"input_ids of {media.shape[1]} units do not fit the largest stride {stride}: use the processor, which pads, or "
                "VQTokenizer.encode"
            )
        low, high = media.aminmax() if media.numel() else (0, 0)
        if low < 0 or high > size:
            raise ValueError(f"input_ids must be from 0 to {size} (padding), got {int(low)} to {int(high)}")
        return media.long()

    def check_sizes(self, sizes: Tensor, batch: int, grid: Sequence[int]) -> Tensor:
        """Refuse anything but int64 `(B, 1)` from 1 to the units of the batch."""
        most = grid[0] * self.layout.stride
        if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64 or tuple(sizes.shape) != (batch, 1):
            shape = f"{sizes.dtype} {tuple(sizes.shape)}" if isinstance(sizes, Tensor) else type(sizes).__name__
            raise ValueError(f"sizes must be int64 ({batch}, 1), the units of each text, got {shape}")
        if bool((sizes < 1).any() | (sizes > most).any()):
            raise ValueError(f"sizes must be from 1 to the {most} units of the batch, got {sizes.flatten().tolist()}")
        return sizes

    def extract(self, media: Tensor, sizes: Tensor | None = None) -> Features:
        """Features of each level, coarse to fine; of each text what lies beyond its size is padding."""
        if sizes is None:
            return self.encoder(media)
        beyond = torch.arange(media.shape[1], device=media.device) >= sizes.to(media.device)
        return self.encoder(media.masked_fill(beyond, self.config.vocab_size), self._padded(sizes, media))

    def propose(self, features: Features, level: int, quantized: Sequence[Tensor]) -> Tensor:
        """Channel-last latents `(B, t, D)` of `level`."""
        coarser = [value.transpose(1, 2).to(features.levels[0].dtype) for value in quantized]
        return self.encoder.latents(features, level, coarser).transpose(1, 2)

    def seen_by_decoder(self, fields: dict[str, Any]) -> Sequence[Tensor]:
        """The quantized latents; while the model is young, the latents themselves of part of the samples."""
        start = getattr(self.quantizer, "start", None)
        return fields["quantized"] if start is None else start.mix(fields["latents"], fields["quantized"])

    def synthesise(
        self, quantized: Sequence[Tensor], keep: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Logits `(B, T, V)` from channel-last quantized latents; zero beyond each text with its own padding."""
        grids, keep = self.quantizer.merge(quantized, keep)
        values = [value.transpose(1, 2).to(self.dtype) for value in grids]
        lengths = None if sizes is None else self._padded(sizes, values[0])
        if lengths is not None:
            pairs = zip(values, self.config.strides, strict=False)
            values = [zero_beyond(value, lengths // stride) for value, stride in pairs]
        return self.decoder(values, keep, lengths).transpose(1, 2)

    def reconstruction_losses(self, reconstruction: Tensor, media: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the units that are no padding, in nats, in fp32."""
        logits, ids = reconstruction.float().flatten(0, 1), media.flatten()
        total = functional.cross_entropy(logits, ids, ignore_index=self.config.vocab_size, reduction="sum")
        return {"reconstruction_loss": total / (ids < self.config.vocab_size).sum().clamp(min=1)}

    @torch.no_grad()
    def encode_long(self, media: Tensor) -> tuple[Tensor, ...]:
        """The codes of `encode`, chunk by chunk (see `vqtok.chunks`)."""
        media = self.check_media(media)
        parts = encode_chunks(self, media.shape[1], lambda start, end: media[:, start:end])
        return tuple(torch.cat(values, 2) for values in zip(*parts, strict=True))

    @torch.no_grad()
    def decode_long(self, codes: Sequence[Tensor]) -> Tensor:
        """The likeliest ids `(B, T)` of the logits of `decode`, some rows and chunks at a time: all logits would fill the memory."""
        self._check_codes(codes)
        batch, _, steps = codes[0].shape
        units = max(1, MOST_LOGITS // self.config.vocab_size)
        rows = max(1, units // (steps * self.layout.stride))
        write = lambda part: self.decode(part).reconstruction.argmax(-1)  # noqa: E731
        some = ([level[first : first + rows] for level in codes] for first in range(0, max(1, batch), rows))
        written = (decode_chunks(self, part, min(units, self.chunk_units), write) for part in some)
        return torch.cat([torch.cat(list(chunks), 1) for chunks in written])

    def _padded(self, sizes: Tensor, like: Tensor) -> Tensor:
        """The units of each text with the padding it has alone."""
        stride = self.layout.stride
        return (-(-sizes[:, 0] // stride) * stride).to(like.device)


def _slower(lengths: Tensor | None, stride: int) -> Tensor | None:
    """Lengths in steps of `stride`; they are multiples of it."""
    return None if lengths is None else lengths // stride
