"""The table of one codebook and its life: data initialisation, EMA, revival.

While a model trains, `accumulate` only collects (counts, residual sums, a bounded reservoir of latents); the update (see
`collective`) applies the sums of all processes: the EMA and the revival, alike on every process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .collective import Accumulator, check_not_frozen
from .kmeans import joint_commonest, joint_k_means
from .search import nearest_code

_PRIORITY_BITS = 23  # integers below 2**24 survive the packed fp32 all-reduce exactly
STARTS: dict[str, Callable[[Tensor, int], Tensor]] = {"kmeans": joint_k_means, "commonest": joint_commonest}
METRICS = ("euclidean", "cosine", "inner_product")


class Codebook(Accumulator):
    """A table of `codebook_size` codes of `dim` numbers, fp32 whatever the model's dtype.

    Args:
        codebook_size: K.
        dim: D.
        update: "ema", the table is a buffer that follows the mean of its latents (van den Oord et al. 2017, appendix A.1), or
            "gradient", the table is a Parameter that the optimizer moves.
        metric: "euclidean"; "cosine", rows of unit length, for latents of unit length (`prepare`); or "inner_product".
        decay: of the moving averages, in [0, 1).
        revival_threshold: a code used less than this share of uniform use (EMA) is moved onto a latent of the batch; 0 never does.
        reservoir_size: how many latents at most are kept for revival between two updates.

    Attributes:
        embedding: `(K, D)` fp32.
        counts: `(K,)` fp32, moving average of hits per update.
        updates: int64, number of updates so far; seeds the choice of revived latents.
        initialised: bool, whether `initialise` ran.
        num_revived: how many codes were revived since this object was made.
    """

    embedding: Tensor
    counts: Tensor
    initialised: Tensor
    # What `accumulate` saw since the last update; None before the first pass.
    _counts: Tensor | None
    _residuals: Tensor | None
    _rows: Tensor | None
    _priorities: Tensor | None

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        update: str = "ema",
        metric: str = "euclidean",
        decay: float = 0.99,
        revival_threshold: float = 0.05,
        reservoir_size: int = 256,
    ):
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(
                f"a codebook needs at least one entry of at least one dimension, got K={codebook_size}, D={dim}"
            )
        if update not in ("ema", "gradient"):
            raise ValueError(f"codebook update must be 'ema' or 'gradient', got {update!r}")
        if metric not in METRICS:
            raise ValueError(f"codebook metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if metric == "inner_product" and update == "ema":
            raise ValueError(
                "a codebook of inner products needs update='gradient': the mean of its latents is not the row that "
                "fits them best"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"codebook decay must be in [0, 1), got {decay}")
        if not 0 <= revival_threshold < 1:
            raise ValueError(f"revival_threshold is a share of uniform use in [0, 1), got {revival_threshold}")
        self.update_rule, self.metric, self.decay = update, metric, decay
        self.revival_threshold, self.reservoir_size = revival_threshold, reservoir_size
        self.num_revived = 0
        table = torch.empty(codebook_size, dim, dtype=torch.float32)
        if update == "ema":
            self.register_buffer("embedding", table)
        else:
            self.embedding = nn.Parameter(table)
        self.register_buffer("counts", torch.empty(codebook_size, dtype=torch.float32))
        self.register_buffer("initialised", torch.empty((), dtype=torch.bool))
        self.drop_pending()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A fresh table from N(0, 1), counts of one."""
        nn.init.normal_(self.embedding)
        nn.init.ones_(self.counts)
        nn.init.zeros_(self.updates)
        nn.init.zeros_(self.initialised)

    @property
    def table(self) -> Tensor:
        """`(K, D)`: the rows that codes stand for; of unit length for the cosine metric."""
        return self._unit(self.embedding)

    def forward(self, codes: Tensor) -> Tensor:
        """The table rows of `codes`: `(*)` int64 -> `(*, D)` fp32."""
        return self._unit(nn.functional.embedding(codes, self.embedding))

    def prepare(self, z: Tensor) -> Tensor:
        """Latents `(*, D)` as this codebook compares them: fp32, of unit length for the cosine metric."""
        return self._unit(z.float())

    def encode(self, z: Tensor) -> Tensor:
        """The nearest codes of prepared latents: `(*, D)` -> `(*)` int64, decided in fp32 under any autocast."""
        metric = "inner_product" if self.metric == "inner_product" else "euclidean"
        return nearest_code(z.reshape(-1, z.shape[-1]), self.table, metric).view(z.shape[:-1])

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or allow) every change of the table, also in `train()`."""
        super().freeze(frozen)
        if isinstance(self.embedding, nn.Parameter):
            self.embedding.requires_grad_(not frozen)

    @torch.no_grad()
    def accumulate(self, z: Tensor, codes: Tensor) -> None:
        """Remember what one training pass saw: prepared latents `(*, D)` and their `codes` `(*)`. Does nothing when frozen."""
        if self.frozen:
            return
        z_ND, codes_N = z.detach().reshape(-1, z.shape[-1]).float(), codes.reshape(-1)
        if self._counts is None:
            self._counts = torch.zeros_like(self.counts)
            self._residuals = torch.zeros_like(self.embedding)
            self._rows = z_ND.new_zeros(0, z_ND.shape[1])
            self._priorities = codes.new_zeros(0)
        assert self._residuals is not None and self._rows is not None and self._priorities is not None
        self._counts += torch.bincount(codes_N, minlength=len(self.counts))
        if self.update_rule == "ema":
            # Residuals z - e instead of z: sums of small numbers keep their digits, and an unused code cannot move.
            self._residuals.index_add_(0, codes_N, z_ND - self(codes_N))
        if self.revival_threshold:
            rows, priorities = _keep_highest(z_ND, self._priority(z_ND), self.reservoir_size)
            rows, priorities = torch.cat([self._rows, rows]), torch.cat([self._priorities, priorities])
            self._rows, self._priorities = _keep_highest(rows, priorities, self.reservoir_size)

    def _priority(self, z_ND: Tensor) -> Tensor:
        """A hash of each row's bits and of the update number, in [1, 2**23].

        It depends on nothing else, so the reservoir is the same for one large batch, several small ones, or several
        processes; equal rows (an empty background) get one priority and so count once.
        """
        bits_ND = (z_ND + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one value
        generator = torch.Generator().manual_seed(int(self.updates))
        multipliers_D = torch.randint(1, 1 << 31, (z_ND.shape[1],), generator=generator, dtype=torch.int32)
        mixed_N = (bits_ND * (multipliers_D.to(z_ND.device) | 1)).sum(1)  # products wrap: exact, in any order
        mixed_N = (mixed_N ^ (mixed_N >> 17)) * 0x2545F4914F6CDD1D
        return ((mixed_N >> 32) & ((1 << _PRIORITY_BITS) - 1)) + 1

    def drop_pending(self) -> None:
        """Forget what was accumulated since the last update."""
        super().drop_pending()
        self._counts = self._residuals = self._rows = self._priorities = None

    def packed(self, rank: int, world_size: int) -> list[Tensor]:
        """Counts, sums of residuals (EMA) and a slot per process for its reservoir (with revival)."""
        parts = [torch.zeros_like(self.counts) if self._counts is None else self._counts]
        if self.update_rule == "ema":
            parts.append(torch.zeros_like(self.embedding) if self._residuals is None else self._residuals)
        if self.revival_threshold:
            slots = self.counts.new_zeros(world_size, self.reservoir_size, 1 + self.embedding.shape[1])
            if self._rows is not None and self._priorities is not None:
                slots[rank, : len(self._rows), 0] = self._priorities.to(slots)
                slots[rank, : len(self._rows), 1:] = self._rows.to(slots)
            parts.append(slots)
        return parts

    def apply_sums(self, *sums: Tensor) -> None:
        """The EMA of counts and table, then the revival."""
        counts_K, *remaining = sums
        self.counts.mul_(self.decay).add_(counts_K, alpha=1 - self.decay)
        if self.update_rule == "ema":
            # e <- (decay * c * e + (1 - decay) * sum z) / c', written as a step along the mean residual.
            step_KD = remaining.pop(0) * ((1 - self.decay) / self.counts.clamp_min(1e-20))[:, None]
            moved = counts_K > 0  # the others keep their bits
            self._set_rows(moved, self.table[moved] + step_KD[moved])
        if self.revival_threshold:
            pool = remaining.pop(0).flatten(0, 1)
            filled = pool[:, 0] > 0
            rows, _ = _keep_highest(pool[filled, 1:], pool[filled, 0].long(), self.reservoir_size)
            self._revive(rows)

    def _revive(self, rows: Tensor) -> None:
        uniform = self.counts.mean()
        dead = (self.counts < self.revival_threshold * uniform).nonzero()[:, 0]
        dead = dead[torch.argsort(self.counts[dead], stable=True)][: len(rows)]
        self._set_rows(dead, rows[: len(dead)])
        # As if used uniformly: the code has time to find its latents before it can be called dead again.
        self.counts[dead] = uniform
        self.num_revived += len(dead)

    @torch.no_grad()
    def initialise(self, z: Tensor, start: str = "kmeans") -> None:
        """Set the table from the prepared latents `z` `(*, D)` of all processes: to k-means centroids, or to the "commonest" of them.

        For inner products the rows get the directions of the centroids and one length.

        Raises:
            ValueError: there are no latents, some are not finite, or the table is frozen.
        """
        check_not_frozen(self.frozen)
        self._set_rows(slice(None), STARTS[start](z.reshape(-1, z.shape[-1]), len(self.counts)))
        self.counts.fill_(1)
        self.initialised.fill_(True)
        self.drop_pending()

    def _set_rows(self, where: slice | Tensor, rows: Tensor) -> None:
        if self.metric == "inner_product":
            # Of rows of different length the long ones would win everything: the new ones get the length of the others.
            others = rows if isinstance(where, slice) else self.embedding.data
            rows = nn.functional.normalize(rows, dim=-1) * others.norm(dim=-1).mean()
        self.embedding.data[where] = self._unit(rows)

    def _unit(self, rows: Tensor) -> Tensor:
        # Also at each look-up: an optimizer changes lengths.
        return nn.functional.normalize(rows, dim=-1) if self.metric == "cosine" else rows

    def extra_repr(self) -> str:
        return f"{self.counts.shape[0]} x {self.embedding.shape[1]}, {self.metric}, {self.update_rule}"


def _keep_highest(rows: Tensor, priorities: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` rows of highest priority, one of each priority, highest first."""
    order = torch.argsort(priorities, descending=True, stable=True)
    ordered = priorities[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    kept = order[first][:size]
    return rows[kept], priorities[kept]
