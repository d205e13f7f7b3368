"""VQTokenizer for sound: exact lengths, any batch, saving, rates, refusals."""

import json

import numpy as np
import pytest
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from tests.tiny import assert_same_codes, make_audio_tokenizer, picture, sound
from vqtok import AudioVQFeatureExtractor, AudioVQModel, Codes, VQTokenizer
from vqtok.encoding import encode_dataset
from vqtok.prior.data import CodeDataset

SIZES = [1, 39, 40, 41, 1000, 999, 2000]


@pytest.fixture(scope="module")
def tok():
    return make_audio_tokenizer()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": True, "activation": "elu"},
        {"num_channels": 2},
        {"strides": [40, 20, 4], "quantizer": {"type": "vector", "codebook_size": 16}},
        {"quantizer": {"type": "multi_rate", "strides": [4, 2, 1], "layer": {"type": "vector", "codebook_size": 16}}},
        {"downsampling_ratios": [3, 5, 7], "strides": [105]},
    ],
)
def test_n_samples_in_n_samples_out(changes):
    tok = make_audio_tokenizer(**changes)
    stereo = tok.processor.num_channels == 2
    clips = [np.stack([sound(n), sound(n, 1)]) if stereo else sound(n) for n in SIZES]
    codes = tok.encode(clips, sampling_rate=8000)
    assert codes.sizes.flatten().tolist() == SIZES
    for batch_size in (None, 1):
        made = tok.decode(codes, batch_size)
        assert [each.shape for each in made] == [clip.shape for clip in clips]
        assert all(each.dtype == np.float32 and np.isfinite(each).all() for each in made)
    (alone,) = tok.reconstruct(clips[-1], sampling_rate=8000)
    np.testing.assert_allclose(alone, made[-1], atol=1e-5)
    for i, clip in enumerate(clips):
        assert_same_codes(tok.encode(clip, sampling_rate=8000), codes[i])


def test_a_prefix_of_codebooks_has_its_rate(tok):
    codes = tok.encode(sound(4000), sampling_rate=8000, num_codebooks=2)
    assert codes.levels[0].shape == (1, 2, 100)
    assert tok.model.config.kbps(2) == pytest.approx(2 * 4 * 200 / 1000) and tok.model.config.kbps() == 2.4
    assert tok.decode(codes)[0].shape == (4000,)
    assert not np.array_equal(tok.decode(codes)[0], tok.decode(tok.encode(sound(4000), sampling_rate=8000))[0])
    with pytest.raises(ValueError, match="num_codebooks must be from 1 to 3, got 4"):
        tok.encode(sound(400), sampling_rate=8000, num_codebooks=4)


def test_what_it_prints(tok):
    lines = repr(tok).splitlines()
    assert lines[0].startswith("VQTokenizer for audio (AudioVQModel, ")
    assert lines[1:3] == [
        "  level 0: 3 codes of 16 per 40 samples, 12 bits",
        "  0.3 bits per sample, 2.4 kbps at 8000 Hz",
    ]


def test_saved_and_loaded_it_is_the_same(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    back = VQTokenizer.from_pretrained(tmp_path)
    assert back.verify() == tok.fingerprint and back.modality == "audio"
    clip = sound(1234)
    codes = back.encode(clip, sampling_rate=8000)
    assert_same_codes(codes, tok.encode(clip, sampling_rate=8000))
    codes.save(tmp_path / "a.vq")
    assert np.array_equal(back.decode(Codes.load(tmp_path / "a.vq"))[0], tok.decode(codes)[0])
    assert type(AutoModel.from_pretrained(tmp_path)) is AudioVQModel
    assert AutoConfig.from_pretrained(tmp_path).sampling_rate == 8000
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is AudioVQFeatureExtractor
    # Batches of the extractor, padded to each other, have the codes of the facade.
    batch = back.processor([sound(500), clip], 8000)
    together = back.model.encode(batch["input_values"], batch["sizes"]).codes[0]
    assert together[1:, :, :31].equal(codes.levels[0])
    assert together[:1, :, :13].equal(back.encode(sound(500), sampling_rate=8000).levels[0])


def test_asking_for_conversion_changes_no_fingerprint(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": True, "mix": True}))
    back = VQTokenizer.from_pretrained(tmp_path)
    assert back.verify() == tok.fingerprint
    assert back.encode(np.stack([sound(441)] * 2), sampling_rate=44_100).sizes.tolist() == [[80]]


@pytest.mark.parametrize(
    ("media", "rate", "named"),
    [
        (sound(100), None, "does not know its rate"),
        ([sound(100), sound(100)[:, None]], 8000, r"item 1: .*\(samples, channels\)"),
        ([sound(100)], 16_000, "item 0: a clip has 16000 Hz, the tokenizer takes 8000 Hz"),
        ([picture(8, 8)], 8000, "item 0: a clip is an array, a tensor or a path, not Image"),
    ],
)
def test_what_does_not_fit_is_named(tok, media, rate, named):
    with pytest.raises((ValueError, TypeError), match=named):
        tok.encode(media, sampling_rate=rate)


def test_codes_of_other_layouts_are_refused(tok):
    other = make_audio_tokenizer(quantizer={"type": "vector", "codebook_size": 16})
    codes = other.encode(sound(200), sampling_rate=8000)
    with pytest.raises(ValueError, match="do not fit this tokenizer's"):
        tok.decode(codes)


@pytest.mark.parametrize(("field", "value"), [("sampling_rate", 16_000), ("num_channels", 2), ("stride", 41)])
def test_a_feature_extractor_of_another_model_is_refused(tok, field, value):
    fields = {"stride": 40, "sampling_rate": 8000, "num_channels": 1, field: value}
    with pytest.raises(ValueError, match="the processor (gives|pads)"):
        VQTokenizer(tok.model, AudioVQFeatureExtractor(**fields))


def test_no_clips_are_no_codes(tok):
    codes = tok.encode([])
    assert len(codes) == 0 and tok.decode(codes) == []


def test_a_data_set_of_sound_becomes_a_code_cache(tok, tmp_path):
    tok.save_pretrained(tmp_path / "tok")
    clips = [{"audio": sound(100 + 37 * i)[None], "sampling_rate": 8000, "text": f"clip {i}"} for i in range(5)]
    encode_dataset(tok, clips, tmp_path / "codes", batch_size=2)
    codes = CodeDataset(tmp_path / "codes")
    assert len(codes) == 5 and codes.fingerprint == tok.fingerprint and codes[3]["text"] == "clip 3"
    clips[3]["audio"] = np.full((1, 9), np.nan, np.float32)
    with pytest.raises(ValueError, match="sample 3: .*NaN"):
        encode_dataset(tok, clips, tmp_path / "more", batch_size=2)
