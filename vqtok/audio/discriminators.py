"""Discriminators that a codec can be trained against: by periods (HiFi-GAN) and by complex spectra at several resolutions (EnCodec).

They are published in a tokenizer's `training/`, so that anybody can continue the training.

Axis letters: B batch, C channels, T samples.
"""
# No `from __future__ import annotations`: `strict` reads the annotations of the config and lets strings pass unchecked.

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from vqtok.configuration import VQConfig, require
from vqtok.files import write_json, write_with
from vqtok.layers import initialise_convolution

from .losses import adversarial_loss, discriminator_loss, feature_matching_loss

CONFIG, WEIGHTS = "discriminator_config.json", "discriminator.safetensors"
_SLOPE = 0.1  # of the leaky relu


@strict
class AudioDiscriminatorConfig(VQConfig):
    """Configuration of `AudioDiscriminator`.

    Args:
        num_channels: of the sound, 1 or 2.
        periods: samples per row of each discriminator by period; primes show them different things.
        period_hidden_size: channels of their first layer, doubled by each of the next three.
        windows: samples of the window of each discriminator by spectrum; the hop is a quarter.
        spectrum_hidden_size: channels of their layers.
        loss: "hinge" or "least_squares".
    """

    model_type = "vqtok_audio_discriminator"

    num_channels: int = 1
    periods: list[int] | tuple[int, ...] = (2, 3, 5, 7, 11)
    period_hidden_size: int = 32
    windows: list[int] | tuple[int, ...] = (2048, 1024, 512)
    spectrum_hidden_size: int = 32
    loss: str = "hinge"

    def check_ranges(self) -> None:
        require(self.num_channels in (1, 2), self, "num_channels", "1 or 2")
        fits = len(self.periods) <= 16 and all(2 <= period <= 1024 for period in self.periods)
        require(fits, self, "periods", "at most 16 numbers from 2 to 1024")
        fits = len(self.windows) <= 16 and all(32 <= window <= 16_384 and window % 4 == 0 for window in self.windows)
        require(fits, self, "windows", "at most 16 numbers from 32 to 16384, multiples of 4")
        require(bool(self.periods or self.windows), self, "windows", "at least one, if there are no periods")
        for name in ("period_hidden_size", "spectrum_hidden_size"):
            require(1 <= getattr(self, name) <= 1024, self, name, "from 1 to 1024")
        require(self.loss in ("hinge", "least_squares"), self, "loss", "'hinge' or 'least_squares'")


@dataclass
class AudioDiscriminatorOutput(ModelOutput):
    """What the discriminators say.

    Attributes:
        logits: one tensor per discriminator, `(B, 1, *places)`: above 0 for real sound.
        features: of each discriminator the outputs of its layers, `(B, D, *places)`.
    """

    logits: tuple[Tensor, ...] | None = None
    features: tuple[tuple[Tensor, ...], ...] | None = None


class _Layers(nn.Module):
    """Convolutions with leaky relus between; the last gives the logits."""

    def __init__(self, convolutions: list[nn.Conv2d]):
        super().__init__()
        self.layers = nn.ModuleList(convolutions)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        features = []
        for layer in self.layers[:-1]:
            x = functional.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.layers[-1](x), tuple(features)


class PeriodDiscriminator(_Layers):
    """Sees every `period`-th sample in a row (HiFi-GAN, Kong et al. 2020, section 2.3)."""

    def __init__(self, config: AudioDiscriminatorConfig, period: int):
        width = config.period_hidden_size
        widths = [config.num_channels, width, 2 * width, 4 * width, 8 * width]
        layers = [nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0)) for a, b in zip(widths, widths[1:], strict=False)]
        layers += [nn.Conv2d(widths[-1], widths[-1], (5, 1), 1, (2, 0)), nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0))]
        super().__init__(layers)
        self.period = period

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = functional.pad(x, (0, -x.shape[-1] % self.period))
        return super().forward(x.unflatten(-1, (-1, self.period)))


class SpectrumDiscriminator(_Layers):
    """Sees the complex spectrum at one resolution (EnCodec, Défossez et al. 2022, section 3.4)."""

    def __init__(self, config: AudioDiscriminatorConfig, window: int):
        width = config.spectrum_hidden_size
        layers = [nn.Conv2d(2 * config.num_channels, width, (3, 9), padding=(1, 4))]
        layers += [
            nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
            for dilation in (1, 2, 4)
        ]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)]
        super().__init__(layers)
        self.window = window

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast(x.device.type, enabled=False):
            shape = torch.hann_window(self.window, device=x.device)
            sound = x.float().flatten(0, 1)
            spectrum = torch.stft(
                sound, self.window, self.window // 4, window=shape, pad_mode="constant", return_complex=True
            )
            # Scaled so that white noise of variance 1 has numbers of about that size.
            parts = torch.view_as_real(spectrum / shape.square().sum().sqrt())
        parts = parts.permute(0, 3, 2, 1).unflatten(0, x.shape[:2]).flatten(1, 2)
        return super().forward(parts.to(self.layers[0].weight.dtype))


class AudioDiscriminator(PreTrainedModel):
    """Several discriminators of sound, and the losses of playing against them.

    Example:
        >>> config = AudioDiscriminatorConfig(periods=[2, 3], windows=[256], period_hidden_size=4, spectrum_hidden_size=4)
        >>> output = AudioDiscriminator(config)(torch.randn(2, 1, 1600))
        >>> len(output.logits), [len(layers) for layers in output.features]
        (3, [5, 5, 5])
    """

    config: AudioDiscriminatorConfig
    config_class = AudioDiscriminatorConfig
    base_model_prefix = "vqtok"
    main_input_name = "input_values"

    def __init__(self, config: AudioDiscriminatorConfig):
        super().__init__(config)
        self.periods = nn.ModuleList(PeriodDiscriminator(config, period) for period in config.periods)
        self.spectra = nn.ModuleList(SpectrumDiscriminator(config, window) for window in config.windows)
        self.post_init()

    def forward(self, input_values: Tensor) -> AudioDiscriminatorOutput:
        """See `AudioDiscriminatorOutput`; `input_values` is float `(B, C, T)`, nominally in [-1, 1]."""
        pairs = [each(input_values) for each in (*self.periods, *self.spectra)]
        return AudioDiscriminatorOutput(
            logits=tuple(logits for logits, _ in pairs), features=tuple(features for _, features in pairs)
        )

    def own_loss(self, real: AudioDiscriminatorOutput, fake: AudioDiscriminatorOutput) -> Tensor:
        """What it is trained with (see `vqtok.audio.losses.discriminator_loss`)."""
        return discriminator_loss(real.logits, fake.logits, self.config.loss)

    def codec_losses(self, real: AudioDiscriminatorOutput, fake: AudioDiscriminatorOutput) -> dict[str, Tensor]:
        """What a codec is trained with: `adversarial_loss` and `feature_matching_loss`."""
        return {
            "adversarial_loss": adversarial_loss(fake.logits, self.config.loss),
            "feature_matching_loss": feature_matching_loss(real.features, fake.features),
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            initialise_convolution(module)


def read_discriminator_config(path: str | Path) -> AudioDiscriminatorConfig:
    """The config in a `discriminator_config.json`.

    Raises:
        ValueError: it is no such file; it is named.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {name: value for name, value in values.items() if name not in ("transformers_version", "architectures")}
        if known.pop("model_type", None) != AudioDiscriminatorConfig.model_type:
            raise ValueError(f"model_type must be {AudioDiscriminatorConfig.model_type!r}")
        return AudioDiscriminatorConfig(**known)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def save_discriminator(discriminator: AudioDiscriminator, folder: str | Path) -> None:
    """Write `discriminator_config.json` and `discriminator.safetensors` to `folder`."""
    folder = Path(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in discriminator.state_dict().items()}
    write_with(folder / WEIGHTS, lambda temporary: save_file(weights, temporary, metadata={"format": "pt"}))
    write_json(folder / CONFIG, {"model_type": discriminator.config.model_type, **discriminator.config.to_diff_dict()})


def load_discriminator(folder: str | Path) -> AudioDiscriminator:
    """What `save_discriminator` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are damaged or do not fit the config.
    """
    folder = Path(folder)
    discriminator = AudioDiscriminator(read_discriminator_config(folder / CONFIG))
    try:
        discriminator.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or does not fit {CONFIG}: {error}") from error
    return discriminator
