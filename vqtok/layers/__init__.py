"""Building blocks that several rooms share."""

from .convolution import ResidualStack, downsample, initialise_convolution, upsample

__all__ = ["ResidualStack", "downsample", "initialise_convolution", "upsample"]
