"""A file or folder is whole or absent, whatever fails and whenever."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqtok import files

ROOT = Path(__file__).resolve().parents[1]


def names(folder: Path) -> set[str]:
    """Everything in a folder, hidden leftovers too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_written_is_read(tmp_path):
    files.write_bytes(tmp_path / "a" / "b" / "x.bin", b"\x00\xff")
    files.write_text(tmp_path / "t.txt", "zwölf ☂\n")
    files.write_json(str(tmp_path / "j.json"), {"größe": [1, 2.5, None]})
    assert (tmp_path / "a/b/x.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t.txt").read_bytes() == "zwölf ☂\n".encode()
    assert json.loads((tmp_path / "j.json").read_text("utf-8")) == {"größe": [1, 2.5, None]}
    assert (tmp_path / "j.json").read_bytes().endswith(b"}\n")
    files.write_text(tmp_path / "t.txt", "new")
    assert (tmp_path / "t.txt").read_text() == "new"
    assert names(tmp_path) == {"a", "a/b", "a/b/x.bin", "t.txt", "j.json"}


def test_modes_are_those_of_plain_files(tmp_path):
    """Temporary files are private; what is published beside others must be readable like the others."""
    files.write_text(tmp_path / "ours", "x")
    (tmp_path / "theirs").write_text("x")
    with files.new_folder(tmp_path / "our_folder"):
        pass
    (tmp_path / "their_folder").mkdir()
    for ours, theirs in (("ours", "theirs"), ("our_folder", "their_folder")):
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (ours, theirs)]
        assert modes[0] == modes[1]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failing", ["writer", "os.fsync", "os.replace", "os.chmod"])
def test_a_failed_file_keeps_the_previous_one(tmp_path, monkeypatch, existing, failing):
    path = tmp_path / "weights.bin"
    if existing:
        path.write_bytes(b"old")

    def write_half(temporary):
        Path(temporary).write_bytes(b"ne")
        if failing == "writer":
            full_disk()

    if failing != "writer":
        monkeypatch.setattr(os, failing.removeprefix("os."), full_disk)
    with pytest.raises(OSError, match="No space left on device. Nothing was changed") as caught:
        files.write_with(path, write_half)
    assert caught.value.errno == errno.ENOSPC and str(path) in str(caught.value)
    assert names(tmp_path) == ({"weights.bin"} if existing else set())
    assert not existing or path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [ValueError("bad value"), KeyboardInterrupt()])
def test_other_errors_of_a_writer_pass_and_leave_nothing(tmp_path, error):
    def write_half(temporary):
        Path(temporary).write_bytes(b"ne")
        raise error

    (tmp_path / "x").write_text("old")
    with pytest.raises(type(error)):
        files.write_with(tmp_path / "x", write_half)
    with pytest.raises(type(error)), files.new_folder(tmp_path / "folder") as folder:
        write_half(folder / "part")
    assert names(tmp_path) == {"x"} and (tmp_path / "x").read_text() == "old"


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    """A rename that overtakes the data leaves an empty file after a power cut."""
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append(os.fstat(descriptor).st_size), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("rename"), replace(*names)))
    files.write_bytes(tmp_path / "x", b"12345")
    assert order == [5, "rename"]
    order.clear()
    with files.new_folder(tmp_path / "folder") as folder:
        (folder / "sub").mkdir()
        (folder / "a").write_bytes(b"123")
        (folder / "sub" / "b").write_bytes(b"1234567")
    assert sorted(order[:-1]) == [3, 7] and order[-1] == "rename"


@pytest.mark.parametrize("place", ["a_file/x", "a_folder"])
def test_places_that_cannot_be_written_are_named(tmp_path, place):
    (tmp_path / "a_file").write_text("old")
    (tmp_path / "a_folder").mkdir()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / place))):
        files.write_text(tmp_path / place, "new")
    assert names(tmp_path) == {"a_file", "a_folder"}


def test_long_names(tmp_path):
    """The temporary name must not be the one that is too long."""
    name = "n" * 250
    files.write_text(tmp_path / name, "x")
    with files.new_folder(tmp_path / ("f" + name)):
        pass
    assert names(tmp_path) == {name, "f" + name}


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "tokenizer"
    for content in ("first", "second"):
        with files.new_folder(target) as folder:
            (folder / content).write_text(content)
            assert not target.exists() or names(target) == {"first"}
        assert names(tmp_path / "deep") == {"tokenizer", f"tokenizer/{content}"}


@pytest.mark.parametrize(
    ("existing", "failing"),
    [(existing, failing) for existing in (False, True) for failing in ("block", "sync", "chmod", "first rename")]
    + [(True, "second rename")],  # where nothing was before there is only one
)
def test_a_failed_folder_keeps_the_previous_one(tmp_path, monkeypatch, existing, failing):
    target = tmp_path / "tokenizer"
    if existing:
        with files.new_folder(target) as folder:
            (folder / "old").write_text("old")
    replace, seen = os.replace, []

    def fail_once(source, destination):
        seen.append(destination)
        if len(seen) == (2 if failing == "second rename" else 1):
            full_disk()
        replace(source, destination)

    if failing in ("sync", "chmod"):
        monkeypatch.setattr(os, {"sync": "fsync"}.get(failing, failing), full_disk)
    elif failing.endswith("rename"):
        monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match=f"could not write {re.escape(str(target))}: No space left"):  # noqa: SIM117
        with files.new_folder(target) as folder:
            (folder / "new").write_text("new")
            if failing == "block":
                full_disk()
    assert names(tmp_path) == ({"tokenizer", "tokenizer/old"} if existing else set())
    monkeypatch.undo()
    with files.new_folder(target) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == {"tokenizer", "tokenizer/new"}


def test_leftovers_of_a_killed_process_do_not_disturb(tmp_path):
    (tmp_path / ".tokenizer.old").mkdir()
    (tmp_path / ".tokenizer.old" / "x").write_text("x")
    for content in ("first", "second"):
        with files.new_folder(tmp_path / "tokenizer") as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == {"tokenizer", "tokenizer/second"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for content in ("first", "second", "third"):
        with files.new_folder(tmp_path / "link") as folder:
            (folder / content).write_text(content)
        assert (tmp_path / "link").is_symlink() and names(tmp_path) == {"link", "disk", f"disk/{content}"}


def test_a_file_in_the_way_of_a_folder_is_kept(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OSError, match="out: a file of that name is in the way"), files.new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == {"out"} and (tmp_path / "out").read_text() == "precious"


def test_the_reason_is_said_once_and_about_the_right_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.png") as caught, files.new_folder(tmp_path / "out"):
        (tmp_path / "nowhere.png").read_bytes()
    assert "could not write" not in str(caught.value), "nothing was wrong with the folder"
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="Nothing was changed") as caught, files.new_folder(tmp_path / "out") as folder:
        files.write_text(folder / "a.json", "x")
    assert str(caught.value).count("Nothing was changed") == 1 and f"write {tmp_path / 'out'}:" in str(caught.value)


def test_a_really_full_disk(tmp_path):
    """A process that may write 100 kB to a file saves 1 MB of weights over good ones, both ways, through safetensors."""
    script = """
import resource, signal, sys
import torch
from safetensors.torch import save_file
from vqtok import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG as an error, as a full disk would be
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder, weights = sys.argv[1], {"w": torch.ones(250_000)}
def by_folder():
    with files.new_folder(folder + "/checkpoint") as new:
        files.write_json(new / "state.json", {"step": 2})
        save_file(weights, new / "model.safetensors")
for save in (
    lambda: files.write_with(folder + "/model.safetensors", lambda path: save_file(weights, path)),
    lambda: files.write_bytes(folder + "/model.safetensors", bytes(1_000_000)),
    by_folder,
):
    try:
        save()
    except OSError as error:
        print(error)
"""
    good = {"w": torch.arange(4.0)}
    save_file(good, tmp_path / "model.safetensors")
    with files.new_folder(tmp_path / "checkpoint") as folder:
        files.write_json(folder / "state.json", {"step": 1})
        save_file(good, folder / "model.safetensors")
    before = names(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("could not write" in line and "File too large" in line for line in lines), (
        done.stdout
    )
    assert names(tmp_path) == before
    assert load_file(tmp_path / "model.safetensors")["w"].equal(good["w"])
    assert load_file(tmp_path / "checkpoint" / "model.safetensors")["w"].equal(good["w"])
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text()) == {"step": 1}
