"""Processes that are killed anywhere leave whole shards or none, and many processes write the bytes of one."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.bulk.making import contents, parquet_shards, start
from vqtok import VQTokenizer, tokenize_dataset

pytestmark = pytest.mark.slow  # each process takes seconds to start


@pytest.fixture(scope="module")
def whole(saved, tmp_path_factory):
    """An input, and its codes as one process writes them: some seconds of work, so that a kill finds some left."""
    folder = tmp_path_factory.mktemp("whole")
    parquet_shards(folder / "in", 24, 80, lambda i: (64 + 8 * (i % 2), 64), broken=(3, 100))
    tokenize_dataset(folder / "in", folder / "out", VQTokenizer.from_pretrained(saved), batch_size=8)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_writes_the_same_bytes(whole, saved, tmp_path, processes):
    process = start(whole / "in", tmp_path / "out", "-t", saved, "--batch_size", 8, "--processes", processes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert contents(tmp_path / "out") == contents(whole / "out")


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_at_random_points_and_going_on_gives_the_same_bytes(whole, saved, tmp_path, processes):
    rng, out, kills = random.Random(processes), tmp_path / "out", 0
    arguments = (whole / "in", out, "-t", saved, "--batch_size", 8, "--processes", processes)
    while kills < 3:
        had = set(out.glob("codes-*.json"))
        process = start(*arguments)
        # The first file is written when the imports, most of the time, are over: from there on a kill meets work.
        while process.poll() is None and set(out.glob("codes-*.json")) == had:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)  # which one that has ended does not get
        _, err = process.communicate()
        if process.returncode == 0:  # the kill came too late: once more, from the start
            shutil.rmtree(out)
            continue
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
        for record in out.glob("codes-*.json"):  # whatever is finished is final
            assert record.read_bytes() == (whole / "out" / record.name).read_bytes()
    process = start(*arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert contents(out) == contents(whole / "out")


def test_a_member_that_is_killed_stops_the_run_and_says_so(whole, saved, tmp_path):
    process = start(whole / "in", tmp_path / "out", "-t", saved, "--batch_size", 8, "--processes", 2)
    deadline, members = time.monotonic() + 120, []
    while not members and time.monotonic() < deadline and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        members = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        time.sleep(0.05)
    os.kill(members[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and re.search("a process that encodes was killed by signal 9", err)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_same_command_started_twice_writes_each_shard_once(whole, saved, tmp_path):
    arguments = (whole / "in", tmp_path / "out", "-t", saved, "--batch_size", 8)
    both = [start(*arguments) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    shares = [int(re.search(r"encoded (\d+) samples", out)[1]) for out, _ in said]
    assert sum(shares) == 24 * 80 - 2 and contents(tmp_path / "out") == contents(whole / "out")
