"""Recordings from folders and data sets: every format, every way in which a file can be bad, texts and labels."""

import io
import json

import datasets
import numpy as np
import pytest

from vqtok.audio.data import AudioDataset, SpokenNumbers, load_audio, skipped_summary
from vqtok.audio.files import read_file
from vqtok.audio.resampling import match_channels, resample

soundfile = pytest.importorskip("soundfile")
RATE = 16_000


def _sound(seed=0, length=400, channels=1):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (length, channels))


def _folder(root, *names, **options):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, _sound(seed), RATE, **options)
    return root


def _load(source, split="all", rate=RATE, channels=1, **options):
    return load_audio(source, rate, channels, split, **options)


def test_a_folder_is_read_in_order_with_names(tmp_path):
    _folder(tmp_path, "b.flac", "deep/er/a.wav", "c.ogg")
    (tmp_path / "notes.txt").write_text("no sound")
    dataset = _load(tmp_path)
    assert isinstance(dataset, AudioDataset)
    assert [dataset.name(i) for i in range(len(dataset))] == ["b.flac", "c.ogg", "deep/er/a.wav"]
    item = dataset[0]
    assert item["audio"].dtype == np.float32 and item["audio"].shape == (1, 400) and item["sampling_rate"] == RATE
    assert item["text"] is None and "label" not in item and dataset.skipped == []
    assert np.abs(item["audio"][0] - _sound(0)[:, 0]).max() < 1 / 32768


@pytest.mark.parametrize(
    ("subtype", "step"),
    [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-24), ("FLOAT", 2**-24)],
)
def test_every_depth_has_full_scale_at_one(tmp_path, subtype, step):
    _folder(tmp_path, "a.wav", subtype=subtype)
    assert np.abs(_load(tmp_path)[0]["audio"][0] - _sound(0)[:, 0]).max() <= step


def test_a_clipped_and_a_silent_file_and_one_sample_are_recordings_like_others(tmp_path):
    soundfile.write(tmp_path / "clipped.wav", np.sign(_sound()), RATE)
    soundfile.write(tmp_path / "one.wav", _sound()[:1], RATE)
    soundfile.write(tmp_path / "silent.wav", np.zeros(50), RATE)
    dataset = _load(tmp_path)
    assert [dataset[i]["audio"].shape[1] for i in range(3)] == [400, 1, 50]
    assert not dataset[2]["audio"].any() and np.abs(dataset[0]["audio"]).max() > 0.9999


def _bad_files(folder):
    """Name -> the words that its reason must hold."""
    good = io.BytesIO()
    soundfile.write(good, _sound(length=20_000), RATE, format="FLAC")
    nan = _sound()
    nan[7] = np.nan
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("I am a text")
    (folder / "cut.flac").write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    (folder / "header.flac").write_bytes(b"fLaX" + good.getvalue()[4:])
    soundfile.write(folder / "nothing.wav", _sound()[:0], RATE)
    soundfile.write(folder / "nan.wav", nan, RATE, subtype="FLOAT")
    soundfile.write(folder / "six.wav", _sound(channels=6), RATE)
    soundfile.write(folder / "long.wav", np.zeros(3 * RATE), RATE)
    broken = "broken, or of a format that libsndfile does not read"
    return {
        "cut.flac": "broken",
        "empty.wav": broken,
        "header.flac": broken,
        "long.wav": "lasts 3.0 s, longer than max_seconds=2",
        "nan.wav": "NaN or infinite samples",
        "nothing.wav": "holds no sound",
        "six.wav": "6 channels, not 1",
        "text.wav": broken,
    }


def test_what_cannot_be_read_is_skipped_counted_and_named(tmp_path):
    _folder(tmp_path, "good.wav")
    reasons = _bad_files(tmp_path)
    dataset = _load(tmp_path, max_seconds=2)
    assert len(dataset) == 1 and dataset.name(0) == "good.wav"
    assert [name for name, _ in dataset.skipped] == sorted(reasons)
    for name, reason in dataset.skipped:
        assert reasons[name] in reason, name
    assert skipped_summary(dataset).startswith(f"{len(reasons)} recordings were skipped:\n  cut.flac: ")


def test_unverified_the_broken_one_is_named_when_it_is_reached(tmp_path):
    _folder(tmp_path, "b.wav")
    (tmp_path / "a.wav").write_bytes(b"")
    dataset = _load(tmp_path, verify=False)
    assert len(dataset) == 2 and dataset[1]["audio"].shape == (1, 400)
    with pytest.raises(ValueError, match=r"cannot read the recording a.wav \(it is no sound, is broken.*verify=True"):
        dataset[0]


def test_another_rate_is_an_error_unless_one_asks(tmp_path):
    _folder(tmp_path, "a.wav")
    soundfile.write(tmp_path / "b.wav", _sound(5, 441), 44_100)
    with pytest.raises(ValueError, match="b.wav cannot be used.*sampled at 44100 Hz, not 16000: set resample=True"):
        _load(tmp_path)
    dataset = _load(tmp_path, resample=True)
    assert dataset.skipped == [] and dataset[1]["sampling_rate"] == RATE
    assert dataset[1]["audio"].shape == (1, 160) and dataset[0]["audio"].shape == (1, 400)


def test_channels_are_averaged_or_doubled_and_never_dropped(tmp_path):
    stereo = _sound(1, channels=2)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, subtype="FLOAT")
    assert np.allclose(_load(tmp_path)[0]["audio"][0], stereo.mean(axis=1), atol=1e-7)
    assert np.allclose(_load(tmp_path, channels=2)[0]["audio"], stereo.T, atol=1e-7)
    mono = np.array([[1.0, -1.0]], np.float32)
    assert np.array_equal(match_channels(mono, 2), [[1, -1], [1, -1]]) and match_channels(mono, 1) is mono
    with pytest.raises(ValueError, match="6 channels, not 2"):
        match_channels(np.zeros((6, 3)), 2)


def test_resampling_keeps_a_tone_and_takes_out_what_does_not_fit():
    times = np.arange(24_000) / 24_000
    low, high = (np.sin(2 * np.pi * f * times).astype(np.float32)[None] for f in (1000.0, 10_500.0))
    moved = resample(low, 24_000, 16_000)
    assert moved.shape == (1, 16_000) and moved.dtype == np.float32
    wanted = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert np.abs(moved[0] - wanted)[200:-200].max() < 2e-3
    assert np.abs(resample(high, 24_000, 16_000))[0, 200:-200].max() < 1e-3
    assert resample(low, 24_000, 24_000) is low


def test_transcripts_and_labels_from_tables(tmp_path):
    _folder(tmp_path, "a.wav", "b.wav")
    (tmp_path / "metadata.csv").write_text("file_name,text,speaker\na.wav,one two,ann\nb.wav,three,bob\n")
    dataset = _load(tmp_path, caption_column="text", label_column="speaker")
    assert [dataset[i]["text"] for i in range(2)] == ["one two", "three"]
    assert [dataset[i]["label"] for i in range(2)] == [0, 1] and dataset.label_names == ["ann", "bob"]
    (tmp_path / "metadata.csv").unlink()
    rows = [{"file_name": name, "said": name} for name in ("a.wav", "b.wav")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert _load(tmp_path, caption_column="said")[1]["text"] == "b.wav"


def test_subfolders_are_labels_and_splits(tmp_path):
    _folder(tmp_path, "train/dog/a.wav", "train/cat/b.wav", "test/cat/c.wav")
    train, test = _load(tmp_path, "train"), _load(tmp_path, "test")
    assert train.label_names == ["cat", "dog"] and [train[i]["label"] for i in range(2)] == [0, 1]
    assert len(test) == 1 and test[0]["label"] == 0


def test_held_out_files_are_the_test_split(tmp_path):
    _folder(tmp_path, "a.wav", "b.wav", "c.wav")
    train, test = (_load(tmp_path, split, holdout=["b"]) for split in ("train", "test"))
    assert [train.name(i) for i in range(2)] == ["a.wav", "c.wav"] and test.name(0) == "b.wav"


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (None, "captions were asked for, but 2 of 2 recordings have none"),
        ("file_name,text\na.wav,x\n", "1 of 2 recordings have none, first .*b.wav: add it to .*metadata.csv"),
        ("file_name,text\na.wav,x\nb.wav,\n", "line 3 has no caption in column 'text'"),
        ("file_name,text\na.wav,x\nc.wav,y\n", "line 3 names 'c.wav', which is not in"),
        ("file_name,said\na.wav,x\n", "no column 'text'"),
    ],
)
def test_missing_transcripts_are_said(tmp_path, table, complaint):
    _folder(tmp_path, "a.wav", "b.wav")
    if table is not None:
        (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(ValueError, match=complaint):
        _load(tmp_path, caption_column="text")


def test_a_source_without_recordings_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no recording: put files like .wav, .flac or .ogg"):
        _load(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 recordings of .* can be read, the first, a.wav, because"):
        _load(tmp_path)
    with pytest.raises(ValueError, match="is a file: name the folder of the recordings"):
        _load(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="there is no folder"):
        _load(tmp_path / "absent" / "x")


def _bytes(seed, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, _sound(seed), rate, format="WAV")
    return {"bytes": buffer.getvalue(), "path": None}


def _audio_rows(cells, **columns):
    """A data set as it comes from Parquet: to encode into a column of Audio, `datasets` would want torchcodec."""
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"audio": stored, **{name: datasets.Value("string") for name in columns}}
    rows = datasets.Dataset.from_dict({"audio": cells, **columns}, features=datasets.Features(features))
    return rows.cast_column("audio", datasets.Audio())


def test_a_data_set_with_a_column_of_audio(tmp_path):
    table = _audio_rows([_bytes(i) for i in range(3)], words=["one", "two", "three"])
    for source in (table, tmp_path / "saved"):
        if source is not table:
            table.save_to_disk(source)
        dataset = _load(source, caption_column="words")
        assert [dataset[i]["text"] for i in range(3)] == ["one", "two", "three"] and dataset.name(2) == "row 2"
        assert np.abs(dataset[1]["audio"][0] - _sound(1)[:, 0]).max() < 1 / 32768
    with pytest.raises(ValueError, match="no column of recordings 'words'.*'audio'"):
        _load(table, audio_column="words")
    with pytest.raises(ValueError, match="no column of recordings among"):
        _load(table.remove_columns("audio"))
    with pytest.raises(ValueError, match="no column 'text' for the captions"):
        _load(table, caption_column="text")


def test_rows_without_a_recording_are_skipped():
    cells = [{"bytes": b"no sound", "path": None}, None, _bytes(0)]
    dataset = _load(_audio_rows(cells))
    assert len(dataset) == 1 and dataset.name(0) == "row 2"
    assert [name for name, _ in dataset.skipped] == ["row 0", "row 1"]
    assert dataset.skipped[1][1] == "the row has no recording"


def test_the_spoken_numbers_by_name():
    dataset = _load("spoken-numbers", "test", num_samples=3, seed=4, caption_column="text")
    direct = SpokenNumbers("test", 3, seed=4)
    assert len(dataset) == 3 and np.array_equal(dataset[2]["audio"], direct[2]["audio"])
    assert len(_load("spoken-numbers", "train")) == 10_000
    assert _load("spoken-numbers", "test", rate=8000, num_samples=1, resample=True)[0]["sampling_rate"] == 8000
    for options, complaint in (
        ({"split": "all"}, "unknown split 'all'"),
        ({"split": "test", "rate": 24_000}, "sampled at 16000 Hz, not 24000: set resample=True"),
        ({"split": "test", "holdout": ["a"]}, "cannot use holdout"),
        ({"split": "test", "audio_column": "a"}, "cannot use audio_column"),
        ({"split": "test", "caption_column": "words"}, "no column 'words'"),
        ({"split": "test", "num_samples": 0}, "num_samples is 0"),
        ({"split": "test", "channels": 6}, "num_channels is 6"),
        ({"split": "test", "rate": 0}, "sampling rate is 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            _load("spoken-numbers", **options)


def test_one_file_alone(tmp_path):
    soundfile.write(tmp_path / "a.wav", _sound(2, channels=3), 22_050)
    audio, rate = read_file(tmp_path / "a.wav")
    assert audio.shape == (3, 400) and rate == 22_050 and audio.flags.c_contiguous
