"""The text room: configuration, model, processor, and codes of whole sentences."""

from .configuration_text_vq import TextVQConfig
from .modeling_text_vq import TextVQModel
from .processing_text_vq import TextVQProcessor
from .semantic import SentenceCodes

__all__ = ["SentenceCodes", "TextVQConfig", "TextVQModel", "TextVQProcessor"]
