"""The maths of codebooks, once, pure: nearest code, straight-through gradient, usage.

Axis letters: N flattened positions, K codebook entries, D code dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Rows per block are chosen so that a block of scores stays about this large whatever N and K are. A processor likes what
# stays in its cache; on an accelerator small blocks would leave it waiting for Python.
_BLOCK_BYTES = 8 << 20
_BLOCK_BYTES_ELSEWHERE = 256 << 20


@torch.no_grad()
def nearest_code(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Return, for every row of `z_ND`, the index of the row of `codebook_KD` at the least squared distance.

        argmin_k |z - e_k|^2 = argmin_k |e_k|^2 / 2 - z . e_k          (van den Oord et al. 2017, eq. 1)

    Each row is decided alone: in fp32 around the codebook's mean (so that a large common offset costs no digits), and
    wherever rounding could have decided, again in float64 from the differences themselves. The lowest index wins ties.
    Autocast and TF32 never apply. Extra memory is a few blocks of 8 MiB (256 MiB on an accelerator), whatever N and K.

    Args:
        z_ND: float, any dtype; computed in fp32.
        codebook_KD: float32.

    Returns:
        codes_N, int64 in [0, K).

    Raises:
        ValueError: shapes that do not fit, or latents that are not finite.
    """
    if z_ND.ndim != 2 or codebook_KD.ndim != 2 or z_ND.shape[1] != codebook_KD.shape[1] or not len(codebook_KD):
        raise ValueError(
            f"nearest_code needs latents (N, D) and a codebook (K, D) of one D, got {tuple(z_ND.shape)} and "
            f"{tuple(codebook_KD.shape)}"
        )
    with full_precision(z_ND.device.type):
        table_KD = codebook_KD.float()
        mean_D = table_KD.mean(0)
        centred_KD = table_KD - mean_D
        half_K = centred_KD.square().sum(1) / 2
        block_bytes = _BLOCK_BYTES if z_ND.device.type == "cpu" else _BLOCK_BYTES_ELSEWHERE
        rows = max(1, block_bytes // (4 * len(table_KD)))
        blocks = [
            _nearest_in_block(block_nD.float(), mean_D, centred_KD, half_K, table_KD) for block_nD in z_ND.split(rows)
        ]
        return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64, device=z_ND.device)


def _nearest_in_block(z_nD: Tensor, mean_D: Tensor, centred_KD: Tensor, half_K: Tensor, table_KD: Tensor) -> Tensor:
    y_nD = z_nD - mean_D
    scores_nK = torch.addmm(half_K, y_nD, centred_KD.T, alpha=-1)
    best_n, codes_n = scores_nK.min(1)
    if not bool(torch.isfinite(best_n).all()):
        raise ValueError(
            "latents hold NaN or infinite values: look for a diverged training (lower the learning rate) or bad input"
        )
    # Bound on the rounding of a score: D products accumulated in fp32, the centring of both sides (a difference is rounded
    # in proportion to itself, so the size of the mean is not in the bound), and |e|^2 / 2. The last
    # term is for products so small that fp32 underflows, where rounding is absolute instead of relative.
    info = torch.finfo(torch.float32)
    reach = centred_KD.norm(dim=1).max()
    spread_n = y_nD.norm(dim=1) + reach
    slack_n = 2 * info.eps * math.sqrt(z_nD.shape[1] + 4) * 4 * spread_n * reach + info.tiny
    close_nK = scores_nK <= (best_n + slack_n)[:, None]
    doubtful = close_nK.sum(1) > 1
    if bool(doubtful.any()):
        rows = doubtful.nonzero()[:, 0]
        codes_n[rows] = _decide_in_float64(z_nD[rows], table_KD, close_nK[rows])
    return codes_n


def _decide_in_float64(z_mD: Tensor, table_KD: Tensor, candidates_mK: Tensor) -> Tensor:
    """The nearest candidate of every row by float64 differences; the lowest index wins exact ties."""
    row, code = candidates_mK.nonzero(as_tuple=True)
    # A row may be close to all K (a codebook of equal rows): the differences of all pairs at once would be large.
    pairs = max(1, _BLOCK_BYTES // (8 * max(1, table_KD.shape[1])))
    distances = [
        (z_mD[some_rows].double() - table_KD[some_codes].double()).square().sum(1)
        for some_rows, some_codes in zip(row.split(pairs), code.split(pairs), strict=True)
    ]
    dense_mK = torch.full(candidates_mK.shape, math.inf, dtype=torch.float64, device=z_mD.device)
    dense_mK[row, code] = torch.cat(distances)
    return dense_mK.argmin(1)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Run fp32 as fp32: without autocast and without TF32 or bf16 shortcuts, so that codes do not depend on the caller's settings."""
    known: Any = torch.backends  # its settings are attributes that a type checker does not see
    backends = (known.cuda.matmul, known.cudnn.conv, known.mkldnn.matmul, known.mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """Return the values of `quantized` with the gradient of the identity to `z` (van den Oord et al. 2017, section 3.2).

    The codebook gets no gradient through it. For use in training only: in eval the table row itself is passed on, because
    z + (q - z) differs from q by rounding.
    """
    return z + (quantized - z).detach()


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs: int64 `(K,)`."""
    return torch.bincount(codes.reshape(-1), minlength=codebook_size)


def usage(counts_K: Tensor) -> float:
    """The share of the codebook that was hit at least once, in [0, 1]."""
    return float((counts_K > 0).double().mean())


def entropy_bits(counts_K: Tensor) -> float:
    """Entropy of the histogram in bits, in [0, log2 K]; 0 for an empty one."""
    total = counts_K.sum()
    if not total:
        return 0.0
    p_K = counts_K.double() / total
    return float(-(p_K * torch.where(p_K > 0, p_K, 1).log2()).sum())


def perplexity(counts_K: Tensor) -> float:
    """exp of the entropy in nats, in [1, K]: the size of a codebook in uniform use that carries as much."""
    return 2 ** entropy_bits(counts_K)
