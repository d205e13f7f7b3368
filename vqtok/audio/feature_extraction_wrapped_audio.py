"""Sound of any kind to the tensors of a wrapped codec, and back."""

from typing import Any

from torch import Tensor

from .feature_extraction_audio_vq import AudioVQFeatureExtractor

# A clip is in memory as a whole, with all activations of the codec: about 2 GB for EnCodec.
MAX_CLIP_SECONDS = 600


class WrappedAudioFeatureExtractor(AudioVQFeatureExtractor):
    """As `AudioVQFeatureExtractor`, but clips keep their exact length: how a codec goes on at the end of a clip is its own business.

    Args:
        stride: the hop of the codec, in samples.
        sampling_rate, num_channels, resample, mix: see `AudioVQFeatureExtractor`.
        max_seconds: a longer clip is refused; another bound can be given to `encode`.

    Example:
        >>> extractor = WrappedAudioFeatureExtractor(stride=320, sampling_rate=24_000)
        >>> values, size = extractor.prepare(np.zeros(1000, np.float32), sampling_rate=24_000)
        >>> tuple(values.shape), size
        ((1, 1000), (1000,))
    """

    def __init__(
        self,
        stride: int = 320,
        sampling_rate: int = 24_000,
        num_channels: int = 1,
        resample: bool = False,
        mix: bool = False,
        max_seconds: int = MAX_CLIP_SECONDS,
        **kwargs: Any,
    ) -> None:
        super().__init__(stride, sampling_rate, num_channels, resample, mix, max_seconds, **kwargs)

    @property
    def code_fields(self) -> dict[str, Any]:
        return {**super().code_fields, "padding": "none"}

    def prepare(
        self, audio: Any, sampling_rate: int | None = None, max_seconds: int | None = None
    ) -> tuple[Tensor, tuple[int]]:
        values, size = super().prepare(audio, sampling_rate, max_seconds)
        return values[:, : size[0]], size
