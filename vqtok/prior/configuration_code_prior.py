"""Configuration of the prior over codes."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

import copy
import dataclasses
import difflib
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vqtok.codes import CodeLayout
from vqtok.configuration import VQConfig, require
from vqtok.vocabulary import CodeVocabulary, factors

from .sequence import ORDERS, SHIFTED, check_order

CONDITIONS = ("text", "class", "features", "codes", "none")
DEFAULT_BACKBONE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
# What config.json of any model may hold beside the fields of its config class.
_LEGACY_KEYS = frozenset(
    [
        "model_type",
        "torch_dtype",
        "rope_theta",
        "rope_scaling",
        "name_or_path",
        "auto_map",
        "use_cache",
        "attn_implementation",
    ]
)


@strict
class CodePriorConfig(VQConfig):
    """Configuration of `CodePriorModel`: a decoder-only transformer over the codes of one layout.

    `fingerprint` is the code space that the prior was trained on.

    Args:
        layout: the codes, as `CodeLayout.to_dict` describes them.
        condition: what a sample is told to be: "text" (tokens of its own), "class", "features" (hidden states of a frozen text
            encoder), "codes" (codes of another layout) or "none".
        text_size: number of text tokens (`len(tokenizer)`) or of classes; of "codes" it follows from their layout; else 0.
        max_text_length: the most tokens of a text, or of codes that are a condition (their size tokens included).
        condition_places: whether the tokens of a condition also know their number, counted from the first, by learned vectors. Without,
            a text knows its order alone, and one that is read word by word, as speech, takes longer to learn.
        feature_size: width of the text encoder's hidden states; 0 for other conditions.
        condition_layout: of codes that are a condition, as `CodeLayout.to_dict` describes it.
        condition_fingerprint: the code space of these.
        text_loss_weight: w in (1 - w) codes + w text, for a joint loss on the tokens of the text (DALL-E: 1/8); 0 predicts no text.
        max_grid: the largest extent of the coarsest grid.
        order: how codes follow each other, see `vqtok.prior.sequence`: "flat" (one after another: coarse to fine, each level in raster
            order, all codebooks of a place together), "delay" and "depth" for residual codebooks, "next_scale" level by level.
        stops: a time series that ends by itself: laid out frame by frame, without announcing its length; before each coarse frame
            it is decided whether there is one.
        first_level: levels coarser than this one are given, not predicted: a finer stage of a cascade.
        num_levels: how many levels are predicted; None for all from `first_level` on.
        window: units of a window, for sequences longer than the context; None puts whole samples into the context.
        depth_layers: of the small transformer over the codebooks of a place, in the order "depth".
        condition_dropout: chance that a training sample loses its condition, from which guidance and unconditional sampling live.
        backbone_config: config of any decoder-only model of transformers, as a dict with `model_type` or as a config object;
            a small Llama if absent. Its `vocab_size` is set from the vocabulary.

    Example:
        >>> layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 256}]}
        >>> config = CodePriorConfig(layout=layout, condition="class", text_size=10)
        >>> config.vocabulary.size, config.backbone_config.vocab_size
        (332, 384)
    """

    model_type = "vqtok_prior"
    has_no_defaults_at_init = (
        True  # there is no prior without a layout; older transformers build a default config otherwise
    )
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (the name and form transformers reads, 5.17 to 5.23)

    layout: dict[str, Any] = dataclasses.field(default_factory=dict)
    condition: str = "none"
    text_size: int = 0
    max_text_length: int = 64
    condition_places: bool = False
    feature_size: int = 0
    condition_layout: dict[str, Any] | None = None
    condition_fingerprint: str | None = None
    text_loss_weight: float | int = 0
    max_grid: int = 64
    order: str = "flat"
    stops: bool = False
    first_level: int = 0
    num_levels: int | None = None
    window: int | None = None
    depth_layers: int = 2
    condition_dropout: float | int = 0.1
    backbone_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = _backbone(self.backbone_config)
        super().__post_init__(**kwargs)
        # Its own special tokens mean nothing here. A padding id would even freeze the embedding of the text token with that id.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self.backbone_config, name, None)
        self.backbone_config.vocab_size = self.vocabulary.padded_size

    def check_ranges(self) -> None:
        """Refuse values that no model can be built from, before anything is allocated."""
        require(bool(self.layout), self, "layout", "the dict of a CodeLayout (take it from the tokenizer or the codes)")
        layout = CodeLayout.from_dict(self.layout)
        self._check_condition()
        require(1 <= self.max_grid <= 1 << 20, self, "max_grid", "from 1 to 1048576")
        require(self.order in self.orders, self, "order", " or ".join(map(repr, self.orders)))
        most = len(layout.levels)
        require(0 <= self.first_level < most, self, "first_level", f"from 0 to {most - 1}, a level of the layout")
        rest = most - self.first_level
        fits = self.num_levels is None or 1 <= self.num_levels <= rest
        require(fits, self, "num_levels", f"from 1 to {rest}, or None for the rest")
        require(1 <= self.depth_layers <= 1 << 10, self, "depth_layers", "from 1 to 1024")
        wide = self.window is None or 2 <= self.window <= 1 << 22
        require(wide, self, "window", "from 2 to 4194304 units, or None")
        require(self.window is None or self.order in SHIFTED, self, "window", f"None in the order {self.order!r}")
        require(not (self.stops and self.first_level), self, "stops", "false for a prior that is given coarser levels")
        CodeVocabulary(layout, self.text_size, self.max_grid)
        check_order(self.order, self.streams_per_level[self.own_levels], layout.ndim, self.stops)
        if self.extent > 1 << 22:
            raise ValueError(
                f"CodePriorConfig.max_grid {self.max_grid} makes grids of up to {self.extent} codes along an axis at the finest level; "
                "at most 4194304 are possible: choose a smaller max_grid"
            )

    def _check_condition(self) -> None:
        kind, dropout, weight = self.condition, self.condition_dropout, self.text_loss_weight
        require(kind in CONDITIONS, self, "condition", f"one of {', '.join(map(repr, CONDITIONS))}")
        require(1 <= self.max_text_length <= 1 << 16, self, "max_text_length", "from 1 to 65536")
        if kind in ("none", "features"):
            require(self.text_size == 0, self, "text_size", f"0 for a prior with the condition {kind!r}")
        elif kind == "codes":
            require(bool(self.condition_layout), self, "condition_layout", "the dict of the condition's CodeLayout")
            size = self.condition_vocabulary.size
            self.text_size = self.text_size or size
            require(
                self.text_size == size, self, "text_size", f"{size}, what condition_layout and max_text_length make"
            )
        else:
            known = 1 <= self.text_size <= 1 << 22
            require(known, self, "text_size", "the number of text tokens or classes, at least 1")
        if kind == "features":
            require(1 <= self.feature_size <= 1 << 16, self, "feature_size", "the width of the text encoder's states")
        else:
            require(self.feature_size == 0, self, "feature_size", f"0 for a prior with the condition {kind!r}")
        if kind != "codes":
            for name in ("condition_layout", "condition_fingerprint"):
                require(getattr(self, name) is None, self, name, f"None for a prior with the condition {kind!r}")
        require(math.isfinite(dropout) and 0 <= dropout < 1, self, "condition_dropout", "a probability in [0, 1)")
        require(math.isfinite(weight) and 0 <= weight < 1, self, "text_loss_weight", "a share of the loss in [0, 1)")
        require(not weight or kind == "text", self, "text_loss_weight", "0 without tokens of a text to predict")

    @property
    def condition_vocabulary(self) -> CodeVocabulary:
        """The ids of codes that are a condition. No extent is larger than the number of codes, so that is how many are announced."""
        return CodeVocabulary(CodeLayout.from_dict(self.condition_layout), 0, self.max_text_length, 1)

    @property
    def vocabulary(self) -> CodeVocabulary:
        """The ids of text, special tokens and codes."""
        return CodeVocabulary(CodeLayout.from_dict(self.layout), self.text_size, self.max_grid)

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders that a prior of this class can have."""
        return ORDERS

    @property
    def own_levels(self) -> slice:
        """The levels of the layout that are predicted."""
        return slice(self.first_level, self.first_level + self.num_levels if self.num_levels else None)

    @property
    def streams_per_level(self) -> tuple[int, ...]:
        """Codebooks of each level of the layout, factors of a large one counted as codebooks."""
        levels = CodeLayout.from_dict(self.layout).levels
        return tuple(level.num_codebooks * len(factors(level.codebook_size)) for level in levels)

    @property
    def ratios(self) -> tuple[int, ...]:
        """How many cells of the finest grid one cell of each level covers along an axis."""
        strides = [level["stride"] for level in self.layout["levels"]]
        return tuple(stride // strides[-1] for stride in strides)

    @property
    def extent(self) -> int:
        """Cells of the largest finest grid along an axis, and room behind it."""
        return (self.max_grid + self.room) * self.ratios[0]

    @property
    def room(self) -> int:
        """Coarse frames behind the last one of a time series that ends by itself.

        Frames that nobody has: so that the unit that says "no more" is in the table, and each unit is as in a longer one.
        """
        if not self.stops:
            return 0
        return max(self.streams_per_level) if self.order == "delay" else 1

    @property
    def prefix_length(self) -> int:
        """The position of the token `begin`, however long the condition before it is."""
        return 1 if self.condition in ("class", "none") else self.max_text_length

    @property
    def depth_config(self) -> PreTrainedConfig:
        """Of the small transformer over the codebooks of a place: a Llama as wide as the backbone."""
        backbone, width = self.backbone_config, self.backbone_config.hidden_size
        return CONFIG_MAPPING["llama"](
            hidden_size=width,
            intermediate_size=-(-8 * width // 3 // 32) * 32,
            num_hidden_layers=self.depth_layers,
            num_attention_heads=backbone.num_attention_heads,
            num_key_value_heads=backbone.num_attention_heads,
            max_position_embeddings=max(self.streams_per_level),
            vocab_size=1,  # it reads vectors
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's config: what transformers reads to make caches and masks."""
        return self.backbone_config


def _backbone(value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """A config of the caller's own, checked to be decoder-only."""
    if isinstance(value, PreTrainedConfig):
        config = copy.deepcopy(value)
    else:
        fields = dict(DEFAULT_BACKBONE if value is None else value)
        model_type = fields.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            near = difflib.get_close_matches(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"backbone_config needs a model_type that transformers knows, such as 'llama' or 'gpt2', got {model_type!r}"
                + (f". Did you mean {near!r}?" if model_type else "")
            )
        config_class = CONFIG_MAPPING[model_type]
        _check_names(config_class, fields)
        config = config_class(**fields)
    # Encoders say `is_decoder=False`; so does GPT-NeoX, which never reads it.
    is_encoder = getattr(config, "is_decoder", True) is False and not config.model_type.startswith("gpt_neox")
    if config.is_encoder_decoder or is_encoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "an encoder, or no language model,"
        raise ValueError(
            f"backbone_config: {config.model_type!r} is {kind} and cannot predict codes one after another; "
            "choose a decoder-only model such as 'llama', 'gpt2', 'qwen3' or 'mistral'"
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        number = getattr(config, name, None)
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 1 << 16:
            raise ValueError(f"backbone_config.{name} must be from 1 to 65536, got {number!r}")
    return config


def _check_names(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    # Some classes compute attributes, which their saved form holds too.
    allowed = (
        known | _LEGACY_KEYS | set(GenerationConfig._get_default_generation_params()) | set(config_class().to_dict())
    )
    for key in fields:
        if key not in allowed and not key.startswith("_"):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"backbone_config: {config_class.__name__} has no field {key!r}. Did you mean {near!r}?")
