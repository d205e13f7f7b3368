"""A tokenizer of sound goes to the Hub with what was measured and what can be heard, and comes back."""

import json
import re

import numpy as np
import pytest
import yaml

from tests.hub.loopback import MINE
from tests.tiny import assert_same_codes, make_audio_tokenizer, sound
from vqtok import VQTokenizer, cli
from vqtok.audio.files import write_file
from vqtok.evaluation import audio_report
from vqtok.files import write_json


@pytest.fixture
def home(tmp_path):
    """A folder as training leaves it, with discriminators."""
    folder = tmp_path / "out" / "voice"
    tokenizer = make_audio_tokenizer()
    tokenizer.save_pretrained(folder)
    clips = [{"audio": sound(3000, seed)[None], "sampling_rate": 8000} for seed in range(2)]
    write_json(folder / "metrics.json", audio_report.evaluate(tokenizer, clips, name="voice", speech=False))
    write_json(folder / "training.json", {"arguments": {"config": "audio/x", "max_steps": 7}, "history": []})
    for name in ("samples/reconstructions.wav", "samples/step-5.wav", "checkpoints/step-5/a.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, sound(400), 8000)
    (folder / "training").mkdir()
    (folder / "training" / "discriminator_config.json").write_text("{}")
    return folder


def test_a_tokenizer_of_sound_is_pushed_and_comes_back(hub, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", MINE)
    assert cli.main(["push", str(home), "me/voice"]) == 0
    assert "/me/voice" in capsys.readouterr().out
    files = hub.repos["me/voice"].files()
    three = {"config.json", "model.safetensors", "preprocessor_config.json"}
    extras = {"README.md", "metrics.json", "training.json", "samples/reconstructions.wav"}
    assert set(files) == {".gitattributes", *three, *extras, "training/discriminator_config.json"}
    there, here = VQTokenizer.from_pretrained("me/voice"), VQTokenizer.from_pretrained(home)
    assert there.verify() == here.fingerprint
    assert_same_codes(*(tok.encode(sound(999), sampling_rate=8000) for tok in (there, here)))

    card, metrics = files["README.md"].decode(), json.loads(files["metrics.json"])
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["pipeline_tag"] == "feature-extraction" and "audio-tokenization" in fields["tags"]
    figures = {each["type"]: each["value"] for each in fields["model-index"][0]["results"][0]["metrics"]}
    assert figures == {
        "si-sdr": round(metrics["si_sdr_db"], 4),
        "mel_distance": round(metrics["mel_distance"], 4),
    }
    assert "2.4 kbps at 8,000 Hz." in card and here.fingerprint in card
    assert '<audio controls src="samples/reconstructions.wav"></audio>' in card

    monkeypatch.chdir(tmp_path)
    write_file("voice.wav", sound(777), 8000)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names = {}
    exec(compile(code, "the card", "exec"), names)
    assert names["sounds"][0].shape == (777,) and names["sounds"][0].dtype == np.float32


def test_without_figures_the_card_still_knows_the_rate(hub):
    make_audio_tokenizer().push_to_hub("me/new", token=MINE)
    card = hub.repos["me/new"].files()["README.md"].decode()
    assert "2.4 kbps at 8,000 Hz." in card and "Measured" not in card and "None" not in card
