"""Quantizers, usable alone in anybody's model: channel-last in, integers and table rows out."""

from .codebook import Codebook, k_means, update_codebooks
from .functional import code_counts, entropy_bits, full_precision, nearest_code, perplexity, straight_through, usage
from .hierarchy import HierarchicalQuantizer
from .vector import VectorQuantizer

__all__ = [
    "Codebook",
    "HierarchicalQuantizer",
    "VectorQuantizer",
    "code_counts",
    "entropy_bits",
    "full_precision",
    "k_means",
    "nearest_code",
    "perplexity",
    "straight_through",
    "update_codebooks",
    "usage",
]
