"""Building blocks that several rooms share."""

from .convolution import ResidualStack, downsample, initialise_convolution, upsample
from .spectrum import TimeSpectrum, TimeSynthesis
from .waveform import ResidualUnits, StreamState, TimeConv, TimeUpsample, activation, zero_beyond

__all__ = [
    "ResidualStack",
    "ResidualUnits",
    "StreamState",
    "TimeConv",
    "TimeSpectrum",
    "TimeSynthesis",
    "TimeUpsample",
    "activation",
    "downsample",
    "initialise_convolution",
    "upsample",
    "zero_beyond",
]
