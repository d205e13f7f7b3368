"""What SECURITY.md promises about files of sound that a stranger made."""

import tracemalloc
from io import BytesIO

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from tests.test_fuzz import budget, few_and_many
from tests.test_trust import edit
from tests.tiny import make_audio_tokenizer, picture, sound
from vqtok import VQTokenizer
from vqtok.audio import AudioVQFeatureExtractor
from vqtok.audio.data import load_audio
from vqtok.audio.files import read_file
from vqtok.audio.long import SoundFileReader


@pytest.fixture
def spoken(tmp_path):
    """The folder of a tokenizer of sound."""
    make_audio_tokenizer().save_pretrained(tmp_path / "spoken")
    return tmp_path / "spoken"


def promise(path, rate, frames, channels=1):
    """A FLAC file of 20 samples whose header says something else."""
    soundfile.write(path, np.zeros((20, channels)), 8000, format="FLAC")
    data = bytearray(path.read_bytes())
    facts = int.from_bytes(data[18:26], "big")  # 20 bits of rate, 8 of channels and depth, 36 of samples
    facts = rate << 44 | (facts >> 36 & 0xFF) << 36 | frames
    data[18:26] = facts.to_bytes(8, "big")
    path.write_bytes(data)


def test_a_header_of_sound_is_not_believed(spoken, tmp_path):
    path, tok = tmp_path / "bomb.flac", VQTokenizer.from_pretrained(spoken)
    tok.processor.resample = tok.processor.mix = True
    promise(path, 655_350, 9_000_000_000, 8)
    with soundfile.SoundFile(path) as file:
        assert (file.samplerate, file.frames, file.channels) == (
            655_350,
            9_000_000_000,
            8,
        ) and path.stat().st_size < 200
    for media in (path, [path], {"audio": str(path), "sampling_rate": 655_350}):
        with pytest.raises(ValueError, match=r"is broken|truncated|72,000,000,000 samples in all channels, more than"):
            tok.encode(media)
    # One that stays below all bounds, and would still take 2 GB.
    promise(path, 655_350, (1 << 26) - 1, 8)
    tracemalloc.start()
    for read in (
        lambda: tok.encode([path]),
        lambda: read_file(path),
        lambda: load_audio(tmp_path, 8000, resample=True),
    ):
        with pytest.raises(ValueError, match=r"is broken|truncated|readable"):
            read()
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_seconds_of_sound_are_bounded_in_every_form(spoken, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, sound(9000), 8000)
    edit(spoken / "preprocessor_config.json", max_seconds=1)
    tok = VQTokenizer.from_pretrained(spoken)
    forms = [path, [path], {"audio": sound(9000), "sampling_rate": 8000}, {"array": str(path), "sampling_rate": 8000}]
    for media in forms:
        with pytest.raises(ValueError, match="lasts 1.1 s, longer than max_seconds=1: cut it, or give a larger"):
            tok.encode(media)
        assert tok.encode(media, max_seconds=2).sizes.tolist() == [[9000]]
    with pytest.raises(ValueError, match="longer than max_seconds=1"):
        tok.encode(sound(9000), sampling_rate=8000)
    with pytest.raises(ValueError, match="max_seconds must be at least 1, got 0"):
        tok.encode([], max_seconds=0)
    edit(spoken / "preprocessor_config.json", max_seconds=10**15)
    with pytest.raises(
        ValueError, match="max_seconds 1,000,000,000,000,000 is more than 14,400, and a file cannot raise"
    ):
        VQTokenizer.from_pretrained(spoken)


def test_max_seconds_is_not_for_pictures(saved):
    with pytest.raises(ValueError, match="max_seconds=9 is for audio"):
        VQTokenizer.from_pretrained(saved).encode(picture(16, 16), max_seconds=9)


def test_a_strange_rate_asks_for_no_large_filter(spoken, tmp_path):
    """At 655,349 Hz to 8,000 Hz every of 8,000 phases would have a filter of 700,000 coefficients, 42 GB."""
    tok = VQTokenizer.from_pretrained(spoken)
    tok.processor.resample = True
    soundfile.write(tmp_path / "a.wav", sound(100), 655_349)
    for media in (tmp_path / "a.wav", [tmp_path / "a.wav"]):
        with pytest.raises(
            ValueError, match="655349 Hz cannot be brought to 8000 Hz here, their common divisor is only 1"
        ):
            tok.encode(media)
    with pytest.raises(ValueError, match="at 8000 Hz a clip has 800,000,000 samples in all channels, more than"):
        tok.encode(np.zeros(100_000, np.float32), sampling_rate=1, max_seconds=100_000)


@few_and_many
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF"])
def test_bytes_of_files_of_sound(tmp_path, kind, examples):
    """Whole and in parts: finite sound, or a sentence."""
    path, whole = tmp_path / f"a.{kind.lower()}", BytesIO()
    soundfile.write(whole, sound(1200), 8000, format=kind)
    good = whole.getvalue()
    extractor = AudioVQFeatureExtractor(stride=40, sampling_rate=8000, resample=True, mix=True)
    places = st.integers(0, 99) | st.integers(0, len(good) - 1)  # in the header above all

    def in_part():
        with SoundFileReader(path, extractor) as reader:
            return reader.read(0, 4000)

    @budget(examples)
    @given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4))
    def check(changes):
        data = bytearray(good)
        for at, value in changes:
            data[at] = value
        path.write_bytes(data)
        for read in (in_part, lambda: extractor.prepare(path)[0]):
            try:
                assert read().isfinite().all()
            except ValueError as error:
                assert str(error).strip()

    check()
