"""Data order: which samples make up step n, on every process, without any state to save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler


class StepSampler(Sampler[list[int]]):
    """Yield, step by step, the draws of each micro-batch of one process.

    A draw is a number that names a sample and one visit to it: `draw % len(dataset)` is the sample, and augmentation may
    depend on the draw alone. Step n is computed from (seed, n), so a run resumes at any step, and the global batch is the same
    for any number of processes. Every epoch is a new permutation.

    Args:
        groups: index arrays; the samples of a batch come from one of them (pictures of one size). One group is the usual case.
        batch_size: samples per step over all processes.
        num_steps: steps of the run.
        seed: of the order.
        start: first step to yield.
        rank, world_size: this process and how many there are.
        parts: micro-batches per step.

    Raises:
        ValueError: a batch cannot be cut evenly into processes and parts, or there are no samples.
    """

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        batch_size: int,
        num_steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ):
        if batch_size % (world_size * parts):
            raise ValueError(
                f"--batch_size {batch_size} cannot be cut evenly into {world_size} processes x {parts} accumulation steps: "
                f"choose a multiple of {world_size * parts}"
            )
        self.groups = [np.asarray(group) for group in groups if len(group)]
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.rank, self.world_size, self.parts, self.num_steps = rank, world_size, parts, num_steps
        self.length = sum(len(group) for group in self.groups)
        if not self.length:
            raise ValueError(
                "there is nothing to train on: the data set, or what is left of it without held-out samples, is empty"
            )
        shares = np.array([len(group) for group in self.groups]) / self.length
        self.group_of_step = np.random.default_rng([seed, 1]).choice(len(shares), num_steps, p=shares)

    def __len__(self) -> int:
        return (self.num_steps - self.start) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        visits = np.bincount(self.group_of_step[: self.start], minlength=len(self.groups))
        for step in range(self.start, self.num_steps):
            group = self.group_of_step[step]
            draws = self._draws(int(group), int(visits[group]))[self.rank :: self.world_size]
            visits[group] += 1
            yield from (part.tolist() for part in np.split(draws, self.parts))

    def _draws(self, group: int, visit: int) -> np.ndarray:
        """Draws number visit * batch_size and following of the endless, epoch-wise shuffled stream of this group."""
        indices = self.groups[group]
        places = np.arange(visit * self.batch_size, (visit + 1) * self.batch_size)
        epochs = places // len(indices)
        draws = np.empty_like(places)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([self.seed, 2, group, int(epoch)]).permutation(len(indices))
            chosen = epochs == epoch
            draws[chosen] = epoch * self.length + indices[order[places[chosen] % len(indices)]]
        return draws


class _Draws(Dataset):
    """Index a dataset by draws: one that knows draws (`takes_draws`) gets them, another the sample number."""

    def __init__(self, dataset: Any):
        self.dataset, self.length = dataset, len(dataset)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, draw: int) -> Any:
        return self.dataset[draw if getattr(self.dataset, "takes_draws", False) else draw % self.length]


def step_loader(
    dataset: Any, collate: Callable[[list[Any]], Any], sampler: StepSampler, num_workers: int = 0
) -> DataLoader:
    """A loader of the micro-batches that `sampler` names."""
    return DataLoader(
        _Draws(dataset),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
