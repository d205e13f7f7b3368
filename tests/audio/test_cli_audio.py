"""vqtok encode voice.wav voice.vq and back: what is written, what is refused in one line."""

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import make_audio_tokenizer, make_tokenizer, picture, sound
from vqtok import CodePriorConfig, CodePriorModel, VQPipeline, cli
from vqtok.audio.files import read_file
from vqtok.auto import VQTokenizer
from vqtok.codes import CodeLayout, Codes, LevelLayout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    make_audio_tokenizer().save_pretrained(folder / "sound")
    make_tokenizer().save_pretrained(folder / "pictures")
    return folder


@pytest.fixture
def run(capsys):
    def run(*arguments):
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def refuse(run, tmp_path):
    """Runs a command that must fail with one line, and write nothing; returns the line."""

    def refuse(*arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and err.startswith("vqtok: ") and err.count("\n") == 1, err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return err

    return refuse


def test_generate_writes_sound(run, refuse, folders, tmp_path):
    """Drawn, written as .wav with the pipeline's own samples, and not over what is there."""
    backbone = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tok = VQTokenizer.from_pretrained(folders / "sound")
    told = {"condition": "class", "text_size": 3, "fingerprint": tok.fingerprint, "max_grid": 5}
    torch.manual_seed(0)
    prior = CodePriorModel(CodePriorConfig(layout=tok.layout.to_dict(), backbone_config=backbone, **told))
    pipe = VQPipeline(prior.eval(), tok)
    pipe.save_pretrained(tmp_path / "pipe")
    arguments = ["generate", tmp_path / "pipe", 2, 0, "--num_samples", 2, "--seed", 1, "--output_dir", tmp_path / "out"]
    status, out, err = run(*arguments)
    assert status == 0, err
    names = [f"{name}-{sample:03d}.wav" for name in ("000-2", "001-0") for sample in range(2)]
    assert [line.rsplit("/", 1)[1] for line in out.splitlines()] == names
    for name, wanted in zip(names, pipe([2, 0], num_samples=2, seed=1), strict=True):
        heard, rate = read_file(tmp_path / "out" / name)
        assert rate == 8000 and heard.shape == (1, *wanted.shape) and np.abs(heard[0] - wanted.clip(-1, 1)).max() < 1e-4
    assert "000-2-000.wav exists already" in refuse(*arguments)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_there_and_back(run, folders, tmp_path, suffix):
    clip, voice, codes, back = (
        sound(12_345),
        tmp_path / f"voice{suffix}",
        tmp_path / "voice.vq",
        tmp_path / f"b{suffix}",
    )
    soundfile.write(voice, clip, 8000)
    status, out, err = run("encode", voice, codes, "-t", folders / "sound")
    assert status == 0 and err == "" and "kbps with its header" in out and "927 codes" in out, (out, err)
    status, out, err = run("decode", codes, back, "-t", folders / "sound")
    assert status == 0 and "12345 samples at 8000 Hz, 1.54 s" in out, (out, err)
    made, rate = read_file(back)
    tok = VQTokenizer.from_pretrained(folders / "sound")
    (expected,) = tok.reconstruct(voice)
    assert rate == 8000 and made.shape == (1, 12_345) and np.abs(made[0] - np.clip(expected, -1, 1)).max() < 1e-4
    status, out, _ = run("info", codes)
    assert status == 0 and "3 codes of 16 per 40" in out and tok.fingerprint in out and "bits per sample or byte" in out
    status, out, _ = run("info", folders / "sound")
    assert status == 0 and "2.4 kbps at 8000 Hz" in out


def test_fewer_codebooks_are_a_smaller_file(run, folders, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound(8000), 8000)
    for count in (1, 3):
        run("encode", tmp_path / "a.wav", tmp_path / f"{count}.vq", "-t", folders / "sound", "--num_codebooks", count)
    sizes = [(tmp_path / f"{count}.vq").stat().st_size for count in (1, 3)]
    assert sizes[1] - sizes[0] == 2 * 200 * 4 // 8
    assert "at most 1 of 3 codebooks" in run("info", tmp_path / "1.vq")[1]
    for name, options in (("1.vq", []), ("3.vq", ["--num_codebooks", "1"])):
        run("decode", tmp_path / name, tmp_path / f"{name}.wav", "-t", folders / "sound", *options)
    assert (tmp_path / "1.vq.wav").read_bytes() == (tmp_path / "3.vq.wav").read_bytes()


def test_conversions_only_when_asked_for(run, refuse, folders, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([sound(4410)] * 2, 1), 44_100)
    command = ["encode", tmp_path / "a.wav", tmp_path / "a.vq", "-t", folders / "sound"]
    assert "has 2 channels, the tokenizer takes 1" in refuse(*command) and "--mix" in refuse(*command)
    assert "has 44100 Hz" in refuse(*command, "--mix") and "--resample" in refuse(*command, "--mix")
    assert run(*command, "--mix", "--resample")[0] == 0
    assert Codes.load(tmp_path / "a.vq").sizes.tolist() == [[800]]


def test_several_samples_become_several_files(run, folders, tmp_path):
    tok = VQTokenizer.from_pretrained(folders / "sound")
    tok.encode([sound(100), sound(230)], sampling_rate=8000).save(tmp_path / "two.vq")
    assert run("decode", tmp_path / "two.vq", tmp_path / "out.wav", "-t", folders / "sound")[0] == 0
    assert [read_file(tmp_path / f"out-{i:04d}.wav")[0].shape[1] for i in range(2)] == [100, 230]


def test_what_cannot_be_done_is_one_line(refuse, folders, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound(400), 8000)
    picture(16, 16).save(tmp_path / "a.png")
    (tmp_path / "broken.wav").write_bytes(b"RIFF1234WAVEnothing")
    VQTokenizer.from_pretrained(folders / "sound").encode(sound(400), sampling_rate=8000).save(tmp_path / "a.vq")
    VQTokenizer.from_pretrained(folders / "pictures").encode(picture(16, 16)).save(tmp_path / "p.vq")
    voice, new, sounds, pictures = tmp_path / "a.wav", tmp_path / "new.vq", folders / "sound", folders / "pictures"
    assert "is no sound" in refuse("encode", tmp_path / "a.png", new, "-t", sounds)
    assert "it is no picture" in refuse("encode", voice, new, "-t", pictures)
    assert "broken.wav is no sound, is broken, or of a format" in refuse(
        "encode", tmp_path / "broken.wav", new, "-t", sounds
    )
    assert "is a folder" in refuse("encode", tmp_path, new, "-t", sounds)
    assert "there is no file" in refuse("encode", tmp_path / "none.wav", new, "-t", sounds)
    assert "named like a picture, a sound or a text" in refuse("encode", voice, tmp_path / "b.flac", "-t", sounds)
    assert "a file of codes already" in refuse("encode", tmp_path / "a.vq", new, "-t", sounds)
    assert "--mix is for sound" in refuse("encode", tmp_path / "a.png", new, "-t", pictures, "--mix")
    assert "a.wav is a sound, not a file of codes" in refuse("decode", voice, tmp_path / "b.wav", "-t", sounds)
    assert "no suffix of a sound format" in refuse("decode", tmp_path / "a.vq", tmp_path / "b.png", "-t", sounds)
    assert "no suffix of a picture format" in refuse("decode", tmp_path / "p.vq", tmp_path / "b.wav", "-t", pictures)
    assert "belong to the code space" in refuse("decode", tmp_path / "p.vq", tmp_path / "b.png", "-t", sounds)
    assert "exists already" in refuse("decode", tmp_path / "a.vq", voice, "-t", sounds)


def test_files_are_within_two_percent_of_the_nominal_rate_from_two_minutes_on(tmp_path):
    """The layouts of 1.5 kbps and of SNAC's 0.98; to a byte per level, and a header."""
    for layout, rate, nominal in (
        (CodeLayout(1, (LevelLayout(320, 3, 1024),)), 16_000, 1500),
        (CodeLayout(1, tuple(LevelLayout(stride, 1, 4096) for stride in (2048, 1024, 512))), 24_000, 984.375),
    ):
        samples = 120 * rate
        grids = layout.grids((samples,))
        levels = [
            torch.randint(level.codebook_size, (1, level.num_codebooks, *grid))
            for level, grid in zip(layout.levels, grids, strict=True)
        ]
        Codes(tuple(levels), torch.tensor([[samples]]), layout, "f" * 64).save(tmp_path / "a.vq")
        size = (tmp_path / "a.vq").stat().st_size
        bits = [
            level.numel() * (each.codebook_size - 1).bit_length()
            for level, each in zip(levels, layout.levels, strict=True)
        ]
        assert 0 < size - sum(-(-count // 8) for count in bits) <= 256
        assert abs(8 * size / 120 / nominal - 1) < 0.02


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_altered_files_of_sound_are_refused(data):
    layout = CodeLayout(1, (LevelLayout(40, 3, 16),))
    generator = torch.Generator().manual_seed(1)
    good = Codes((torch.randint(16, (1, 3, 25), generator=generator),), torch.tensor([[1000]]), layout).to_bytes()
    how = data.draw(st.sampled_from(["cut", "flip", "append"]))
    at = data.draw(st.integers(0, len(good) - 1))
    if how == "cut":
        bad = good[:at]
    elif how == "append":
        bad = good + data.draw(st.binary(min_size=1, max_size=9))
    else:
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    with pytest.raises(ValueError):
        Codes.from_bytes(bad)
