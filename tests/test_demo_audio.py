"""The demo of sound, tiny: every stage, every file, every key; the figures themselves are measured by `make demo-audio`."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import demo_audio
from vqtok import VQPipeline, VQTokenizer
from vqtok.audio.phrases import phrase_split
from vqtok.evaluation.html import Page

soundfile = pytest.importorskip("soundfile")
ROOT = Path(__file__).resolve().parent.parent


def scores(right, asked, **edits):
    names = ("num_substitutions", "num_deletions", "num_insertions")
    counts = {**dict.fromkeys(names, 0), **edits, "num_words": asked, "num_phrases": 2}
    return {**counts, "word_accuracy": right / asked, "words_recognised": right / asked, "phrase_accuracy": 0.5}


def test_the_page_says_which_words_were_missed_and_what_goal():
    metrics = {
        "judged": {"real": scores(4, 4), "reconstructed": scores(4, 4), "spoken": scores(3, 4, num_substitutions=1)},
        "by_word": {
            "reconstructed": {"<six>": (2, 2), "two": (2, 2)},
            "spoken": {"<six>": (1, 2), "two": (2, 2)},
        },
        **{"num_judged": 2, "num_different_phrases": 77, "word_accuracy": 0.75, "kbps": 1.6, "codes_per_second": 200.0},
        **{"pesq_wb": None, "stoi": 0.8123, "si_sdr_db": -3.0, "mel_distance": 0.5, "nats_per_code": [1.0]},
        **{"usage": [[0.5, 0.25]], "perplexity": [[9.0, 8.0]], "ln_codebook_size": [5.545]},
        **{"seeds": {"judged": 1}, "spoken_seconds_per_second": 12.0, "seconds_per_stage": {"start": 30.0, "x": 570.6}},
    }
    page = Page("title", "lead")
    demo_audio._figures(page, metrics)
    demo_audio._add_times(page, metrics | {"minutes": 10.01})
    text = page.render()
    assert "Of 2 different words these 1 were missed" in text and "&lt;six&gt;" in text and "<six>" not in text
    assert text.count("class='missed'") == 2 and "600.6" in text, "a goal of words and one of minutes"
    assert (
        "75.0%" in text and "1 / 0 / 0" in text and "77 different" in text and "0.8123" in text and "PESQ" not in text
    )
    assert "CC-BY-SA" in text
    metrics["by_word"]["spoken"] = metrics["by_word"]["reconstructed"]
    page = Page("title", "lead")
    demo_audio._figures(page, metrics | {"word_accuracy": 0.9})
    demo_audio._add_times(page, metrics | {"minutes": 10.0})
    text = page.render()
    assert "All 2 different words were recognised" in text and "class='missed'" not in text


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """A codec and a prior of almost no size."""
    folder = tmp_path_factory.mktemp("recipes")
    codec = json.loads((ROOT / "tokenizers_configs/audio/spoken-16khz/config.json").read_text())
    extractor = json.loads((ROOT / "tokenizers_configs/audio/spoken-16khz/preprocessor_config.json").read_text())
    codec |= {"hidden_sizes": [4] * len(codec["hidden_sizes"]), "latent_size": 4, "dilations": [1]}
    codec["quantizer"] = {"type": "residual", "num_codebooks": 2, "layer": {"type": "vector", "codebook_size": 16}}
    prior = json.loads((ROOT / "tokenizers_configs/prior/spoken/config.json").read_text())
    prior["backbone_config"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    prior["backbone_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    training = json.loads((ROOT / "tokenizers_configs/prior/spoken/training.json").read_text())
    for name, files in {
        "codec": {
            "config": codec,
            "preprocessor_config": extractor,
            "training": {"batch_size": 2, "eval_samples": 2, "num_samples": 8},
        },
        "prior": {"config": prior, "training": {**training, "batch_size": 8, "attn_implementation": "eager"}},
    }.items():
        (folder / name).mkdir()
        for file, value in files.items():
            (folder / name / f"{file}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.slow
def test_the_demo_makes_everything_it_promises_and_continues(recipes, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path), "--tokenizer", str(recipes / "codec"), "--prior", str(recipes / "prior")]
    flags += ["--tokenizer_steps", "3", "--prior_steps", "3", "--num_phrases", "600", "--num_judged", "6"]
    metrics = demo_audio.main([*flags, "--num_threads", "1"])
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["judged"]["real"]["word_accuracy"] == 1.0 and metrics["num_judged"] == 6
    assert metrics["judged"]["spoken"]["num_words"] == metrics["judged"]["real"]["num_words"]
    assert len(metrics["usage"][0]) == 2 and metrics["kbps"] > 0
    assert set(metrics["seconds_per_stage"]) == {
        *("start", "train the codec", "encode train", "encode test", "train the prior", "speak and judge", "report"),
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page and "one recording" in page and "Allison Smith" in page
    players = re.findall(r"data:audio/flac;base64,([A-Za-z0-9+/=]+)", page)
    assert len(players) == 3 * 5 + 6 and page.count("data:image/png;base64,") == 5 + 3
    spoken, rate = soundfile.read(io.BytesIO(base64.b64decode(players[2])))
    again, _ = soundfile.read(tmp_path / "spoken" / "000.wav")
    assert rate == 16_000 and np.array_equal(spoken, again)

    # Another process says the same words from the saved folder.
    tokenizer = VQTokenizer.from_pretrained(tmp_path / "tokenizer")
    pipeline = VQPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.vq_tokenizer.fingerprint == tokenizer.fingerprint and pipeline.sampling_rate == 16_000
    prompt = re.search(r'generate \S+ "([^"]+)"', capsys.readouterr().out)[1]
    assert phrase_split(prompt) == "test"
    here = pipeline([prompt], seed=1)[0]
    assert here.ndim == 1 and here.dtype == np.float32 and np.isfinite(here).all()
    command = [sys.executable, "-m", "vqtok.cli", "generate", str(tmp_path / "pipeline"), prompt, "--seed", "1"]
    subprocess.run([*command, "--output_dir", str(tmp_path / "mine")], check=True, capture_output=True)
    (made,) = (tmp_path / "mine").glob("*.wav")
    there, rate = soundfile.read(made, dtype="float32")
    assert rate == 16_000 and there.shape == here.shape and np.abs(there - here.clip(-1, 1)).max() < 1e-3
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert f'["{prompt}"]' in card and "| word accuracy |" in card and str(tmp_path) not in card

    before = (tmp_path / "tokenizer" / "model.safetensors").stat().st_mtime
    more = demo_audio.main([*flags, "--num_threads", "1"])
    assert (tmp_path / "tokenizer" / "model.safetensors").stat().st_mtime == before
    assert more["judged"] == metrics["judged"]
