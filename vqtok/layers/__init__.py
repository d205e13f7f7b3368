"""Building blocks that several rooms share."""

from .convolution import ResidualStack, downsample, initialise_convolution, upsample
from .waveform import ResidualUnits, StreamState, TimeConv, TimeUpsample, activation, zero_beyond

__all__ = [
    "ResidualStack",
    "ResidualUnits",
    "StreamState",
    "TimeConv",
    "TimeUpsample",
    "activation",
    "downsample",
    "initialise_convolution",
    "upsample",
    "zero_beyond",
]
