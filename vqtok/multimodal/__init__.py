"""Codes inside a language model: ids, the model that knows them, what it reads and writes, and generation inside the grid."""

from .extension import extend
from .frozen import FrozenRows, freeze_old_rows
from .generation import GridLogitsProcessor
from .processor import MultimodalProcessor
from .vocabulary import Modality, MultimodalVocabulary

__all__ = [
    "FrozenRows",
    "GridLogitsProcessor",
    "Modality",
    "MultimodalProcessor",
    "MultimodalVocabulary",
    "extend",
    "freeze_old_rows",
]
