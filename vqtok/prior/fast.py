"""One token after another through a backbone: any of transformers with its cache, the default one by a path of our own.

The path of our own has the weights of a Llama of transformers, without what generality costs. Between two codes a transformer
does little work, so what is around the matrix products counts: module calls, growing caches, masks made anew. Here the weights are
laid out for few rows (`products.py`), what is constant around a product is folded into its weights, the cache has its final
size from the start, and what lies between the products stays in 32 bits. The numbers are those of the backbone's own forward,
to rounding.

Axis letters: B batch, T tokens of this pass, N = B T, n of them that are chosen, S cached tokens, H heads, G key/value heads,
X = B G, h = H / G queries of a group, E width of a head, M width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from .products import Product, product

_MAX_PACKED = 1 << 28  # weights of a larger model are not copied


class _Layer(NamedTuple):
    qkv: Product
    out: Product
    gate: Product
    up: Product
    down: Product


class Decoder(Protocol):
    """Hidden states `(B, T, M)` of the next tokens from their input vectors.

    `mask_BS` is false for padding among the tokens so far, or None. Each token sees the tokens before it and itself; with `causal`
    False the tokens of this pass see each other and all that came before. With `at_Bn`, places among the tokens of this pass, only their
    states are wanted: `(B, n, M)`.
    """

    def __call__(
        self, x_BTM: Tensor, mask_BS: Tensor | None, causal: bool = True, at_Bn: Tensor | None = None
    ) -> Tensor: ...

    def restart(self, seen: int = 0) -> None:
        """Forget all tokens but the first `seen`."""


def decoder_for(backbone: nn.Module, batch: int, length: int, start: int, per_pass: int = 1) -> Decoder:
    """A decoder for one batch of sequences of `length` tokens in all, the first of which stand at the position `start`.

    Args:
        per_pass: tokens of a sequence in most passes; changes speed only.
    """
    if has_fast_path(backbone):
        return FastDecoder(backbone, batch, length, start, per_pass)
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

    def __call__(
        self, x_BTM: Tensor, mask_BS: Tensor | None, causal: bool = True, at_Bn: Tensor | None = None
    ) -> Tensor:
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
        return hidden if at_Bn is None else _chosen(hidden, at_Bn)


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
        per_pass: tokens of a sequence in most passes.
    """

    def __init__(self, backbone: Any, batch: int, length: int, start: int, per_pass: int = 1):
        config, weight = backbone.config, backbone.norm.weight
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.act, self.norm, self.dtype = backbone.layers[0].mlp.act_fn, weight, weight.dtype
        # Products may be in 16 bits; what lies between them is little work and stays in 32, where sums and softmax belong.
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.eps = torch.tensor(config.rms_norm_eps, dtype=self.wide, device=weight.device)
        positions = torch.arange(start, start + length, device=weight.device)[None]
        cos, sin = backbone.rotary_emb(self.eps.new_zeros(1, length, 1), positions)  # (1, length, E), both halves alike
        turn = torch.complex(cos[0, :, None, : self.width // 2], sin[0, :, None, : self.width // 2])
        # Queries and keys turn, values stay: one product of complex numbers for all.
        turns = [turn.expand(-1, self.heads + self.groups, -1), torch.ones_like(turn).expand(-1, self.groups, -1)]
        self.turn = torch.cat(turns, 1)  # (length, H + 2G, E / 2)
        kept = self.dtype if weight.is_cuda else self.wide  # a CPU attends faster in 32 bits
        shape = (len(backbone.layers), batch * self.groups, length, self.width)
        self.keys, self.values = weight.new_empty(shape, dtype=kept), weight.new_empty(shape, dtype=kept)
        self.seen = 0
        self.layers = [_packed(layer, self.width, batch, per_pass) for layer in backbone.layers]

    def restart(self, seen: int = 0) -> None:
        """Forget all tokens but the first `seen`; the cache is written over."""
        self.seen = seen

    def __call__(
        self, x_BTM: Tensor, mask_BS: Tensor | None, causal: bool = True, at_Bn: Tensor | None = None
    ) -> Tensor:
        """Hidden states `(B, T, M)` of the next tokens, given their input vectors; autocast changes nothing.

        Args:
            mask_BS: false for padding among the tokens so far, these included; None if nothing is padding.
            causal: whether a token of this pass sees only those before it and itself; False lets all of this pass see each other.
            at_Bn: int64, the places among the tokens of this pass whose states are wanted, `(B, n, M)`; None wants all.
        """
        with torch.autocast(x_BTM.device.type, enabled=False):
            return self._pass(x_BTM, mask_BS, causal, at_Bn)

    def _pass(self, x_BTM: Tensor, mask_BS: Tensor | None, causal: bool, at_Bn: Tensor | None) -> Tensor:
        batch, length, width = x_BTM.shape
        first, last = self.seen, self.seen + length
        self.seen = last
        bias = _allowed(x_BTM, first, mask_BS, causal)
        turn = self.turn[first:last]
        keys, values = self.keys[:, :, :last].unbind(0), self.values[:, :, :last].unbind(0)
        x_NM = x_BTM.reshape(-1, width).to(self.wide)
        for layer, k_XSE, v_XSE in zip(self.layers, keys, values, strict=True):
            qkv = layer.qkv(self._normed(x_NM)).view(batch, length, -1, self.width // 2, 2)
            qkv = torch.view_as_real(torch.view_as_complex(qkv) * turn).flatten(3)
            q_BTHE, k_BTGE, v_BTGE = qkv.split([self.heads, self.groups, self.groups], 2)
            k_XSE[:, first:].unflatten(0, (batch, -1)).copy_(k_BTGE.transpose(1, 2))
            v_XSE[:, first:].unflatten(0, (batch, -1)).copy_(v_BTGE.transpose(1, 2))
            if at_Bn is not None and layer is self.layers[-1]:  # what the other places would say, nobody reads
                q_BTHE, x_NM = _chosen(q_BTHE, at_Bn), _chosen(x_NM.view(batch, length, width), at_Bn).flatten(0, 1)
                bias = None if bias is None else _chosen(bias[:, 0].expand(batch, -1, -1), at_Bn)[:, None]
            mixed = self._attend(q_BTHE, k_XSE, v_XSE, bias)
            x_NM = layer.out(mixed, x_NM)
            h_NM = self._normed(x_NM)
            x_NM = layer.down(self.act(layer.gate(h_NM)).mul_(layer.up(h_NM)), x_NM)
        return (self._normed(x_NM) * self.norm).to(self.dtype).view(batch, -1, width)

    def _attend(self, q_BTHE: Tensor, k_XSE: Tensor, v_XSE: Tensor, bias: Tensor | None) -> Tensor:
        """What the queries read from the cache, `(N, H E)`; the weights of the queries hold the scale."""
        batch, length = q_BTHE.shape[:2]
        if length > 1:
            k_BGSE, v_BGSE = (each.unflatten(0, (batch, -1)) for each in (k_XSE, v_XSE))
            q_BHTE, grouped = q_BTHE.transpose(1, 2).to(k_XSE.dtype), self.groups != self.heads
            mixed = F.scaled_dot_product_attention(q_BHTE, k_BGSE, v_BGSE, bias, scale=1.0, enable_gqa=grouped)
            return mixed.transpose(1, 2).reshape(batch * length, -1).to(self.wide)
        # One query per head: two products are quicker than the fused attention, which is made for many. With the keys on the left
        # memory is read in order, which counts where the cache is larger than that of the processor.
        q_XhE = q_BTHE.reshape(len(k_XSE), -1, self.width).to(k_XSE.dtype)
        scores = torch.bmm(k_XSE, q_XhE.transpose(1, 2)).transpose(1, 2)
        if bias is not None:
            scores = scores.unflatten(0, (batch, -1)).masked_fill(~bias, -torch.inf).flatten(0, 1)
        shares = scores.softmax(-1, dtype=self.wide).to(v_XSE.dtype)
        return torch.bmm(shares, v_XSE).reshape(batch, -1).to(self.wide)

    def _normed(self, x_NM: Tensor) -> Tensor:
        """x / sqrt(mean of squares + eps); the learned factors are in the weights of the next product."""
        norm_N1 = torch.linalg.vector_norm(x_NM, 2, -1, True)
        return x_NM * torch.addcmul(self.eps, norm_N1, norm_N1, value=1 / x_NM.shape[1]).rsqrt_()


def _chosen(x_BT: Tensor, at_Bn: Tensor) -> Tensor:
    """These places `(B, n, *)` of `(B, T, *)`."""
    return x_BT[torch.arange(len(at_Bn), device=at_Bn.device)[:, None], at_Bn]


def _allowed(x_BTM: Tensor, first: int, mask_BS: Tensor | None, causal: bool) -> Tensor | None:
    """What the tokens of this pass see, bool `(B or 1, 1, T, S)`; None if each sees all."""
    length, last = x_BTM.shape[1], first + x_BTM.shape[1]
    if mask_BS is None and (length == 1 or not causal):
        return None
    seen = torch.ones(length, last, dtype=torch.bool, device=x_BTM.device)[None, None]
    seen = seen.tril(first) if causal else seen
    seen = seen if mask_BS is None else seen & mask_BS[:, None, None, :last]
    # A row of padding alone attends to itself, as no softmax can be over nothing; nobody reads what comes out.
    return seen | torch.eye(length, last, dtype=torch.bool, device=x_BTM.device).roll(first, 1)


def _packed(layer: Any, width: int, batch: int, per_pass: int) -> _Layer:
    """The products of a layer, with what is constant around them in their weights: norms' factors, the scale of the softmax."""
    attention, mlp = layer.self_attn, layer.mlp
    dtype = layer.input_layernorm.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    norm, mlp_norm = layer.input_layernorm.weight.to(wide), layer.post_attention_layernorm.weight.to(wide)

    def paired(value: Tensor) -> Tensor:
        """Number i of a head's first half beside number i of its second: the complex number that the position turns."""
        return value.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)

    def qkv(name: str) -> Tensor | None:
        q, k, v = (getattr(each, name) for each in (attention.q_proj, attention.k_proj, attention.v_proj))
        return (
            None if q is None else torch.cat([paired(q).to(wide) * attention.scaling, paired(k).to(wide), v.to(wide)])
        )

    def made(weight: Tensor, bias: Tensor | None) -> Product:
        return product(weight, bias, dtype, batch * per_pass, per_pass)

    return _Layer(
        made(qkv("weight") * norm, qkv("bias")),
        made(attention.o_proj.weight, attention.o_proj.bias),
        made(mlp.gate_proj.weight * mlp_norm, mlp.gate_proj.bias),
        made(mlp.up_proj.weight * mlp_norm, mlp.up_proj.bias),
        made(mlp.down_proj.weight, mlp.down_proj.bias),
    )
