"""Published codecs of transformers behind our contract."""

from .codecs import CODECS
from .configuration_wrapped_audio import WrappedAudioConfig
from .modeling_wrapped_audio import WrappedAudioModel, read_codec_config

__all__ = ["CODECS", "WrappedAudioConfig", "WrappedAudioModel", "read_codec_config"]
