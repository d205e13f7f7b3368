"""The loop on a tiny real tokenizer: resume, accumulation, stopping, averaging, bad luck."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from vqtok.image import ImageVQConfig, ImageVQModel
from vqtok.training import StepSampler, Stopped, TokenizerStep, TrainingArguments, WeightAverage, fit, step_loader
from vqtok.training.checkpoint import checkpoints
from vqtok.training.loop import learning_rate

TINY = {
    "strides": [4, 2],
    "quantizer": {"type": "vector", "codebook_size": 8},
    "latent_size": 4,
    "hidden_size": 8,
    "residual_size": 4,
    "num_residual_layers": 1,
}


class Pictures(torch.utils.data.Dataset):
    """Real tensors, made from their number."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index)) * 2 - 1


def run(folder, *, accelerator=None, model=None, break_at=None, evaluate=None, pictures=None, extra=None, **options):
    """Train; return the model's weights. `break_at` raises an error before that step, as a crash would."""
    settings = {
        "max_steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "save_every": 2,
        "log_every": 2,
    }
    args = TrainingArguments(output_dir=str(folder), average_decay=0.9, **{**settings, **options})
    torch.manual_seed(0)
    model = model or ImageVQModel(ImageVQConfig(**TINY, level_dropout=0.5))
    pictures = pictures or Pictures()

    class Step(TokenizerStep):
        number = 0

        def __call__(self, batches, rate):
            if break_at is not None and self.number == break_at:
                raise RuntimeError("crash")
            self.number += 1
            return super().__call__(batches, rate)

    accelerator = accelerator or Accelerator(cpu=True)
    step = Step(accelerator, model, args)

    def loader(start):
        sampler = StepSampler([np.arange(len(pictures))], args.batch_size, args.max_steps, args.seed, start,
                              accelerator.process_index, accelerator.num_processes, args.gradient_accumulation_steps)  # fmt: skip
        return step_loader(pictures, torch.stack, sampler)

    history = fit(accelerator, step, loader, args, evaluate=evaluate, extra_arguments=extra)
    return {name: value.clone() for name, value in model.state_dict().items()}, history


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_crash_anywhere_and_the_same_command_again_ends_with_equal_weights(tmp_path):
    whole, history = run(tmp_path / "whole")
    for crash in (1, 3, 5):
        with pytest.raises(RuntimeError, match="crash"):
            run(tmp_path / f"cut{crash}", break_at=crash)
        again, resumed = run(tmp_path / f"cut{crash}")
        assert_equal(whole, again)
        assert resumed == history
    initial = ImageVQModel(ImageVQConfig(**TINY)).state_dict()
    assert any(not torch.equal(whole[name], initial[name]) for name in whole)


def test_the_seconds_of_a_run_count_those_before_an_interruption(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("vqtok.training.loop.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))

    def seconds(folder):
        return json.loads((checkpoints(folder / "checkpoints")[-1] / "state.json").read_text())["seconds"]

    run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "cut", break_at=3)
    before = seconds(tmp_path / "cut")
    run(tmp_path / "cut")
    assert 0 < before < seconds(tmp_path / "whole") <= seconds(tmp_path / "cut")


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    first, _ = run(tmp_path)
    again, _ = run(tmp_path)
    assert_equal(first, again)


def test_interrupt_finishes_the_step_saves_and_continues_to_equal_weights(tmp_path):
    whole, _ = run(tmp_path / "whole")
    sent = []

    class Interrupting(Pictures):
        def __getitem__(self, index):
            if checkpoints(tmp_path / "cut" / "checkpoints") and not sent:
                sent.append(True)
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    with pytest.raises(Stopped, match="the same command continues"):
        run(tmp_path / "cut", pictures=Interrupting())
    assert [path.name for path in checkpoints(tmp_path / "cut" / "checkpoints")] == ["step-2", "step-3"]
    again, _ = run(tmp_path / "cut")
    assert_equal(whole, again)


def test_changed_arguments_are_named_and_refused(tmp_path):
    run(tmp_path, max_steps=2, extra={"dataset": "a"})
    with pytest.raises(ValueError, match="learning_rate was 0.01, now 0.02"):
        run(tmp_path, max_steps=2, learning_rate=0.02, extra={"dataset": "a"})
    with pytest.raises(ValueError, match="dataset was 'a', now 'b'"):
        run(tmp_path, max_steps=2, extra={"dataset": "b"})
    run(tmp_path, max_steps=2, log_every=1, extra={"dataset": "a"})  # changes no number


def test_arguments_that_json_writes_otherwise_are_the_same_run(tmp_path):
    extra = {"model": {"id2label": {0: "a"}, "strides": (4, 2)}}
    first, _ = run(tmp_path, max_steps=2, extra=extra)
    again, _ = run(tmp_path, max_steps=2, extra=extra)
    assert_equal(first, again)


def test_only_the_newest_checkpoints_stay_and_half_written_ones_do_not_count(tmp_path):
    run(tmp_path, max_steps=6, save_every=1, keep_checkpoints=2)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step-5", "step-6"]
    (folder / "step-7").mkdir()
    assert [path.name for path in checkpoints(folder)] == ["step-5", "step-6"]
    assert not list(folder.glob(".*"))


def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run_continues_from_it(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole")
    real = torch.save

    def full(value, path, *args, **kwargs):
        if "step-4" in str(path):
            raise OSError(28, "No space left on device")
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device. Earlier checkpoints are whole"):
        run(tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.setattr(torch, "save", real)
    again, _ = run(tmp_path / "cut")
    assert_equal(whole, again)


def first_step(accelerator, parts):
    """One step on the batch of all pictures, cut into parts; gradients (as Adam's first moment / 0.1) and the codebooks after it."""
    args = TrainingArguments(output_dir="unused", max_grad_norm=0.0)
    torch.manual_seed(1)
    step = TokenizerStep(accelerator, ImageVQModel(ImageVQConfig(**TINY, level_dropout=0.0)), args)
    pictures = torch.stack([Pictures()[i] for i in range(24)])[accelerator.process_index :: accelerator.num_processes]
    step.begin(iter(pictures.split(4)))
    step.prepared.train()
    step(pictures.split(len(pictures) // parts), 1e-3)
    moments = {
        name: step.optimizer.state[p]["exp_avg"] / 0.1
        for name, p in step.model.named_parameters()
        if p in step.optimizer.state
    }
    assert len(moments) > 10 and all(bool(value.any()) for name, value in moments.items() if name != "decoder.null")
    return {**moments, **dict(step.model.quantizer.named_buffers())}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulation_equals_the_large_batch():
    assert_close(first_step(Accelerator(cpu=True), 4), first_step(Accelerator(cpu=True), 1))


def test_evaluation_leaves_the_numbers_of_the_run_alone(tmp_path):
    seen = []

    def evaluate(step):
        seen.append(step)
        torch.rand(17)
        return {"loss": -float(len(seen))}  # the averaged weights, measured last, always measure better

    plain, _ = run(tmp_path / "plain")
    measured, history = run(tmp_path / "measured", evaluate=evaluate, eval_every=2)
    assert_equal(plain, measured)
    assert seen == [2, 4, 6, 6]
    assert [record["step"] for record in history if "eval_loss" in record] == [2, 4]


def test_averaged_weights_that_measure_worse_are_not_published(tmp_path):
    seen = []

    def evaluate(step):
        seen.append(step)
        return {"loss": float(len(seen))}

    averaged, _ = run(tmp_path / "plain")
    raw, history = run(tmp_path / "measured", evaluate=evaluate)
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    assert history[-1]["eval_loss_raw"] < history[-1]["eval_loss_averaged"]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    class Broken(Pictures):
        def __getitem__(self, index):
            return super().__getitem__(index) * 1e30

    model = ImageVQModel(ImageVQConfig(**TINY))
    with pytest.raises((FloatingPointError, ValueError), match="learning rate|--learning_rate"):
        run(tmp_path, model=model, pictures=Broken())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_learning_rate_by_hand():
    args = TrainingArguments(output_dir="x", max_steps=110, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.1)
    assert learning_rate(5, args) == 1.0
    assert learning_rate(10, args) == 2.0
    assert learning_rate(60, args) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(110, args) == pytest.approx(0.2)


def test_weight_average_by_hand():
    layer = torch.nn.BatchNorm1d(1)
    average = WeightAverage(layer, 0.5)
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.running_mean.fill_(7.0)
    average.update(layer)  # decay min(0.5, 1/10)
    assert float(average.values["weight"]) == pytest.approx(0.1 * 1 + 0.9 * 3)
    assert float(average.values["running_mean"]) == 7.0
    with average.applied(layer):
        assert layer.weight.item() == pytest.approx(2.8)
    assert layer.weight.item() == 3.0


TWO_PROCESSES = """
    import sys, torch
    sys.path[:0] = [{root!r}, {root!r} + "/tests/training"]
    torch.set_num_threads(1)
    from test_loop import first_step, run
    from vqtok.training import TrainingArguments
    from vqtok.training.setup import finish, make_accelerator
    accelerator = make_accelerator(TrainingArguments(output_dir=sys.argv[1]))
    rank = accelerator.process_index
    torch.save([first_step(accelerator, 2), run(sys.argv[1], accelerator=accelerator)[0]], sys.argv[1] + f"/rank{{rank}}.pt")
    finish(accelerator)
"""


@pytest.mark.slow
def test_two_processes_equal_each_other_and_one_process(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES).format(root=root))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]  # fmt: skip
    done = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (step_0, weights_0), (step_1, weights_1) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert_equal(weights_0, weights_1)  # codebooks among them
    assert_equal(step_0, step_1)
    assert_close(step_0, first_step(Accelerator(cpu=True), 1))
