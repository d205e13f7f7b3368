"""A published codec of transformers behind the contract of our models.

Axis letters: B batch, C channels, T samples, t steps, D code dimension.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqtok.codes import CodeLayout
from vqtok.configuration import refuse_code
from vqtok.files import read_json
from vqtok.fingerprint import fingerprint
from vqtok.hub.folders import fetch_folder
from vqtok.hub.weights import MODEL_FILES, WEIGHTS, require_safetensors, weight_shapes
from vqtok.modeling import VQPreTrainedModel, check_shapes, load_checked
from vqtok.quantizers import HierarchicalQuantizer, build_hierarchy

from .codecs import CODECS
from .configuration_wrapped_audio import WrappedAudioConfig

_HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class WrappedAudioModel(VQPreTrainedModel):
    """Sound to codes and back by EnCodec, DAC, Mimi or X-Codec: their encoder and decoder, and their tables in our quantizer.

    `forward` and `encode` take `input_values`, float `(B, C, T)` of any T: clips of one exact length, because what stands behind a clip
    changes codes of codecs that are not causal, and where it ends changes the last codes of all of them. Codes are a tuple of one level,
    int64 `(B, Q, t)` with t = T / hop, rounded up. `decode` gives t times the hop samples.

    Args:
        config: names the codec.
        model: of transformers, whose parts are taken over; None makes one with random weights.
    """

    config: WrappedAudioConfig
    config_class = WrappedAudioConfig
    main_input_name = "input_values"
    input_modalities = ("audio",)
    quantizer: HierarchicalQuantizer
    chunk_units = 1 << 62  # everything at once

    def __init__(self, config: WrappedAudioConfig, model: Any = None):
        super().__init__(config)
        wrapped, codec = config.wrapped, config.codec_config
        given = model
        if model is None:
            model = wrapped.model_class(codec)
        self._pads, self._channels, self._layout = wrapped.pads, wrapped.num_channels(codec), config.layout
        self.encoder, self.decoder = wrapped.encoder(model), wrapped.decoder(model)
        quantizer = build_hierarchy(config.quantizers, wrapped.latent_size(codec), ndim=1)
        assert isinstance(quantizer, HierarchicalQuantizer)
        wrapped.adapt(quantizer)
        self.quantizer = quantizer
        self.post_init()
        if given is not None:
            wrapped.fill(quantizer, given)

    @property
    def layout(self) -> CodeLayout:
        """The static shape of the codes, read once."""
        return self._layout

    @classmethod
    def from_codec(cls, folder: str | os.PathLike, source: dict[str, Any] | None = None) -> WrappedAudioModel:
        """The model around the codec that a folder holds as transformers saves it, in eval mode and float32.

        Args:
            folder: with `config.json` and safetensors.
            source: see `WrappedAudioConfig`.

        Raises:
            OSError: there are no safetensors.
            ValueError: a config that makes no sense or cannot keep the promises; weights that are damaged or do not fit it.
        """
        config = read_codec_config(folder)
        theirs = CODECS[config.model_type].model_class
        model = load_checked(theirs.from_pretrained, folder, config=config, dtype=torch.float32, may_hold_more=True)
        made = cls(WrappedAudioConfig(codec=config.to_diff_dict(), source=source), model.eval()).eval()
        made.config.decoder_fingerprint = made.compute_decoder_fingerprint()
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):  # type: ignore[no-untyped-def]
        """The model of a folder that holds its weights, as `save_pretrained` of a model writes them.

        Raises:
            OSError: the folder or repository has no safetensors; where they lie elsewhere, `VQTokenizer.from_pretrained` fetches them.
            ValueError: they are damaged, or weights are missing, unknown, or of another shape than the config says; they are named.
        """
        hub = {name: value for name in _HUB if (value := kwargs.pop(name, None)) is not None}
        hub["revision"] = kwargs.pop("_commit_hash", None) or hub.get("revision")
        config, dtype = kwargs.pop("config", None), kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if unknown := [name for name in kwargs if not name.startswith("_") and kwargs[name] not in (None, False)]:
            raise ValueError(f"{cls.__name__}.from_pretrained takes dtype and where to load from, not {unknown[0]!r}")
        folder, _ = fetch_folder(pretrained_model_name_or_path, MODEL_FILES, **hub)
        require_safetensors(folder)
        config = config if isinstance(config, WrappedAudioConfig) else WrappedAudioConfig.from_pretrained(folder)
        try:
            shapes = weight_shapes(folder)
            check_shapes(cls, config, shapes, folder)
            model = cls(config)
            _check_names(model, shapes, folder)
            for file in sorted(folder.glob("model*.safetensors")):
                if file.name == WEIGHTS or not (folder / WEIGHTS).exists():
                    model.load_state_dict(load_file(file), strict=False)
        except SafetensorError as error:
            raise ValueError(
                f"{folder}: the weights file is truncated or damaged ({error}): save or download it again"
            ) from error
        config.name_or_path = str(pretrained_model_name_or_path)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        return (model.to(dtype) if isinstance(dtype, torch.dtype) else model).eval()

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Refused: the weights are somebody's, and the facade knows whose.

        Raises:
            ValueError: always, with what to do.
        """
        raise ValueError(
            f"{type(self).__name__} is not pushed alone: push the VQTokenizer, which names the codec it wraps"
        )

    def compute_decoder_fingerprint(self) -> str:
        """The sha256 over the decoder's weights as they are now."""
        return fingerprint({}, self.decoder.state_dict())

    def forward(self, input_values: Tensor):  # type: ignore[no-untyped-def]
        """See `VQPreTrainedModel.forward`; `input_values` is float `(B, C, T)`, nominally in [-1, 1]."""
        return super().forward(input_values)

    def check_media(self, media: Tensor) -> Tensor:
        """Refuse anything but floats `(B, C, T)`."""
        if not isinstance(media, Tensor) or media.ndim != 3 or media.shape[1] != self._channels or not media.shape[2]:
            shape = tuple(media.shape) if isinstance(media, Tensor) else type(media).__name__
            raise ValueError(f"input_values must be a float tensor (B, {self._channels}, T), got {shape}")
        if not media.is_floating_point():
            raise ValueError(f"input_values must be floats in [-1, 1], got {media.dtype}: use the feature extractor")
        return media.to(self.dtype)

    def extract(self, media: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Latents `(B, D, t)`."""
        if self._pads:
            media = nn.functional.pad(media, (0, -media.shape[2] % self._layout.stride))
        return self.encoder(media)

    def propose(self, features: Tensor, level: int, quantized: Sequence[Tensor]) -> Tensor:
        """Channel-last latents `(B, t, D)`."""
        return features.transpose(1, 2)

    def synthesise(
        self, quantized: Sequence[Tensor], keep: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Sound `(B, C, t * hop)`; what the codec does not give is silence."""
        z = quantized[0].transpose(1, 2)
        sound = self.decoder(z.to(self.dtype))
        return nn.functional.pad(sound, (0, z.shape[2] * self._layout.stride - sound.shape[2]))

    def reconstruction_losses(self, reconstruction: Tensor, media: Tensor) -> dict[str, Tensor]:
        """The mean absolute difference of the waveforms, in fp32."""
        return {"reconstruction_loss": (reconstruction[..., : media.shape[2]].float() - media.float()).abs().mean()}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Everything is made as it should be: the codec's parts by transformers, the quantizers by themselves."""


def read_codec_config(folder: str | os.PathLike) -> Any:
    """The configuration of a codec's folder, in transformers' own class.

    Raises:
        OSError: there is none.
        ValueError: it names code or weights elsewhere, makes no sense, or is of a codec that cannot keep the promises.
    """
    path = os.path.join(folder, "config.json")
    values = read_json(path)
    refuse_code(values, path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CODECS:
        raise ValueError(f"{path} is of model_type {kind!r}, which is no codec that vqtok wraps ({', '.join(CODECS)})")
    try:
        config = CODECS[kind].config_class.from_pretrained(folder)
    except (StrictDataclassError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} makes no sense to transformers: {' '.join(str(error).split())}") from error
    CODECS[kind].check(config)
    return config


def _check_names(model: nn.Module, held: dict[str, tuple[int, ...]], folder: Any) -> None:
    wanted = model.state_dict().keys()
    problems = {"missing_keys": sorted(wanted - held.keys()), "unexpected_keys": sorted(held.keys() - wanted)}
    if shown := {kind: names[:5] for kind, names in problems.items() if names}:
        raise ValueError(f"{folder}: the weights do not fit the config: {shown}")
