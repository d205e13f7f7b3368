"""Convolutional blocks on pictures, `(B, C, H, W)`. Zero padding only, no norms: nothing depends on the rest of the batch."""

from __future__ import annotations

import math

from torch import Tensor, nn


class ResidualStack(nn.Module):
    """`num_layers` blocks x + conv1x1(relu(conv3x3(relu(x)))), then a relu (van den Oord et al. 2017, section 4.1)."""

    def __init__(self, channels: int, residual_channels: int, num_layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, residual_channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(residual_channels, channels, 1),
            )
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.relu(x)


def downsample(in_channels: int, out_channels: int, factor: int) -> nn.Sequential:
    """4x4 convolutions of stride 2, halving each side log2(factor) times; the first stages are narrower."""
    layers: list[nn.Module] = []
    steps = int(math.log2(factor))
    channels = in_channels
    for step in range(steps):
        width = max(out_channels >> (steps - 1 - step), 16) if in_channels < out_channels else out_channels
        layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, out_channels, 3, padding=1))


def upsample(in_channels: int, out_channels: int, factor: int) -> nn.Sequential:
    """4x4 transposed convolutions of stride 2, doubling each side log2(factor) times; the last stages are narrower."""
    layers: list[nn.Module] = []
    steps = int(math.log2(factor))
    channels = in_channels
    for step in range(steps):
        width = out_channels if step == steps - 1 else max(in_channels >> step, 16)
        layers += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers[:-1])


def initialise_convolution(module: nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d) -> None:
    """Normal with variance 1 / fan_in (LeCun et al. 1998, section 4.6), or 0 if the layer says `starts_at_zero`; biases 0.

    A layer along time may say `starts_with`, a slice of its kernel: all other places start at 0.

    torch's default is a third of that, with which ten layers make activations of 1e-3: latents then start almost constant, and
    training spends its first hundreds of steps on scaling them up. Twice that (He et al. 2015), meant for stacks where a relu
    follows every convolution, makes the first steps of this decoder explode.
    """
    places: slice | None = getattr(module, "starts_with", None)
    seen = math.prod(module.kernel_size) if places is None else places.stop - places.start
    fan_in = module.in_channels // module.groups * seen
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        fan_in /= math.prod(module.stride)  # of the kernel's places, each output sees one in stride
    # Said by the layer and not done by the block around it: transformers visits only modules with tensors of their own.
    scale = 0.0 if getattr(module, "starts_at_zero", False) else math.sqrt(1 / fan_in)
    nn.init.normal_(module.weight, 0.0, scale)
    if places is not None and not getattr(
        module.weight, "_is_hf_initialized", False
    ):  # what came from a file stays, as above
        module.weight.data[..., : places.start] = 0
        module.weight.data[..., places.stop :] = 0
    if module.bias is not None:
        nn.init.zeros_(module.bias)
