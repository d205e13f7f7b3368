"""The prior: a decoder-only transformer over codes. What is about codes is here; the transformer is any of transformers'.

A sample is the sequence

    [condition, padded on the left]  begin  one size token per axis  codes of level 0 ... codes of the finest level

The size tokens announce the coarsest grid. Without a condition its place holds the one learned token `null`. The token `begin`
stands at the same position whatever the length of the condition. A position is predicted over the entries of its own stream only.

Axis letters: B batch, A grid axes, L condition tokens, T input tokens, P code positions, K entries of a stream, M width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init

from vqtok.hub.publish import PublishedModel
from vqtok.modeling import load_checked
from vqtok.outputs import CodePriorOutput

from .checks import check_codes, check_condition
from .configuration_code_prior import CodePriorConfig
from .drawing import CodeDrawingMixin
from .generation import CodeGenerationMixin
from .sequence import OrderTable, Shapes, flatten, order_table, places, replace_conditions


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


class CodePriorModel(PublishedModel, PreTrainedModel, CodeDrawingMixin, CodeGenerationMixin):
    """A prior over codes: trains on them (`forward`), draws them (`sample_codes`), tells how likely they are (`score`).

    Example:
        >>> layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 16}]}
        >>> backbone = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> backbone |= {"num_attention_heads": 2, "num_key_value_heads": 2}
        >>> config = CodePriorConfig(layout=layout, condition="class", text_size=10, backbone_config=backbone)
        >>> prior = CodePriorModel(config).eval()
        >>> codes = prior.sample_codes([3, 7], sizes=(32, 24), seed=0)
        >>> tuple(codes.levels[0].shape), tuple(prior.score(codes, [3, 7]).nats.shape)
        ((2, 1, 4, 3), (2,))
    """

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
        # What `generate` of transformers reads too: null follows the last code, and top_k 0 keeps all.
        end = {"eos_token_id": self.null_id, "pad_token_id": self.null_id, "max_length": self.max_length}
        defaults = {"do_sample": True, "guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self.generation_config = GenerationConfig(**defaults, **end)
        self.post_init()

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The backbone initialises itself; these functions leave alone what was loaded from a file.
        if isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, mean=0.0, std=0.02)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):  # type: ignore[no-untyped-def]
        """As transformers does, but safetensors only, and every weight must be there and fit.

        Raises:
            OSError: the folder or repository has no safetensors.
            ValueError: the file is damaged, or weights are missing from it, unknown, or of another shape than the config says;
                they are named.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    # -- training

    def forward(
        self,
        codes: Sequence[Tensor] | None = None,
        sizes: Tensor | None = None,
        condition_ids: Tensor | None = None,
        condition_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        history_ids: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CodePriorOutput:
        """Return the loss of codes, or for `input_ids` the logits that `generate` of transformers reads.

        Args:
            codes: all levels, coarse to fine, each int64 `(B, Q, *grid)`; one grid for the whole batch.
            sizes: int64 `(B, ndim)` in pixels, samples or bytes; checked against the grid.
            condition_ids: int64 `(B, L)` text tokens padded on the left, or `(B,)` class labels; None is the null condition. In train
                mode conditions become null with probability `condition_dropout` (torch's global CPU generator decides).
            condition_mask: `(B, L)`, true for tokens, false for padding; None if nothing is padding. A row of padding alone is null.
            input_ids: int64 `(B, T)`, ids of `vocabulary`: condition, begin, sizes, codes.
            attention_mask: `(B, cached + T)`, 0 for padding on the left.
            past_key_values: the cache of earlier tokens.
            history_ids: all ids so far, cached ones included; needed with a filled cache.
            use_cache: whether to return a cache; for `input_ids` only.
            return_dict: ignored, the output is always named.

        Returns:
            `loss` and `nats_per_code`; or `logits` `(B, T, V)`, -inf for every id that cannot follow, and `past_key_values`.

        Raises:
            ValueError: codes or conditions that do not fit the config, or samples of different grids.
        """
        if (codes is None) == (input_ids is None):
            raise ValueError("give either codes (to train) or input_ids (as transformers' generate does)")
        if input_ids is not None:
            return self._forward_ids(input_ids, attention_mask, past_key_values, history_ids, use_cache)
        check_codes(codes, sizes, self.config)
        batch = len(codes[0])
        if condition_ids is None:
            ids_BL = torch.full((batch, 1), self.null_id, device=self.device)
            mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        else:
            ids_BL, mask_BL = check_condition(condition_ids.to(self.device), condition_mask, batch, self.config)
            null_B = ~mask_BL[:, -1]
            if self.training and self.config.condition_dropout:
                null_B = null_B | (torch.rand(batch) < self.config.condition_dropout).to(self.device)
            ids_BL, mask_BL = replace_conditions(ids_BL, mask_BL, null_B, self.null_id)
        nats_BP, size_nats_BA, table = self._nats(codes, ids_BL, mask_BL)
        sums = torch.zeros(len(codes), device=self.device).index_add(0, table.level_P, nats_BP.detach().sum(0))
        counts = torch.tensor([values.numel() for values in codes], device=self.device)
        loss = (nats_BP.sum() + size_nats_BA.sum()) / (nats_BP.numel() + size_nats_BA.numel())
        return CodePriorOutput(loss=loss, nats_per_code=sums / counts)

    def _nats(self, codes: Sequence[Tensor], ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, OrderTable]:
        """-ln p, float32, of every code `(B, P)` in the order of the table, and of every size token `(B, A)`."""
        levels = self.vocabulary.to_ids([values.to(self.device) for values in codes])
        shapes = tuple(tuple(values.shape[1:]) for values in levels)
        table, axes = order_table(shapes, self.config.order, self.device), self.vocabulary.layout.ndim
        codes_BP = flatten(levels, table)
        prefix_BT = self._prefix(shapes[0][1:]).expand(len(ids_BL), -1)
        tokens_BT = torch.cat([ids_BL, prefix_BT, codes_BP[:, :-1]], 1)
        padding = tokens_BT.shape[1] - ids_BL.shape[1]
        mask_BT = None if bool(mask_BL.all()) else F.pad(mask_BL, (0, padding), value=True)
        # From begin on: what stands at position p predicts position p + 1.
        x_BTM = self._run(tokens_BT, self._place_vectors(shapes)[:-1], mask_BT)[:, ids_BL.shape[1] :]
        sizes = (self.vocabulary.size_offset, self.vocabulary.max_grid)
        size_nats_BA = self._stream_nats(x_BTM[:, :axes], prefix_BT[:, 1:], *sizes)
        x_BPM = x_BTM[:, axes:]
        parts = [
            self._stream_nats(
                x_BPM[:, run.positions], codes_BP[:, run.positions], *self._streams[run.level, run.codebook]
            )
            for run in table.runs
        ]
        return torch.cat(parts, 1)[:, table.from_runs_P], size_nats_BA, table

    def _stream_nats(self, x_BNM: Tensor, ids_BN: Tensor, offset: int, size: int) -> Tensor:
        logits_XK = self._logits(x_BNM, offset, size).flatten(0, 1).float()
        return F.cross_entropy(logits_XK, (ids_BN - offset).flatten(), reduction="none").view(ids_BN.shape)

    def _logits(self, x_M: Tensor, offset: int, size: int) -> Tensor:
        """Logits over the ids [offset, offset + size) alone."""
        first = offset - self.vocabulary.size_offset
        return F.linear(x_M, self.lm_head.weight[first : first + size])

    def _run(
        self, tokens_BT: Tensor, places_PM: Tensor, mask_BT: Tensor | None, cache: Any = None, start: int | None = None
    ) -> Tensor:
        """Hidden states `(B, T, M)` of tokens, the last of which stand at `places_PM`.

        Args:
            mask_BT: `(B, cached + T)`, or None if nothing is padding.
            start: the position of the first token; None puts the first token with a place (begin) at its fixed position.
        """
        length, without_place = tokens_BT.shape[1], tokens_BT.shape[1] - places_PM.shape[-2]
        start = self.config.prefix_length - without_place if start is None else start
        self._check_length(start + length)
        return self.backbone(
            inputs_embeds=self._inputs(tokens_BT, places_PM),
            attention_mask=None if mask_BT is None else mask_BT.long(),
            position_ids=torch.arange(start, start + length, device=tokens_BT.device)[None],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _inputs(self, tokens_BT: Tensor, places_PM: Tensor) -> Tensor:
        """Input vectors `(B, T, M)` of tokens, the last of which stand at `places_PM`."""
        without_place = tokens_BT.shape[1] - places_PM.shape[-2]
        return self.get_input_embeddings()(tokens_BT) + F.pad(places_PM, (0, 0, without_place, 0))

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the backbone's max_position_embeddings {self.max_length}: "
                "use smaller media, or make the prior with a larger one in backbone_config"
            )

    def _place_vectors(self, shapes: Shapes) -> Tensor:
        """`(1 + A + P, M)` for begin, sizes and codes: where each stands, and, from other tables, where the next one will."""
        here = places(shapes, self.config.ratios, self.config.extent, self.config.order, self.device)
        rows = (here.level_P, here.codebook_P, here.coord_PA)
        return self.place_embed(*(row[:-1] for row in rows)) + self.next_place_embed(*(row[1:] for row in rows))

    def _prefix(self, grid: Sequence[int]) -> Tensor:
        """Ids `(1 + A,)` of begin and of the tokens that announce the coarsest grid."""
        sizes = [self.vocabulary.size_offset + extent - 1 for extent in grid]
        return torch.tensor([self.vocabulary.special_id("begin"), *sizes], device=self.device)

    def _shapes(self, grids: Sequence[Sequence[int]]) -> Shapes:
        """`(Q, *grid)` of each level, factors of a codebook counted as codebooks."""
        streams = [sum(level == name[0] for name in self._streams) for level in range(len(grids))]
        return tuple((count, *grid) for count, grid in zip(streams, grids, strict=True))


def _check_backbone(backbone: nn.Module) -> None:
    needed = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values"}
    missing = needed - set(inspect.signature(backbone.forward).parameters)
    if missing:
        raise ValueError(
            f"{type(backbone).__name__} takes no {', '.join(sorted(missing))} and cannot be a backbone: "
            "choose an attention decoder such as 'llama', 'gpt2', 'qwen3' or 'mistral'"
        )
