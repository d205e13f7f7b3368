"""Two processes equal one on the joined batch, in values and gradients, with one collective per update."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.quantizers import distributed_worker as worker
from tests.quantizers.cases import CASES, build

ROOT = Path(__file__).resolve().parents[2]
# What is learned by gradients alone, or not at all, has nothing to sum.
SILENT = {name for name in CASES if any(kind in name for kind in ("sim", "fsq", "gumbel", "lfq", "bsq"))}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each of two gloo processes found: started once, some ten seconds."""
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(rank), "2", str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """The same scenarios in this process, on the joined rows."""
    return {
        f"{name}/{key}": value
        for name, scenario in worker.SCENARIOS.items()
        for key, value in scenario(lambda joined, split: joined.clone(), []).items()
    }


def of(results: dict[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in results.items() if name.startswith(start)}
    assert found, f"nothing begins with {start}"
    return found


def test_both_processes_agree_bit_for_bit(ranks):
    own = ("/loss", "/latents", "/gradient/")  # of each process's own share
    compared = [name for name in ranks[0] if not any(part in name for part in own)]
    assert len(compared) > 400
    assert [name for name in compared if not ranks[0][name].equal(ranks[1][name])] == []


@pytest.mark.parametrize("name", CASES)
def test_every_kind_trains_as_in_one_process(name, ranks, alone):
    for key, value in of(alone, f"kinds/{name}/state/").items() if CASES[name].stored else ():
        torch.testing.assert_close(ranks[0][key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_has_the_gradients_of_the_joined_batch(name, ranks, alone):
    """Averaged over the processes, as DistributedDataParallel does; entropy losses too, which are no means over latents."""
    start = f"kinds/{name}/"
    mean_loss = (ranks[0][start + "loss"] + ranks[1][start + "loss"]) / 2
    torch.testing.assert_close(mean_loss, alone[start + "loss"], rtol=1e-5, atol=1e-6)
    gradients = {key for key in alone if key.startswith(start + "gradient/")}
    if name not in worker.DRAWN:
        assert gradients == {f"{start}gradient/{key}" for key, _ in build(name).named_parameters()}
    for key in gradients:
        torch.testing.assert_close(
            (ranks[0][key] + ranks[1][key]) / 2, alone[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: key + text
        )
    joined = torch.cat([rank[start + "latents"] for rank in ranks]) / 2
    torch.testing.assert_close(joined, alone[start + "latents"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_one_collective_per_update_and_none_in_a_pass(name, ranks):
    """moshi averages inside the loop over layers, so that layer 1 is averaged once per layer (style.md 2.9, defect 9).

    An entropy penalty alone needs one in the pass: one per table that has it, one for all groups of bits.
    """
    in_update = 0 if name in SILENT else 1
    in_pass = {"residual, entropy": 2}.get(name, 1) if name in worker.TOGETHER else 0
    for rank in ranks:
        before, between, after = rank[f"kinds/{name}/calls"].view(4, 3).T
        assert (between - before).tolist() == [in_pass] * 4
        assert (after - between).tolist() == [in_update] * 3 + [0], "frozen, there is nothing to sum"


def test_revival_equals_one_process(ranks, alone):
    """Which latents are taken hangs on their bits. Those of a residual hang on the table's rounding, hence only on step 0."""
    for level in range(2):
        for key, value in of(alone, f"train/levels.{level}").items():
            torch.testing.assert_close(ranks[0][key], value, rtol=1e-5, atol=1e-5, msg=key)
    for key, value in of(alone, "train/first").items():
        torch.testing.assert_close(ranks[0][key], value, rtol=1e-5, atol=1e-5, msg=key)
    counted = [key for key in of(alone, "train/health") if key.endswith(("_0", "_1"))]  # of the first two levels
    assert len(counted) == 8 and all(ranks[0][key].equal(alone[key]) for key in counted)
    assert alone["train/health.window_last_0"].sum() >= 150, "no window was full: the test shows little"
    for results in (*ranks, alone):
        assert (results["train/revived"] > 10).all(), "nothing was revived: the test shows nothing"
    assert int(ranks[0]["train/levels.0.codebook.updates"]) == 5
    assert int(ranks[0]["train/health.samples"]) == 5 * 2 * 2 - 2, "rank 1 had no pass in step 3"


def test_all_levels_and_the_health_of_codebooks_share_one_collective(ranks):
    for rank in ranks:
        assert rank["train/calls"].tolist() == [n for step in range(5) for n in (step, step + 1)]
        assert {worker.COLLECTIVES[i] for i in rank["train/names"].tolist()} == {"all_reduce"}
        assert {worker.COLLECTIVES[i] for i in rank["kinds/names"].tolist()} == {"all_reduce"}
        assert {worker.COLLECTIVES[i] for i in rank["initialise/names"].tolist()} <= {"all_gather", "broadcast"}


def test_initialisation_equals_one_process(ranks, alone):
    names = {key.split("/")[1] for key in of(alone, "initialise/")}
    assert len(names) == 15
    for key, value in of(alone, "initialise/").items():
        torch.testing.assert_close(ranks[0][key], value, rtol=1e-4, atol=1e-5, msg=key)
    first, second = (alone[f"initialise/residual/layers.{layer}.codebook.embedding"] for layer in range(2))
    assert not first.equal(second) and bool(alone["initialise/scales/layers.0.codebook.initialised"])


def test_a_quantizer_built_before_the_group_is_synchronised(ranks):
    """The libraries that ask for a group when they are built train on local statistics for ever."""
    assert ranks[0]["early/table"].equal(ranks[1]["early/table"])


def test_bad_rows_of_one_process_are_refused_by_all(ranks):
    assert [rank["refused/raised"].tolist() for rank in ranks] == [[True] * 6] * 2
