"""The same units on a Ray cluster: each actor is what a process of one machine is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .workers import Progress, Work

_AT_ONCE = 8  # units in the hands of an actor


class Member:
    """An actor of Ray Data: keeps the tokenizer between units."""

    def __init__(self, work: Work):
        self._work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        records: list[dict[str, Any] | None] = []
        self._work.encode([int(number) for number in batch["number"]], lambda count: None, records.append)
        mine = [record for record in records if record is not None]
        return {name: [record[name] for record in mine] for name in ("num_samples", "num_skipped")}


def run_on_ray(work: Work, numbers: Sequence[int], processes: int, progress: Progress) -> None:
    """Encode units with `processes` actors, of which each has a CPU for each of its threads and, on cuda, one GPU.

    Ray connects to the cluster of `RAY_ADDRESS`, or starts one on this machine. Tokenizer, source and folder must lie where all
    machines find them.

    Raises:
        ImportError: ray is not installed.
        OSError, ValueError, RuntimeError: what stopped an actor.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("the engine ray needs the package ray: pip install 'vqtok[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # An actor reads the next unit while it encodes one, so it is given a few at once where there are many.
    at_once = max(1, min(_AT_ONCE, len(numbers) // (4 * processes)))
    rows = ray.data.from_items(
        [{"number": number} for number in numbers], override_num_blocks=-(-len(numbers) // at_once)
    )
    resources: dict[str, Any] = {"num_cpus": work.settings.threads}
    if work.device == "cuda":
        resources["num_gpus"] = 1
    encoded = rows.map_batches(
        Member, batch_size=None, fn_constructor_args=[work], concurrency=min(processes, len(numbers)), **resources
    )  # fmt: skip
    try:
        for record in encoded.iter_rows():
            progress.count(int(record["num_samples"]))
            progress.finish_unit(record)
    except Exception as error:  # Ray wraps what an actor raised
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (OSError, ValueError)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise cause or RuntimeError(
            f"an actor of Ray stopped ({type(error).__name__}): start again to go on"
        ) from error
