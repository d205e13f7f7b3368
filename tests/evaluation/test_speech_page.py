"""The page about trained codecs of speech: what stands in it, and that nothing is measured on what was trained on."""

import json
import re

import pytest
from PIL import Image

from benchmarks import speech
from tests.tiny import make_audio_tokenizer, sound
from vqtok.audio.data import load_audio
from vqtok.audio.files import write_file
from vqtok.evaluation.audio_report import PUBLISHED, evaluate

pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")
NAMES = ("first", "second", "third")
ARGUMENTS = {"config": "audio/x", "max_steps": 4000, "batch_size": 8, "seconds": 0.5, "num_threads": 1}


@pytest.fixture
def place(tmp_path):
    """A folder of speech and a tokenizer that was trained on a part of it."""
    (tmp_path / "voices").mkdir()
    for seed, name in enumerate(NAMES):
        write_file(tmp_path / "voices" / f"{name}.wav", sound(12_000, seed)[None], 8000)
    make_audio_tokenizer().save_pretrained(tmp_path / "codec")
    training = {"arguments": {**ARGUMENTS, "holdout": ["second", "third"]}, "seconds": 600.0, "history": []}
    (tmp_path / "codec" / "training.json").write_text(json.dumps(training))
    return tmp_path


def run(place, *flags):
    given = [
        "--tokenizer",
        str(place / "codec"),
        "--dataset",
        str(place / "voices"),
        "--num_codebooks",
        "1",
        "3",
        *flags,
    ]
    return speech.main(given)


def test_the_page_has_what_was_measured_and_no_path(place):
    results = run(place, "--report", str(place / "page.md"), "--credit", "Spoken by a sine.")
    page = (place / "page.md").read_text()
    assert str(place) not in page and "`voices`. Spoken by a sine. Measured on 2 recordings, 3 s," in page
    held_out = load_audio(str(place / "voices"), 8000, 1, "test", holdout=["second", "third"])
    for number, result in zip((1, 3), results, strict=True):
        again = evaluate(speech.VQTokenizer.from_pretrained(place / "codec"), held_out, num_codebooks=number)
        assert result["mel_distance"] == again["mel_distance"] and result["data"] == again["data"]
        (row,) = re.findall(rf"^\| codec \| {number} \| [\d.]+ \| [\d.]+ \|.*$", page, re.M)
        assert f"| {result['mel_distance']:.2f} |" in row and f"| {result['kbps']['file']:.3f} |" in row
    assert results[0]["mel_distance"] != results[1]["mel_distance"]
    assert len(re.findall(r"^\| .*, published \|", page, re.M)) == len(PUBLISHED)
    assert len(re.findall(r"^\| codec \| \d \| [\d.]+ % \|", page, re.M)) == 3, "a row per codebook"
    assert "4,000 steps of 8 crops of 0.5 s in 10 minutes with 1 thread, without discriminators; 4.4 hours" in page
    assert "`second`, `third`" in page and Image.open(place / "page.png").height > 300


def test_files_that_were_trained_on_are_refused(place):
    with pytest.raises(ValueError, match="codec was trained on first"):
        run(place, "--holdout", "first", "second")
    (place / "codec" / "training.json").unlink()
    with pytest.raises(ValueError, match="name them with --holdout"):
        run(place)


def test_goals_are_asked_of_codes_of_their_rate_alone():
    def result(name, number, pesq):
        layout = {"levels": [{"stride": 320, "num_codebooks": 12, "codebook_size": 1024}]}
        return {
            "name": name,
            "num_codebooks": number,
            "pesq_wb": pesq,
            "stoi": 0.9,
            "tokenizer": {"layout": layout, "sampling_rate": 16_000},
        }

    rows = speech.goal_rows([result("a", 3, 1.5), result("a", 6, 3.0), result("b", None, 2.9), result("c", 12, None)])
    assert [(row[0].split(":")[0], row[2], row[3]) for row in rows] == [
        ("a, 1.5 kbps", "1.500", "**no**"),
        ("a, 1.5 kbps", "0.900", "yes"),
        ("b, 6 kbps", "2.900", "yes"),
        ("c, 6 kbps", "-", "not measured"),
        ("b, 6 kbps", "0.900", "**no**"),
        ("c, 6 kbps", "0.900", "**no**"),
    ]
