"""vqtok: VQ tokenizers for images, audio and text, and priors over their codes.

Importing this package is light; a name is loaded when it is first used, and with it everything that registers vqtok's
models with transformers' Auto classes (`import vqtok.auto` does the same).
"""

from __future__ import annotations

import importlib
import traceback
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "VQTokenizer": "vqtok.auto",
    "VQPipeline": "vqtok.pipeline",
    "tokenize_dataset": "vqtok.bulk",
    "Codes": "vqtok.codes",
    "CodeLayout": "vqtok.codes",
    "LevelLayout": "vqtok.codes",
    "CodeVocabulary": "vqtok.vocabulary",
    "AudioVQConfig": "vqtok.audio",
    "AudioVQFeatureExtractor": "vqtok.audio",
    "AudioVQModel": "vqtok.audio",
    "ImageVQConfig": "vqtok.image",
    "ImageVQImageProcessor": "vqtok.image",
    "ImageVQModel": "vqtok.image",
    "SentenceCodes": "vqtok.text",
    "TextVQConfig": "vqtok.text",
    "TextVQModel": "vqtok.text",
    "TextVQProcessor": "vqtok.text",
    "CodePriorConfig": "vqtok.prior",
    "CodePriorModel": "vqtok.prior",
    "MaskedCodePriorConfig": "vqtok.prior",
    "MaskedCodePriorModel": "vqtok.prior",
    "GridLogitsProcessor": "vqtok.multimodal",
    "Modality": "vqtok.multimodal",
    "MultimodalProcessor": "vqtok.multimodal",
    "MultimodalVocabulary": "vqtok.multimodal",
    "extend": "vqtok.multimodal",
    "freeze_old_rows": "vqtok.multimodal",
}
__all__ = [
    "AudioVQConfig",
    "AudioVQFeatureExtractor",
    "AudioVQModel",
    "CodeLayout",
    "CodePriorConfig",
    "CodePriorModel",
    "CodeVocabulary",
    "Codes",
    "GridLogitsProcessor",
    "ImageVQConfig",
    "ImageVQImageProcessor",
    "ImageVQModel",
    "LevelLayout",
    "MaskedCodePriorConfig",
    "MaskedCodePriorModel",
    "Modality",
    "MultimodalProcessor",
    "MultimodalVocabulary",
    "SentenceCodes",
    "TextVQConfig",
    "TextVQModel",
    "TextVQProcessor",
    "VQPipeline",
    "VQTokenizer",
    "__version__",
    "extend",
    "freeze_old_rows",
    "tokenize_dataset",
]

if TYPE_CHECKING:
    from vqtok.audio import AudioVQConfig, AudioVQFeatureExtractor, AudioVQModel
    from vqtok.auto import VQTokenizer
    from vqtok.bulk import tokenize_dataset
    from vqtok.codes import CodeLayout, Codes, LevelLayout
    from vqtok.image import ImageVQConfig, ImageVQImageProcessor, ImageVQModel
    from vqtok.multimodal import (
        GridLogitsProcessor,
        Modality,
        MultimodalProcessor,
        MultimodalVocabulary,
        extend,
        freeze_old_rows,
    )
    from vqtok.pipeline import VQPipeline
    from vqtok.prior import CodePriorConfig, CodePriorModel, MaskedCodePriorConfig, MaskedCodePriorModel
    from vqtok.text import SentenceCodes, TextVQConfig, TextVQModel, TextVQProcessor
    from vqtok.vocabulary import CodeVocabulary


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    if name not in _HOME:
        raise AttributeError(f"module 'vqtok' has no attribute {name!r}")
    try:
        importlib.import_module(_HOME["VQTokenizer"])  # registers the Auto classes
        return getattr(importlib.import_module(_HOME[name]), name)
    except (OSError, RuntimeError, ImportError) as error:
        if "torchaudio" in "".join(traceback.format_exception(error)):
            raise ImportError(
                f"vqtok.{name} needs transformers, which cannot be imported with this torchaudio ({error}): install torch and "
                "torchaudio of one version together, or uninstall torchaudio"
            ) from error
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
