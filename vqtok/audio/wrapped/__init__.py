"""Published codecs of transformers behind our contract."""

from .codecs import CODECS
from .configuration_wrapped_audio import WrappedAudioConfig
from .feature_extraction_wrapped_audio import WrappedAudioFeatureExtractor
from .modeling_wrapped_audio import WrappedAudioModel, read_codec_config

__all__ = ["CODECS", "WrappedAudioConfig", "WrappedAudioFeatureExtractor", "WrappedAudioModel", "read_codec_config"]
