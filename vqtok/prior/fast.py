"""One token after another through a backbone: any of transformers with its cache, the default one by a path of our own.

The path of our own has the weights of a Llama of transformers, without what generality costs. Between two codes a transformer
does little work, so what is around the matrix products counts: module calls, growing caches, masks made anew. Here the
projections of a layer that read the same input are one product, the cache has its final size from the start, and the rest
are a dozen calls per layer. The numbers are those of the backbone's own forward, to rounding.

Axis letters: B batch, T tokens of this pass, S cached tokens, H heads, G key/value heads, E width of a head, M width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

_MAX_PACKED = 1 << 28  # weights of a larger model are not copied


class _Layer(NamedTuple):
    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: nn.Linear
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: nn.Linear


class Decoder(Protocol):
    """Hidden states `(B, T, M)` of the next tokens from their input vectors.

    `mask_BS` is false for padding among the tokens so far, or None. Each token sees the tokens before it and itself; with `causal`
    False the tokens of this pass see each other and all that came before.
    """

    def __call__(self, x_BTM: Tensor, mask_BS: Tensor | None, causal: bool = True) -> Tensor: ...

    def restart(self, seen: int = 0) -> None:
        """Forget all tokens but the first `seen`."""


def decoder_for(backbone: nn.Module, batch: int, length: int, start: int) -> Decoder:
    """A decoder for one batch of sequences of `length` tokens in all, the first of which stand at the position `start`."""
    if has_fast_path(backbone):
        return FastDecoder(backbone, batch, length, start)
    return CachedDecoder(backbone, start)


class CachedDecoder:
    """Any backbone of transformers, with its growing cache. (A static one attends to all of its length at every step.)"""

    def __init__(self, backbone: Any, start: int):
        self.backbone, self.start, self.position = backbone, start, start
        self.cache = DynamicCache(config=backbone.config)

    def restart(self, seen: int = 0) -> None:
        """Forget all tokens but the first `seen`."""
        if seen == 0:
            self.cache = DynamicCache(config=self.backbone.config)
        elif (too_many := self.position - self.start - seen) > 0:
            self.cache.crop(-too_many)
        self.position = self.start + seen

    def __call__(self, x_BTM: Tensor, mask_BS: Tensor | None, causal: bool = True) -> Tensor:
        batch, length, _ = x_BTM.shape
        first, self.position = self.position, self.position + length
        mask = None if mask_BS is None else mask_BS.long()
        if not causal and length > 1:  # four axes: what transformers takes as it is, to be added to the scores
            seen = self.cache.get_seq_length() + length
            mask = x_BTM.new_zeros(batch, 1, length, seen)
            if mask_BS is not None:
                mask = mask.masked_fill(~mask_BS[:, None, None, :seen], torch.finfo(x_BTM.dtype).min)
        hidden: Tensor = self.backbone(
            inputs_embeds=x_BTM,
            attention_mask=mask,
            position_ids=torch.arange(first, self.position, device=x_BTM.device)[None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden


def has_fast_path(backbone: nn.Module) -> bool:
    """Whether `FastDecoder` knows this backbone: a Llama of transformers, unquantized, without adapters, of moderate size."""
    if getattr(backbone.config, "model_type", None) != "llama" or type(backbone).__name__ != "LlamaModel":
        return False
    plain = all(
        type(module) is nn.Linear
        for name, module in backbone.named_modules()
        if name.rpartition(".")[2].endswith("_proj")
    )
    return plain and sum(p.numel() for p in backbone.parameters()) <= _MAX_PACKED


class FastDecoder:
    """The backbone for one batch of sequences, token after token.

    Made for one call and thrown away, so that it cannot miss a change of the weights.

    Args:
        backbone: a model that `has_fast_path`.
        batch: B.
        length: tokens in all; the cache's size.
        start: position of the first token.
    """

    def __init__(self, backbone: Any, batch: int, length: int, start: int):
        config = backbone.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.act, self.norm = config.rms_norm_eps, backbone.layers[0].mlp.act_fn, backbone.norm.weight
        weight = backbone.norm.weight
        positions = torch.arange(start, start + length, device=weight.device)[None]
        cos, sin = backbone.rotary_emb(weight.new_zeros(1, length, 1), positions)  # (1, length, E)
        # x * cos + rotated(x) * sin, where rotated(x) = (-second half, first half): the sign goes into sin.
        sign = torch.cat([-torch.ones(self.width // 2), torch.ones(self.width // 2)]).to(sin)
        self.cos, self.sin = cos[0, :, None], (sin[0] * sign)[:, None]
        shape = (len(backbone.layers), 2, batch, self.groups, length, self.width)
        self.cache = weight.new_empty(shape)
        self.seen = 0
        self.layers = [_packed(layer) for layer in backbone.layers]

    def restart(self, seen: int = 0) -> None:
        """Forget all tokens but the first `seen`; the cache is written over."""
        self.seen = seen

    def __call__(self, x_BTM: Tensor, mask_BS: Tensor | None, causal: bool = True) -> Tensor:
        """Hidden states `(B, T, M)` of the next tokens, given their input vectors.

        Args:
            mask_BS: false for padding among the tokens so far, these included; None if nothing is padding.
            causal: whether a token of this pass sees only those before it and itself; False lets all of this pass see each other.
        """
        batch, length, _ = x_BTM.shape
        first, last = self.seen, self.seen + length
        self.seen = last
        cos, sin = self.cos[first:last], self.sin[first:last]
        bias = None
        if mask_BS is not None or (causal and length > 1):
            allowed = torch.ones(length, last, dtype=torch.bool, device=x_BTM.device)[None, None]
            allowed = allowed.tril(first) if causal else allowed
            bias = allowed if mask_BS is None else allowed & mask_BS[:, None, None, :last]
            # A row of padding alone attends to itself, as no softmax can be over nothing; nobody reads what comes out.
            bias = bias | torch.eye(length, last, dtype=torch.bool, device=x_BTM.device).roll(first, 1)
        for index, layer in enumerate(self.layers):
            h_BTM = F.rms_norm(x_BTM, (x_BTM.shape[-1],), layer.norm, self.eps)
            qkv = F.linear(h_BTM, layer.qkv, layer.qkv_bias).view(batch, length, -1, self.width)
            rotated = qkv[:, :, : self.heads + self.groups]
            swapped = rotated.roll(self.width // 2, -1)
            rotated = torch.addcmul(rotated * cos, swapped, sin)
            keys, values = self.cache[index, 0, :, :, :last], self.cache[index, 1, :, :, :last]
            keys[:, :, first:] = rotated[:, :, self.heads :].transpose(1, 2)
            values[:, :, first:] = qkv[:, :, self.heads + self.groups :].transpose(1, 2)
            mixed = F.scaled_dot_product_attention(
                rotated[:, :, : self.heads].transpose(1, 2), keys, values, bias, enable_gqa=self.groups != self.heads
            )
            mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
            x_BTM = x_BTM + layer.out(mixed)
            h_BTM = F.rms_norm(x_BTM, (x_BTM.shape[-1],), layer.mlp_norm, self.eps)
            gate, up = F.linear(h_BTM, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x_BTM = x_BTM + layer.down(self.act(gate) * up)
        return F.rms_norm(x_BTM, (x_BTM.shape[-1],), self.norm, self.eps)


def _packed(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    return _Layer(
        layer.input_layernorm.weight,
        torch.cat([each.weight for each in qkv]),
        None if attention.q_proj.bias is None else torch.cat([each.bias for each in qkv]),
        attention.o_proj,
        layer.post_attention_layernorm.weight,
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        None if mlp.gate_proj.bias is None else torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias]),
        mlp.down_proj,
    )
