"""A prior that starts from pretrained text weights: any causal language model of transformers becomes the backbone.

The vocabulary of a prior begins with the text, so text rows keep their ids; what is about codes is new:

- New rows of the embedding are drawn around the mean of the old rows, with the old spread of each coordinate. To the layers
  above they look like the words they know, in direction and in length.
- Place vectors are added to those rows. Their tables share one such spread, so that their sum is about as large as one token.
- The head over the codes starts at zero: the first predictions are uniform, and no random direction pulls at the layers.

A fresh prior may begin with what it is given of the codes: the vectors of the codec (`begin_with_vectors`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from vqtok.code_vectors import projected
from vqtok.codes import CodeLayout

from .configuration_code_prior import CodePriorConfig
from .modeling_code_prior import CodePriorModel
from .network import CodePriorPreTrainedModel, PlaceEmbedding


def prior_from_text_model(
    source: str,
    layout: CodeLayout | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    **fields: Any,
) -> CodePriorModel:
    """Return a prior over the codes of `layout` that starts from the weights of a text model.

    Args:
        source: a folder or a repository on the Hub with a causal language model in safetensors.
        layout: of the codes.
        tokenizer: the model's own; its length becomes `text_size`. None takes every row that the model has.
        revision: branch, tag or commit of the repository.
        fields: of `CodePriorConfig` (`max_text_length`, `max_grid`, `condition_dropout`, ...).

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> folder = tempfile.mkdtemp()
        >>> GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
        >>> layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 16}]}
        >>> prior = prior_from_text_model(folder, layout, max_grid=4)
        >>> prior.config.text_size, prior.vocabulary.size
        (50, 72)

    Raises:
        OSError: there is no such model, or it has no safetensors.
        ValueError: it needs remote code, is no decoder, or its weights do not fit its config.
    """
    backbone = text_backbone(source, revision)
    text_size = backbone.vocab_size if tokenizer is None else len(tokenizer)
    layout = layout.to_dict() if isinstance(layout, CodeLayout) else dict(layout)
    fields = {"condition": "text", "text_size": text_size, **fields}
    prior = CodePriorModel(CodePriorConfig(layout=layout, backbone_config=backbone, **fields))
    load_text_weights(prior, source, revision)
    return prior


def text_backbone(source: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a text model, as `CodePriorConfig.backbone_config` takes it (which refuses what is no decoder).

    Raises:
        OSError: there is no config.
        ValueError: transformers does not know the model without remote code.
    """
    kind = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{source} is a model of the type {kind!r}, which transformers does not know by itself, and vqtok runs no remote code: "
            "choose a decoder-only model such as a Llama, GPT-2, Qwen3 or Mistral"
        )
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    config.name_or_path, config.architectures = "", None  # neither is true of the prior, and the first may be a path
    return config


@torch.no_grad()
def load_text_weights(prior: CodePriorModel, source: str, revision: str | None = None, keep_text: bool = True) -> int:
    """Give the backbone of `prior` the weights of a text model, initialise what is new, and return how many text rows were kept.

    Args:
        prior: made from the config of the same model (`text_backbone`).
        keep_text: whether the prior's text tokens are those of the model; otherwise all rows are new.

    Raises:
        OSError: there are no safetensors.
        ValueError: the file is damaged, weights are missing from it or of another shape, or the prior has another backbone.
    """
    text = _load(source, revision, prior.dtype)
    old, new = text.get_input_embeddings(), prior.get_input_embeddings()
    loaded, wanted = text.state_dict(), prior.backbone.state_dict()
    table = next(name for name, value in wanted.items() if value.data_ptr() == new.weight.data_ptr())
    shapes = ({k: v.shape for k, v in state.items() if k != table} for state in (loaded, wanted))
    if next(shapes) != next(shapes) or old.weight.shape[1] != prior.config.backbone_config.hidden_size:
        raise ValueError(
            f"{source} has other weights than the backbone of this prior: make it with backbone_config=text_backbone({source!r}), "
            "from a model whose embedding is as wide as its layers"
        )
    for name, value in wanted.items():
        if name != table:
            value.copy_(loaded[name])
    kept = min(prior.config.text_size, len(old.weight)) if keep_text and prior.config.condition == "text" else 0
    rows = old.weight.float()
    noise = torch.randn(new.weight[kept:].shape, device=rows.device)
    new.weight[kept:] = (rows.mean(0) + rows.std(0) * noise).to(new.weight)
    new.weight[:kept] = old.weight[:kept].to(new.weight)
    _initialise_places(prior, old)
    prior.lm_head.weight.zero_()
    return kept


@torch.no_grad()
def begin_with_vectors(
    prior: CodePriorPreTrainedModel, vectors: Iterable[tuple[tuple[int, int], Tensor]], seed: int = 0
) -> None:
    """Let each code's rows in the embedding and in the head begin as its vector, projected at random and scaled to their spread.

    Codes that sound or look nearly alike then begin alike, and what is learnt of one holds for the others. Both rows are the same
    but for their scale, so that at first codes are the likelier the nearer they are to what the layers say.

    Args:
        prior: a fresh one.
        vectors: of each stream, as `vqtok.code_vectors.code_vectors` gives them.
        seed: of the projections.
    """
    embed, head, first = prior.get_input_embeddings().weight, prior.lm_head.weight, prior.vocabulary.size_offset
    generator = torch.Generator().manual_seed(seed)
    for (level, codebook), points in vectors:
        offset, size = prior._streams[level, codebook]
        rows = projected(points.cpu(), embed.shape[1], generator).to(embed)
        for own in (embed[offset : offset + size], head[offset - first : offset - first + size]):
            own.copy_(own.std() * rows)


def _initialise_places(prior: CodePriorModel, old: nn.Module) -> None:
    # Of what the table returns, not of its rows: some models scale them.
    spread = old(torch.arange(min(len(old.weight), 4096), device=old.weight.device)).float().std(0).mean()
    parts = [module for module in prior.modules() if isinstance(module, PlaceEmbedding)]
    tables = [table for part in parts for table in part.modules() if isinstance(table, nn.Embedding)]
    for table in tables:
        table.weight.normal_(0.0, float(spread) / math.sqrt(len(tables)))


def _load(source: str, revision: str | None, dtype: torch.dtype) -> Any:
    """The text model without its head, every weight of it from safetensors."""
    options = {"use_safetensors": True, "trust_remote_code": False, "revision": revision, "dtype": dtype}
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report counts the head as a loss; ours is below
    try:
        text, info = AutoModel.from_pretrained(
            source, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ValueError(
            f"{source}: the weights file is truncated or damaged ({error}): save or download it again"
        ) from error
    finally:
        transformers_logging.set_verbosity(before)
    # A head of any kind (`lm_head`, `score`) is left over, and may be; a layer is not.
    prefix = f"{text.base_model_prefix}."
    unknown = [k for k in info["unexpected_keys"] if hasattr(text, str(k).removeprefix(prefix).split(".")[0])]
    found = {"missing": info["missing_keys"], "of another shape": info["mismatched_keys"], "unknown": unknown}
    if problems := {name: sorted(map(str, keys))[:5] for name, keys in found.items() if keys}:
        raise ValueError(f"{source}: the weights do not fit the config: {problems}")
    return text
