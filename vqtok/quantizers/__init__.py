"""Quantizers, usable alone in anybody's model: channel-last in, integers and table rows out."""

from .base import Quantizer, mean_losses
from .binary import BSQ, LFQ
from .build import QUANTIZERS, build_hierarchy, build_quantizer, check_hierarchy, quantizer_config
from .codebook import Codebook
from .collective import update_all
from .configuration import QuantizerConfig
from .continuous import ContinuousStart
from .functional import code_counts, entropy_bits, full_precision, perplexity, rotate, straight_through, usage
from .gumbel import GumbelQuantizer
from .health import CodebookHealth, CodebookReport
from .hierarchy import HierarchicalQuantizer, Hierarchy
from .kmeans import k_means
from .multirate import MultiRateQuantizer
from .multiscale import MultiScaleQuantizer
from .product import ProductQuantizer
from .residual import ResidualQuantizer
from .scalar import FSQ
from .search import nearest_code
from .sim import SimVQ
from .soft import assignment_entropy, entropy_penalty, index_backpropagation
from .vector import VectorQuantizer

__all__ = [
    "BSQ",
    "Codebook",
    "CodebookHealth",
    "CodebookReport",
    "ContinuousStart",
    "FSQ",
    "GumbelQuantizer",
    "HierarchicalQuantizer",
    "Hierarchy",
    "LFQ",
    "MultiRateQuantizer",
    "MultiScaleQuantizer",
    "ProductQuantizer",
    "QUANTIZERS",
    "Quantizer",
    "QuantizerConfig",
    "ResidualQuantizer",
    "SimVQ",
    "VectorQuantizer",
    "assignment_entropy",
    "build_hierarchy",
    "build_quantizer",
    "check_hierarchy",
    "code_counts",
    "entropy_bits",
    "entropy_penalty",
    "full_precision",
    "index_backpropagation",
    "k_means",
    "mean_losses",
    "nearest_code",
    "perplexity",
    "quantizer_config",
    "rotate",
    "straight_through",
    "update_all",
    "usage",
]
