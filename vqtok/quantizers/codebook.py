"""The table of one codebook and its life: data initialisation, EMA, revival, and every collective about codes.

While a model trains, `accumulate` only collects (counts, residual sums, a bounded reservoir of latents); `update_codebooks`, called
once after `optimizer.step()`, does one packed all-reduce for all codebooks, then the EMA and the revival, alike on every process.
So gradient accumulation equals the large batch, a forward pass has no collectives, and nothing changes in eval or when frozen.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .functional import nearest_code

_PRIORITY_BITS = 23  # integers below 2**24 survive the packed fp32 all-reduce exactly
_PASSES_BEFORE_WARNING = 200


class Codebook(nn.Module):
    """A table of `codebook_size` codes of `dim` numbers, fp32 whatever the model's dtype.

    Args:
        codebook_size: K.
        dim: D.
        update: "ema", the table is a buffer that follows the mean of its latents (van den Oord et al. 2017, appendix A.1), or
            "gradient", the table is a Parameter that the optimizer moves.
        decay: of the moving averages, in [0, 1).
        revival_threshold: a code used less than this share of uniform use (EMA) is moved onto a latent of the batch; 0 never does.
        reservoir_size: how many latents at most are kept for revival between two updates.

    Attributes:
        embedding: `(K, D)` fp32.
        counts: `(K,)` fp32, moving average of hits per update.
        updates: int64, number of updates so far; seeds the choice of revived latents.
        initialised: bool, whether `initialise` ran.
    """

    embedding: Tensor
    counts: Tensor
    updates: Tensor
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
        if not 0 <= decay < 1:
            raise ValueError(f"codebook decay must be in [0, 1), got {decay}")
        if not 0 <= revival_threshold < 1:
            raise ValueError(f"revival_threshold is a share of uniform use in [0, 1), got {revival_threshold}")
        self.update_rule, self.decay, self.revival_threshold = update, decay, revival_threshold
        self.reservoir_size = reservoir_size
        self.frozen = False
        table = torch.empty(codebook_size, dim, dtype=torch.float32)
        if update == "ema":
            self.register_buffer("embedding", table)
        else:
            self.embedding = nn.Parameter(table)
        self.register_buffer("counts", torch.empty(codebook_size, dtype=torch.float32))
        self.register_buffer("updates", torch.empty((), dtype=torch.int64))
        self.register_buffer("initialised", torch.empty((), dtype=torch.bool))
        self._drop_pending()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A fresh table from N(0, 1), counts of one."""
        nn.init.normal_(self.embedding)
        nn.init.ones_(self.counts)
        nn.init.zeros_(self.updates)
        nn.init.zeros_(self.initialised)

    def forward(self, codes: Tensor) -> Tensor:
        """The table rows of `codes`: `(*)` int64 -> `(*, D)` fp32."""
        return nn.functional.embedding(codes, self.embedding)

    def encode(self, z: Tensor) -> Tensor:
        """The nearest codes of `z`: `(*, D)` -> `(*)` int64, decided in fp32 under any autocast."""
        return nearest_code(z.reshape(-1, z.shape[-1]), self.embedding).view(z.shape[:-1])

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or allow) every change of the table, also in `train()`."""
        self.frozen = frozen
        if isinstance(self.embedding, nn.Parameter):
            self.embedding.requires_grad_(not frozen)
        self._drop_pending()

    @torch.no_grad()
    def accumulate(self, z: Tensor, codes: Tensor) -> None:
        """Remember what one training pass saw: `z` `(*, D)` and its `codes` `(*)`. Does nothing when frozen."""
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
            self._residuals.index_add_(0, codes_N, z_ND - self.embedding[codes_N])
        if self.revival_threshold:
            rows = torch.cat([self._rows, z_ND])
            priorities = torch.cat([self._priorities, self._priority(z_ND)])
            self._rows, self._priorities = _keep_highest(rows, priorities, self.reservoir_size)
        self._passes += 1
        if self._passes == _PASSES_BEFORE_WARNING:
            warnings.warn(
                f"{_PASSES_BEFORE_WARNING} training passes without a codebook update: call model.update_codebooks() after "
                "optimizer.step(), or model.quantizer.freeze() if the codes shall stay",
                stacklevel=2,
            )

    def _priority(self, z_ND: Tensor) -> Tensor:
        """A hash of each row's bits and of the update number, in [1, 2**23].

        It depends on nothing else, so the reservoir is the same for one large batch, several small ones, or several
        processes; equal rows (an empty background) get one priority and so count once.
        """
        bits_ND = (z_ND + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 and 0.0 one value
        generator = torch.Generator().manual_seed(int(self.updates))
        multipliers_D = torch.randint(1, 1 << 31, (z_ND.shape[1],), generator=generator).to(z_ND.device) | 1
        mixed_N = (bits_ND * multipliers_D).sum(1)  # wraps modulo 2**64: exact, in any order
        mixed_N = (mixed_N ^ (mixed_N >> 29)) * 0x2545F4914F6CDD1D
        return ((mixed_N >> 32) & ((1 << _PRIORITY_BITS) - 1)) + 1

    def _drop_pending(self) -> None:
        self._counts = self._residuals = self._rows = self._priorities = None
        self._passes = 0

    # -- what update_codebooks packs, and what each codebook does with the sums of all processes

    def _packed(self, rank: int, world_size: int) -> list[Tensor]:
        slots = self.embedding.new_zeros(world_size, self.reservoir_size, 1 + self.embedding.shape[1])
        if self._counts is None:
            return [torch.zeros_like(self.counts), torch.zeros_like(self.embedding), slots]
        assert self._residuals is not None and self._rows is not None and self._priorities is not None
        slots[rank, : len(self._rows), 0] = self._priorities.to(slots)
        slots[rank, : len(self._rows), 1:] = self._rows.to(slots)
        return [self._counts, self._residuals, slots]

    def _apply_update(self, counts_K: Tensor, residuals_KD: Tensor, slots: Tensor) -> None:
        self.counts.mul_(self.decay).add_(counts_K, alpha=1 - self.decay)
        if self.update_rule == "ema":
            # e <- (decay * c * e + (1 - decay) * sum z) / c', written as a step along the mean residual.
            self.embedding.add_(residuals_KD * ((1 - self.decay) / self.counts.clamp_min(1e-20))[:, None])
        if self.revival_threshold:
            pool = slots.flatten(0, 1)
            filled = pool[:, 0] > 0
            rows, _ = _keep_highest(pool[filled, 1:], pool[filled, 0].long(), self.reservoir_size)
            self._revive(rows)
        self.updates += 1
        self._drop_pending()

    def _revive(self, rows: Tensor) -> None:
        uniform = self.counts.mean()
        dead = (self.counts < self.revival_threshold * uniform).nonzero()[:, 0]
        dead = dead[torch.argsort(self.counts[dead], stable=True)][: len(rows)]
        self.embedding.data[dead] = rows[: len(dead)]
        # As if used uniformly: the code has time to find its latents before it can be called dead again.
        self.counts[dead] = uniform

    @torch.no_grad()
    def initialise(self, z_ND: Tensor, iterations: int = 10) -> None:
        """Set the table to the k-means centroids of `z_ND`, the same on every process.

        The latents of all processes are gathered, process 0 clusters them, and the result is broadcast.

        Raises:
            ValueError: there are no latents, or some are not finite.
        """
        pool = _gather_rows(z_ND.float())
        # By every process, not only by the one that clusters: an error there alone would leave the others waiting for ever.
        _check_rows(pool)
        centroids = torch.empty_like(self.embedding.data)
        if _rank() == 0:
            centroids.copy_(k_means(pool, len(centroids), iterations))
        if _world_size() > 1:
            dist.broadcast(centroids, 0)
        self.embedding.data.copy_(centroids)
        self.counts.fill_(1)
        self.initialised.fill_(True)
        self._drop_pending()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move, but never change the dtype: `.half()` and `.to(dtype)` leave codebooks in fp32."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._drop_pending()
        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"{self.counts.shape[0]} x {self.embedding.shape[1]}, update={self.update_rule!r}, decay={self.decay}"


@torch.no_grad()
def update_codebooks(codebooks: Sequence[Codebook]) -> None:
    """Apply what all processes accumulated since the last call: one packed all-reduce, the EMA, the revival.

    Every process must call it equally often, after `optimizer.step()`. Frozen codebooks are left alone.
    """
    active = [codebook for codebook in codebooks if not codebook.frozen]
    if not active:
        return
    rank, world_size = _rank(), _world_size()
    parts = [codebook._packed(rank, world_size) for codebook in active]
    if world_size > 1:
        flat = torch.cat([tensor.reshape(-1) for part in parts for tensor in part])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for part in parts for tensor in part]
        pieces = iter(flat.split(sizes))
        parts = [[next(pieces).view(tensor.shape) for tensor in part] for part in parts]
    for codebook, part in zip(active, parts, strict=True):
        codebook._apply_update(*part)


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
            stacklevel=2,
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


def _keep_highest(rows: Tensor, priorities: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` rows of highest priority, one of each priority, highest first."""
    order = torch.argsort(priorities, descending=True, stable=True)
    ordered = priorities[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    kept = order[first][:size]
    return rows[kept], priorities[kept]


def _check_rows(rows: Tensor) -> None:
    if not len(rows):
        raise ValueError("k-means needs at least one latent: give init_codebooks at least one batch")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(
            "the latents to initialise from hold NaN or infinite values: look for bad input or diverged weights"
        )


def _gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, joined in rank order; processes may hold different numbers of rows."""
    if _world_size() == 1:
        return rows
    length = torch.tensor([len(rows)], device=rows.device)
    lengths = [torch.zeros_like(length) for _ in range(_world_size())]
    dist.all_gather(lengths, length)
    most = int(torch.stack(lengths).max())
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.zeros_like(padded) for _ in range(_world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, lengths, strict=True)])


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
