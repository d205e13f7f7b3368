"""The image room: configuration, model, processor, data."""

from .configuration_image_vq import ImageVQConfig
from .image_processing_image_vq import ImageVQImageProcessor
from .modeling_image_vq import ImageVQModel

__all__ = ["ImageVQConfig", "ImageVQImageProcessor", "ImageVQModel"]
