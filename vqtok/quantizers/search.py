"""The search for the nearest code: exact, each row alone, as fast as the matrix product in it, in constant memory.

Scores are computed in tiles that stay in the cache. Of each tile only the minima of groups of codes are looked at, which a
processor does at the speed of reading; the winner is then found inside one group. Rows where rounding could have decided are
decided again in float64.

Axis letters: N flattened positions (n in a block), K codebook entries (k in a tile), D code dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .functional import full_precision

METRICS = ("euclidean", "inner_product")
# A tile of scores. A processor likes what stays in its cache; on an accelerator small tiles would leave it waiting for Python.
_TILE_BYTES = {"cpu": 8 << 20}
_TILE_BYTES_ELSEWHERE = 256 << 20
_TILE_CODES = 1024  # few enough that a matrix product packs them once for many rows
_ROWS_AT_ONCE = 1 << 16  # rows whose running minima are kept while the tiles of the codebook pass by


def nearest_code(z_ND: Tensor, codebook_KD: Tensor, metric: str = "euclidean") -> Tensor:
    """Return, for every row of `z_ND`, the index of the best row of `codebook_KD`.

        euclidean      argmin_k |z - e_k|^2 = argmin_k |e_k|^2 / 2 - z . e_k          (van den Oord et al. 2017, eq. 1)
        inner_product  argmax_k z . e_k                                                (IBQ, Shi et al. 2024, eq. 3)

    Each row is decided alone: in fp32 around the codebook's mean (so that a large common offset costs no digits), and
    wherever rounding could have decided, again in float64 from the values themselves. The lowest index wins ties.
    Autocast and TF32 never apply. Extra memory is a few tiles of 8 MiB (256 MiB on an accelerator), whatever N and K.
    It is one operator for `torch.compile` and `torch.export` (`vqtok::nearest_code`), and has no gradient.

    Args:
        z_ND: float, any dtype; computed in fp32.
        codebook_KD: float32.
        metric: "euclidean" or "inner_product"; for cosine similarity give normalised rows on both sides.

    Returns:
        codes_N, int64 in [0, K).

    Raises:
        ValueError: shapes that do not fit, an unknown metric, or values that are not finite.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if z_ND.ndim != 2 or codebook_KD.ndim != 2 or z_ND.shape[1] != codebook_KD.shape[1] or not len(codebook_KD):
        raise ValueError(
            f"nearest_code needs latents (N, D) and a codebook (K, D) of one D, got {tuple(z_ND.shape)} and "
            f"{tuple(codebook_KD.shape)}"
        )
    codes_N: Tensor = torch.ops.vqtok.nearest_code(z_ND.detach(), codebook_KD.detach(), metric)
    return codes_N


@torch.library.custom_op("vqtok::nearest_code", mutates_args=())
def _nearest_code(z_ND: Tensor, codebook_KD: Tensor, metric: str) -> Tensor:
    codes_N = torch.empty(len(z_ND), dtype=torch.int64, device=z_ND.device)
    with torch.no_grad(), full_precision(z_ND.device.type):
        search = _Search(codebook_KD.float(), metric)
        for start in range(0, len(z_ND), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            codes_N[part] = search(z_ND[part])
    return codes_N


@_nearest_code.register_fake
def _(z_ND: Tensor, codebook_KD: Tensor, metric: str) -> Tensor:
    return z_ND.new_empty(z_ND.shape[0], dtype=torch.int64)


class _Search:
    """The search in one table."""

    def __init__(self, table_KD: Tensor, metric: str):
        self.table_KD, self.euclidean = table_KD, metric == "euclidean"
        self.mean_D = table_KD.mean(0)
        self.budget = _TILE_BYTES.get(table_KD.device.type, _TILE_BYTES_ELSEWHERE) // 4  # numbers in a tile of scores
        self.tile = min(len(table_KD), max(_TILE_CODES, self.budget // 4096))
        self.members = 1 << (self.tile.bit_length() - 1) // 2  # codes in a group: a power of two about sqrt(tile)
        norms = [(part_kD - self.mean_D).norm(dim=1).max() for part_kD in table_KD.split(self.tile)]
        self.reach = torch.stack(norms).max()

    def __call__(self, z_ND: Tensor) -> Tensor:
        codes_N, best_N, doubtful_N = self._by_tiles(z_ND)
        rows = doubtful_N.nonzero()[:, 0]
        if len(rows):
            codes_N[rows] = self._decide(z_ND, rows, best_N[rows])
        return codes_N

    def _by_tiles(self, z_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best code of every row by fp32 scores, its score, and whether another one is within their rounding."""
        best_N = z_ND.new_full((len(z_ND),), math.inf, dtype=torch.float32)
        codes_N = torch.zeros(len(z_ND), dtype=torch.int64, device=z_ND.device)
        doubtful_N = torch.zeros(len(z_ND), dtype=torch.bool, device=z_ND.device)
        at_once = max(1, min(len(z_ND), self.budget // self.tile))
        scores = torch.empty(at_once, self.tile + self.members, dtype=torch.float32, device=z_ND.device)
        for offset, centred_kD, bias_k in self._tiles():
            for start in range(0, len(z_ND), at_once):
                part = slice(start, start + at_once)
                y_nD = self._centred(z_ND[part])
                scores_nk = scores.view(-1)[: len(y_nD) * len(bias_k)].view(len(y_nD), -1)
                torch.addmm(bias_k, y_nD, centred_kD.T, alpha=-1, out=scores_nk)
                slack_n = self._slack(y_nD)
                low_n, code_n, close_n = _best_of_tile(scores_nk, slack_n, self.members)
                # Against the tiles before: which is lower, and whether rounding could have decided that.
                margin_n = low_n - best_N[part]
                lower_n = margin_n < 0
                doubtful_N[part] = torch.where(lower_n, close_n, doubtful_N[part]) | (margin_n.abs() <= slack_n)
                codes_N[part] = torch.where(lower_n, code_n + offset, codes_N[part])
                best_N[part] = torch.minimum(low_n, best_N[part])
        if not bool(torch.isfinite(best_N).all()):
            where = "latents" if bool(torch.isfinite(self.reach)) else "the codebook"
            raise ValueError(
                f"{where} hold NaN or infinite values: look for a diverged training (lower the learning rate) or bad input"
            )
        return codes_N, best_N, doubtful_N

    def _decide(self, z_ND: Tensor, rows_R: Tensor, best_R: Tensor) -> Tensor:
        """The best codes of the rows `rows_R`, all that come close to `best_R` compared in float64; the lowest index wins ties."""
        least_R = best_R.new_full((len(rows_R),), math.inf, dtype=torch.float64)
        codes_R = torch.zeros_like(rows_R)
        for offset, centred_kD, bias_k in self._tiles(padded=False):
            # A row may be close to all codes (a codebook of equal rows), and a pair takes more room than a score.
            at_once = max(1, self.budget // (8 * len(bias_k)))
            for start in range(0, len(rows_R), at_once):
                part = slice(start, start + at_once)
                z_nD = z_ND[rows_R[part]]
                y_nD = self._centred(z_nD)
                scores_nk = torch.addmm(bias_k, y_nD, centred_kD.T, alpha=-1)
                row_c, code_c = (scores_nk <= (best_R[part] + self._slack(y_nD))[:, None]).nonzero(as_tuple=True)
                low_n, code_n = self._least_of_pairs(z_nD, row_c, code_c + offset)
                lower_n = low_n < least_R[part]  # tiles come in order, so that the first of equals stays
                codes_R[part] = torch.where(lower_n, code_n, codes_R[part])
                least_R[part] = torch.minimum(low_n, least_R[part])
        return codes_R

    def _least_of_pairs(self, z_nD: Tensor, row_c: Tensor, code_c: Tensor) -> tuple[Tensor, Tensor]:
        """The least exact distance of each row among pairs of row and code, and the lowest code that has it."""
        size = max(1, self.budget // (16 * z_nD.shape[1]))
        exact = [
            self._exact(z_nD[rows].double(), self.table_KD[codes].double())
            for rows, codes in zip(row_c.split(size), code_c.split(size), strict=True)
        ]
        exact_c = torch.cat(exact)
        least_n = exact_c.new_full((len(z_nD),), math.inf).scatter_reduce(0, row_c, exact_c, "amin")
        wins_c = exact_c == least_n[row_c]
        none_n = torch.full((len(z_nD),), len(self.table_KD), dtype=torch.int64, device=z_nD.device)
        return least_n, none_n.scatter_reduce(0, row_c[wins_c], code_c[wins_c], "amin")

    def _tiles(self, padded: bool = True) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First code, centred rows and bias of each tile, filled up to whole groups with codes that never win."""
        for offset in range(0, len(self.table_KD), self.tile):
            centred_kD = self.table_KD[offset : offset + self.tile] - self.mean_D
            bias_k = centred_kD.square().sum(1) / 2 if self.euclidean else centred_kD.new_zeros(len(centred_kD))
            missing = -len(bias_k) % self.members if padded else 0
            if missing:
                centred_kD = torch.nn.functional.pad(centred_kD, (0, 0, 0, missing))
                bias_k = torch.nn.functional.pad(bias_k, (0, missing), value=math.inf)
            yield offset, centred_kD, bias_k

    def _centred(self, z_nD: Tensor) -> Tensor:
        # A product of z with the codebook's mean is the same for all codes, so inner products need only the table centred.
        return z_nD.float() - self.mean_D if self.euclidean else z_nD.float()

    def _slack(self, y_nD: Tensor) -> Tensor:
        """How far apart two scores must be for rounding not to have decided.

        The bound holds for D products accumulated in fp32, the centring of both sides (a difference is rounded in proportion
        to itself, so the size of the mean is not in the bound), and |e|^2 / 2. The last term is for products so small that
        fp32 underflows, where rounding is absolute instead of relative.
        """
        info = torch.finfo(torch.float32)
        spread_n = y_nD.norm(dim=1) + self.reach
        return 8 * info.eps * math.sqrt(y_nD.shape[1] + 4) * spread_n * self.reach + info.tiny

    def _exact(self, z_cD: Tensor, rows_cD: Tensor) -> Tensor:
        return (z_cD - rows_cD).square().sum(1) if self.euclidean else -(z_cD * rows_cD).sum(1)


def _best_of_tile(scores_nk: Tensor, slack_n: Tensor, members: int) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest score of each row, its code in the tile, and whether another one lies within the slack."""
    grouped = scores_nk.view(len(scores_nk), members, -1)  # a group is a column: minima run along memory
    lows_ng = grouped.amin(1)
    low_n, group_n = lows_ng.min(1)
    inside_nm = grouped.gather(2, group_n[:, None, None].expand(-1, members, 1))[:, :, 0]
    bound_n1 = (low_n + slack_n)[:, None]
    close_n = (lows_ng <= bound_n1).sum(1) + (inside_nm <= bound_n1).sum(1) > 2
    return low_n, inside_nm.argmin(1) * lows_ng.shape[1] + group_n, close_n
