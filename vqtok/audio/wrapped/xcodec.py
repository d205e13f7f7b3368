"""X-Codec (Ye et al. 2024) of transformers: DAC's convolutions beside a model of speech or sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import XcodecConfig, XcodecModel

from vqtok.codes import LevelLayout

from .codec import Codec, check_upsampling

_SEMANTIC = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
_SEMANTIC += ("conv_dim", "conv_stride", "conv_kernel", "conv_bias", "feat_extract_norm", "feat_extract_activation")
_SEMANTIC += ("do_stable_layer_norm", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "layer_norm_eps")


class XcodecFront(nn.Module):
    """Acoustic and semantic latents side by side, through one linear layer, as `XcodecModel.encode` has it.

    The semantic model is never trained, and stays in eval mode.
    """

    context = (0, 0)

    def __init__(self, model: Any):
        super().__init__()
        self.acoustic, self.semantic = model.acoustic_encoder, model.encoder_semantic
        self.semantic_model, self.join = model.semantic_model.requires_grad_(False), model.fc
        self.semantic_model.masked_spec_embed = None  # of training only
        self.pad = model.pad

    def train(self, mode: bool = True) -> XcodecFront:
        super().train(mode)
        self.semantic_model.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        around = nn.functional.pad(x, (self.pad, self.pad))
        with torch.no_grad():
            hidden = self.semantic_model(around[:, 0], output_hidden_states=True).hidden_states
        semantic = self.semantic(torch.stack(hidden, 1).mean(1).transpose(1, 2))
        is_short = _steps(self.acoustic, x.shape[2]) != semantic.shape[2]
        acoustic = self.acoustic(around if is_short else x)
        return self.join(torch.cat([acoustic, semantic], 1).transpose(1, 2)).transpose(1, 2)


class XcodecBack(nn.Module):
    """The acoustic half of the quantized latents to sound."""

    context = (0, 0)

    def __init__(self, model: Any):
        super().__init__()
        self.split, self.acoustic = model.fc2, model.acoustic_decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.acoustic(self.split(x.transpose(1, 2)).transpose(1, 2))


class XCodec(Codec):
    """A clip alone, padded to the hop, has the codes that `XcodecModel.encode` gives at its highest bandwidth."""

    name = "X-Codec"
    config_class = XcodecConfig
    model_class = XcodecModel
    code_names = (
        "model_type",
        "sample_rate",
        "kernel_size",
        "channel_ratios",
        "strides",
        "block_dilations",
        "unit_kernel_size",
    )
    code_names += ("codebook_size", "codebook_dim")
    pads = True

    def check(self, config: Any) -> None:
        super().check(config)
        if config.acoustic_model_config.model_type != "dac":
            raise ValueError(f"X-Codec with {config.acoustic_model_config.model_type!r} instead of 'dac' is not known")
        check_upsampling(config.acoustic_model_config, "X-Codec's acoustic model")
        if config.semantic_model_config.model_type not in ("hubert", "wavlm"):
            raise ValueError(
                f"X-Codec with {config.semantic_model_config.model_type!r} instead of 'hubert' or 'wavlm' is not known"
            )
        if config.codebook_dim != config.hidden_size:
            raise ValueError(
                f"X-Codec: codebook_dim {config.codebook_dim} is not the latents' width {config.hidden_size}: mend the config"
            )

    def sampling_rate(self, config: Any) -> int:
        return config.sample_rate

    def level(self, config: Any) -> LevelLayout:
        return LevelLayout(config.hop_length, config.num_quantizers, config.codebook_size)

    def latent_size(self, config: Any) -> int:
        return config.hidden_size

    def code_fields(self, config: Any) -> dict[str, Any]:
        acoustic, semantic = config.acoustic_model_config, config.semantic_model_config
        return {
            **super().code_fields(config),
            "acoustic": {
                name: getattr(acoustic, name) for name in ("encoder_hidden_size", "downsampling_ratios", "hidden_size")
            },
            "semantic": {name: getattr(semantic, name) for name in _SEMANTIC},
        }

    def encoder(self, model: Any) -> nn.Module:
        return XcodecFront(model)

    def decoder(self, model: Any) -> nn.Module:
        return XcodecBack(model)

    def tables(self, model: Any) -> list[Tensor]:
        return [layer.codebook.embed for layer in model.quantizer.quantizers]


def _steps(encoder: nn.Module, length: int) -> int:
    """How many steps the convolutions make of `length` samples."""
    for layer in (module for module in encoder.modules() if isinstance(module, nn.Conv1d)):
        (padding,), (dilation,), (kernel,), (stride,) = (
            getattr(layer, name) for name in ("padding", "dilation", "kernel_size", "stride")
        )
        length = (length + 2 * int(padding) - dilation * (kernel - 1) - 1) // stride + 1
    return length
