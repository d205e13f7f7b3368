"""What the demos share: stages are timed, not repeated, and remembered by the next process."""

import json
import sys

import pytest

from vqtok.evaluation.stages import Stages, launch, record_judged

pytest.importorskip("psutil")


def test_a_finished_stage_is_not_repeated_and_its_time_is_kept(tmp_path, capsys):
    done = []
    first = Stages(tmp_path / "progress.json")
    first.run("one", lambda: done.append(1))
    with pytest.raises(ZeroDivisionError):
        first.run("two", lambda: 1 / 0)
    assert first.done == ["one"] and set(first.spent) == {"start", "one", "two"} and first.spent["start"] > 0

    second = Stages(tmp_path / "progress.json")
    second.run("one", lambda: done.append(1))
    second.run("two", lambda: done.append(2))
    assert done == [1, 2] and second.done == ["one", "two"]
    assert second.spent["one"] == first.spent["one"] and second.spent["two"] >= first.spent["two"]
    assert second.spent["start"] > first.spent["start"], "both processes started"
    assert second.seconds == pytest.approx(sum(second.spent.values()))
    second.forget("two", "never there")
    assert set(second.spent) == {"start", "one"}
    assert capsys.readouterr().out.split() == ["==", "one", "==", "two", "==", "two"]
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == ["one", "two"]


@pytest.mark.parametrize(("steps", "flags"), [(0, []), (6, ["--max_steps", "6", "--warmup_steps", "1"])])
def test_a_script_is_launched_with_its_flags(steps, flags, tmp_path, monkeypatch):
    """accelerate itself would need ten seconds; what it is given is looked at."""
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexit $(cat {tmp_path}/status)\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "status").write_text("0")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    launch(tmp_path / "train.py", tmp_path / "out", ["--config", "x"], num_threads=3, max_steps=steps)
    said = (tmp_path / "said").read_text().split()
    script = said.index(str(tmp_path / "train.py"))
    assert said[script + 1 :] == ["--output_dir", str(tmp_path / "out"), "--num_threads", "3", "--config", "x", *flags]
    assert said[said.index("--num_cpu_threads_per_process") + 1] == "3"
    (tmp_path / "status").write_text("7")
    with pytest.raises(SystemExit) as error:
        launch(tmp_path / "train.py", tmp_path / "out", [])
    assert error.value.code == 7


def test_what_was_judged_reaches_the_figures_and_the_card(tmp_path):
    folder = tmp_path / "demo" / "pipeline"
    folder.mkdir(parents=True)
    metrics = {"nats_per_code": [1.5], "ln_codebook_size": [5.5], "prior_bits_per_second": 400.0, "held_out_samples": 9}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "training.json").write_text(json.dumps({"arguments": {"max_steps": 7}}))
    record_judged(folder, {"word_accuracy": 0.9375, "num_judged": 100}, "monday july third", "audio")
    card = (folder / "README.md").read_text()
    assert "# demo/pipeline" in card and "| word accuracy | 0.9375 |" in card and '["monday july third"]' in card
    assert "text-to-audio" in card and "| max_steps | 7 |" in card
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["judged"]["num_judged"] == 100 and stored["nats_per_code"] == [1.5]
