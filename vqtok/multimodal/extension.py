"""A language model and its text tokenizer get ids for codes: what was there stays, what is new begins near what is known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqtok.auto import VQTokenizer
from vqtok.code_vectors import code_vectors, projected

from .frozen import freeze_old_rows, vocabulary_parameters
from .processor import MultimodalProcessor
from .vocabulary import Modality, MultimodalVocabulary

INITS = ("codebook", "mean")
NOISE = 0.02  # spread of a new row around the mean, as a share of the old rows' spread
_EXTENDED = re.compile(r"<\|([a-z][a-z0-9]*)_0_0_0\|>")  # only to say that a tokenizer was extended before


def extend(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    vq_tokenizers: VQTokenizer | Mapping[str, VQTokenizer],
    init: str = "codebook",
    max_grid: int | Mapping[str, int] = 64,
    freeze: bool = False,
    multiple: int = 64,
    seed: int = 0,
) -> MultimodalProcessor:
    """Give a language model ids for the codes of one or more VQ tokenizers, in place, and return the processor that knows them.

    The rows of the tokenizer's ids keep every bit. New ids stand behind the last id of the tokenizer; spare rows that the model has
    there are used. A new row is

    - "mean": the mean of the old rows, with a little noise, so that at first no code is likelier than another;
    - "codebook": the mean of the old rows, plus the code's vector, projected at random (fixed by `seed`) and scaled to the old rows'
      spread along each axis. Codes that mean nearly the same begin with nearly the same row. Begin, end, row and size tokens are as in
      "mean".

    The head is treated like the embedding, if it is not the same table.

    Args:
        tokenizer: any fast tokenizer of transformers; it gets the names of the new ids as special tokens.
        model: any causal language model of transformers, not yet sharded, quantized, or adapted.
        vq_tokenizers: one, or several by the name of their modality; one alone is named after its medium, "image" or "audio".
        init: "codebook" or "mean".
        max_grid: the largest extent of the coarsest grid that can be announced, one number for all or one for each name.
        freeze: keep the old rows as they are while training (see `freeze_old_rows`).
        multiple: the rows of the model are padded to a multiple of this.
        seed: of noise and projection.

    Returns:
        The processor; save it beside the model.

    Raises:
        ValueError: it was extended before; the ids would clash; the model has fewer rows than the tokenizer ids; its weights are
            sharded or quantized; an unknown `init`. Nothing was changed then.
        TypeError: a tokenizer that is not fast.
    """
    vocabulary, vqs = _vocabulary(tokenizer, vq_tokenizers, max_grid, multiple)
    if init not in INITS:
        raise ValueError(
            f"init must be one of {', '.join(INITS)}, got {init!r}: 'codebook' begins with the codebooks' vectors"
        )
    _check_text(tokenizer, vocabulary)
    _check_model(model, vocabulary)
    if freeze and not all(parameter.requires_grad for parameter in vocabulary_parameters(model)):
        raise ValueError("freeze keeps old rows while new ones learn, and this model's embedding does not learn at all")
    vectors = dict(_code_vectors(vocabulary, vqs)) if init == "codebook" else {}
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in vocabulary.names()])
    processor = MultimodalProcessor(tokenizer, vqs, vocabulary)
    _grow(model, vocabulary, vectors, seed)
    if freeze:
        freeze_old_rows(model, vocabulary.text_size)
    return processor


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    vq_tokenizers: VQTokenizer | Mapping[str, VQTokenizer],
    max_grid: int | Mapping[str, int],
    multiple: int,
) -> tuple[MultimodalVocabulary, dict[str, VQTokenizer]]:
    vqs = {vq_tokenizers.modality: vq_tokenizers} if isinstance(vq_tokenizers, VQTokenizer) else dict(vq_tokenizers)
    grids = dict(max_grid) if isinstance(max_grid, Mapping) else dict.fromkeys(vqs, max_grid)
    if set(grids) != set(vqs):
        raise ValueError(
            f"max_grid is given for {sorted(grids)}, the modalities are {sorted(vqs)}: name each, or give one number"
        )
    modalities = [Modality(name, vq.layout, grids[name], vq.fingerprint) for name, vq in vqs.items()]
    return MultimodalVocabulary(len(tokenizer), tuple(modalities), multiple), vqs


def _check_text(tokenizer: PreTrainedTokenizerBase, vocabulary: MultimodalVocabulary) -> None:
    """Refuse a tokenizer that would not give the new tokens the ids behind its last one."""
    if not tokenizer.is_fast:
        raise TypeError(
            f"{type(tokenizer).__name__} is no fast tokenizer: load it with AutoTokenizer, which takes the fast one"
        )
    ids = tokenizer.get_vocab()
    if before := next((match for name in ids if (match := _EXTENDED.fullmatch(name))), None):
        raise ValueError(
            f"this tokenizer was extended before: {before[0]!r} is id {ids[before[0]]}. Load its processor with "
            "MultimodalProcessor.from_pretrained; or begin from the original tokenizer and name all modalities in one call"
        )
    if taken := next((name for name in vocabulary.names() if name in ids), None):
        raise ValueError(
            f"ids would clash: this tokenizer has a token {taken!r} of its own, id {ids[taken]}: give the modality another name"
        )
    last = max(ids, key=ids.__getitem__)
    if ids[last] >= len(tokenizer):
        raise ValueError(
            f"ids would clash: this tokenizer has {len(tokenizer)} tokens, but {last!r} is id {ids[last]}, so that a new token would not "
            "get the id behind the last one: add tokens for the ids that are left out"
        )


def _check_model(model: PreTrainedModel, vocabulary: MultimodalVocabulary) -> None:
    if getattr(model.config, "vqtok_vocabulary", None) is not None:
        raise ValueError(
            "this model was extended before (its config has a vqtok_vocabulary): load its processor with "
            "MultimodalProcessor.from_pretrained, or begin from the original model"
        )
    for parameter in vocabulary_parameters(model):
        whole = type(parameter.data) is Tensor and not parameter.is_meta and parameter.is_floating_point()
        if not whole or not parameter.numel():
            raise ValueError(
                f"the embedding or the head of this model is a {type(parameter.data).__name__} of {parameter.dtype} on "
                f"{parameter.device}: extend it before it is sharded (FSDP, ZeRO-3) or quantized, with its weights in memory"
            )
        if len(parameter) < vocabulary.text_size:
            raise ValueError(
                f"the tokenizer has {vocabulary.text_size} ids, the model {len(parameter)} rows: they do not belong together, or the "
                "tokenizer got tokens that the model never heard of; call model.resize_token_embeddings(len(tokenizer)) first"
            )


def _code_vectors(
    vocabulary: MultimodalVocabulary, vqs: Mapping[str, VQTokenizer]
) -> Iterator[tuple[tuple[str, int, int], Tensor]]:
    """Those of `code_vectors` for each (modality, level, codebook or factor)."""
    for name, vq in vqs.items():
        for stream, points in code_vectors(vocabulary.block(name), vq.model):
            yield (name, *stream), points


@torch.no_grad()
def _grow(
    model: PreTrainedModel, vocabulary: MultimodalVocabulary, vectors: Mapping[tuple[str, int, int], Tensor], seed: int
) -> None:
    """Resize the model, write the new rows, and note the vocabulary in its config."""
    first = vocabulary.text_size
    old = [parameter[:first].clone() for parameter in vocabulary_parameters(model)]
    rows = max(len(model.get_input_embeddings().weight), vocabulary.padded_size)
    model.resize_token_embeddings(rows, mean_resizing=False)
    for parameter, before in zip(vocabulary_parameters(model), old, strict=True):
        generator = torch.Generator().manual_seed(seed)
        if parameter.ndim == 1:  # the head's bias
            parameter[first:] = before.float().mean()
        else:
            parameter[first:] = _new_rows(before.float(), len(parameter) - first, vocabulary, vectors, generator).to(
                parameter
            )
        if not torch.equal(parameter[:first], before):
            raise RuntimeError(f"{type(model).__name__}.resize_token_embeddings changed rows that were there")
    model.config.vqtok_vocabulary = vocabulary.to_dict()


def _new_rows(
    old: Tensor,
    count: int,
    vocabulary: MultimodalVocabulary,
    vectors: Mapping[tuple[str, int, int], Tensor],
    generator: torch.Generator,
) -> Tensor:
    mean, spread = old.mean(0), old.std(0)
    rows = mean + NOISE * spread * torch.randn(count, old.shape[1], generator=generator).to(old)
    for (name, level, codebook), points in vectors.items():
        start = vocabulary.block(name).offset(level, codebook) - vocabulary.text_size
        rows[start : start + len(points)] += spread * projected(points, old.shape[1], generator).to(old)
    return rows
