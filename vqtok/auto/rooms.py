"""The rooms: which classes make a tokenizer of each modality. Importing this module registers them with transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel
from transformers.utils import logging as transformers_logging

from vqtok.audio.configuration_audio_vq import AudioVQConfig
from vqtok.audio.feature_extraction_audio_vq import MAX_SECONDS, AudioVQFeatureExtractor
from vqtok.audio.feature_extraction_wrapped_audio import WrappedAudioFeatureExtractor
from vqtok.audio.files import RECORDINGS
from vqtok.audio.long import encode_file
from vqtok.audio.modeling_audio_vq import AudioVQModel
from vqtok.audio.wrapped import CODECS, WrappedAudioConfig, WrappedAudioModel
from vqtok.codes import CodeLayout
from vqtok.files import read_json
from vqtok.hub.weights import require_safetensors
from vqtok.image.configuration_image_vq import ImageVQConfig
from vqtok.image.image_processing_image_vq import MAX_PIXELS, ImageVQImageProcessor
from vqtok.image.modeling_image_vq import ImageVQModel
from vqtok.image.pictures import PICTURES
from vqtok.modeling import VQPreTrainedModel
from vqtok.prior import PRIORS
from vqtok.text.configuration_text_vq import TextVQConfig
from vqtok.text.medium import TEXTS
from vqtok.text.modeling_text_vq import TextVQModel
from vqtok.text.processing_text_vq import TextVQProcessor


class Room(NamedTuple):
    """What a modality brings: its classes, the words for its media and for one unit of them, and how it reads long files.

    `encode_file(model, processor, path, max_seconds)` gives the codes of each level and the size, in memory that does
    not grow with the file.
    """

    modality: str
    plural: str
    unit: str
    config: type
    model: type
    processor: type
    encode_file: Callable[..., Any] | None = None


WRAPPED = Room("audio", "audio", "sample", WrappedAudioConfig, WrappedAudioModel, WrappedAudioFeatureExtractor)
ROOMS = {
    ImageVQConfig.model_type: Room("image", "images", "pixel", ImageVQConfig, ImageVQModel, ImageVQImageProcessor),
    AudioVQConfig.model_type: Room(
        "audio", "audio", "sample", AudioVQConfig, AudioVQModel, AudioVQFeatureExtractor, encode_file
    ),
    TextVQConfig.model_type: Room("text", "texts", "unit", TextVQConfig, TextVQModel, TextVQProcessor),
    WrappedAudioConfig.model_type: WRAPPED,
}
MEDIA = {"image": PICTURES, "audio": RECORDINGS, "text": TEXTS}  # by modality
for _model_type, _room in ROOMS.items():
    AutoConfig.register(_model_type, _room.config, exist_ok=True)
    AutoModel.register(_room.config, _room.model, exist_ok=True)
for _model_type, (_config, _model) in PRIORS.items():
    AutoConfig.register(_model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
AutoFeatureExtractor.register(AudioVQConfig, AudioVQFeatureExtractor, exist_ok=True)
AutoFeatureExtractor.register(WrappedAudioConfig, WrappedAudioFeatureExtractor, exist_ok=True)
AutoFeatureExtractor.register(TextVQConfig, TextVQProcessor, exist_ok=True)
# Older transformers have no AutoImageProcessor without torchvision; VQTokenizer does not need it.
with suppress(ImportError):
    # Resampling and rounding of the other back end differ, so there is only this one.
    AutoImageProcessor.register(ImageVQConfig, image_processor_classes={"pil": ImageVQImageProcessor}, exist_ok=True)

# What a tokenizer's folder consists of, for downloads; of a pipeline's, what is needed to say that it is one.
FILES = (
    *("config.json", "preprocessor_config.json", "pipeline.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)


def bits_per_unit(layout: CodeLayout) -> float:
    """The nominal rate: log2(codebook_size) bits of every code, per pixel, sample or byte, without padding.

    Example:
        >>> bits_per_unit(ImageVQConfig(strides=[8, 4], quantizer={"type": "vector", "codebook_size": 512}).layout)
        0.703125
    """
    return sum(level.bits / level.stride**layout.ndim for level in layout.levels)


def room_of(folder: Path) -> Room:
    """The room whose model the folder's `config.json` describes.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: it is of something else.
    """
    pipeline = (folder / "pipeline.json").is_file()
    if not pipeline and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: name a folder that save_pretrained wrote")
    model_type = None if pipeline else read_json(folder / "config.json").get("model_type")
    if pipeline:
        raise ValueError(f"{folder} is a pipeline: use VQPipeline.from_pretrained, or subfolder='vq_tokenizer'")
    if isinstance(model_type, str) and model_type in CODECS:
        return WRAPPED
    if not isinstance(model_type, str) or model_type not in ROOMS:
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {model_type!r}, which is no VQ tokenizer ({', '.join((*ROOMS, *CODECS))})"
        )
    return ROOMS[model_type]


def load_config(folder: Path, room: Room) -> Any:
    """The config of a folder.

    Raises:
        ValueError: wrong types, unknown fields or impossible values; file and field are named.
    """
    try:
        return room.config.from_pretrained(folder)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error


def load_processor(folder: Path, room: Room) -> Any:
    """The processor of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: unknown fields or impossible values; file and field are named.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no preprocessor_config.json: save the tokenizer again with save_pretrained"
        )
    fields = read_json(path)
    try:
        processor = room.processor.from_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    for name, most in (("max_pixels", MAX_PIXELS), ("max_seconds", MAX_SECONDS)):
        bound = fields.get(name, 0)
        if bound > most:  # who wrote the file must not decide what this machine can bear
            raise ValueError(
                f"{path}: {name} {bound:,} is more than {most:,}, and a file cannot raise this bound: remove it, and give "
                f"{name} to encode where it is needed"
            )
    return processor


def load_model(folder: Path, room: Room, config: Any, dtype: Any) -> VQPreTrainedModel:
    """The model of a folder, in eval mode, from safetensors only.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged or do not fit the config.
    """
    require_safetensors(folder)
    with quiet():
        return room.model.from_pretrained(folder, config=config, dtype=dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which only flash by for models of this size."""
    were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()
