"""Which share of the units this process has, where many machines run the same command."""

from __future__ import annotations

from collections.abc import Mapping

# (index, count) of who are started together, the surest first: torchrun and accelerate, then srun.
_TOGETHER = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def share_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (worker, num_workers) as a launcher tells them; (0, 1) without one.

    Known are `accelerate launch` and torchrun (RANK, WORLD_SIZE), `srun` (SLURM_PROCID, SLURM_NTASKS), and job arrays
    (SLURM_ARRAY_TASK_ID, _COUNT, _MIN, _STEP), alone or around one of the others.

    Raises:
        ValueError: a variable is no number, or out of range.

    Example:
        >>> share_of({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"})
        (2, 4)
    """
    inner, size = next(
        (
            (_number(environment, i), _number(environment, n))
            for i, n in _TOGETHER
            if i in environment and n in environment
        ),
        (0, 1),
    )
    outer, arrays = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        outer = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // max(1, step)
        arrays = _number(environment, "SLURM_ARRAY_TASK_COUNT")
    worker, num_workers = outer * size + inner, arrays * size
    check_share(worker, num_workers)
    return worker, num_workers


def chosen_share(environment: Mapping[str, str], worker: int | None, num_workers: int | None) -> tuple[int, int]:
    """The share that was asked for, else that of `share_of`.

    Raises:
        ValueError: only one of both was given; and see `share_of`.
    """
    if worker is not None and num_workers is not None:
        return worker, num_workers
    if worker is not None or num_workers is not None:
        raise ValueError("--worker and --num_workers go together: give both, or none")
    return share_of(environment)


def check_share(worker: int, num_workers: int) -> None:
    """Refuse a share that cannot be.

    Raises:
        ValueError: naming both numbers.
    """
    if not 0 <= worker < num_workers:
        raise ValueError(
            f"worker {worker} of num_workers {num_workers} cannot be: workers count from 0 to num_workers - 1"
        )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no number: give --worker and --num_workers") from None
