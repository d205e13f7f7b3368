"""What vector-quantize-pytorch 1.32 and ours do in two processes: proofs of docs/differences.md."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity import peer_worker as worker

pytestmark = pytest.mark.parity

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes found: started once."""
    folder = tmp_path_factory.mktemp("peers")
    done = subprocess.run(
        [sys.executable, worker.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [load_file(folder / f"{rank}.safetensors") for rank in range(worker.WORLD)]


def test_whether_codebooks_are_joined_is_decided_when_they_are_built(ranks):
    """And remembered for those built later: after one that was built before the process group, none is joined unasked."""
    joined = worker.latents(worker.DIM).flatten(0, 1)[None]
    theirs, ours = worker.build_theirs().train(), worker.build_ours().train()
    theirs(joined)
    ours(joined)
    ours.update()
    for name in ("table/theirs", "table/theirs after"):
        assert (ranks[0][name] - ranks[1][name]).abs().max() > 1e-3, name
    for rank in ranks:
        torch.testing.assert_close(rank["table/theirs told"], theirs.codebook)
        torch.testing.assert_close(rank["table/ours"], ours.codebook.embedding)
    assert torch.equal(ranks[0]["table/ours"], ranks[1]["table/ours"])


def test_the_entropy_of_use_is_not_that_of_all_processes(ranks):
    """The reduced mean is thrown away and the local one divided by the number of processes: p / 2, with H(p / 2)."""
    both = worker.latents(worker.BITS)
    joined = worker.their_entropies(both.flatten(0, 1)[None])
    gradients = joined["gradient"].view_as(both)
    for rank, (found, z) in enumerate(zip(ranks, both, strict=True)):
        alone = worker.their_entropies(z[None])
        torch.testing.assert_close(found["theirs/entropy"], (alone["entropy"] + math.log(2)) / 2)
        assert (found["theirs/entropy"] - joined["entropy"]).abs() > 0.1
        # Data parallelism takes the mean over processes, so each should have twice the gradient of the joined batch.
        scale = gradients.abs().max()
        assert (found["theirs/gradient"][0] - 2 * gradients[rank]).abs().max() > 0.1 * scale
        torch.testing.assert_close(found["theirs/gradient"][0], alone["gradient"][0] / 2)


def test_our_entropy_loss_of_processes_adds_up_to_that_of_the_joined_batch(ranks):
    both = worker.latents(worker.BITS)
    joined = worker.our_entropies(both.flatten(0, 1)[None])
    for rank, found in enumerate(ranks):
        torch.testing.assert_close(
            found["ours/gradient"][0], 2 * joined["gradient"].view_as(both)[rank], atol=1e-7, rtol=1e-4
        )
    torch.testing.assert_close((ranks[0]["ours/loss"] + ranks[1]["ours/loss"]) / 2, joined["loss"])
