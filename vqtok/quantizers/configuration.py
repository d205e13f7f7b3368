"""Strict configurations of the quantizers: what stands in a `config.json`, checked before anything is allocated.

A quantizer takes the same names as arguments: `VectorQuantizer(dim, codebook_size=8192, metric="cosine")`.
"""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

import copy
import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from vqtok.codes import LevelLayout

MAX_CODES = 1 << 24  # rows of a stored table


Config = TypeVar("Config", bound="QuantizerConfig")


@strict
@dataclass(kw_only=True)
class QuantizerConfig:
    """What all quantizers' configurations have: closed, typed, JSON-able, with ranges that are checked."""

    type: ClassVar[str]
    # Fields that do not decide codes, so that they are not in the fingerprint.
    training_only: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        self.check_ranges()

    def check_ranges(self) -> None:
        """Refuse impossible values with a sentence."""

    @property
    def depth(self) -> int:
        """Q: codes per grid position."""
        return 1

    @property
    def size(self) -> int:
        """K: entries of each codebook."""
        raise NotImplementedError

    @property
    def ratios(self) -> tuple[int, ...]:
        """Grid cells of the finest level per cell of each level, coarse to fine; one level on one grid is (1,)."""
        return (1,)

    @property
    def start_latents(self) -> int:
        """How many latents of each process are enough to start the codebooks from."""
        return max(65_536, 16 * self.size)

    def levels(self, stride: int) -> tuple[LevelLayout, ...]:
        """The levels of a layout whose finest grid has `stride` input units per cell."""
        return tuple(LevelLayout(stride * ratio, self.depth, self.size) for ratio in self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with the key `type`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"type": self.type, **copy.deepcopy(values)}

    @property
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide codes, for the fingerprint."""
        return {name: value for name, value in self.to_dict().items() if name not in self.training_only}

    def require(self, condition: bool, name: str, wanted: str) -> None:
        """Raise a ValueError that names the field, its value and what is wanted, unless `condition` holds."""
        if not condition:
            raise ValueError(f"quantizer type {self.type!r}: {name} must be {wanted}, got {getattr(self, name)!r}")


def _weights(config: QuantizerConfig, *names: str) -> None:
    for name in names:
        config.require(0 <= getattr(config, name) < 1e6, name, "at least 0 and finite")


@strict
@dataclass(kw_only=True)
class VectorQuantizerConfig(QuantizerConfig):
    """One codebook of learned rows (van den Oord et al. 2017), and its descendants.

    Args:
        codebook_size: K.
        codebook_dim: width of the table; another than the latents' adds a linear projection in and one out. None: theirs.
        metric: "euclidean"; "cosine", both sides normalised (ViT-VQGAN, Yu et al. 2022: with a `codebook_dim` of 8 to 32); or
            "inner_product", where every code gets a gradient from every latent (IBQ, Shi et al. 2024).
        update: "ema", the table follows the mean of its latents; or "gradient", the optimizer moves it.
        start: what `initialise` makes of the first latents: "kmeans", centroids; or "commonest", those that occur most often, for latents
            that repeat because they depend on a few letters alone.
        decay: of the moving averages.
        revival_threshold: a code used less than this share of uniform use is moved onto a latent; 0 never does.
        gradient: how gradients pass to the latents: "straight_through", or "rotation" (Fifty et al. 2024).
        commitment_weight: of mean (z - sg[e])^2, on the encoder's side (beta of the paper).
        codebook_loss_weight: of mean (e - sg[z])^2; only tables that the optimizer moves have it.
        entropy_weight: of the entropy loss: single latents sure of their code, all codes used (0: none).
        entropy_temperature: of the soft assignment in that loss, in units of the metric.
    """

    type: ClassVar[str] = "vector"
    training_only: ClassVar[frozenset[str]] = frozenset(
        ["update", "start", "decay", "revival_threshold", "gradient", "commitment_weight", "codebook_loss_weight"]
        + ["entropy_weight", "entropy_temperature"]
    )

    codebook_size: int = 512
    codebook_dim: int | None = None
    metric: str = "euclidean"
    update: str = "ema"
    start: str = "kmeans"
    decay: float | int = 0.99
    revival_threshold: float | int = 0.05
    gradient: str = "straight_through"
    commitment_weight: float | int = 0.25
    codebook_loss_weight: float | int = 1.0
    entropy_weight: float | int = 0.0
    entropy_temperature: float | int = 1.0

    def check_ranges(self) -> None:
        self.require(1 <= self.codebook_size <= MAX_CODES, "codebook_size", f"from 1 to {MAX_CODES}")
        self.require(self.codebook_dim is None or 1 <= self.codebook_dim <= 65_536, "codebook_dim", "from 1 to 65536")
        self.require(
            self.metric in ("euclidean", "cosine", "inner_product"),
            "metric",
            "'euclidean', 'cosine' or 'inner_product'",
        )
        self.require(self.update in ("ema", "gradient"), "update", "'ema' or 'gradient'")
        self.require(
            self.metric != "inner_product" or self.update == "gradient", "update", "'gradient' with inner products"
        )
        self.require(self.gradient in ("straight_through", "rotation"), "gradient", "'straight_through' or 'rotation'")
        self.require(
            self.metric != "inner_product" or self.gradient == "straight_through",
            "gradient",
            "left alone with inner products, which have a gradient of their own",
        )
        self.require(self.start in ("kmeans", "commonest"), "start", "'kmeans' or 'commonest'")
        self.require(0 <= self.decay < 1, "decay", "in [0, 1)")
        self.require(0 <= self.revival_threshold < 1, "revival_threshold", "a share of uniform use in [0, 1)")
        self.require(0 < self.entropy_temperature < 1e6, "entropy_temperature", "above 0")
        _weights(self, "commitment_weight", "codebook_loss_weight", "entropy_weight")

    @property
    def size(self) -> int:
        return self.codebook_size

    @property
    def start_latents(self) -> int:
        few = super().start_latents
        return 4 * few if self.start == "commonest" else few  # which of the rare ones are less rare takes more to tell


@strict
@dataclass(kw_only=True)
class SimVQConfig(QuantizerConfig):
    """A frozen random table seen through a learned linear map, so that all codes move together (SimVQ, Zhu et al. 2024).

    Args:
        codebook_size: K.
        codebook_dim: width of the table; None: that of the latents.
        gradient: "straight_through" or "rotation".
        commitment_weight: of mean (z - sg[e])^2.
        codebook_loss_weight: of mean (e - sg[z])^2, which trains the map.
    """

    type: ClassVar[str] = "sim"
    training_only: ClassVar[frozenset[str]] = frozenset(["gradient", "commitment_weight", "codebook_loss_weight"])

    codebook_size: int = 512
    codebook_dim: int | None = None
    gradient: str = "straight_through"
    commitment_weight: float | int = 0.25
    codebook_loss_weight: float | int = 1.0

    def check_ranges(self) -> None:
        self.require(1 <= self.codebook_size <= MAX_CODES, "codebook_size", f"from 1 to {MAX_CODES}")
        self.require(self.codebook_dim is None or 1 <= self.codebook_dim <= 65_536, "codebook_dim", "from 1 to 65536")
        self.require(self.gradient in ("straight_through", "rotation"), "gradient", "'straight_through' or 'rotation'")
        _weights(self, "commitment_weight", "codebook_loss_weight")

    @property
    def size(self) -> int:
        return self.codebook_size


@strict
@dataclass(kw_only=True)
class GumbelConfig(QuantizerConfig):
    """Codes drawn by the Gumbel-softmax while training (Jang et al. 2017; the dVAE of DALL-E, Ramesh et al. 2021).

    Args:
        codebook_size: K.
        temperature: of the relaxation at the start.
        final_temperature: where it ends, after `anneal_steps` updates along half a cosine.
        anneal_steps: updates until then.
        kl_weight: of KL(p || uniform) in nats per code.
    """

    type: ClassVar[str] = "gumbel"
    training_only: ClassVar[frozenset[str]] = frozenset(
        ["temperature", "final_temperature", "anneal_steps", "kl_weight"]
    )

    codebook_size: int = 512
    temperature: float | int = 1.0
    final_temperature: float | int = 0.0625
    anneal_steps: int = 10_000
    kl_weight: float | int = 5e-4

    def check_ranges(self) -> None:
        self.require(1 <= self.codebook_size <= MAX_CODES, "codebook_size", f"from 1 to {MAX_CODES}")
        self.require(0 < self.temperature <= 100, "temperature", "above 0 and at most 100")
        self.require(
            0 < self.final_temperature <= self.temperature, "final_temperature", "above 0 and at most temperature"
        )
        self.require(self.anneal_steps >= 1, "anneal_steps", "at least 1")
        _weights(self, "kl_weight")

    @property
    def size(self) -> int:
        return self.codebook_size


@strict
@dataclass(kw_only=True)
class FSQConfig(QuantizerConfig):
    """Finite scalar quantization: each of a few numbers rounded to a few levels; no table (Mentzer et al. 2023).

    Args:
        scalar_levels: levels of each number; their product is K. For 2^8, 2^10, 2^12, 2^14, 2^16: [8, 6, 5], [8, 5, 5, 5],
            [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5] (about those sizes, table 1 of the paper).
        symmetric: levels spread evenly over [-1, 1]. False is the paper's rule: even numbers of levels reach from -1 to
            1 - 2 / L, and 2 levels hardly ever use one of them.
    """

    type: ClassVar[str] = "fsq"

    scalar_levels: list[int] | tuple[int, ...] = (8, 5, 5, 5)
    symmetric: bool = True

    def check_ranges(self) -> None:
        self.scalar_levels = list(self.scalar_levels)
        fits = 1 <= len(self.scalar_levels) <= 64 and all(2 <= level <= 65_536 for level in self.scalar_levels)
        self.require(fits, "scalar_levels", "1 to 64 numbers of levels, each from 2 to 65536")
        self.require(math.prod(self.scalar_levels) < 1 << 62, "scalar_levels", "levels whose product is below 2^62")

    @property
    def size(self) -> int:
        return math.prod(self.scalar_levels)


@strict
@dataclass(kw_only=True)
class LFQConfig(QuantizerConfig):
    """Look-up-free quantization: the signs of a few numbers; no table (MAGVIT-v2, Yu et al. 2024).

    Args:
        bits: numbers per code; K = 2^bits.
        commitment_weight: of mean (z - sg[q])^2.
        entropy_weight: of the entropy loss.
        entropy_temperature: of the soft assignment in that loss; latents of one code's size have logits of 4 / temperature.
        entropy_group_bits: bits whose joint use is held even; groups of them are treated as independent (2^bits codes at most
            are held even exactly).
    """

    type: ClassVar[str] = "lfq"
    training_only: ClassVar[frozenset[str]] = frozenset(
        ["commitment_weight", "entropy_weight", "entropy_temperature", "entropy_group_bits"]
    )

    bits: int = 10
    commitment_weight: float | int = 0.25
    entropy_weight: float | int = 0.1
    entropy_temperature: float | int = 1.0
    entropy_group_bits: int = 8

    def check_ranges(self) -> None:
        self.require(1 <= self.bits <= 61, "bits", "from 1 to 61")
        self.require(0 < self.entropy_temperature < 1e6, "entropy_temperature", "above 0")
        self.require(1 <= self.entropy_group_bits <= 16, "entropy_group_bits", "from 1 to 16")
        _weights(self, "commitment_weight", "entropy_weight")

    @property
    def size(self) -> int:
        return 2**self.bits


@strict
@dataclass(kw_only=True)
class BSQConfig(LFQConfig):
    """Binary spherical quantization: the signs of a unit vector, rows of unit length (Zhao et al. 2024). Fields as in LFQ."""

    type: ClassVar[str] = "bsq"


def read_config(
    values: Mapping[str, Any], types: Mapping[str, type[QuantizerConfig]], what: str = "quantizer"
) -> QuantizerConfig:
    """The configuration that a dict with the key `type` describes.

    Raises:
        ValueError: no dict, a missing or unknown `type`, an unknown field (the nearest known one is named), a field of a
            wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a dict with the key 'type', got {values!r}")
    name = values.get("type")
    if not isinstance(name, str) or name not in types:
        raise ValueError(f"{what}: type must be one of {', '.join(types)}, got {name!r}")
    return make_config(types[name], **{name: value for name, value in values.items() if name != "type"})


def make_config(config_class: type[Config], **values: Any) -> Config:
    """An instance, with a ValueError for whatever does not fit."""
    known = [each.name for each in dataclasses.fields(config_class)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"quantizer type {config_class.type!r} has no field {name!r}. Did you mean {near[0]!r}?")
    try:
        return config_class(**copy.deepcopy(values))  # the caller's dicts and lists stay the caller's
    except StrictDataclassError as error:
        raise ValueError(f"quantizer type {config_class.type!r}: {error.__cause__ or error}") from None
