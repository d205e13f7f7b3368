"""EnCodec (Défossez et al. 2022) of transformers: 24 kHz, and MusicGen's 32 kHz."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import EncodecConfig, EncodecModel

from vqtok.codes import LevelLayout

from .codec import Codec, Front


class EnCodec(Codec):
    """A clip alone has the codes that `EncodecModel.encode` gives at the highest bandwidth; all of them, not its lowest, are default."""

    name = "EnCodec"
    config_class = EncodecConfig
    model_class = EncodecModel
    code_names = ("model_type", "sampling_rate", "audio_channels", "hidden_size", "num_filters", "num_residual_layers")
    code_names += ("upsampling_ratios", "norm_type", "kernel_size", "last_kernel_size", "residual_kernel_size")
    code_names += ("dilation_growth_rate", "use_causal_conv", "pad_mode", "compress", "num_lstm_layers")
    code_names += ("codebook_size", "codebook_dim", "use_conv_shortcut")

    def check(self, config: Any) -> None:
        kind = f"EnCodec at {config.sampling_rate} Hz"
        instead = "use facebook/encodec_24khz, whose sound is resampled with processor.resample = True, or a DAC"
        if config.chunk_length_s is not None:
            raise ValueError(
                f"{kind} codes chunks of {config.chunk_length_s:g} s that overlap (chunk_length_s), so that a moment has two sets of "
                f"codes, and no grid of them is that of the clip: {instead}"
            )
        if config.normalize:
            raise ValueError(
                f"{kind} divides each clip by its loudness (normalize), and its codes alone do not say how loud it was: {instead}"
            )
        super().check(config)
        if config.codebook_dim != config.hidden_size:
            raise ValueError(
                f"{kind}: codebook_dim {config.codebook_dim} is not hidden_size {config.hidden_size}: mend the config"
            )

    def num_channels(self, config: Any) -> int:
        return config.audio_channels

    def level(self, config: Any) -> LevelLayout:
        return LevelLayout(config.hop_length, config.num_quantizers, config.codebook_size)

    def latent_size(self, config: Any) -> int:
        return config.hidden_size

    def encoder(self, model: Any) -> nn.Module:
        return Front(model.encoder)

    def decoder(self, model: Any) -> nn.Module:
        return Front(model.decoder)

    def tables(self, model: Any) -> list[Tensor]:
        return [layer.codebook.embed for layer in model.quantizer.layers]
