"""The README runs: every Python block, every command it names exists, every file it links to is there."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from typer.testing import CliRunner

from examples import train_prior, train_tokenizer
from tests.hub.loopback import MINE
from vqtok.cli import app, main

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = [line for line in re.findall(r"^    (vqtok .*)$", TEXT, re.M) if not line.startswith("vqtok push")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as `make demo` leaves it, but tiny, with a cat."""
    folder = tmp_path_factory.mktemp("readme")
    quick = [
        "--max_steps",
        "2",
        "--batch_size",
        "4",
        "--num_samples",
        "40",
        "--num_threads",
        "1",
        "--mixed_precision",
        "no",
    ]
    for name in ("demo/tokenizer", "out/vq"):
        flags = ["--config", "image/vqvae2-digits", "--eval_samples", "8", "--output_dir", str(folder / name)]
        train_tokenizer.main([*flags, *quick])
        AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--config", "prior/digits", "--tokenizer", str(folder / "demo/tokenizer"), "--eval_samples", "8"]
    train_prior.main([*flags, *quick, "--output_dir", str(folder / "demo/pipeline")])
    AcceleratorState._reset_state(reset_partial_state=True)
    Image.effect_noise((45, 38), 60).convert("RGB").save(folder / "cat.png")
    (folder / "photos").mkdir()
    for i in range(60):
        Image.effect_noise((32, 32), 60).convert("RGB").save(folder / "photos" / f"{i}.png")
    return folder


def test_there_is_something_to_run():
    assert len(BLOCKS) == 2 and len(COMMANDS) == 6


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run(index, home, monkeypatch):
    monkeypatch.chdir(home)
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), {})


def test_commands_run(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "cat.vq").unlink(missing_ok=True)  # of the Python block; the command never overwrites unasked
    for command in COMMANDS:
        # All of its test pictures would take half a minute, and show nothing more.
        fewer = ["--num_samples", "40"] if command.endswith(" digits") else []
        result = CliRunner().invoke(app, [*shlex.split(command)[1:], *fewer])
        assert result.exit_code == 0, (command, result.output, result.exception)
    assert Image.open("back.png").size == (45, 38)


def test_the_line_that_publishes_runs(hub, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_TOKEN", MINE)
    shutil.copytree("demo/pipeline", "out/pipeline", dirs_exist_ok=True)
    (command,) = re.findall(r"^    (vqtok push out/.*)$", TEXT, re.M)
    assert main(shlex.split(command)[1:]) == 0
    assert hub.repos["me/my-dalle"].private and "samples/samples.png" in hub.repos["me/my-dalle"].files()


def test_training_lines_run(home, monkeypatch):
    """As they stand, on captioned pictures of 32 pixels, with fewer steps."""
    monkeypatch.chdir(home)
    pictures = sorted(path.name for path in Path("photos").glob("*.png"))
    Path("photos/metadata.csv").write_text("file_name,text\n" + "".join(f"{name},a red bicycle\n" for name in pictures))
    lines = re.findall(r"^    (?:accelerate launch|python) examples/(\w+)\.py (.*)$", TEXT, re.M)
    assert [name for name, _ in lines] == ["train_tokenizer", "train_prior", "generate"]
    shutil.rmtree("out")
    for name, flags in lines:
        short = (
            []
            if name == "generate"
            else ["--max_steps", "2", "--batch_size", "2", "--num_threads", "1", "--mixed_precision", "no"]
        )
        importlib.import_module(f"examples.{name}").main([*shlex.split(flags), *short])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert Path("out/pictures/sheet.png").exists()


def test_links_and_flags_exist():
    links = re.findall(r"\]\(((?!http)[^)#]+)", TEXT)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []
    for script, flags in re.findall(r"(examples/\w+\.py)([^\n]*)", TEXT):
        source = (ROOT / script).read_text() + (ROOT / "vqtok/training/arguments.py").read_text()
        assert [flag for flag in re.findall(r"--(\w+)", flags) if f"{flag}:" not in source] == [], script
    targets = re.findall(r"^    make ([\w-]+)", TEXT, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "demo-audio", "test"] and all(f"\n{target}:" in makefile for target in targets)
