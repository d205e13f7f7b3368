"""From media to a prior: shards of codes are trained on, stopped in the middle of an epoch, on any number of processes."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from examples import train_prior
from tests.bulk.making import ROOT, parquet_shards
from vqtok import VQTokenizer, tokenize_dataset
from vqtok.prior.data import CodeDataset, prior_collate
from vqtok.training import StepSampler, step_loader

BACKBONE = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# Which samples lose their condition is drawn per process; without that, any number of processes has the same gradients.
RECIPE = {
    "model_type": "vqtok_prior",
    "vqtok_format": 1,
    "condition": "class",
    "condition_dropout": 0.0,
    "backbone_config": BACKBONE,
}
STEPS, BATCH = 9, 8


@pytest.fixture(scope="module")
def made(saved, tmp_path_factory):
    """Shards of pictures with labels, their codes, and a recipe."""
    folder = tmp_path_factory.mktemp("made")
    parquet_shards(folder / "in", 3, 20)
    tokenize_dataset(folder / "in", folder / "codes", VQTokenizer.from_pretrained(saved))
    (folder / "recipe").mkdir()
    (folder / "recipe" / "config.json").write_text(json.dumps(RECIPE))
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def flags(made, saved, output):
    given = {"config": made / "recipe", "tokenizer": saved, "codes": made / "codes", "output_dir": output}
    given |= {"max_steps": STEPS, "batch_size": BATCH, "save_every": 2, "log_every": 3, "warmup_steps": 1}
    given |= {"mixed_precision": "no", "num_threads": 1}
    return [str(each) for name, value in given.items() for each in (f"--{name}", value)]


def test_a_run_that_stops_in_the_middle_of_an_epoch_goes_on_with_the_samples_it_would_have_had(
    made, saved, tmp_path, monkeypatch
):
    read, plain = [], CodeDataset.__getitem__
    stop_at = None

    def watched(data, index):
        if index % 50:  # every 50th is held out
            if len(read) == stop_at:
                raise RuntimeError("stopped")
            read.append(index)
        return plain(data, index)

    monkeypatch.setattr(CodeDataset, "__getitem__", watched)

    def run(folder):
        read.clear()
        train_prior.main(flags(made, saved, folder))
        AcceleratorState._reset_state(reset_partial_state=True)
        return load_file(folder / "model.safetensors"), list(read)

    whole, order = run(tmp_path / "whole")
    assert len(order) == STEPS * BATCH and len(set(order[:58])) == 58 == len(set(order)), "an epoch, and a part of one"
    stop_at = 4 * BATCH + 3  # inside step 5; steps 2 and 4 are saved
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "cut")
    stop_at = None
    again, rest = run(tmp_path / "cut")
    assert rest == order[4 * BATCH :]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def batches(folder, rank=0, world_size=1, start=0):
    data = CodeDataset(folder)
    sampler = StepSampler(data.groups(), BATCH, STEPS, 3, start, rank, world_size)
    return list(step_loader(data, prior_collate(lambda item: [item["label"]]), sampler))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one["codes"], other["codes"], strict=True)) and torch.equal(
        one["condition_ids"], other["condition_ids"]
    )


def test_any_number_of_processes_sees_the_same_samples(made):
    whole = batches(made / "codes")
    assert all(same(a, b) for a, b in zip(batches(made / "codes", start=5), whole[5:], strict=True))
    for world_size in (2, 4):
        for rank in range(world_size):
            for mine, everything in zip(batches(made / "codes", rank, world_size), whole, strict=True):
                share = {
                    "codes": [level[rank::world_size] for level in everything["codes"]],
                    "condition_ids": everything["condition_ids"][rank::world_size],
                }
                assert same(mine, share)


def test_a_cache_goes_to_a_process_that_loads_for_another(made):
    data = CodeDataset(made / "codes")
    again = pickle.loads(pickle.dumps(data))
    for index in (0, 33, 59):
        assert all(torch.equal(a, b) for a, b in zip(data[index]["codes"], again[index]["codes"], strict=True))


@pytest.mark.slow
def test_two_processes_end_where_one_ends(made, saved, tmp_path):
    train_prior.main(flags(made, saved, tmp_path / "one"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]  # fmt: skip
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    script = [str(ROOT / "examples/train_prior.py"), *flags(made, saved, tmp_path / "two")]
    done = subprocess.run([*launch, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
