"""Soft assignments of latents to codes, without a table of all latents times all codes.

Both functions walk over blocks of rows and, going backward, compute each block again: memory is a few blocks, whatever N and K.
All in fp32, under any autocast.

Axis letters: N flattened positions (n in a block), K codebook entries, D code dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .collective import mean_over_processes

_BLOCK_BYTES = 4 << 20


def assignment_entropy(z_ND: Tensor, table_KD: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    """Return how sure single latents are of their code, and how much they use each code together.

        p_n = softmax(z_n . e_k + b_k),   entropy = mean_n H(p_n) in nats (0-dim),   use = mean_n p_n `(K,)`

    (The two terms of the entropy penalty of Yu et al. 2024, MAGVIT-v2, eq. 6.) Gradients flow to all three arguments.
    """
    with torch.autocast(z_ND.device.type, enabled=False):
        entropy, use_K = _AssignmentEntropy.apply(z_ND.float(), table_KD.float(), bias_K.float())
    return entropy, use_K


def entropy_penalty(assignments: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return the penalty that makes single latents sure of their code and uses all codes (Yu et al. 2024, eq. 6), in nats, 0-dim.

        mean_n H(p_n) - H(mean_n p_n), summed over tables

    The mean inside the second term is that of all processes, so that values and gradients are those of the joined batch (with
    gradients averaged over processes, as DDP does; of equal shares). That takes one collective for all tables, the only one in a
    forward pass. A mean over updates in its place would need none, and would be exact under gradient accumulation: but then
    latents that move together away from that mean are rewarded, and they chase it in circles instead of spreading.

    Args:
        assignments: for each table latents `(N, D)`, rows `(K, D)` and biases `(K,)`, as `assignment_entropy` takes them.
    """
    entropies, uses = zip(*(assignment_entropy(*each) for each in assignments), strict=True)
    own = torch.cat(uses)
    joint = own + (mean_over_processes(own.detach().clone()) - own).detach()
    return torch.stack(entropies).sum() + (joint * joint.clamp_min(1e-12).log()).sum()


def index_backpropagation(z_ND: Tensor, table_KD: Tensor, codes_N: Tensor) -> Tensor:
    """Return the rows of `codes_N`, with the gradient of the whole soft assignment (IBQ, Shi et al. 2024, eq. 4 to 6).

        q_n = sum_k (onehot(code_n) + p_n - sg[p_n])_k e_k,   p_n = softmax(z_n . e_k)

    So every code of the table gets a gradient from every latent, and the latents one through p.
    """
    with torch.autocast(z_ND.device.type, enabled=False):
        rows_ND: Tensor = _IndexBackpropagation.apply(z_ND.float(), table_KD.float(), codes_N)
    return rows_ND


def _blocks(num_rows: int, num_codes: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_BYTES // (4 * num_codes))
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


class _AssignmentEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_ND: Tensor, table_KD: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z_ND, table_KD, bias_K)
        entropy, use_K = z_ND.new_zeros(()), torch.zeros_like(bias_K)
        for part in _blocks(len(z_ND), len(table_KD)):
            logp_nK = torch.addmm(bias_K, z_ND[part], table_KD.T).log_softmax(1)
            p_nK = logp_nK.exp()
            use_K += p_nK.sum(0)
            entropy -= logp_nK.mul_(p_nK).sum()
        count = max(1, len(z_ND))
        return entropy / count, use_K / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_entropy, by_use_K = gradients
        z_ND, table_KD, bias_K = ctx.saved_tensors
        dz_ND, dtable_KD, dbias_K = torch.empty_like(z_ND), torch.zeros_like(table_KD), torch.zeros_like(bias_K)
        count = max(1, len(z_ND))
        for part in _blocks(len(z_ND), len(table_KD)):
            logp_nK = torch.addmm(bias_K, z_ND[part], table_KD.T).log_softmax(1)
            p_nK = logp_nK.exp()
            # dH/dlogit_k = -p_k (log p_k + H);   d(use . g)/dlogit_k = p_k (g_k - p . g)
            inner_nK = by_use_K - by_entropy * logp_nK
            dlogits_nK = p_nK * (inner_nK - (p_nK * inner_nK).sum(1, keepdim=True)) / count
            dz_ND[part] = dlogits_nK @ table_KD
            dtable_KD.addmm_(dlogits_nK.T, z_ND[part])
            dbias_K += dlogits_nK.sum(0)
        return dz_ND, dtable_KD, dbias_K


class _IndexBackpropagation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_ND: Tensor, table_KD: Tensor, codes_N: Tensor) -> Tensor:
        ctx.save_for_backward(z_ND, table_KD, codes_N)
        return table_KD[codes_N]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (by_rows_ND,) = gradients
        z_ND, table_KD, codes_N = ctx.saved_tensors
        dz_ND = torch.empty_like(z_ND)
        dtable_KD = torch.zeros_like(table_KD).index_add_(0, codes_N, by_rows_ND)  # through the one-hot rows
        for part in _blocks(len(z_ND), len(table_KD)):
            p_nK = (z_ND[part] @ table_KD.T).softmax(1)
            by_p_nK = by_rows_ND[part] @ table_KD.T
            dlogits_nK = p_nK * (by_p_nK - (p_nK * by_p_nK).sum(1, keepdim=True))
            dz_ND[part] = dlogits_nK @ table_KD
            dtable_KD.addmm_(dlogits_nK.T, z_ND[part])
        return dz_ND, dtable_KD, None
