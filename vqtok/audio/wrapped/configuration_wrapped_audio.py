"""Configuration of a published codec behind our contract."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict

from vqtok.codes import CodeLayout
from vqtok.configuration import VQConfig, require
from vqtok.quantizers import QuantizerConfig, quantizer_config

from .codec import Codec
from .codecs import CODECS


@strict
class WrappedAudioConfig(VQConfig):
    """Configuration of `WrappedAudioModel`: the codec's own, and where it comes from.

    Args:
        codec: the `config.json` of the codec, with its `model_type`.
        source: where its weights lie: `{"repo", "revision"}` on the Hub, or `{"folder"}` on this machine.
        decoder_fingerprint: of the decoder's weights; the code space has its own (`fingerprint`).
        license: of the weights, where they lie beside this file.

    Example:
        >>> config = WrappedAudioConfig(codec={"model_type": "encodec"})
        >>> config.layout.levels[0].stride, config.layout.levels[0].num_codebooks, config.kbps(), config.kbps(2)
        (320, 32, 24.0, 1.5)
    """

    model_type = "vqtok_wrapped_audio"

    codec: dict[str, Any] = field(default_factory=lambda: {"model_type": "encodec"})
    source: dict[str, Any] | None = None
    decoder_fingerprint: str | None = None
    license: str | None = None

    def check_ranges(self) -> None:
        """Refuse what is no codec that is known, or one that cannot keep the promises."""
        kind = self.codec.get("model_type")
        require(
            isinstance(kind, str) and kind in CODECS,
            self,
            "codec",
            f"a config with a model_type of {', '.join(CODECS)}",
        )
        keys = None if self.source is None else set(self.source)
        fits = keys in (None, {"repo", "revision"}, {"repo", "revision", "subfolder"}, {"folder"}) and all(
            isinstance(value, str) and value for value in (self.source or {}).values()
        )
        require(fits, self, "source", '{"repo", "revision"} or {"folder"}')
        try:
            config = self.codec_config
        except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"WrappedAudioConfig.codec makes no sense to transformers ({error}): mend it") from error
        CODECS[kind].check(config)

    @property
    def wrapped(self) -> Codec:
        """What is known of this kind of codec."""
        return CODECS[self.codec["model_type"]]

    @property
    def codec_config(self) -> Any:
        """The codec's configuration as transformers has it, made anew."""
        return self.wrapped.config_class.from_dict(dict(self.codec))

    @property
    def sampling_rate(self) -> int:
        """Of the codec, in Hz."""
        return self.wrapped.sampling_rate(self.codec_config)

    @property
    def num_channels(self) -> int:
        """1 (mono) or 2 (stereo)."""
        return self.wrapped.num_channels(self.codec_config)

    @property
    def quantizers(self) -> list[QuantizerConfig]:
        """Our residual quantizer with the codec's number and kind of codebooks."""
        config = self.codec_config
        depth = self.wrapped.level(config).num_codebooks
        return [quantizer_config({"type": "residual", "num_codebooks": depth, "layer": self.wrapped.layer(config)})]

    @property
    def layout(self) -> CodeLayout:
        """The shape of the codes: one level."""
        return CodeLayout(1, (self.wrapped.level(self.codec_config),))

    def kbps(self, num_codebooks: int | None = None) -> float:
        """Kilobits per second of the codes of the first `num_codebooks` (None: all), without padding and header."""
        (level,) = self.layout.levels
        depth = min(level.num_codebooks, num_codebooks or level.num_codebooks)
        return level.bits * depth / level.num_codebooks / level.stride * self.sampling_rate / 1000

    @property
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide codes, for the fingerprint."""
        return {"model_type": self.model_type, "codec": self.wrapped.code_fields(self.codec_config)}
