"""Encoding of data sets that outgrow the machine: one input shard to one shard of codes, many at once, resumed where it stopped."""

from .run import Tokenized, tokenize_dataset

__all__ = ["Tokenized", "tokenize_dataset"]
