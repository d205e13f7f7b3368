"""The embedded recordings are those that were published, bit for bit, with licence and credit beside them."""

import csv
import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from vqtok.audio import words
from vqtok.audio.words import FOLDER, recordings, recordings_of

soundfile = pytest.importorskip("soundfile")
ROOT = Path(__file__).resolve().parents[2]


def _table():
    with (FOLDER / "words.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_word_has_the_samples_of_its_source():
    """The checksums were taken from the source files, each decoded alone."""
    rows = _table()
    assert len(rows) == len(recordings()) == 138
    everything, rate = soundfile.read(FOLDER / "words.flac", dtype="int16")
    assert rate == 16_000 and len(everything) == sum(int(row["num_samples"]) for row in rows)
    place = 0
    for row, recording in zip(rows, recordings(), strict=True):
        samples = everything[place : place + int(row["num_samples"])]
        place += len(samples)
        assert hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest() == row["sha256"], row["word"]
        assert (recording.word, recording.file) == (row["word"], row["file"])
        assert np.array_equal(recording.samples, samples)
        assert not recording.samples.flags.writeable


def test_the_words_are_those_of_the_transcripts():
    for row in _table():
        assert row["word"] == row["transcript"].removeprefix("letter ")
    assert len(recordings_of()) == 137
    assert [word for word, takes in recordings_of().items() if len(takes) > 1] == ["november"]


def test_the_spoken_part_holds_nearly_all_energy_and_begins_and_ends_in_it():
    for recording in recordings():
        energy = recording.samples.astype(np.float64) ** 2
        assert energy[recording.start : recording.stop].sum() > 0.9999 * energy.sum(), recording.word
        assert 0 <= recording.start < recording.stop <= len(recording.samples)
        assert 0.4 < (recording.stop - recording.start) / 16_000 < 1.2, recording.word


def test_a_damaged_recording_is_found(tmp_path, monkeypatch):
    for name in ("words.csv", "words.flac"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    everything, rate = soundfile.read(FOLDER / "words.flac", dtype="int16")
    everything[20_000] += 1  # in "one", the second word
    soundfile.write(tmp_path / "words.flac", everything, rate)
    monkeypatch.setattr(words, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="recording of 'one' .* is damaged"):
        recordings.__wrapped__()


def test_the_bundle_comes_with_licence_and_credit_and_stays_small():
    assert "Attribution-ShareAlike 3.0 Unported" in (FOLDER / "LICENSE.txt").read_text(encoding="utf-8")
    credit = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "Allison Smith" in credit and "Digium" in credit and "creativecommons.org/licenses/by-sa/3.0" in credit
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0 AND CC-BY-SA-3.0"
    assert all((ROOT / name).is_file() for name in project["license-files"])
    assert (FOLDER / "LICENSE.txt").relative_to(ROOT).as_posix() in project["license-files"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2.4e6


def test_the_bundling_script_makes_such_a_bundle(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    sounds = {"letters--b.flac": ("letter b", 50), "digits--7.flac": ("seven", 30)}
    rng = np.random.default_rng(0)
    table = ["file,transcript"]
    for name, (transcript, length) in sounds.items():
        soundfile.write(source / name, rng.integers(-9000, 9000, length).astype(np.int16), 16_000)
        table.append(f"{name},{transcript}")
    (source / "words.csv").write_text("\n".join(table))
    script = ROOT / "benchmarks" / "bundle_spoken_numbers.py"
    done = subprocess.run([sys.executable, script, source, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((out / "words.csv").open(encoding="utf-8")))
    assert [(row["word"], int(row["num_samples"])) for row in rows] == [("b", 50), ("seven", 30)]
    joined, _ = soundfile.read(out / "words.flac", dtype="int16")
    parts = [soundfile.read(source / name, dtype="int16")[0] for name in sounds]
    assert np.array_equal(joined, np.concatenate(parts))
    assert rows[1]["sha256"] == hashlib.sha256(parts[1].tobytes()).hexdigest()
