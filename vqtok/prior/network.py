"""What every prior over codes is made of: a transformer of transformers, places, heads that are slices, and the prompt.

A sample is the sequence

    [condition, padded on the left]  begin  one size token per axis  units

The size tokens announce the coarsest grid; a time series that ends by itself has none. Without a condition its place holds the one
learned token `null`. The token `begin` stands at the same position whatever the length of the condition. What a unit is made of and
what it predicts is said by the table of the order (`sequence.py`). A position is predicted over the entries of its own stream only.

Axis letters: B batch, A grid axes, L condition tokens, T input tokens, U units, S sources of a unit, P code positions, K entries of a
stream, M width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init

from vqtok.modeling import CheckedModel

from .checks import check_condition, check_features
from .conditioner import LevelConditioner
from .configuration_code_prior import CodePriorConfig
from .sequence import OrderTable, Shapes, order_table, pad_conditions, pad_features, replace_conditions


class PlaceEmbedding(nn.Module):
    """Learned vectors of where a token stands: level, codebook, and each coordinate of the finest grid, summed."""

    def __init__(self, num_levels: int, num_codebooks: int, extent: int, axes: int, width: int):
        super().__init__()
        self.level = nn.Embedding(num_levels + 1, width)
        self.codebook = nn.Embedding(num_codebooks, width)
        self.coords = nn.ModuleList(nn.Embedding(extent + 1, width) for _ in range(axes))

    def forward(self, level_P: Tensor, codebook_P: Tensor, coord_PA: Tensor) -> Tensor:
        """Vectors `(P, M)`."""
        x_PM = self.level(level_P) + self.codebook(codebook_P)
        for table, coord_P in zip(self.coords, coord_PA.unbind(1), strict=True):
            x_PM = x_PM + table(coord_P)
        return x_PM


class UnitVectors(NamedTuple):
    """What is added to the embeddings of tokens, because of where they stand and of what comes next.

    Attributes:
        prefix_TM: of begin and the size tokens.
        place_PM: of each code, and a row of zeros for none.
        next_UM: of the positions that each unit predicts.
        unit_UM: `next_UM` and the places of the unit's sources.
    """

    prefix_TM: Tensor
    place_PM: Tensor
    next_UM: Tensor
    unit_UM: Tensor


class BatchCondition(NamedTuple):
    """Conditions of a training batch as the transformer reads them.

    Attributes:
        vectors_BLM: of the conditions, null ones replaced.
        mask_BL: false for padding on the left.
        ids_BL: what the conditions were made of; None for null alone and for features.
        told_BL: the tokens that the transformer reads; false for padding and for conditions that became null.
    """

    vectors_BLM: Tensor
    mask_BL: Tensor
    ids_BL: Tensor | None
    told_BL: Tensor


class CodePriorPreTrainedModel(CheckedModel, PreTrainedModel):
    """The parts, and how they are initialised, saved and loaded."""

    config: CodePriorConfig
    config_class = CodePriorConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    # The backbone decides when it is built; these let a choice through to it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: CodePriorConfig):
        super().__init__(config)
        self.vocabulary = config.vocabulary
        # The dtype of the whole, not the one that a saved backbone_config remembers.
        self.backbone = AutoModel.from_config(config.backbone_config, dtype=torch.get_default_dtype())
        _check_backbone(self.backbone)
        layout, width, streams = self.vocabulary.layout, config.backbone_config.hidden_size, self.vocabulary.streams
        num_codebooks = max(layout.ndim, *(stream.codebook + 1 for stream in streams))
        dims = (len(layout.levels), num_codebooks, config.extent, layout.ndim, width)
        self.place_embed, self.next_place_embed = PlaceEmbedding(*dims), PlaceEmbedding(*dims)
        # Rows for what is predicted, sizes and codes: row 0 belongs to the id `vocabulary.size_offset`.
        self.lm_head = nn.Linear(width, self.vocabulary.size - self.vocabulary.size_offset, bias=False)
        self._streams = {(stream.level, stream.codebook): (stream.offset, stream.size) for stream in streams}
        if config.condition == "features":
            # As LlamaGen puts the features of a text encoder before its codes (Sun et al. 2024); encoders differ in scale.
            self.feature_norm = nn.RMSNorm(config.feature_size)
            self.feature_proj = nn.Linear(config.feature_size, width)
        if config.condition_places:
            self.condition_places = nn.Embedding(config.max_text_length, width)
        if config.first_level:
            self.conditioner = LevelConditioner(width, layout.ndim, config.first_level)
        # What `generate` of transformers reads too: null follows the last code, and top_k 0 keeps all.
        end = {"eos_token_id": self.null_id, "pad_token_id": self.null_id, "max_length": self.max_length}
        defaults = {"do_sample": True, "guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self.generation_config = GenerationConfig(**defaults, **end)

    @property
    def null_id(self) -> int:
        """The id of the learned token that stands for no condition."""
        return self.vocabulary.special_id("null")

    @property
    def max_length(self) -> int:
        """The longest sequence of the backbone; a few backbones name no limit."""
        return getattr(self.config.backbone_config, "max_position_embeddings", 1 << 20)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's table of `vocabulary.padded_size` rows."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: slices of `lm_head` are read, it is never called, so nothing that wraps modules (FSDP2) may hook its call."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The backbone initialises itself; these functions leave alone what was loaded from a file.
        if isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    # -- where things stand

    def _shapes(self, grids: Sequence[Sequence[int]]) -> Shapes:
        """`(Q, *grid)` of each level of the layout, factors of a codebook counted as codebooks."""
        streams = self.config.streams_per_level
        return tuple((count, *grid) for count, grid in zip(streams, grids, strict=True))

    def _with_room(self, grids: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Grids with the frames more that a time series that ends by itself needs."""
        room = self.config.room
        return [(grid[0] + room * (grid[0] // grids[0][0]),) if room else tuple(grid) for grid in grids]

    def _table(self, shapes: Shapes) -> OrderTable:
        """The order of the levels that this prior predicts, given the shapes of all levels."""
        return order_table(shapes[self.config.own_levels], self.config.order, self.config.stops, self.device)

    def _prefix(self, grid: Sequence[int]) -> Tensor:
        """Ids of begin and, unless the time series ends by itself, of the tokens that announce the coarsest grid."""
        sizes = [] if self.config.stops else [self.vocabulary.size_offset + extent - 1 for extent in grid]
        return torch.tensor([self.vocabulary.special_id("begin"), *sizes], device=self.device)

    def _prefix_vectors(self) -> Tensor:
        """`(1 + A, M)` for begin and size tokens: where each stands and, but for the last one, what comes next."""
        axes, layout = 0 if self.config.stops else self.vocabulary.layout.ndim, self.vocabulary.layout
        level_T = torch.full((1 + axes,), len(layout.levels), device=self.device)
        codebook_T = torch.tensor([0, *range(axes)], device=self.device)
        nowhere_TA = torch.full((1 + axes, layout.ndim), self.config.extent, device=self.device)
        here_TM = self.place_embed(level_T, codebook_T, nowhere_TA)
        next_TM = self.next_place_embed(level_T[1:], codebook_T[1:], nowhere_TA[1:])
        return here_TM + F.pad(next_TM, (0, 0, 0, 1))

    def _unit_vectors(self, table: OrderTable) -> UnitVectors:
        """Vectors of prefix, codes and units, from the tables of places."""
        level_P = table.level_P + self.config.first_level
        # In cells of the finest grid, so that a code and its coarse parent share their coordinates.
        ratios = torch.tensor(self.config.ratios, device=self.device)
        rows = (level_P, table.codebook_P, table.coord_PA * ratios[level_P, None])
        place_PM, next_PM = F.pad(self.place_embed(*rows), (0, 0, 0, 1)), self.next_place_embed(*rows)
        if len(table) == len(table.step_U):
            next_UM = next_PM
        else:
            next_UM = next_PM.new_zeros(len(table.step_U), next_PM.shape[1]).index_add(0, table.unit_P, next_PM)
        unit_UM = next_UM
        for source_U in table.sources_US.unbind(1):
            unit_UM = unit_UM + place_PM[source_U]
        prefix_TM = self._prefix_vectors()
        if table.shifted:  # the last token of the prefix is unit 0
            prefix_TM = torch.cat([prefix_TM[:-1], prefix_TM[-1:] + next_UM[:1]])
        return UnitVectors(prefix_TM, place_PM, next_UM, unit_UM)

    def _given(self, codes: Sequence[Tensor], table: OrderTable) -> Tensor | None:
        """What the coarser levels, which this prior is given, add to each unit: `(B, U, M)`, or None if there are none.

        Args:
            codes: the given levels, maybe followed by others, each int64 `(B, Q, *grid)`.
        """
        if not self.config.first_level:
            return None
        ids = self.vocabulary.to_ids([values.to(self.device) for values in codes])[: self.config.first_level]
        embed = self.get_input_embeddings()
        embedded = []
        for level, values in enumerate(ids):
            place = torch.tensor(range(values.shape[1]), device=self.device)
            here = self.place_embed.level.weight[level] + self.place_embed.codebook(place)
            embedded.append((embed(values).movedim(1, -2) + here).sum(-2))
        own = [shape[1:] for shape in table.shapes]
        maps = self.conditioner(embedded, own)
        streams = [shape[0] for shape in table.shapes]
        flat = [x.flatten(1, -2).repeat(1, count, 1) for x, count in zip(maps, streams, strict=True)]
        given_BPM = torch.cat(flat, 1)[:, table.index_P]
        if len(table) == len(table.step_U):
            return given_BPM
        zeros = given_BPM.new_zeros(len(given_BPM), len(table.step_U), given_BPM.shape[2])
        return zeros.index_add(1, table.unit_P, given_BPM)

    # -- conditions

    def _null_vector(self) -> Tensor:
        """`(M,)`, the learned vector that stands for no condition."""
        return self.get_input_embeddings()(torch.tensor(self.null_id, device=self.device))

    def _feature_vectors(self, features_BLD: Tensor) -> Tensor:
        """Input vectors `(B, L, M)` of what a text encoder says."""
        return self.feature_proj(self.feature_norm(features_BLD.to(self.device, self.dtype)))

    def _numbered(self, x_BLM: Tensor, mask_BL: Tensor) -> Tensor:
        """Condition vectors that know their number, where the config says so."""
        if not self.config.condition_places:
            return x_BLM
        number_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        return x_BLM + self.condition_places(number_BL).to(x_BLM.dtype)

    def _condition_vectors(self, rows: Sequence[list[int] | Tensor]) -> tuple[Tensor, Tensor]:
        """Input vectors `(B, L, M)` and mask `(B, L)` of the rows that `condition_rows` returns, padded on the left."""
        if self.config.condition != "features":
            ids_BL, mask_BL = pad_conditions(rows)
            mask_BL = mask_BL.to(self.device)
            return self._numbered(self.get_input_embeddings()(ids_BL.to(self.device)), mask_BL), mask_BL
        given = [row if isinstance(row, Tensor) else None for row in rows]
        features_BLD, mask_BL = (x.to(self.device) for x in pad_features(given, self.config.feature_size))
        x_BLM = self._feature_vectors(features_BLD)
        x_BLM, mask_BL = replace_conditions(x_BLM, mask_BL, ~mask_BL[:, -1], self._null_vector())
        return self._numbered(x_BLM, mask_BL), mask_BL

    def _batch_condition(
        self, batch: int, ids: Tensor | None, mask: Tensor | None, features: Tensor | None
    ) -> BatchCondition:
        """Conditions of a training batch, checked; in train mode some become null."""
        null_M = self._null_vector()
        if ids is None and features is None:
            mask_BL = torch.ones(batch, 1, dtype=torch.bool, device=self.device)
            x_BLM = self._numbered(null_M.expand(batch, 1, -1), mask_BL)
            return BatchCondition(x_BLM, mask_BL, None, ~mask_BL)
        if ids is not None and features is not None:
            raise ValueError("give condition_ids or condition_features, not both")
        if features is None:
            ids_BL, mask_BL = check_condition(ids.to(self.device), mask, batch, self.config)
            x_BLM = self.get_input_embeddings()(ids_BL)
        else:
            features_BLD, mask_BL = check_features(features.to(self.device), mask, batch, self.config)
            ids_BL, x_BLM = None, self._feature_vectors(features_BLD)
        null_B = ~mask_BL[:, -1]
        if self.training and self.config.condition_dropout:
            null_B = null_B | (torch.rand(batch) < self.config.condition_dropout).to(self.device)
        told_BL = mask_BL & ~null_B[:, None]
        x_BLM, mask_BL = replace_conditions(x_BLM, mask_BL, null_B, null_M)
        return BatchCondition(self._numbered(x_BLM, mask_BL), mask_BL, ids_BL, told_BL)

    # -- inputs

    def _prompt(
        self, condition_BLM: Tensor, prefix_T: Tensor, vectors: UnitVectors, given_BUM: Tensor | None, shifted: bool
    ) -> Tensor:
        """Input vectors `(B, L + 1 + A, M)` of condition, begin and size tokens."""
        prefix_BTM = (self.get_input_embeddings()(prefix_T) + vectors.prefix_TM).expand(len(condition_BLM), -1, -1)
        if given_BUM is not None and shifted:
            prefix_BTM = torch.cat([prefix_BTM[:, :-1], prefix_BTM[:, -1:] + given_BUM[:, :1]], 1)
        return torch.cat([condition_BLM, prefix_BTM.to(condition_BLM.dtype)], 1)

    def _unit_inputs(
        self,
        ids_BP: Tensor,
        table: OrderTable,
        vectors: UnitVectors,
        units: slice,
        given_BUM: Tensor | None = None,
        valid_BP: Tensor | None = None,
        has_gaps: bool = True,
    ) -> Tensor:
        """Input vectors `(B, U, M)` of some units: the sum over their sources, and where they stand.

        Args:
            ids_BP: ids of the codes in the table's order, and one more column that stands for no code.
            valid_BP: which of these codes there are; None if all but the last column.
            has_gaps: whether some of these units have fewer sources than others.
        """
        embed, sources_US = self.get_input_embeddings(), table.sources_US[units]
        if valid_BP is None and not has_gaps:
            x_BUM = vectors.unit_UM[units]
            for source_U in sources_US.unbind(1):
                x_BUM = x_BUM + embed(ids_BP[:, source_U])
        else:
            x_BUM = vectors.next_UM[units]
            for source_U in sources_US.unbind(1):
                there = (source_U < len(table)) if valid_BP is None else valid_BP[:, source_U]
                code_BUM = embed(ids_BP[:, source_U]) + vectors.place_PM[source_U]
                x_BUM = x_BUM + code_BUM * there[..., None]
        return x_BUM if given_BUM is None else x_BUM + given_BUM[:, units]

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse media of a size (pixels, samples or bytes) whose sequence is longer than the context; of a data set ask the largest.

        Raises:
            ValueError: it is, or its coarsest grid is larger than `max_grid`.
        """
        config, grids = self.config, self.vocabulary.layout.grids(size)
        units = self._most_units(self._table(self._shapes(self._with_room(grids))))
        length = config.prefix_length + len(self._prefix(grids[0])) + units
        self._check_length(length, f" for media of size {tuple(size)}")

    def _most_units(self, table: OrderTable) -> int:
        """How many units the transformer reads at most behind the prompt, whose last token is unit 0 of a shifted order."""
        units, window = len(table.step_U), self.config.window
        return units - table.shifted if window is None or units <= window else window

    def _check_length(self, length: int, what: str = "") -> None:
        if length > self.max_length:
            raise ValueError(
                f"a sequence of {length} tokens{what} is longer than the backbone's max_position_embeddings {self.max_length}: "
                "use smaller media, set `window` in the prior's config, or make the prior with a larger one in backbone_config"
            )

    # -- outputs

    def _run(self, x_BTM: Tensor, start: int, mask: Tensor | None, position_T: Tensor | None = None) -> Tensor:
        """Hidden states `(B, T, M)` of input vectors, the first of which stands at position `start`.

        Args:
            mask: `(B, T)`, false for padding; or what `attention_bias` returns; None if nothing is padding.
            position_T: where each token stands, where that is not one after another.
        """
        if position_T is None:
            position_T = torch.arange(start, start + x_BTM.shape[1], device=x_BTM.device)
            self._check_length(start + x_BTM.shape[1])
        return self.backbone(
            inputs_embeds=x_BTM,
            attention_mask=mask.long() if mask is not None and mask.ndim == 2 else mask,
            position_ids=position_T[None],
            use_cache=False,
        ).last_hidden_state

    def _stream_nats(self, x_BNM: Tensor, ids_BN: Tensor, offset: int, size: int) -> Tensor:
        logits_XK = self._logits(x_BNM, offset, size).flatten(0, 1).float()
        return F.cross_entropy(logits_XK, (ids_BN - offset).flatten(), reduction="none").view(ids_BN.shape)

    def _logits(self, x_M: Tensor, offset: int, size: int) -> Tensor:
        """Logits over the ids [offset, offset + size) alone."""
        first = offset - self.vocabulary.size_offset
        return F.linear(x_M, self.lm_head.weight[first : first + size])

    def _own_stream(self, level: int, codebook: int) -> tuple[int, int]:
        """Offset and size of a stream, by the level's number in the order's table."""
        return self._streams[level + self.config.first_level, codebook]


def attention_bias(mask_BT: Tensor | None, step_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores, `(B | 1, 1, T, T)`: 0 where a token may look, the lowest number elsewhere.

    A token sees those of its own step and of earlier ones. (Additive, because eager attention knows no other form.)

    Args:
        mask_BT: false for padding; None if nothing is padding.
        step_T: int64, the step of each token.
    """
    allowed = (step_T[None, :] <= step_T[:, None])[None, None]
    if mask_BT is not None:
        # A row of padding attends to itself, as no softmax can be over nothing; nobody reads what comes out.
        allowed = (allowed & mask_BT[:, None, None, :]) | torch.eye(len(step_T), dtype=torch.bool, device=step_T.device)
    return torch.zeros(allowed.shape, dtype=dtype, device=step_T.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _check_backbone(backbone: nn.Module) -> None:
    needed = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values"}
    missing = needed - set(inspect.signature(backbone.forward).parameters)
    if missing:
        raise ValueError(
            f"{type(backbone).__name__} takes no {', '.join(sorted(missing))} and cannot be a backbone: "
            "choose an attention decoder such as 'llama', 'gpt2', 'qwen3' or 'mistral'"
        )
