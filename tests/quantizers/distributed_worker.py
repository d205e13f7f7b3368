"""One process of tests/quantizers/test_distributed.py: `python distributed_worker.py RANK WORLD_SIZE FOLDER`.

Every scenario is a function of the rank's share of the data, so that the test runs the same one in one process on the
joined batch. Results go to FOLDER/RANK.safetensors.
"""

import datetime
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from vqtok.quantizers import Codebook, HierarchicalQuantizer, VectorQuantizer

COLLECTIVES = [
    name for name in ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast")
]
COLLECTIVES += [
    "broadcast_object_list",
    "reduce",
    "reduce_scatter",
    "gather",
    "scatter",
    "barrier",
    "all_to_all",
    "send",
]

Share = Callable[[Tensor, list[int]], Tensor]


def batches(seed: int, num_rows: int, dim: int = 4) -> Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


def tables(quantizer: HierarchicalQuantizer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in quantizer.state_dict().items()}


def build(**options) -> HierarchicalQuantizer:
    torch.manual_seed(0)
    return HierarchicalQuantizer([VectorQuantizer(4, 32, **options), VectorQuantizer(4, 24, **options)])


def train(share: Share, counted: list[str]) -> dict[str, Tensor]:
    """Five steps of two levels and two passes each, ranks with unequal shares, one step with nothing on rank 1."""
    quantizer = build(decay=0.8, revival_threshold=0.9, reservoir_size=8).train()
    calls = []
    for step in range(5):
        split = [60, 0] if step == 3 else [40, 20]
        for micro in range(2):
            z = share(batches(10 * step + micro, 60), split)
            if len(z):
                quantizer(lambda level, quantized, z=z: z[None] * (level + 1))
        calls.append(len(counted))
        quantizer.update()
        calls.append(len(counted))
    return {**tables(quantizer), "calls": torch.tensor(calls)}


def initialise(share: Share, counted: list[str]) -> dict[str, Tensor]:
    """K-means of 300 rows, 290 of them on one rank."""
    quantizer = build()
    for level in range(2):
        quantizer.initialise(level, share(batches(100 + level, 300), [290, 10]))
    return tables(quantizer)


def one_without_rows(share: Share, counted: list[str]) -> dict[str, Tensor]:
    """A rank whose loader gave nothing still takes part."""
    quantizer = build()
    quantizer.initialise(0, share(batches(7, 100), [100, 0]))
    return tables(quantizer)


def refused(share: Share, counted: list[str]) -> dict[str, Tensor]:
    """Bad rows of one rank are refused by all, instead of one raising and the others waiting."""
    rows = batches(8, 100)
    rows[-1] = torch.nan
    raised = []
    for bad in (rows, rows[:0]):
        try:
            Codebook(8, 4).initialise(share(bad, [len(bad) // 2] * 2))
        except ValueError as error:
            raised.append("NaN" in str(error) or "at least one" in str(error))
    return {"raised": torch.tensor(raised)}


SCENARIOS = {scenario.__name__: scenario for scenario in (train, initialise, one_without_rows, refused)}


def count_collectives(counted: list[str]) -> None:
    """Lets every function of torch.distributed that talks to other processes write down its name."""
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def noted(*args, original=original, name=name, **kwargs):
            counted.append(name)
            return original(*args, **kwargs)

        setattr(dist, name, noted)


def main(rank: int, world_size: int, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    quantizer_before_the_group = build()  # whether there is a group is asked when it matters, not when things are built
    counted: list[str] = []
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=30),
    )
    count_collectives(counted)

    def share(rows: Tensor, split: list[int]) -> Tensor:
        return rows.split(split)[rank]

    results = {}
    for name, scenario in SCENARIOS.items():
        results.update({f"{name}/{key}": value for key, value in scenario(share, counted).items()})
    results["names"] = torch.tensor([COLLECTIVES.index(name) for name in counted])
    quantizer_before_the_group.initialise(0, share(batches(9, 64), [32, 32]))
    results["early/table"] = quantizer_before_the_group.levels[0].codebook.embedding
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
