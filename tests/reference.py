"""Slow, obvious versions in float64 and plain Python that the fast code is compared with. Nothing here imports vqtok."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def squared_distances(z: Tensor, table: Tensor) -> np.ndarray:
    """|z_n - e_k|^2 by differences: `(N, K)`."""
    z64, table64 = z.detach().double().numpy(), table.detach().double().numpy()
    return np.array([[((row - code) ** 2).sum() for code in table64] for row in z64]).reshape(len(z64), len(table64))


def nearest_code(z: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest row; numpy's argmin takes the lowest of equal ones."""
    return torch.from_numpy(squared_distances(z, table).argmin(1)).long()


def ema_step(table: Tensor, counts: Tensor, z: Tensor, codes: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Table and counts after van den Oord et al. 2017, appendix A.1, equations 6 to 8, code by code.

    N_i <- decay N_i + (1 - decay) n_i,   m_i <- decay m_i + (1 - decay) sum_j z_ij,   e_i <- m_i / N_i
    """
    table, counts, z = table.double().clone(), counts.double().clone(), z.double()
    for k in range(len(table)):
        mine = [row for row, code in zip(z, codes.tolist(), strict=True) if code == k]
        mass = decay * counts[k] * table[k] + (1 - decay) * sum(mine, torch.zeros_like(table[k]))
        counts[k] = decay * counts[k] + (1 - decay) * len(mine)
        table[k] = mass / counts[k]
    return table, counts


def k_means_step(z: Tensor, centroids: Tensor) -> Tensor:
    """Every centroid at the mean of the rows nearest to it; one without rows stays."""
    codes = nearest_code(z, centroids)
    z, new = z.double(), centroids.double().clone()
    for k in range(len(new)):
        if (codes == k).any():
            new[k] = z[codes == k].mean(0)
    return new


def pack_bits(values: Sequence[int], bits: int) -> bytes:
    """The values as a string of zeros and ones, filled up to whole bytes."""
    text = "".join(f"{value:0{bits}b}" for value in values) if bits else ""
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def entropy_bits(counts: Sequence[int]) -> float:
    """-sum p log2 p over the codes that occur."""
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n)


def is_near_tie(z: Tensor, first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether moving `z` by at most `tolerance` can change which of two codes is nearer: their distances differ by twice that."""
    distances = [float((z.double() - code.double()).norm()) for code in (first, second)]
    return abs(distances[0] - distances[1]) <= 2 * tolerance
