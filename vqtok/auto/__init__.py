"""`VQTokenizer`. Importing this folder registers every class of vqtok with transformers' Auto classes."""

from vqtok.hub.folders import config_folder

from .rooms import bits_per_unit
from .tokenizer import VQTokenizer

__all__ = ["VQTokenizer", "bits_per_unit", "config_folder"]
