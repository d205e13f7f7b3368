"""Sound of any kind to the tensors of the model, and back."""

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from .files import check_length, check_samples, read_file
from .resampling import resample

# Keys that transformers writes into preprocessor_config.json beside the state.
_SERVICE_KEYS = frozenset(("image_processor_type", "processor_class", "feature_extractor_type", "auto_map"))
_FIELDS = ("stride", "sampling_rate", "num_channels", "resample", "mix", "max_seconds")
# Floats beyond this are no clipping any more, but integers that were made floats without being scaled.
_LOUDEST = 16.0
_FULL_SCALE = {"int16": (0, 1 << 15), "int32": (0, 1 << 31), "uint8": (128, 1 << 7)}  # of PCM: middle and amplitude
_MOST_CHANNELS = 64
MAX_SECONDS = 4 * 3600


class AudioVQFeatureExtractor(FeatureExtractionMixin):
    """Sound to `input_values` and back. Nothing is resampled or mixed unless asked for; loudness stays as it is.

    Clips are continued with silence to a multiple of `stride`; `postprocess` cuts that off again.

    Args:
        stride: the largest stride of the model's layout, in samples.
        sampling_rate: of the model, in Hz.
        num_channels: of the model, 1 (mono) or 2 (stereo).
        resample: bring other rates to the model's (see `vqtok.audio.resampling`); False refuses them.
        mix: make what the model wants of other channels: mono is the mean of all, stereo of mono is mono twice; False refuses them.
        max_seconds: a longer clip is refused; a file before it is read.

    Raises:
        ValueError: an impossible value, or a name that is none of these (the nearest one is said).

    Example:
        >>> extractor = AudioVQFeatureExtractor(stride=320, sampling_rate=16_000)
        >>> values, size = extractor.prepare(np.zeros(1000, np.float32), sampling_rate=16_000)
        >>> tuple(values.shape), size
        ((1, 1280), (1000,))
        >>> extractor.postprocess(values[None], [size])[0].shape
        (1000,)
    """

    model_input_names = ["input_values", "sizes"]  # noqa: RUF012 (the name and form transformers reads)

    def __init__(
        self,
        stride: int = 320,
        sampling_rate: int = 16_000,
        num_channels: int = 1,
        resample: bool = False,
        mix: bool = False,
        max_seconds: int = MAX_SECONDS,
        **kwargs: Any,
    ) -> None:
        for key in kwargs:
            if key not in _SERVICE_KEYS and not key.startswith("_"):
                near = difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.0)
                raise ValueError(f"AudioVQFeatureExtractor has no field {key!r}. Did you mean {near[0]!r}?")
        super().__init__()
        numbers = {"stride": stride, "sampling_rate": sampling_rate, "num_channels": num_channels}
        for name, value in {**numbers, "max_seconds": max_seconds}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"AudioVQFeatureExtractor.{name} must be a positive integer, got {value!r}")
        for name, value in (("resample", resample), ("mix", mix)):
            if not isinstance(value, bool):
                raise ValueError(f"AudioVQFeatureExtractor.{name} must be true or false, got {value!r}")
        if num_channels not in (1, 2):
            raise ValueError(f"AudioVQFeatureExtractor.num_channels must be 1 (mono) or 2 (stereo), got {num_channels}")
        self.stride, self.sampling_rate, self.num_channels = stride, sampling_rate, num_channels
        self.resample, self.mix, self.max_seconds = resample, mix, max_seconds

    @property
    def code_fields(self) -> dict[str, Any]:
        """What decides codes, for the fingerprint. Conversions of other rates and channels happen before and are not in it."""
        return {
            "stride": self.stride,
            "sampling_rate": self.sampling_rate,
            "num_channels": self.num_channels,
            "range": [-1, 1],
            "padding": "zero, right",
        }

    def prepare(
        self, audio: Any, sampling_rate: int | None = None, max_seconds: int | None = None
    ) -> tuple[Tensor, tuple[int]]:
        """One clip as the model wants it.

        Args:
            audio: an array or tensor `(samples,)` or `(channels, samples)` of floats, nominally in [-1, 1], or of int16, int32 or
                uint8 (PCM, scaled to that range); the path of a file that soundfile reads; or a dict with "audio" or "array" and
                "sampling_rate", as data sets have them.
            sampling_rate: in Hz, of an array, which does not know it; files and dicts do.
            max_seconds: another bound than the extractor's, for this call.

        Returns:
            values: float32 `(C, T)`, T padded to a multiple of the stride.
            size: `(samples,)` before padding, at the model's rate.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no sound or is broken (it is named); another rate or other channels than the model's, without
                the conversion being asked for; NaN or infinite samples; no sample; too many.
            TypeError: anything else.
        """
        most = self.max_seconds if max_seconds is None else max_seconds
        sound, rate, what = self._read(audio, sampling_rate, most)
        sound = self.convert(sound, rate, what)
        size = sound.shape[1]
        return torch.nn.functional.pad(sound, (0, -size % self.stride)), (size,)

    def convert(self, sound: Tensor, rate: int, what: str = "a clip") -> Tensor:
        """Float32 `(channels, samples)` at `rate` as float32 `(C, T)` at the model's rate, if that is allowed.

        Raises:
            ValueError: it is not, and which field allows it.
        """
        return self._resampled(self._mixed(sound, what), rate, what)

    def __call__(self, audio: Any, sampling_rate: int | None = None, return_tensors: str | None = "pt") -> BatchFeature:
        """A batch of clips of any lengths, padded to the longest, in the form of transformers.

        Args:
            audio: one clip or a list (see `prepare`); a list of numbers is one clip.
            sampling_rate: in Hz, of arrays.
            return_tensors: "pt" for tensors, "np" for arrays.

        Returns:
            input_values: float32 `(B, C, T)`.
            sizes: int64 `(B, 1)`, samples before padding; `AudioVQModel.encode` takes them.
        """
        many = isinstance(audio, (list, tuple)) and not (audio and isinstance(audio[0], (int, float)))
        batch = list(audio) if many else [np.asarray(audio, np.float32) if isinstance(audio, (list, tuple)) else audio]
        if not batch:
            raise ValueError("there is no clip: give at least one")
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors must be 'pt' or 'np', got {return_tensors!r}")
        prepared = [self.prepare(each, sampling_rate) for each in batch]
        longest = max(values.shape[1] for values, _ in prepared)
        padded = [torch.nn.functional.pad(values, (0, longest - values.shape[1])) for values, _ in prepared]
        data = {
            "input_values": torch.stack(padded),
            "sizes": torch.tensor([size for _, size in prepared], dtype=torch.int64),
        }
        return BatchFeature(data if return_tensors == "pt" else {name: value.numpy() for name, value in data.items()})

    def postprocess(self, values: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Float32 arrays of the given sizes: `(samples,)` of mono, `(2, samples)` of stereo.

        Args:
            values: float `(B, C, T)`.
            sizes: `(B, 1)`, samples of each clip without its padding.
        """
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        arrays = values.detach().float().cpu().numpy()
        cut = [array[:, :size] for array, (size,) in zip(arrays, sizes, strict=True)]
        return [np.ascontiguousarray(array[0] if self.num_channels == 1 else array) for array in cut]

    # -- helpers

    def _read(self, audio: Any, rate: int | None, max_seconds: int) -> tuple[Tensor, int, str]:
        """Float32 `(channels, samples)`, its rate, and how to call it."""
        if isinstance(audio, (str, os.PathLike)):
            what = f"the file {audio}"
            sound, own = read_file(audio, what, max_seconds)
            if rate is not None and rate != own:
                raise ValueError(f"the file {audio} says {own} Hz, not {rate}: leave sampling_rate out")
            return torch.from_numpy(sound), own, what
        if isinstance(audio, Mapping):
            array = audio.get("audio", audio.get("array"))
            own = audio.get("sampling_rate", rate)
            if array is None or own is None:
                raise ValueError(
                    f"a clip given as a dict needs 'audio' and 'sampling_rate', got the keys {sorted(audio)}"
                )
            if rate is not None and rate != own:
                raise ValueError(f"the clip says {own} Hz, not {rate}: leave sampling_rate out")
            if not isinstance(array, (np.ndarray, Tensor)):
                return self._read(array, own, max_seconds)
            audio, rate = array, own
        if not isinstance(audio, (np.ndarray, Tensor)):
            raise TypeError(f"a clip is an array, a tensor or a path, not {type(audio).__name__}")
        if rate is None:
            raise ValueError(
                f"an array does not know its rate: give sampling_rate={self.sampling_rate} if that is what it is"
            )
        if not isinstance(rate, (int, np.integer)) or isinstance(rate, bool) or rate < 1:
            raise ValueError(f"sampling_rate must be a positive integer in Hz, got {rate!r}")
        sound = self._from_array(audio)
        check_length(sound.shape[1], int(rate), max_seconds, "a clip")
        return sound, int(rate), "a clip"

    def _from_array(self, audio: np.ndarray | Tensor) -> Tensor:
        sound = audio.detach().cpu() if isinstance(audio, Tensor) else torch.from_numpy(np.ascontiguousarray(audio))
        if sound.ndim not in (1, 2):
            raise ValueError(
                f"an array of shape {tuple(sound.shape)} is no clip: give (samples,) or (channels, samples)"
            )
        sound = sound[None] if sound.ndim == 1 else sound
        channels, samples = sound.shape
        if not sound.numel():
            raise ValueError(f"an array of shape {tuple(audio.shape)} has no sample: give at least one")
        if channels > samples and channels != self.num_channels and (samples <= 8 or channels > _MOST_CHANNELS):
            raise ValueError(
                f"an array of shape {tuple(sound.shape)} would have {channels} channels: it looks like (samples, channels), "
                "give it transposed, as (channels, samples)"
            )
        kind = str(sound.dtype).removeprefix("torch.")
        if kind in _FULL_SCALE:
            middle, amplitude = _FULL_SCALE[kind]
            return ((sound.double() - middle) / amplitude).float()
        if not sound.is_floating_point():
            raise ValueError(
                f"an array of {kind} has no known scale: give floats in [-1, 1], or int16, int32 or uint8 (PCM)"
            )
        return sound.float()

    def _mixed(self, sound: Tensor, what: str) -> Tensor:
        channels, wanted = sound.shape[0], self.num_channels
        if sound.shape[1] == 0:
            raise ValueError(f"{what} has no sample: give at least one")
        if not bool(sound.isfinite().all()):
            raise ValueError(f"{what} has NaN or infinite samples, {int((~sound.isfinite()).sum())} of them: repair it")
        if float(sound.abs().max()) > _LOUDEST:
            raise ValueError(
                f"{what} has samples of up to {float(sound.abs().max()):g}, far outside [-1, 1]: scale it (integers of 16 bits "
                "made floats are divided by 32768)"
            )
        if channels == wanted:
            return sound
        if not self.mix:
            raise ValueError(
                f"{what} has {channels} channel{'s' * (channels != 1)}, the tokenizer takes {wanted}: choose among them, or set "
                "processor.mix = True (vqtok encode --mix)"
            )
        if wanted == 1:
            return sound.mean(0, keepdim=True)
        if channels == 1:
            return sound.expand(2, -1).contiguous()
        raise ValueError(f"{what} has {channels} channels, and there is no one way to make 2 of them: choose two")

    def _resampled(self, sound: Tensor, rate: int, what: str) -> Tensor:
        if rate == self.sampling_rate:
            return sound
        if not self.resample:
            raise ValueError(
                f"{what} has {rate} Hz, the tokenizer takes {self.sampling_rate} Hz: resample it, or set "
                "processor.resample = True (vqtok encode --resample)"
            )
        check_samples(sound.shape[0], sound.shape[1] / rate * self.sampling_rate, f"at {self.sampling_rate} Hz {what}")
        return torch.from_numpy(resample(sound.numpy(), rate, self.sampling_rate))
