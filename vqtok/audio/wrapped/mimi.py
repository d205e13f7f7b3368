"""Mimi (Défossez et al. 2024) of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MimiConfig, MimiModel

from vqtok.codes import LevelLayout

from .codec import Codec


class MimiFront(nn.Module):
    """Convolutions, transformer and downsampling, then the projections of both its quantizers side by side."""

    context = (0, 0)

    def __init__(self, seanet: nn.Module, transformer: nn.Module, downsample: nn.Module, project: nn.Module):
        super().__init__()
        self.seanet, self.transformer, self.downsample, self.project = seanet, transformer, downsample, project

    def forward(self, x: Tensor) -> Tensor:
        x = self.seanet(x).transpose(1, 2)
        x = self.transformer(x, use_cache=False)[0].transpose(1, 2)
        return self.project(self.downsample(x))


class MimiBack(nn.Module):
    """The way back from the sum of both quantizers to sound."""

    context = (0, 0)

    def __init__(self, seanet: nn.Module, transformer: nn.Module, upsample: nn.Module, project: nn.Module):
        super().__init__()
        self.seanet, self.transformer, self.upsample, self.project = seanet, transformer, upsample, project

    def forward(self, x: Tensor) -> Tensor:
        x = self.upsample(self.project(x)).transpose(1, 2)
        return self.seanet(self.transformer(x, use_cache=False)[0].transpose(1, 2))


class Mimi(Codec):
    """A clip alone has the codes that `MimiModel.encode` gives; the first codebook is the semantic one.

    Mimi has two residual quantizers that see the same latents: a semantic and an acoustic one. Here they are one, whose latents are
    those of both side by side: the rows of semantic codebooks are zero in the acoustic half, and the other way round, so that a search in
    one half is not moved by the other.
    """

    name = "Mimi"
    config_class = MimiConfig
    model_class = MimiModel
    code_names = ("model_type", "sampling_rate", "audio_channels", "hidden_size", "num_filters", "num_residual_layers")
    code_names += (
        "upsampling_ratios",
        "kernel_size",
        "last_kernel_size",
        "residual_kernel_size",
        "dilation_growth_rate",
    )
    code_names += (
        "use_causal_conv",
        "pad_mode",
        "compress",
        "codebook_size",
        "codebook_dim",
        "num_semantic_quantizers",
    )
    code_names += (
        "use_conv_shortcut",
        "vector_quantization_hidden_dimension",
        "num_hidden_layers",
        "intermediate_size",
    )
    code_names += ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "norm_eps", "sliding_window")
    code_names += ("attention_bias", "rope_parameters")

    def check(self, config: Any) -> None:
        super().check(config)
        if getattr(config, "encoder_config", True) is None or getattr(config, "decoder_config", True) is None:
            raise ValueError("Mimi without its encoder or its decoder is no tokenizer: load the whole model")
        if config.codebook_dim != config.vector_quantization_hidden_dimension:
            raise ValueError(
                f"Mimi: codebook_dim {config.codebook_dim} is not vector_quantization_hidden_dimension "
                f"{config.vector_quantization_hidden_dimension}: mend the config"
            )
        if config.frame_rate == config.encodec_frame_rate:
            raise ValueError(
                f"Mimi: a frame_rate of {config.frame_rate:g} leaves nothing to downsample: mend the config"
            )

    def num_channels(self, config: Any) -> int:
        return config.audio_channels

    def level(self, config: Any) -> LevelLayout:
        return LevelLayout(config.frame_size, config.num_quantizers, config.codebook_size)

    def latent_size(self, config: Any) -> int:
        return 2 * config.vector_quantization_hidden_dimension

    def encoder(self, model: Any) -> nn.Module:
        half = model.encoder  # of older transformers the convolutions alone
        seanet = getattr(half, "encoder_seanet", half)
        transformer, downsample = (_part(half, model, name) for name in ("encoder_transformer", "downsample"))
        return MimiFront(
            seanet, transformer, downsample, _joined([each.input_proj for each in _quantizers(model)], model.config, 0)
        )

    def decoder(self, model: Any) -> nn.Module:
        half = model.decoder
        seanet = getattr(half, "decoder_seanet", half)
        transformer, upsample = (_part(half, model, name) for name in ("decoder_transformer", "upsample"))
        return MimiBack(
            seanet, transformer, upsample, _joined([each.output_proj for each in _quantizers(model)], model.config, 1)
        )

    def tables(self, model: Any) -> list[Tensor]:
        tables = []
        for half, quantizer in enumerate(_quantizers(model)):
            for layer in quantizer.layers:
                own = layer.codebook
                rows = own.embed_sum / own.cluster_usage.clamp(min=own.epsilon)[:, None]
                other = torch.zeros_like(rows)
                tables.append(torch.cat([other, rows] if half else [rows, other], 1))
        return tables


def _part(half: nn.Module, model: Any, name: str) -> nn.Module:
    return getattr(half, name) if hasattr(half, name) else getattr(model, name)


def _quantizers(model: Any) -> tuple[Any, Any]:
    both = model.quantizer
    return both.semantic_residual_vector_quantizer, both.acoustic_residual_vector_quantizer


@torch.no_grad()
def _joined(projections: list[Any], config: Any, axis: int) -> nn.Module:
    """One convolution of the two: side by side in its outputs (axis 0) or its inputs (axis 1)."""
    width, inner = config.hidden_size, config.vector_quantization_hidden_dimension
    sizes = (width, 2 * inner) if axis == 0 else (2 * inner, width)
    joined = nn.Conv1d(*sizes, 1, bias=False)
    same = torch.eye(width, device=joined.weight.device)[..., None]  # where both widths are equal it has no projections
    joined.weight.copy_(torch.cat([same if each is None else each.weight for each in projections], axis))
    return joined
