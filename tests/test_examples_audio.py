"""The training script on sound: plain, against discriminators, stopped and continued, and from what was published."""

import json
import shutil
import sys

import numpy as np
import pytest
import soundfile
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from examples import encode_dataset, generate, train_prior, train_tokenizer
from tests.tiny import AUDIO_CONFIG, make_audio_tokenizer, sound
from tests.tiny_codecs import save_codec
from vqtok import VQPipeline, VQTokenizer
from vqtok.audio.discriminators import load_discriminator
from vqtok.prior.data import CodeDataset

QUICK = ["--max_steps", "4", "--batch_size", "4", "--num_threads", "1", "--warmup_steps", "1", "--log_every", "2"]
QUICK += ["--seconds", "0.1", "--eval_samples", "3", "--eval_every", "2"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of sound files, and two recipes, one with discriminators."""
    folder = tmp_path_factory.mktemp("place")
    for index in range(12):
        (folder / "sound").mkdir(exist_ok=True)
        soundfile.write(folder / "sound" / f"{index}.wav", sound(1500 + 400 * index, index), 8000)
    extractor = {"feature_extractor_type": "AudioVQFeatureExtractor", "stride": 40, "sampling_rate": 8000}
    model = {"model_type": "vqtok_audio", **AUDIO_CONFIG, "loss_windows": [256, 64]}
    judge = {"model_type": "vqtok_audio_discriminator", "periods": [2], "windows": [64], "period_hidden_size": 2}
    for name, more in (("plain", {}), ("played", {"discriminator_config.json": {**judge, "spectrum_hidden_size": 2}})):
        (folder / name).mkdir()
        files = {"config.json": model, "preprocessor_config.json": extractor, "training.json": {"adversarial_start": 1}}
        for file, value in {**files, **more}.items():
            (folder / name / file).write_text(json.dumps(value))
    return folder


def train(place, output, *options, config="plain"):
    held_out = ["--holdout", "0.wav", "1.wav", "2.wav"]
    source = [] if "--tokenizer" in options else ["--config", str(place / config)]
    arguments = [*source, "--dataset", str(place / "sound"), "--output_dir", str(output), *QUICK, *held_out, *options]
    metrics = train_tokenizer.main(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    return metrics


def test_a_folder_of_sound_becomes_a_tokenizer_folder(place, tmp_path):
    metrics = train(place, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "metrics.json", "README.md"}
    assert "training" not in names
    samples = {path.name for path in (tmp_path / "out" / "samples").iterdir()}
    assert samples == {"step-2.wav", "reconstructions.wav"}
    tok = VQTokenizer.from_pretrained(tmp_path / "out")
    tok.verify()
    assert tok.reconstruct(sound(777), sampling_rate=8000)[0].shape == (777,)
    training = (tmp_path / "out" / "training.json").read_text()
    assert str(tmp_path) not in training and json.loads(training)["seconds"] > 0
    assert metrics["protocol"] == "vqtok-audio-eval v1" and metrics["data"]["num_recordings"] == 3
    assert metrics["pesq_wb"] is None and metrics["not_measured"] == {}, "not asked for"
    card = (tmp_path / "out" / "README.md").read_text()
    rate = f"{metrics['kbps']['nominal']:.4g} kbps"  # the last step of each clip is not full
    assert f"mel distance {metrics['mel_distance']:.3f} at {rate} on 3 held-out recordings" in card
    assert "2.4 kbps at 8,000 Hz" in card and tok.fingerprint in card and "audio-tokenization" in card
    assert '<audio controls src="samples/reconstructions.wav"></audio>' in card and "| seconds | 0.1 |" in card
    before = load_file(tmp_path / "out" / "model.safetensors")
    train(place, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(before[name].equal(after[name]) for name in before), "a finished run started again changes nothing"


def test_a_run_against_discriminators_publishes_what_it_takes_to_go_on(place, tmp_path):
    train(place, tmp_path / "first", config="played")
    published = {path.name for path in (tmp_path / "first" / "training").iterdir()}
    assert published == {"raw.safetensors", "discriminator.safetensors", "discriminator_config.json"}
    raw, judge = load_file(tmp_path / "first/training/raw.safetensors"), load_discriminator(tmp_path / "first/training")
    model = load_file(tmp_path / "first" / "model.safetensors")
    measured = json.loads((tmp_path / "first" / "training.json").read_text())["history"][-1]
    raw_is_better = measured["eval_loss_raw"] < measured["eval_loss_averaged"]
    assert raw.keys() == model.keys() and all(raw[name].equal(model[name]) for name in raw) == raw_is_better

    # Going on with a learning rate of next to nothing starts from the raw weights and the discriminators as they were left.
    still = ["--learning_rate", "1e-9", "--average_decay", "0", "--adversarial_start", "0"]
    train(place, tmp_path / "second", "--tokenizer", str(tmp_path / "first"), *still)
    again = load_file(tmp_path / "second" / "model.safetensors")
    moved = [name for name in raw if name.startswith(("encoder.", "decoder."))]
    assert moved and all(np.allclose(again[name], raw[name], atol=1e-6) for name in moved)
    more = load_discriminator(tmp_path / "second" / "training")
    pairs = zip(more.parameters(), judge.parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-6 for a, b in pairs)

    # The decoder alone: the codes stay those that were published.
    train(place, tmp_path / "third", "--tokenizer", str(tmp_path / "first"), "--decoder_only")
    folders = [VQTokenizer.from_pretrained(tmp_path / name) for name in ("first", "third")]
    assert folders[0].fingerprint == folders[1].fingerprint
    assert not np.array_equal(*[tok.reconstruct(sound(400), sampling_rate=8000)[0] for tok in folders])


def test_the_spoken_recipe_trains_on_what_comes_with_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)  # as on a machine without a C compiler
    quick = [
        "--max_steps",
        "1",
        "--num_samples",
        "3",
        "--eval_samples",
        "1",
        "--batch_size",
        "1",
        "--warmup_steps",
        "0",
    ]
    arguments = ["--config", "audio/spoken-16khz", "--output_dir", str(tmp_path / "out"), "--num_threads", "1", *quick]
    metrics = train_tokenizer.main([*arguments, "--seconds", "0.1"])
    assert json.loads((tmp_path / "out" / "training.json").read_text())["arguments"]["dataset"] == "spoken-numbers"
    assert metrics["data"]["num_recordings"] == 1 and metrics["tokenizer"]["sampling_rate"] == 16_000
    assert metrics["pesq_wb"] is None and list(metrics["not_measured"]) == ["pesq_wb"]
    assert metrics["stoi"] is not None or metrics["failures"]["stoi"]
    assert "no pesq_wb: pesq is not installed" in capsys.readouterr().out
    assert "PESQ-WB was not measured: pesq is not installed" in (tmp_path / "out" / "README.md").read_text()


def test_what_was_skipped_is_said(place, tmp_path, capsys):
    folder = tmp_path / "more"
    shutil.copytree(place / "sound", folder)
    (folder / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "six.wav", np.zeros((800, 6)), 8000)
    train(place, tmp_path / "out", "--dataset", str(folder))
    said = capsys.readouterr().err
    assert "2 recordings were skipped:" in said and "six.wav: it has 6 channels, not 1" in said


def test_a_folder_of_sound_becomes_codes(tmp_path):
    tokenizer = make_audio_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vq")
    (tmp_path / "sound").mkdir()
    for index in range(3):
        soundfile.write(tmp_path / "sound" / f"{index}.wav", sound(900 + 80 * index, index), 16_000, subtype="FLOAT")
    arguments = ["--tokenizer", str(tmp_path / "vq"), "--dataset", str(tmp_path / "sound"), "--split", "all"]
    arguments += ["--output_dir", str(tmp_path / "codes")]
    with pytest.raises(ValueError, match="sampled at 16000 Hz, not 8000"):
        encode_dataset.main(arguments)
    with pytest.raises(ValueError, match="image_column does not go with a tokenizer of audio"):
        encode_dataset.main([*arguments, "--image_column", "x"])
    manifest = encode_dataset.main([*arguments, "--resample"])
    assert manifest["num_samples"] == 3 and manifest["dataset"] == "sound"
    tokenizer.processor.resample = True
    wanted = tokenizer.encode(tmp_path / "sound" / "2.wav")
    stored = CodeDataset(tmp_path / "codes")[2]["codes"]
    assert [np.asarray(level).reshape(-1).tolist() for level in stored] == [
        level.reshape(-1).tolist() for level in wanted.levels
    ]


def test_rates_are_not_changed_unasked(place, tmp_path):
    folder = tmp_path / "fast"
    folder.mkdir()
    for name in ("a.wav", "b.wav"):
        soundfile.write(folder / name, sound(4000), 16_000)
    options = ["--dataset", str(folder), "--holdout", "a.wav"]
    with pytest.raises(ValueError, match="16000 Hz"):
        train(place, tmp_path / "out", *options)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(place, tmp_path / "again", *options, "--resample")["usage"]


@pytest.mark.parametrize("codec", [None, pytest.param("encodec", marks=pytest.mark.slow)])
def test_a_prior_of_sound_speaks_for_as_long_as_it_wants(place, tmp_path, codec):
    """Recordings of different length in one batch, and a pipeline that returns sound; over a tokenizer of ours or a published codec."""
    if codec is None:
        train(place, tmp_path / "vq")
    else:
        (tmp_path / "vq").mkdir()
        save_codec(codec, tmp_path / "vq")
    backbone = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    (tmp_path / "recipe").mkdir()
    model = {"model_type": "vqtok_prior", "condition": "none", "stops": True, "backbone_config": backbone}
    for name, value in (("config", model), ("training", {})):
        (tmp_path / "recipe" / f"{name}.json").write_text(json.dumps(value))
    flags = [
        "--config",
        str(tmp_path / "recipe"),
        "--tokenizer",
        str(tmp_path / "vq"),
        "--dataset",
        str(place / "sound"),
    ]
    flags += ["--max_steps", "3", "--batch_size", "4", "--num_threads", "1", "--warmup_steps", "1", "--log_every", "1"]
    metrics = train_prior.main([*flags, "--output_dir", str(tmp_path / "pipeline")])
    assert metrics["prior_bits_per_second"] > 0
    pipeline = VQPipeline.from_pretrained(tmp_path / "pipeline")
    sounds = pipeline(num_samples=16, seed=0)
    assert pipeline.sampling_rate == 8000 and len({len(each) for each in sounds}) > 1
    assert all(each.dtype == np.float32 and np.isfinite(each).all() for each in sounds)
    written = sorted(path.name for path in (tmp_path / "pipeline" / "samples").iterdir())
    assert written == [f"samples-{index}.wav" for index in range(8)]
    made = ["--pipeline", str(tmp_path / "pipeline"), "--num_samples", "4", "--output_dir", str(tmp_path / "drawn")]
    paths = generate.main(made)
    assert [path.name for path in paths] == [f"000-{index}.wav" for index in range(4)]
    for path, wanted in zip(paths, sounds[:4], strict=True):
        heard, rate = soundfile.read(path, dtype="float32")
        assert rate == 8000 and heard.shape == wanted.shape and np.abs(heard - wanted.clip(-1, 1)).max() < 1e-4
