"""Sound files: written whole or not at all, read in parts, encoded and decoded at any length through the facade."""

from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch

from tests.tiny import assert_same_codes, make_audio_tokenizer, sound
from vqtok.audio import AudioVQFeatureExtractor
from vqtok.audio.files import read_file, write_file
from vqtok.audio.long import SoundFileReader, decode_to_file, encode_file


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    for array in (sound(301), np.stack([sound(301), sound(301, seed=1)])):
        path = tmp_path / f"a{suffix}"
        write_file(path, array, 8000)
        back, rate = read_file(path)
        assert rate == 8000 and back.shape == np.atleast_2d(array).shape
        assert np.abs(back - array).max() <= 0.501 / 32768, "the nearest of 65,536 values"
        write_file(path, back, 8000)
        assert np.array_equal(read_file(path)[0], back), "and from then on the same"
    write_file(tmp_path / "loud.wav", 3 * np.ones(10, np.float32), 8000)
    assert read_file(tmp_path / "loud.wav")[0].max() == pytest.approx(1, abs=1e-4), "clipped, not wrapped around"


def test_unknown_formats_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"a.xyz has no suffix of a sound format .*a.wav"):
        write_file(tmp_path / "a.xyz", sound(10), 8000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_neither_written_nor_read(tmp_path, value):
    array = sound(50)
    array[7] = value
    with pytest.raises(ValueError, match="NaN or infinite samples cannot be played or written"):
        write_file(tmp_path / "a.wav", array, 8000)
    assert not list(tmp_path.iterdir())
    soundfile.write(tmp_path / "b.wav", array, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match="it has NaN or infinite samples"):
        read_file(tmp_path / "b.wav")


def test_bytes_are_a_file_and_samples_without_a_header_are_none(tmp_path):
    write_file(tmp_path / "a.flac", sound(300), 8000)
    data = (tmp_path / "a.flac").read_bytes()
    assert np.array_equal(read_file(BytesIO(data))[0], read_file(tmp_path / "a.flac")[0])
    (tmp_path / "a.raw").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"^the file b is no sound, is broken"):
        read_file(tmp_path / "a.raw", "the file b")
    with pytest.raises(ValueError, match="it lasts 0.0 s, longer than max_seconds=0.03: cut it"):
        read_file(BytesIO(data), max_seconds=0.03)


@pytest.mark.parametrize("rate", [8000, 16_000, 11_025, 44_100, 6000])
def test_parts_of_a_file_are_those_of_the_whole(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.stack([sound(3 * rate + 7), sound(3 * rate + 7, seed=1)], 1), rate)
    extractor = AudioVQFeatureExtractor(stride=40, sampling_rate=8000, resample=True, mix=True)
    whole, size = extractor.prepare(tmp_path / "a.wav")
    with SoundFileReader(tmp_path / "a.wav", extractor) as reader:
        assert (reader.num_samples,) == size
        steps = [0, 1, 4000, 4040, 17_000, whole.shape[1]]
        parts = [reader.read(a, b)[0] for a, b in zip(steps, steps[1:], strict=False)]
        assert (reader.read(13_000, 13_100)[0] - whole[:, 13_000:13_100]).abs().max() < 1e-6, "in any order"
    assert torch.cat(parts, 1).shape == whole.shape
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-6


def test_a_path_alone_gives_the_codes_of_its_samples(tmp_path):
    tok = make_audio_tokenizer()
    soundfile.write(tmp_path / "a.wav", sound(3333), 8000, subtype="FLOAT")
    whole = tok.encode(sound(3333), sampling_rate=8000)
    assert_same_codes(tok.encode(tmp_path / "a.wav"), whole)
    assert_same_codes(tok.encode([tmp_path / "a.wav"]), whole)
    assert tok.encode(str(tmp_path / "a.wav"), num_codebooks=1).levels[0].shape[1] == 1


def test_a_long_file_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    """70 s, while no more than a chunk and its context is read; the codes are those of the whole."""
    tok = make_audio_tokenizer()
    array = sound(70 * 8000 + 11)
    soundfile.write(tmp_path / "a.wav", array, 8000, subtype="FLOAT")
    read, original = [], SoundFileReader._raw
    monkeypatch.setattr(SoundFileReader, "_raw", lambda self, a, b: (read.append(b - a), original(self, a, b))[1])
    levels, size = encode_file(tok.model, tok.processor, tmp_path / "a.wav")
    assert size == (len(array),) and len(read) == 4
    assert max(read) <= 20 * 8000 + sum(tok.model.encoder.context) + 2 * tok.layout.stride
    whole = tok.model.encode(tok.processor.prepare(array, 8000)[0][None]).codes
    assert [int((a != b).sum()) for a, b in zip(levels, whole, strict=True)] == [0] * len(whole)
    codes = tok.encode(tmp_path / "a.wav")
    assert decode_to_file(tok.model, codes, tmp_path / "b.wav") == len(array)
    back, _ = read_file(tmp_path / "b.wav")
    (made,) = tok.decode(codes)
    assert back.shape == (1, len(array)) and np.abs(back[0] - np.clip(made, -1, 1)).max() < 1e-4


def test_a_file_that_ends_early_leaves_nothing(tmp_path):
    tok = make_audio_tokenizer()
    soundfile.write(tmp_path / "a.flac", sound(80_000), 8000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.flac"):
        tok.encode(tmp_path / "a.flac")


def test_only_one_clip_goes_into_a_file(tmp_path):
    tok = make_audio_tokenizer()
    codes = tok.encode([sound(100), sound(200)], sampling_rate=8000)
    with pytest.raises(ValueError, match="these codes are of 2"):
        decode_to_file(tok.model, codes, tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())
