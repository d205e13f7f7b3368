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


# -- gradients


def rotation_matrix(source: Tensor, target: Tensor) -> Tensor:
    """The `(D, D)` float64 matrix that turns and stretches `source` onto `target` and leaves alone what is across both.

    A turn in the plane of u = source / |source| and the part v of the target across u, in a basis of that plane.
    """
    source, target = source.detach().double(), target.detach().double()
    u, goal = source / source.norm(), target / target.norm()
    across = goal - (goal @ u) * u
    identity = torch.eye(len(u), dtype=torch.float64)
    cosine, sine = float(goal @ u), float(across.norm())
    if sine:
        v = across / sine
        turn = sine * (torch.outer(v, u) - torch.outer(u, v))
        identity = identity + turn + (cosine - 1) * (torch.outer(u, u) + torch.outer(v, v))
    return identity * (target.norm() / source.norm())


def assignment_entropy(z: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """mean_n H(p_n) and mean_n p_n of p_n = softmax(z_n . e_k + b_k), the whole matrix at once, for autograd in float64."""
    p = torch.softmax(z @ table.T + bias, 1)
    return -(p * p.log()).sum(1).mean(), p.mean(0)


def entropy_penalty(logits: Tensor) -> Tensor:
    """mean_n H(p_n) - H(mean_n p_n) in nats (Yu et al. 2024, eq. 6)."""
    p = torch.softmax(logits.double(), 1)
    mean = p.mean(0)
    return -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()


def index_backpropagation(z: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """(onehot(code) + p - sg[p]) @ table with the whole matrix p = softmax(z @ table.T), for autograd in float64."""
    p = torch.softmax(z @ table.T, 1)
    one_hot = torch.nn.functional.one_hot(codes, len(table)).to(z)
    return (one_hot + p - p.detach()) @ table


def in_turn(
    z: Tensor, layers: Sequence[dict[str, Tensor]], codes: Tensor, cosine: bool = False, rotation: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual quantization as DAC trains it: sum of the outputs, mean commitment, mean codebook loss; for autograd.

    Each layer has a `table`, and maybe `w_in`, `b_in`, `w_out`, `b_out`. Gradients pass the residuals.

    Args:
        z: `(N, D)` float64.
        codes: `(N, Q)`, the codes to take.
    """
    residual, total = z, torch.zeros_like(z)
    commitments, codebook_losses = [], []
    for layer, chosen in zip(layers, codes.T, strict=True):
        y = residual @ layer["w_in"].T + layer["b_in"] if "w_in" in layer else residual
        rows = layer["table"][chosen]
        if cosine:
            y, rows = y / y.norm(dim=1, keepdim=True), rows / rows.norm(dim=1, keepdim=True)
        commitments.append((y - rows.detach()).square().mean())
        codebook_losses.append((y.detach() - rows).square().mean())
        passed = y + (rows - y).detach()
        if rotation:
            passed = torch.stack([rotation_matrix(a, b) @ a for a, b in zip(y, rows, strict=True)])
        out = passed @ layer["w_out"].T + layer["b_out"] if "w_out" in layer else passed
        total, residual = total + out, residual - out
    return total, torch.stack(commitments).mean(), torch.stack(codebook_losses).mean()


# -- codes without a table


def fsq_bounded(z: float, levels: int, symmetric: bool) -> float:
    """Where a number lies between its levels 0, 1, .., levels - 1; borders are at halves (Mentzer et al. 2023, appendix A.1)."""
    if symmetric:
        return (math.tanh(z) + 1) / 2 * (levels - 1)
    half, offset = (levels - 1) * 1.001 / 2, 0.5 if levels % 2 == 0 else 0.0
    return math.tanh(z + math.atanh(offset / half)) * half - offset + levels // 2


def fsq_digit(z: float, levels: int, symmetric: bool) -> int:
    return min(max(math.floor(fsq_bounded(z, levels, symmetric) + 0.5), 0), levels - 1)


def fsq_value(digit: int, levels: int, symmetric: bool) -> float:
    """Where a level lies in [-1, 1]."""
    return 2 * digit / (levels - 1) - 1 if symmetric else (digit - levels // 2) / (levels // 2)


def mixed_radix(digits: Sequence[int], levels: Sequence[int]) -> int:
    """The number with these digits, the first one varying fastest."""
    code, place = 0, 1
    for digit, level in zip(digits, levels, strict=True):
        code, place = code + digit * place, place * level
    return code


# -- resampling one sample `(*grid, D)`, axis by axis


def shrink(x: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """The mean over all cells that a larger cell touches."""
    for axis, size in enumerate(grid):
        n = x.shape[axis]
        spans = [range(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        x = np.stack([x.take(span, axis).mean(axis) for span in spans], axis)
    return x


def stretch(x: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Cubic interpolation (Keys, a = -0.75) for two axes, linear for one, pixel centres at halves; the same grid stays."""
    if x.shape[:-1] == tuple(grid):
        return x
    for axis, size in enumerate(grid):
        n = x.shape[axis]
        columns = []
        for i in range(size):
            position = (i + 0.5) * n / size - 0.5
            if len(grid) == 1:
                position = max(position, 0.0)
            first = math.floor(position)
            taps = range(first - 1, first + 3) if len(grid) == 2 else range(first, first + 2)
            kernel = _cubic if len(grid) == 2 else _hat
            columns.append(sum(kernel(position - tap) * x.take(min(max(tap, 0), n - 1), axis) for tap in taps))
        x = np.stack(columns, axis)
    return x


def _cubic(distance: float, a: float = -0.75) -> float:
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def _hat(distance: float) -> float:
    return max(0.0, 1 - abs(distance))


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A convolution 3 wide, zeros around: x `(*grid, D)`, weight `(D, D, 3[, 3])`."""
    out = np.zeros_like(x)
    padded = np.pad(x, [(1, 1)] * (x.ndim - 1) + [(0, 0)])
    for place in np.ndindex(x.shape[:-1]):
        window = padded[tuple(slice(i, i + 3) for i in place)]
        out[place] = np.tensordot(np.moveaxis(window, -1, 0), weight, (range(x.ndim), range(1, x.ndim + 1))) + bias
    return out


def multi_scale(
    z: np.ndarray,
    tables: Sequence[np.ndarray],
    scales: Sequence[int],
    share: float = 0.0,
    smoothings: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Codes `(*grid_l)` and parts `(*grid, D)` of each scale of one sample, in float64 (Tian et al. 2024, algorithm 1).

    Args:
        tables, smoothings: those of each scale.
    """
    grid, residual = z.shape[:-1], z.astype(np.float64)
    codes, parts = [], []
    for level, (table, scale) in enumerate(zip(tables, scales, strict=True)):
        small = shrink(residual, [math.ceil(n * scale / scales[-1]) for n in grid])
        chosen = nearest_code(torch.from_numpy(small.reshape(-1, z.shape[-1])), torch.from_numpy(table)).numpy()
        part = stretch(table.astype(np.float64)[chosen].reshape(small.shape), grid)
        if share:
            part = (1 - share) * part + share * convolve(part, *smoothings[level])
        residual = residual - part
        codes.append(chosen.reshape(small.shape[:-1]))
        parts.append(part)
    return codes, parts


def multi_rate(
    z: np.ndarray, tables: Sequence[np.ndarray], strides: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Codes `(t / stride,)` and parts `(t, D)` of each rate of one sample, span by span (Siuzdak et al. 2024, section 3.1)."""
    residual = z.astype(np.float64)
    codes, parts = [], []
    for table, stride in zip(tables, strides, strict=True):
        chosen, part = [], np.zeros_like(residual)
        for start in range(0, len(z), stride):
            mean = residual[start : start + stride].mean(0)
            chosen.append(int(((table.astype(np.float64) - mean) ** 2).sum(1).argmin()))
            part[start : start + stride] = table[chosen[-1]]
        residual = residual - part
        codes.append(np.array(chosen))
        parts.append(part)
    return codes, parts
