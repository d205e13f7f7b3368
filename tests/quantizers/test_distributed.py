"""Two processes equal one on the joined batch, with one collective per update."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.quantizers import distributed_worker as worker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each of two gloo processes found: started once, about five seconds."""
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
        for key, value in scenario(lambda rows, split: rows, []).items()
    }


def test_both_processes_agree_bit_for_bit(ranks):
    compared = [name for name in ranks[0] if "embedding" in name or "counts" in name]
    assert len(compared) == 12
    assert all(ranks[0][name].equal(ranks[1][name]) for name in compared)


def test_training_equals_one_process(ranks, alone):
    for level in range(2):
        name = f"train/levels.{level}.codebook."
        assert ranks[0][name + "counts"].equal(alone[name + "counts"])
        assert int(ranks[0][name + "updates"]) == 5
        torch.testing.assert_close(ranks[0][name + "embedding"], alone[name + "embedding"], rtol=1e-6, atol=1e-6)


def test_the_training_revived_codes(alone):
    """Otherwise the test above says nothing about revival: some rows of the table are latents, bit for bit."""
    seen = torch.cat([worker.batches(10 * step + micro, 60) for step in range(5) for micro in range(2)])
    table = alone["train/levels.0.codebook.embedding"]
    assert sum(any(row.equal(latent) for latent in seen) for row in table) >= 4


def test_initialisation_equals_one_process(ranks, alone):
    for scenario in ("initialise", "one_without_rows"):
        name = f"{scenario}/levels.0.codebook.embedding"
        assert ranks[0][name].equal(alone[name]) and ranks[1][name].equal(alone[name])
    assert not alone["initialise/levels.0.codebook.embedding"].equal(alone["initialise/levels.1.codebook.embedding"])


def test_one_collective_per_update_for_all_levels_and_none_in_a_pass(ranks):
    """moshi averages inside the loop over layers, so that layer 1 is averaged once per layer (style.md 2.9, defect 9)."""
    for rank in ranks:
        calls = rank["train/calls"].tolist()
        assert calls == [n for step in range(5) for n in (step, step + 1)]
        names = [worker.COLLECTIVES[i] for i in rank["names"].tolist()]
        assert names[:5] == ["all_reduce"] * 5
        assert set(names[5:]) == {"all_gather", "broadcast"}


def test_a_quantizer_built_before_the_group_is_synchronised(ranks):
    """The libraries that ask for a group when they are built train on local statistics for ever."""
    assert ranks[0]["early/table"].equal(ranks[1]["early/table"])


def test_bad_rows_of_one_process_are_refused_by_all(ranks):
    assert [rank["refused/raised"].tolist() for rank in ranks] == [[True, True]] * 2
