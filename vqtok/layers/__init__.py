"""Building blocks that several rooms share."""

from .convolution import ResidualStack, downsample, upsample

__all__ = ["ResidualStack", "downsample", "upsample"]
