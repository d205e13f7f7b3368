"""The image tokenizer: VQ-VAE (van den Oord et al. 2017) with one grid, VQ-VAE-2 (Razavi et al. 2019) with two and more.

Axis letters: B batch, C channels, H W pixels, h w grid of a level, D code dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqtok.layers import ResidualStack, downsample, upsample
from vqtok.modeling import VQPreTrainedModel
from vqtok.quantizers import build_hierarchy

from .configuration_image_vq import ImageVQConfig
from .losses import pixel_loss


class ImageEncoder(nn.Module):
    """Everything that decides codes before the quantizers: features of each level and the way down from coarse to fine."""

    def __init__(self, config: ImageVQConfig):
        super().__init__()
        width, strides = config.hidden_size, list(config.strides)
        ratios = [coarse // fine for coarse, fine in zip(strides, strides[1:], strict=False)]
        # Finest first, as the picture flows.
        self.features = nn.ModuleList([_block(config, downsample(config.num_channels, width, strides[-1]))])
        self.features.extend(_block(config, downsample(width, width, ratio)) for ratio in reversed(ratios))
        # conditions[i] brings what level i knows to the grid of level i + 1.
        self.conditions = nn.ModuleList(
            _block(config, upsample(config.latent_size + (width if index else 0), width, ratio))
            for index, ratio in enumerate(ratios)
        )
        self.heads = nn.ModuleList(
            nn.Conv2d(width + (width if index else 0), config.latent_size, 1) for index in range(len(strides))
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Features `(B, hidden_size, h, w)` of each level, coarse to fine."""
        features = []
        for block in self.features:
            pixels = block(pixels)
            features.append(pixels)
        return features[::-1]

    def latents(self, features: list[Tensor], level: int, quantized: Sequence[Tensor]) -> Tensor:
        """Latents `(B, D, h, w)` of `level`, given the quantized latents `(B, D, h, w)` of the coarser ones."""
        condition: Tensor | None = None
        for block, value in zip(self.conditions, quantized, strict=False):
            condition = block(value if condition is None else torch.cat([value, condition], 1))
        own = features[level]
        return self.heads[level](own if condition is None else torch.cat([own, condition], 1))


class ImageDecoder(nn.Module):
    """Pixels from quantized latents, coarse to fine. A level that is not given is replaced by a learned vector."""

    def __init__(self, config: ImageVQConfig):
        super().__init__()
        width, strides = config.hidden_size, list(config.strides)
        self.coarsest = _block(config, nn.Conv2d(config.latent_size, width, 3, padding=1))
        self.ups = nn.ModuleList(upsample(width, width, a // b) for a, b in zip(strides, strides[1:], strict=False))
        self.merges = nn.ModuleList(
            _block(config, nn.Conv2d(width + config.latent_size, width, 3, padding=1)) for _ in strides[1:]
        )
        # Row i stands for level i + 1; with one level there is none, as DDP does not forgive a parameter that is never used.
        self.null = nn.Parameter(torch.zeros(len(strides) - 1, config.latent_size)) if len(strides) > 1 else None
        self.to_pixels = upsample(width, config.num_channels, strides[-1])

    def forward(self, quantized: Sequence[Tensor], keep: Tensor | None) -> Tensor:
        """Pixels `(B, C, H, W)` from a prefix of levels `(B, D, h, w)`; `keep` `(B,)` shortens the prefix per sample."""
        x = self.coarsest(quantized[0])
        for index, (up, merge) in enumerate(zip(self.ups, self.merges, strict=True), start=1):
            x = up(x)
            null = self.null[index - 1].to(x.dtype)[:, None, None]
            if index >= len(quantized):
                level = null.expand(x.shape[0], -1, *x.shape[2:])
            elif keep is None:
                level = quantized[index]
            else:
                level = torch.where((keep > index)[:, None, None, None], quantized[index], null)
            x = merge(torch.cat([x, level], 1))
        return self.to_pixels(x)


class ImageVQModel(VQPreTrainedModel):
    """Pictures to codes and back.

    `forward` and `encode` take `pixel_values`, float `(B, C, H, W)` in [-1, 1], both sides multiples of the largest stride
    (the processor pads; `VQTokenizer` takes pictures of any size). Codes are a tuple over levels, each int64 `(B, 1, h, w)`.

    Example:
        >>> config = ImageVQConfig(strides=[8, 4], latent_size=4, hidden_size=16, residual_size=8)
        >>> model = ImageVQModel(config).eval()
        >>> codes = model.encode(torch.zeros(1, 3, 32, 48)).codes
        >>> [tuple(level.shape) for level in codes], tuple(model.decode(codes).reconstruction.shape)
        ([(1, 1, 4, 6), (1, 1, 8, 12)], (1, 3, 32, 48))
    """

    config: ImageVQConfig
    config_class = ImageVQConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: ImageVQConfig):
        super().__init__(config)
        self.encoder = ImageEncoder(config)
        self.quantizer = build_hierarchy(config.quantizers, config.latent_size, ndim=2)
        self.decoder = ImageDecoder(config)
        self.post_init()

    def forward(self, pixel_values: Tensor):  # type: ignore[no-untyped-def]
        """See `VQPreTrainedModel.forward`; `pixel_values` is float `(B, C, H, W)` in [-1, 1]."""
        return super().forward(pixel_values)

    def check_media(self, media: Tensor) -> Tensor:
        """Refuse anything but float `(B, C, H, W)` with sides that are multiples of the largest stride."""
        channels, stride = self.config.num_channels, self.layout.stride
        if not isinstance(media, Tensor) or media.ndim != 4 or media.shape[1] != channels:
            shape = tuple(media.shape) if isinstance(media, Tensor) else type(media).__name__
            raise ValueError(f"pixel_values must be a float tensor (B, {channels}, H, W), got {shape}")
        if not media.is_floating_point():
            raise ValueError(f"pixel_values must be floats in [-1, 1], got {media.dtype}: use the processor")
        if not media.shape[2] or not media.shape[3] or media.shape[2] % stride or media.shape[3] % stride:
            raise ValueError(
                f"pixel_values of {media.shape[2]}x{media.shape[3]} pixels do not fit the largest stride {stride}: "
                "use the processor, which pads, or VQTokenizer.encode"
            )
        return media.to(self.dtype, memory_format=torch.channels_last)

    def extract(self, media: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
        """Features of each level, coarse to fine."""
        return self.encoder(media)

    def propose(self, features: list[Tensor], level: int, quantized: Sequence[Tensor]) -> Tensor:
        """Channel-last latents `(B, h, w, D)` of `level`."""
        coarser = [value.permute(0, 3, 1, 2).to(features[0].dtype) for value in quantized]
        return self.encoder.latents(features, level, coarser).permute(0, 2, 3, 1)

    def synthesise(
        self, quantized: Sequence[Tensor], keep: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Pixels `(B, C, H, W)` from channel-last quantized latents."""
        grids, keep = self.quantizer.merge(quantized, keep)
        return self.decoder([value.permute(0, 3, 1, 2).to(self.dtype) for value in grids], keep)

    def reconstruction_losses(self, reconstruction: Tensor, media: Tensor) -> dict[str, Tensor]:
        """The pixel loss of the config, in fp32."""
        return {"reconstruction_loss": pixel_loss(reconstruction, media, self.config.reconstruction_loss)}


def _block(config: ImageVQConfig, first: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, ResidualStack(config.hidden_size, config.residual_size, config.num_residual_layers))
