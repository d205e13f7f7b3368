"""The audio protocol against hand-worked cases and another library, and the report on codecs whose faults are known."""

import json
import math
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import make_audio_tokenizer
from vqtok import cli
from vqtok.audio.data import load_audio
from vqtok.codes import CodeLayout, Codes, LevelLayout
from vqtok.evaluation import audio_report
from vqtok.evaluation.audio_protocols import (
    MEL_BANDS,
    MEL_FLOOR,
    MEL_WINDOWS,
    MeasureError,
    mel_distance,
    pesq_wb,
    si_sdr,
    stoi,
)

pytest.importorskip("soundfile")
RATE = 16_000


@pytest.fixture
def pesq():
    """For tests that measure PESQ."""
    pytest.importorskip("pesq", reason="PESQ stays out: no C compiler was found that could build pesq")


class Telephone:
    """A tokenizer of 16-bit samples: two codebooks of 256, the high byte and the low one. `noise` is added on decoding."""

    fingerprint, modality = None, "audio"

    def __init__(self, noise=0.0, cut=0, num_channels=1):
        self.layout = CodeLayout(ndim=1, levels=(LevelLayout(1, 2, 256),))
        self.processor = SimpleNamespace(sampling_rate=RATE, num_channels=num_channels)
        self.model = torch.nn.Linear(3, 1)
        self.model.config = SimpleNamespace(name_or_path="")
        self.noise, self.cut, self.batches = noise, cut, []

    def encode(self, sounds, sampling_rate=None, batch_size=None):
        assert sampling_rate == RATE
        self.batches.append(len(sounds))
        parts = []
        for sound in sounds:
            whole = torch.from_numpy(np.round(sound[0] * 32768).astype(np.int64) + 32768)
            levels = (torch.stack([whole // 256, whole % 256])[None],)
            parts.append(Codes(levels, torch.tensor([[sound.shape[1]]]), self.layout, None))
        return Codes.cat(parts)

    def decode(self, codes, batch_size=None):
        sounds = []
        for i, one in enumerate(codes):
            high, low = torch.cat([one.levels[0][0], torch.zeros_like(one.levels[0][0])])[:2].numpy()
            sound = ((high * 256 + low - 32768) / 32768).astype(np.float32)
            noise = np.random.default_rng(i).standard_normal(len(sound)) * self.noise
            sounds.append((sound + noise).astype(np.float32)[self.cut :])
        return sounds


class Clips:
    """Sounds with a rate, as `load_audio` gives them."""

    skipped = [("gone.wav", "it is broken")]

    def __init__(self, sounds, rate=RATE):
        self.items = [{"audio": sound, "sampling_rate": rate, "text": None} for sound in sounds]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def _speech(num, split="test"):
    """In whole 16-bit steps, so that the exact codec is exact."""
    dataset = load_audio("spoken-numbers", RATE, 1, split, num_samples=num)
    return [(np.round(dataset[i]["audio"] * 32768) / 32768).astype(np.float32) for i in range(num)]


@pytest.fixture(scope="module")
def speech():
    return _speech(3)


# -- the protocol


def test_equal_sounds_have_the_best_values(speech):
    sound = speech[0]
    assert stoi(sound, sound, RATE) == pytest.approx(1)
    assert si_sdr(sound, sound) == math.inf and mel_distance(sound, sound, RATE) == 0


def test_pesq_of_equal_sounds_is_the_best_there_is(speech, pesq):
    assert pesq_wb(speech[0], speech[0], RATE) == pytest.approx(4.644, abs=1e-3)


def _is_worse_with_more_noise(sound, measure, direction):
    noise = np.random.default_rng(0).standard_normal(sound.shape).astype(np.float32)
    worse = [(sound + level * noise).astype(np.float32) for level in (0.001, 0.01, 0.1)]
    values = [direction * measure(sound, other) for other in worse]
    return values == sorted(values) and values[0] < values[-1]


def test_more_noise_is_worse(speech):
    assert _is_worse_with_more_noise(speech[1], partial(stoi, sampling_rate=RATE), -1)
    assert _is_worse_with_more_noise(speech[1], si_sdr, -1)
    assert _is_worse_with_more_noise(speech[1], partial(mel_distance, sampling_rate=RATE), 1)


def test_more_noise_is_worse_by_pesq(speech, pesq):
    assert _is_worse_with_more_noise(speech[1], partial(pesq_wb, sampling_rate=RATE), -1)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 100), st.floats(-1, 1), st.floats(0.01, 2))
def test_si_sdr_by_hand_for_any_gain_and_offset(gain, offset, noise):
    """The error is orthogonal to the original, so the ratio is that of their energies.

    Of errors far smaller than these the energy nears the 2e-16 that torchmetrics adds to it.
    """
    original = np.array([[1.0, -1.0, 1.0, -1.0]])
    error = np.array([[1.0, 1.0, -1.0, -1.0]])
    estimate = gain * (original + noise * error) + offset
    assert si_sdr(original, estimate) == pytest.approx(-20 * math.log10(noise), abs=1e-6)


def test_si_sdr_is_the_mean_over_channels():
    original, error = np.array([1.0, -1.0, 1.0, -1.0]), np.array([1.0, 1.0, -1.0, -1.0])
    pair = np.stack([original, original]), np.stack([original + 0.1 * error, original + 0.01 * error])
    assert si_sdr(*pair) == pytest.approx((20 + 40) / 2)


@pytest.mark.parity
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_the_mel_distance_is_that_of_slow_sums_and_other_filters(rate):
    from transformers.audio_utils import mel_filter_bank

    rng = np.random.default_rng(0)
    pair = [rng.normal(0, 0.1, 3000).astype(np.float32) for _ in range(2)]
    total = 0.0
    for window, bands in zip(MEL_WINDOWS, MEL_BANDS, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where a band holds no bin
            filters = mel_filter_bank(window // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
        logs = []
        for sound in pair:
            padded = np.pad(sound.astype(np.float64), window // 2)
            starts = range(0, len(padded) - window + 1, window // 4)
            hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
            frames = np.stack([np.abs(np.fft.rfft(hann * padded[start : start + window])) for start in starts])
            logs.append(np.log10(np.maximum(frames @ filters, MEL_FLOOR)))
        total += np.abs(logs[0] - logs[1]).mean()
    assert mel_distance(pair[0][None], pair[1][None], rate) == pytest.approx(total, rel=1e-4)


def test_what_is_undefined_raises_and_is_no_number(speech):
    sound = speech[0]
    silent, short = np.zeros_like(sound), sound[:, :100]
    for measure in (
        lambda: stoi(silent, sound, RATE),
        lambda: stoi(short, short, RATE),
        lambda: si_sdr(silent, sound),
        lambda: si_sdr(sound, silent),
    ):
        with pytest.raises(MeasureError):
            measure()
    with pytest.raises(ValueError, match="cannot compare sounds of the shapes"):
        mel_distance(sound, short, RATE)


def test_pesq_that_is_undefined_raises_and_is_no_number(speech, pesq):
    sound = speech[0]
    silent, short = np.zeros_like(sound), sound[:, :100]
    for one, other in ((silent, sound), (sound, silent), (short, short)):
        with pytest.raises(MeasureError):
            pesq_wb(one, other, RATE)


def test_pesq_takes_other_rates_and_channels(speech, pesq):
    from vqtok.audio.resampling import resample

    faster = np.repeat(resample(speech[0], RATE, 24_000), 2, axis=0)
    assert pesq_wb(faster, faster, 24_000) == pytest.approx(4.644, abs=1e-3)


# -- the report


def test_an_exact_codec_is_perfect_and_its_codes_are_counted(speech):
    tokenizer = Telephone()
    result = audio_report.evaluate(tokenizer, Clips(speech), name="exact")
    assert result["stoi"] == pytest.approx(1)
    assert result["si_sdr_db"] is None and result["si_sdr_perfect"] == 3 and result["mel_distance"] == 0
    assert result["failures"] == {}
    samples = np.concatenate([sound[0] for sound in speech])
    whole = np.round(samples * 32768).astype(int) + 32768
    for codebook, codes in enumerate((whole // 256, whole % 256)):
        counts = np.bincount(codes, minlength=256)
        assert result["usage"][0][codebook] == pytest.approx((counts > 0).mean())
        share = counts[counts > 0] / counts.sum()
        assert result["entropy_bits"][0][codebook] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-5)
    assert result["kbps"]["nominal"] == pytest.approx(256) and result["kbps"]["payload"] == pytest.approx(256)
    files = sum(len(tokenizer.encode([sound], sampling_rate=RATE).to_bytes()) for sound in speech)
    assert result["kbps"]["file"] == pytest.approx(8 * files / (len(samples) / RATE) / 1000)
    assert result["data"]["num_recordings"] == 3 and result["data"]["num_skipped"] == 1
    assert result["data"]["seconds"] == pytest.approx(len(samples) / RATE)
    assert result["tokenizer"]["parameters"] == 4
    json.dumps(result, allow_nan=False)


def test_of_fewer_codebooks_all_is_measured(speech):
    whole, half = (audio_report.evaluate(Telephone(), Clips(speech), speech=False, num_codebooks=n) for n in (2, 1))
    assert (whole["num_codebooks"], half["num_codebooks"]) == (2, 1) and whole["si_sdr_perfect"] == 3
    assert half["kbps"]["nominal"] == pytest.approx(128) == half["kbps"]["payload"] and whole["kbps"][
        "nominal"
    ] == pytest.approx(256)
    assert half["usage"] == [whole["usage"][0][:1]]
    coarse = [(np.floor(sound * 128) / 128).astype(np.float32) for sound in speech]  # the high byte alone
    assert half["si_sdr_db"] == pytest.approx(np.mean([si_sdr(*pair) for pair in zip(speech, coarse, strict=True)]))
    with pytest.raises(ValueError, match="num_codebooks must be between 1 and 2, got 3"):
        audio_report.evaluate(Telephone(), Clips(speech), speech=False, num_codebooks=3)


def test_known_noise_gives_the_known_ratio(speech):
    result = audio_report.evaluate(Telephone(noise=0.01), Clips(speech[:1]), speech=False)
    sound = speech[0][0].astype(np.float64)
    assert result["si_sdr_db"] == pytest.approx(10 * math.log10(sound.var() / 1e-4), abs=0.2)
    assert result["pesq_wb"] is None and result["stoi"] is None and result["mel_distance"] > 1


def test_pesq_is_in_the_report(speech, pesq):
    silent = np.zeros((1, RATE), np.float32)
    exact, mixed = (audio_report.evaluate(Telephone(), Clips(sounds)) for sounds in ([speech[0]], [speech[0], silent]))
    assert exact["pesq_wb"] == mixed["pesq_wb"] == pytest.approx(4.644, abs=1e-3) and exact["not_measured"] == {}
    assert sum(mixed["failures"]["pesq_wb"].values()) == 1 and "4.64 (1 failed)" in audio_report.to_markdown([mixed])


def test_failures_are_counted_and_left_out(speech, monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)  # which has its own test
    silent, short = np.zeros((1, RATE), np.float32), speech[0][:, 6000:6100]
    alone = audio_report.evaluate(Telephone(noise=0.01), Clips(speech[:1]))
    mixed = audio_report.evaluate(Telephone(noise=0.01), Clips([speech[0], silent, short]))
    assert mixed["stoi"] == alone["stoi"]
    assert {key: sum(reasons.values()) for key, reasons in mixed["failures"].items()} == {
        "stoi": 2,
        "si_sdr_db": 1,
    }
    table = audio_report.to_markdown([mixed])
    assert f"{alone['stoi']:.3f} (2 failed)" in table
    nothing = audio_report.evaluate(Telephone(), Clips([silent]))
    assert nothing["stoi"] is None and "- (1 failed)" in audio_report.to_markdown([nothing])


def test_long_sets_are_read_in_chunks_and_summed_the_same(speech, monkeypatch):
    whole = audio_report.evaluate(Telephone(noise=0.01), Clips(speech[:2] * 2), speech=False)
    monkeypatch.setattr(audio_report, "_CHUNK_RECORDINGS", 1)
    tokenizer = Telephone(noise=0.01)
    parts = audio_report.evaluate(tokenizer, Clips(speech[:2] * 2), speech=False)
    assert tokenizer.batches == [1] * 5  # one to warm up
    assert parts["usage"] == whole["usage"] and parts["kbps"] == whole["kbps"]
    assert parts["data"]["sha256"] == whole["data"]["sha256"]


def test_bad_input_is_named(speech):
    with pytest.raises(ValueError, match="no recordings to evaluate"):
        audio_report.evaluate(Telephone(), Clips([]))
    with pytest.raises(ValueError, match="recording 0 is sampled at 8000 Hz, the tokenizer at 16000"):
        audio_report.evaluate(Telephone(), Clips(speech, rate=8000))
    with pytest.raises(ValueError, match="came back as .*lengths must be kept"):
        audio_report.evaluate(Telephone(cut=5), Clips(speech))


def test_a_missing_package_is_said_and_the_rest_is_measured(speech, monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    result = audio_report.evaluate(Telephone(noise=0.01), Clips(speech[:1]))
    assert result["pesq_wb"] is None and result["stoi"] > 0 and "pesq" not in result["versions"]
    assert result["not_measured"] == {"pesq_wb": "pesq is not installed (pip install 'vqtok[speech]')"}
    assert audio_report.to_markdown([result]).endswith(
        "\n\npesq_wb was not measured: pesq is not installed (pip install 'vqtok[speech]')."
    )
    assert audio_report.evaluate(Telephone(), Clips(speech[:1]), speech=False)["not_measured"] == {}


def test_the_command_compares_real_tokenizers_and_resamples_when_asked(tmp_path, capsys):
    make_audio_tokenizer().save_pretrained(tmp_path / "one")
    make_audio_tokenizer(seed=1, quantizer={"type": "fsq", "scalar_levels": [5, 5, 5]}).save_pretrained(
        tmp_path / "two"
    )
    make_audio_tokenizer(num_channels=2).save_pretrained(tmp_path / "stereo")
    out = tmp_path / "out.json"
    data = ["spoken-numbers", "--num_samples", "2"]
    assert cli.main(["evaluate", str(tmp_path / "one"), *data]) == 2
    assert "sampled at 16000 Hz, not 8000" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "one"), *data, "--resample", "--json", str(out)]) == 0
    alone = json.loads(out.read_text())
    assert alone["data"]["num_recordings"] == 2 and alone["tokenizer"]["sampling_rate"] == 8000
    assert "2 recordings of spoken-numbers (test), vqtok-audio-eval v1" in capsys.readouterr().out
    names = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert cli.main(["compare", *names, "--data", *data, "--resample", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [each["mel_distance"] == alone["mel_distance"] for each in results] == [True, False]
    # 3 codes of 16 and one of 125 per 40 samples at 8,000 Hz
    assert [each["tokenizer"]["nominal_kbps"] for each in results] == pytest.approx([2.4, 0.2 * math.log2(125)])
    assert cli.main(["compare", names[0], str(tmp_path / "stereo"), "--data", *data]) == 2
    assert "measure each alone" in capsys.readouterr().err


def test_the_command_measures_audio(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_load_tokenizer", lambda name, device: Telephone(noise={"a": 0.0, "b": 0.01}[name]))
    out = tmp_path / "out.json"
    arguments = ["a", "b", "--data", "spoken-numbers", "--num_samples", "2", "--json", str(out)]
    assert cli.main(["compare", *arguments]) == 0
    results = json.loads(out.read_text())
    assert [result["name"] for result in results] == ["a", "b"]
    assert results[0]["stoi"] > results[1]["stoi"]
    said = capsys.readouterr().out
    assert "2 recordings of spoken-numbers (test), vqtok-audio-eval v1" in said and "| a | 256 |" in said
    assert cli.main(["evaluate", "a", "spoken-numbers", "--image_column", "x"]) == 2
    assert "image_column does not go with a tokenizer of audio" in capsys.readouterr().err
