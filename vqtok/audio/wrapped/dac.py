"""DAC (Kumar et al. 2023) of transformers: 16, 24 and 44.1 kHz."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DacConfig, DacModel

from vqtok.codes import LevelLayout
from vqtok.quantizers import Codebook, HierarchicalQuantizer

from .codec import Codec, Front, check_upsampling


class DirectionCodebook(Codebook):
    """Codes are found by direction alone, and stand for rows as long as they are stored; `table` are their directions."""

    def forward(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(codes, self.embedding)


class DAC(Codec):
    """A clip alone has the codes that `DacModel.encode` gives after its own feature extractor, which pads to the hop.

    Of an odd stride DAC gives some samples less than it takes (8 of 16,000 at 16 kHz); they come back as silence.
    """

    name = "DAC"
    config_class = DacConfig
    model_class = DacModel
    code_names = (
        "model_type",
        "sampling_rate",
        "encoder_hidden_size",
        "downsampling_ratios",
        "codebook_size",
        "codebook_dim",
    )
    pads = True

    def check(self, config: Any) -> None:
        super().check(config)
        check_upsampling(config, self.name)

    def level(self, config: Any) -> LevelLayout:
        return LevelLayout(config.hop_length, config.n_codebooks, config.codebook_size)

    def latent_size(self, config: Any) -> int:
        return config.hidden_size

    def layer(self, config: Any) -> dict[str, Any]:
        return {**super().layer(config), "codebook_dim": config.codebook_dim, "metric": "cosine", "update": "gradient"}

    def encoder(self, model: Any) -> nn.Module:
        return Front(model.encoder)

    def decoder(self, model: Any) -> nn.Module:
        return Front(model.decoder)

    def adapt(self, quantizer: HierarchicalQuantizer) -> None:
        for layer in quantizer.levels[0].layers:
            own = layer.config
            layer.codebook = DirectionCodebook(
                own.codebook_size, own.codebook_dim, own.update, own.metric, own.decay, own.revival_threshold
            )

    @torch.no_grad()
    def fill(self, quantizer: HierarchicalQuantizer, model: Any) -> None:
        super().fill(quantizer, model)
        for layer, theirs in zip(quantizer.levels[0].layers, model.quantizer.quantizers, strict=True):
            for ours, other in ((layer.project_in, theirs.in_proj), (layer.project_out, theirs.out_proj)):
                ours.weight.copy_(other.weight[..., 0])
                ours.bias.copy_(other.bias)

    def tables(self, model: Any) -> list[Tensor]:
        return [layer.codebook.weight for layer in model.quantizer.quantizers]
