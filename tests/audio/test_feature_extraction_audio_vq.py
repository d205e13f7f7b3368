"""AudioVQFeatureExtractor: what it takes, what it refuses and why, and that nothing is converted unasked."""

import json

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor

import vqtok.auto  # noqa: F401 (registers the class)
from vqtok.audio import AudioVQFeatureExtractor
from vqtok.audio.resampling import resample

RATE = 8000


def make(**changes):
    return AudioVQFeatureExtractor(**{"stride": 40, "sampling_rate": RATE, **changes})


def noise(*shape, seed=0, scale=0.1):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 39, 40, 41, 1000])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_length_comes_back_exactly(samples, channels):
    extractor, sound = make(num_channels=channels), noise(channels, samples)
    values, size = extractor.prepare(sound, RATE)
    assert size == (samples,) and values.shape == (channels, -(-samples // 40) * 40) and values.dtype == torch.float32
    assert not values[:, samples:].any(), "padding is silence"
    (back,) = extractor.postprocess(values[None], [size])
    assert np.array_equal(back, sound[0] if channels == 1 else sound) and back.dtype == np.float32


def test_all_forms_of_one_clip_are_equal(tmp_path):
    sound = (np.round(noise(500) * 32768) / 32768).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    soundfile.write(tmp_path / "a.flac", sound, RATE)
    extractor = make()
    forms = [sound[None], torch.from_numpy(sound), sound.astype(np.float64)]
    forms += [(sound * 32768).astype(np.int16), ((sound * 32768).astype(np.int32) << 16)]
    expected = extractor.prepare(sound, RATE)[0]
    for form in forms:
        assert extractor.prepare(form, RATE)[0].equal(expected)
    for path in (tmp_path / "a.wav", str(tmp_path / "a.flac")):
        assert extractor.prepare(path)[0].equal(expected)
    for item in ({"audio": sound, "sampling_rate": RATE}, {"array": sound, "sampling_rate": RATE, "path": None}):
        assert extractor.prepare(item)[0].equal(expected)


def test_bytes_are_pcm_with_the_middle_at_128():
    values, _ = make().prepare(np.array([0, 128, 255], np.uint8), RATE)
    assert values[0, :3].tolist() == [-1.0, 0.0, 127 / 128]


@pytest.mark.parametrize(("subtype", "bits"), [("PCM_U8", 8), ("PCM_16", 16), ("PCM_24", 24), ("FLOAT", 24)])
def test_files_of_any_depth_are_read(tmp_path, subtype, bits):
    sound = noise(300)
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype=subtype)
    values, size = make().prepare(tmp_path / "a.wav")
    assert size == (300,) and np.abs(values[0, :300].numpy() - sound).max() <= 2.0 ** (1 - bits)


def test_silence_and_clipping_pass():
    extractor = make()
    assert not extractor.prepare(np.zeros(10, np.float32), RATE)[0].any()
    loud = np.clip(noise(100, scale=5), -1.2, 1.2)
    assert np.array_equal(extractor.prepare(loud, RATE)[0][0, :100].numpy(), loud)


NAN = noise(100)
NAN[7] = np.nan


@pytest.mark.parametrize(
    ("clip", "rate", "named"),
    [
        (noise(100), None, "does not know its rate: give sampling_rate=8000"),
        (noise(100), 16000, "has 16000 Hz, the tokenizer takes 8000 Hz: .*processor.resample = True"),
        (noise(100), 0, "positive integer in Hz, got 0"),
        (noise(100), 8000.0, "positive integer in Hz, got 8000.0"),
        (noise(100, 1), RATE, r"\(100, 1\) would have 100 channels: it looks like \(samples, channels\)"),
        (noise(100, 2), RATE, r"looks like \(samples, channels\), give it transposed"),
        (noise(2, 100), RATE, "has 2 channels, the tokenizer takes 1: .*processor.mix = True"),
        (noise(6, 100), RATE, "has 6 channels, the tokenizer takes 1"),
        (noise(1, 1, 100), RATE, r"shape \(1, 1, 100\) is no clip"),
        (np.float32(1), RATE, "is no clip|not float32"),
        (noise(0), RATE, "has no sample"),
        (noise(1, 0), RATE, "has no sample"),
        (NAN, RATE, "has NaN or infinite samples, 1 of them"),
        (np.array([np.inf, 0], np.float32), RATE, "NaN or infinite"),
        (noise(100, scale=1000), RATE, r"far outside \[-1, 1\]: scale it"),
        (np.zeros(10, np.int64), RATE, "int64 has no known scale"),
        (np.zeros(10, bool), RATE, "bool has no known scale"),
        ({"sampling_rate": RATE}, None, "needs 'audio' and 'sampling_rate', got the keys"),
        ({"audio": noise(9)}, None, "needs 'audio' and 'sampling_rate'"),
        ({"audio": noise(9), "sampling_rate": RATE}, 16000, "says 8000 Hz, not 16000"),
    ],
)
def test_what_does_not_fit_is_named_with_the_remedy(clip, rate, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make().prepare(clip, rate)


@pytest.mark.parametrize("clip", [None, 3.0, [0.1, 0.2], b"RIFF"])
def test_what_is_no_clip_is_a_type_error(clip):
    with pytest.raises(TypeError, match="a clip is an array, a tensor or a path"):
        make().prepare(clip, RATE)


def test_rates_are_converted_when_asked_for():
    sound = noise(2205)
    values, size = make(resample=True).prepare(sound, 22050)
    assert size == (800,), "ceil(2205 * 8000 / 22050)"
    assert np.array_equal(values.numpy(), resample(sound[None], 22050, RATE))


def test_channels_are_converted_when_asked_for():
    sound = noise(2, 80)
    mono = make(mix=True).prepare(sound, RATE)[0]
    assert mono.equal(torch.from_numpy(sound).mean(0, keepdim=True))
    assert make(mix=True).prepare(noise(6, 80), RATE)[0].shape == (1, 80)
    stereo = make(mix=True, num_channels=2).prepare(sound[0], RATE)[0]
    assert stereo[0].equal(stereo[1]) and stereo.shape == (2, 80)
    with pytest.raises(ValueError, match="1 channel, the tokenizer takes 2"):
        make(num_channels=2).prepare(sound[0], RATE)
    with pytest.raises(ValueError, match="no one way to make 2 of them"):
        make(mix=True, num_channels=2).prepare(noise(6, 80), RATE)


def test_files_that_cannot_be_read_are_named(tmp_path):
    extractor = make()
    good = tmp_path / "good.wav"
    soundfile.write(good, noise(4000), RATE)
    data = good.read_bytes()
    for name, content in {"header.wav": b"RIFF" + data[8:40], "empty.wav": b"", "text.wav": b"not sound" * 50}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*(no sound, is broken|holds no sound)"):
            extractor.prepare(tmp_path / name)
    soundfile.write(tmp_path / "none.wav", noise(0), RATE)
    with pytest.raises(ValueError, match="none.wav holds no sound"):
        extractor.prepare(tmp_path / "none.wav")
    flac = tmp_path / "cut.flac"
    soundfile.write(flac, noise(40_000), RATE)
    flac.write_bytes(flac.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"cut\.flac"):
        extractor.prepare(flac)
    with pytest.raises(FileNotFoundError, match="there is no file .*nothing.wav"):
        extractor.prepare(tmp_path / "nothing.wav")
    with pytest.raises(ValueError, match="is a folder"):
        extractor.prepare(tmp_path)
    with pytest.raises(ValueError, match="is an address, and nothing is downloaded"):
        extractor.prepare("https://example.org/a.wav")
    with pytest.raises(ValueError, match="lasts 2.0 s, longer than max_seconds=1"):
        soundfile.write(tmp_path / "long.wav", noise(16_000), RATE)
        make(max_seconds=1).prepare(tmp_path / "long.wav")
    with pytest.raises(ValueError, match=r"good.wav says 8000 Hz, not 16000"):
        extractor.prepare(good, 16000)


def test_a_batch_is_padded_to_the_longest():
    extractor = make()
    clips = [noise(100), noise(41, seed=1)]
    batch = extractor(clips, RATE)
    assert batch["input_values"].shape == (2, 1, 120) and batch["sizes"].tolist() == [[100], [41]]
    assert not batch["input_values"][1, :, 41:].any()
    assert isinstance(extractor(clips[0], RATE, return_tensors="np")["input_values"], np.ndarray)
    assert extractor([0.5, 0.25], RATE)["sizes"].tolist() == [[2]], "a list of numbers is one clip"
    for bad in ([], ()):
        with pytest.raises(ValueError, match="there is no clip"):
            extractor(bad, RATE)
    with pytest.raises(ValueError, match="'pt' or 'np'"):
        extractor(clips, RATE, return_tensors="tf")


def test_auto_gives_it_back(tmp_path):
    make(num_channels=2, resample=True).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "feature_extractor_type": "AudioVQFeatureExtractor",
        "stride": 40,
        "sampling_rate": RATE,
        "num_channels": 2,
        "resample": True,
        "mix": False,
        "max_seconds": 14_400,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vqtok_audio"}))
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(again) is AudioVQFeatureExtractor and again.to_dict() == make(num_channels=2, resample=True).to_dict()


def test_code_fields_leave_out_what_decides_no_codes():
    fields = make().code_fields
    assert fields == make(resample=True, mix=True, max_seconds=5).code_fields
    for change in ({"stride": 80}, {"sampling_rate": 16_000}, {"num_channels": 2}):
        assert make(**change).code_fields != fields
    json.dumps(fields)


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"stried": 8}, "'stried'. Did you mean 'stride'"),
        ({"stride": "8"}, "positive integer, got '8'"),
        ({"sampling_rate": True}, "positive integer, got True"),
        ({"num_channels": 3}, "1 .mono. or 2 .stereo., got 3"),
        ({"resample": 1}, "resample must be true or false, got 1"),
        ({"mix": "no"}, "mix must be true or false, got 'no'"),
        ({"max_seconds": 0}, "positive integer, got 0"),
    ],
)
def test_bad_state_is_refused(state, complaint):
    with pytest.raises(ValueError, match=complaint):
        AudioVQFeatureExtractor(**state)
