"""The audio room: configuration, model, feature extractor, losses, discriminators, streams."""

from .configuration_audio_vq import AudioVQConfig
from .feature_extraction_audio_vq import AudioVQFeatureExtractor
from .modeling_audio_vq import AudioVQModel
from .streaming import StreamingDecoder, StreamingEncoder

__all__ = ["AudioVQConfig", "AudioVQFeatureExtractor", "AudioVQModel", "StreamingDecoder", "StreamingEncoder"]
