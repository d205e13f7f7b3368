"""One process of tests/quantizers/test_distributed.py: `python distributed_worker.py RANK WORLD_SIZE FOLDER`.

Every scenario is a function of the rank's share of the data, so that the test runs the same one in one process on the
joined batch. Results go to FOLDER/RANK.safetensors.
"""

import datetime
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tests.quantizers.cases import CASES, build, latents, levels, objective
from vqtok.quantizers import (
    Codebook,
    GumbelQuantizer,
    HierarchicalQuantizer,
    Hierarchy,
    MultiRateQuantizer,
    MultiScaleQuantizer,
    ProductQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
    update_all,
)
from vqtok.quantizers.health import CodebookHealth

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
# An entropy penalty needs the others' latents in the pass itself, so every process must make as many passes.
TOGETHER = {name for name, case in CASES.items() if "entropy" in case.losses}
# Dropout of depth is drawn by each process, and a Gumbel mixture too: of those only what is not drawn is compared.
DRAWN = {"residual, depth dropout", "gumbel", "gumbel, one code"}

Share = Callable[[Tensor, list[int]], Tensor]


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(quantizer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in quantizer.state_dict().items()}


def kinds(share: Share, counted: list[str]) -> dict[str, Tensor]:
    """Three steps of every kind: unequal shares, nothing on rank 1, equal shares; then the gradients, then frozen.

    `calls` has the number of collectives before each pass, after it, and after the update.
    """
    results = {}
    for name in CASES:
        quantizer, calls = build(name).train(), []
        for step, split in enumerate(([3, 1], [1, 3] if name in TOGETHER else [4, 0], [2, 2])):
            z = share(latents(name, seed=step, batch=4), split)
            calls.append(len(counted))
            if len(z):
                quantizer(z)
            calls.append(len(counted))
            quantizer.update()
            calls.append(len(counted))
        results.update({f"{name}/state/{key}": value for key, value in tables(quantizer).items()})
        z = share(latents(name, seed=9, batch=4), [2, 2]).requires_grad_()
        out = levels(quantizer(z))
        loss = sum(level.loss for level in out) if name in DRAWN else objective(out)
        loss.backward()
        results[f"{name}/loss"] = loss.detach()
        for key, parameter in quantizer.named_parameters():
            if parameter.grad is not None:
                results[f"{name}/gradient/{key}"] = parameter.grad
        results[f"{name}/latents"] = z.grad
        quantizer.freeze()
        calls.append(len(counted))
        quantizer(z)
        calls.append(len(counted))
        quantizer.update()
        calls.append(len(counted))
        results[f"{name}/calls"] = torch.tensor(calls) - calls[0]
    return results


def build_levels() -> HierarchicalQuantizer:
    torch.manual_seed(0)
    often = {"decay": 0.8, "revival_threshold": 0.9, "codebook_size": 32}
    return HierarchicalQuantizer(
        [
            VectorQuantizer(4, **often),
            VectorQuantizer(4, metric="cosine", **often),
            ResidualQuantizer(4, num_codebooks=2, shared=True, layer={"type": "vector", **often}),
        ]
    )


def train(share: Share, counted: list[str]) -> dict[str, Tensor]:
    """Five steps of three levels and two passes each, with much revival; one step with nothing on rank 1."""
    quantizer = build_levels().train()
    for book in quantizer.codebooks:
        book.reservoir_size = 8
    health = CodebookHealth(quantizer, window=150)
    calls = []
    for step in range(5):
        split = [60, 0] if step == 3 else [40, 20]
        for micro in range(2):
            z = share(rows(10 * step + micro, 60, 4), split)
            if len(z):
                out = quantizer(lambda level, quantized, z=z: z[None] * (level + 1))
                health.observe([level.codes for level in out])
        calls.append(len(counted))
        update_all([*quantizer.accumulators, health])
        calls.append(len(counted))
        if step == 0:
            first = {f"first.{name}": value for name, value in tables(quantizer).items()}
    revived = torch.tensor([book.num_revived for book in quantizer.codebooks])
    health_state = {f"health.{name}": value for name, value in health.state_dict().items()}
    return {**tables(quantizer), **first, **health_state, "calls": torch.tensor(calls) - calls[0], "revived": revived}


def initialise(share: Share, counted: list[str]) -> dict[str, Tensor]:
    """300 rows, 290 of them on one rank; then none on the other."""
    layer = {"type": "vector", "codebook_size": 16}
    torch.manual_seed(0)
    quantizers: dict[str, Any] = {
        "vector": VectorQuantizer(4, codebook_size=16),
        "cosine": VectorQuantizer(4, codebook_size=16, metric="cosine", codebook_dim=3),
        "gradient": VectorQuantizer(4, codebook_size=16, update="gradient"),
        "sim": SimVQ(4, codebook_size=16),
        "gumbel": GumbelQuantizer(4, codebook_size=16),
        "product": ProductQuantizer(4, num_codebooks=2, layer=layer),
        "residual": ResidualQuantizer(4, num_codebooks=3, layer=layer),
        "shared": ResidualQuantizer(4, num_codebooks=3, layer=layer, shared=True),
        "scales": MultiScaleQuantizer(4, 1, scales=[1, 2, 4], layer=layer, smoothing=0),
        "rates": MultiRateQuantizer(4, strides=[2, 1], layer=layer),
        "levels": HierarchicalQuantizer([VectorQuantizer(4, codebook_size=16), VectorQuantizer(4, codebook_size=8)]),
    }
    results = {}
    for name, quantizer in quantizers.items():
        if isinstance(quantizer, Hierarchy):
            z = share(rows(100, 75, 4, 4), [70, 5])

            def propose(level: int, quantized: list[Tensor], z: Tensor = z) -> Tensor:
                return z - sum(quantized)

            quantizer.initialise(lambda propose=propose: iter([propose]), 10_000)
        else:
            quantizer.initialise(share(rows(100, 300, 4), [290, 10]))
        results.update({f"{name}/{key}": value for key, value in tables(quantizer).items()})
    for name in ("vector", "sim", "gumbel", "residual"):
        quantizers[name].initialise(share(rows(7, 100, 4), [100, 0]))
        results.update({f"{name} of one/{key}": value for key, value in tables(quantizers[name]).items()})
    return results


def refused(share: Share, counted: list[str]) -> dict[str, Tensor]:
    """Bad rows of one rank are refused by all, instead of one raising and the others waiting."""
    bad = rows(8, 100, 4)
    bad[-1] = torch.nan
    raised = []
    for make in (lambda: Codebook(8, 4), lambda: SimVQ(4), lambda: GumbelQuantizer(4, codebook_size=8)):
        for z in (bad, bad[:0]):
            try:
                make().initialise(share(z, [len(z) // 2] * 2))
            except ValueError as error:
                raised.append("NaN" in str(error) or "at least one" in str(error))
    return {"raised": torch.tensor(raised)}


SCENARIOS = {scenario.__name__: scenario for scenario in (kinds, train, initialise, refused)}


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
    quantizer_before_the_group = build_levels()  # whether there is a group is asked when it matters, not before
    counted: list[str] = []
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=30),
    )
    count_collectives(counted)

    def share(joined: Tensor, split: list[int]) -> Tensor:
        return joined.split(split)[rank].clone()

    results = {}
    for scenario_name, scenario in SCENARIOS.items():
        torch.manual_seed(rank)  # processes draw different numbers
        first = len(counted)
        results.update({f"{scenario_name}/{key}": value for key, value in scenario(share, counted).items()})
        results[f"{scenario_name}/names"] = torch.tensor([COLLECTIVES.index(name) for name in counted[first:]])
    early = quantizer_before_the_group.train()
    early(lambda level, quantized: share(rows(9, 64, 4), [32, 32]))
    early.update()
    results["early/table"] = early.codebooks[0].embedding
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
