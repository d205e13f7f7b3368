"""The start of a codebook from the latents of all processes: the centroids of Lloyd's algorithm, or the commonest rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .collective import from_first, gather_rows, process_rank
from .search import nearest_code


@torch.no_grad()
def joint_k_means(z_ND: Tensor, num_clusters: int, iterations: int = 10) -> Tensor:
    """The centroids `(K, D)` of the rows of all processes: gathered, clustered by process 0, broadcast to all.

    Raises:
        ValueError: there are no rows on any process, or some are not finite.
    """
    return _by_first(z_ND, num_clusters, lambda pool: k_means(pool, num_clusters, iterations))


def joint_commonest(z_ND: Tensor, number: int) -> Tensor:
    """The same with the `commonest` rows."""
    return _by_first(z_ND, number, lambda pool: commonest(pool, number))


def _by_first(z_ND: Tensor, number: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
    pool = joint_rows(z_ND)
    rows = pool.new_zeros(number, pool.shape[1])
    if process_rank() == 0:
        rows.copy_(choose(pool))
    return from_first(rows)


def joint_rows(z_ND: Tensor) -> Tensor:
    """The rows of all processes in fp32.

    Raises:
        ValueError: there are none on any process, or some are not finite.
    """
    pool = gather_rows(z_ND.float())
    # By every process, not only by the one that goes on: an error there alone would leave the others waiting for ever.
    _check_rows(pool)
    return pool


@torch.no_grad()
def k_means(z_ND: Tensor, num_clusters: int, iterations: int = 10, seed: int = 0) -> Tensor:
    """Return the centroids `(K, D)` of Lloyd's algorithm, started from distinct rows; deterministic for equal input.

    An empty cluster takes the row that is worst represented. With fewer distinct rows than clusters, the rest of the table
    is filled with slightly displaced copies, with a warning.

    Raises:
        ValueError: there are no rows, or some are not finite.
    """
    _check_rows(z_ND)
    generator = torch.Generator().manual_seed(seed)
    distinct_MD = torch.unique(z_ND, dim=0)
    if len(distinct_MD) < num_clusters:
        warnings.warn(
            f"only {len(distinct_MD)} distinct latents for {num_clusters} codes: give init_codebooks more batches",
            stacklevel=3,
        )
        repeats = torch.arange(num_clusters, device=z_ND.device) % len(distinct_MD)
        noise = torch.randn(num_clusters, z_ND.shape[1], generator=generator).to(z_ND)
        noise[: len(distinct_MD)] = 0
        return distinct_MD[repeats] + 1e-3 * z_ND.std().nan_to_num(0).clamp_min(1e-6) * noise
    chosen = torch.randperm(len(distinct_MD), generator=generator)[:num_clusters].to(z_ND.device)
    centroids_KD = distinct_MD[chosen].clone()
    for _ in range(iterations):
        codes_N = nearest_code(z_ND, centroids_KD)
        counts_K = torch.bincount(codes_N, minlength=num_clusters)
        residuals_ND = z_ND - centroids_KD[codes_N]
        step_KD = torch.zeros_like(centroids_KD).index_add_(0, codes_N, residuals_ND)
        centroids_KD = centroids_KD + step_KD / counts_K.clamp_min(1)[:, None]
        empty = (counts_K == 0).nonzero()[:, 0]
        if len(empty):
            worst = residuals_ND.square().sum(1).topk(len(empty)).indices
            centroids_KD[empty] = z_ND[worst]
    return centroids_KD


def commonest(z_ND: Tensor, number: int) -> Tensor:
    """The `number` rows that occur most often, the commonest first and of equally common ones that which came first.

    Where there are not so many, the table is what `k_means` makes of those there are.

    Rows that differ by less than a thousandth of the largest number count as one: a convolution rounds differently here and there.

    Raises:
        ValueError: there are no rows, or some are not finite.
    """
    _check_rows(z_ND)
    _, cell_N, counts_M = torch.unique(_cells(z_ND), return_inverse=True, return_counts=True)
    numbers_N = torch.arange(len(z_ND), device=z_ND.device)
    first_M = torch.full_like(counts_M, len(z_ND)).scatter_reduce_(0, cell_N, numbers_N, "amin")
    order = first_M.argsort()
    order = order[counts_M[order].argsort(descending=True, stable=True)][:number]
    rows = z_ND[first_M[order]]
    return rows if len(counts_M) >= number else k_means(rows, number)


def _cells(z_ND: Tensor) -> Tensor:
    """A number `(N,)` of each row, equal for rows that count as one: a sum with random weights, as sorting whole rows takes far longer."""
    low, high = z_ND.aminmax()
    scale = 1024 / torch.maximum(-low, high).clamp_min(1e-20)
    generator = torch.Generator().manual_seed(0)
    weights_D = torch.randint(-(1 << 62), 1 << 62, (z_ND.shape[1],), generator=generator).to(z_ND.device)
    # int64 wraps around, so that two of a million different rows share a number once in ten million such tables.
    return torch.cat([((some * scale).round().long() * weights_D).sum(1) for some in z_ND.split(1 << 16)])


def _check_rows(rows: Tensor) -> None:
    if not len(rows):
        raise ValueError("k-means needs at least one latent: give init_codebooks at least one batch")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(
            "the latents to initialise from hold NaN or infinite values: look for bad input or diverged weights"
        )
