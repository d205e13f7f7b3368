"""Published codecs through the facade: exact lengths, any batch, saving by name, weights on request, refusals."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from transformers import EncodecConfig

from tests.hub.loopback import MINE
from tests.tiny import assert_same_codes, sound
from tests.tiny_codecs import save_codec
from vqtok import CodePriorConfig, CodePriorModel, Codes, VQPipeline, VQTokenizer, cli
from vqtok.audio.files import write_file
from vqtok.encoding import encode_dataset
from vqtok.evaluation import audio_report
from vqtok.hub.folders import fetch_folder
from vqtok.prior.data import CodeDataset

SIZES = [1, 39, 40, 41, 1000, 999, 2000, 1000]
KINDS = ["encodec", "dac", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mimi", "xcodec"))]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    save_codec(request.param, path)
    return path


@pytest.fixture(scope="module")
def encodec(tmp_path_factory):
    path = tmp_path_factory.mktemp("encodec")
    save_codec("encodec", path)
    return path


def edit(path, **changes):
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, **changes}))


def test_n_samples_in_n_samples_out_in_any_batch(folder):
    tok = VQTokenizer.from_pretrained(folder)
    clips = [sound(n) for n in SIZES]
    codes = tok.encode(clips, sampling_rate=8000)
    assert codes.sizes.flatten().tolist() == SIZES and codes.fingerprint == tok.fingerprint == tok.verify()
    for batch_size in (None, 1):
        made = tok.decode(codes, batch_size)
        assert [each.shape for each in made] == [clip.shape for clip in clips]
        assert all(each.dtype == np.float32 and np.isfinite(each).all() for each in made)
    for i, clip in enumerate(clips):
        assert_same_codes(tok.encode(clip, sampling_rate=8000), codes[i])
    back = Codes.from_bytes(codes.to_bytes())
    assert all(np.array_equal(*pair) for pair in zip(tok.decode(back), tok.decode(codes), strict=True))


def test_a_prefix_of_codebooks_has_its_rate(folder):
    tok = VQTokenizer.from_pretrained(folder)
    every = tok.encode(sound(800), sampling_rate=8000)
    depth = tok.layout.levels[0].num_codebooks
    assert every.levels[0].shape == (1, depth, 20)
    one = tok.encode(sound(800), sampling_rate=8000, num_codebooks=1)
    assert one.levels[0].equal(every.levels[0][:, :1])
    assert not np.array_equal(tok.decode(one)[0], tok.decode(every)[0])
    assert tok.model.config.kbps(1) == 4 * 200 / 1000 and tok.model.config.kbps() == pytest.approx(depth * 0.8)
    assert f"{depth * 0.8:.4g} kbps at 8000 Hz" in repr(tok) and f"wraps {tok.model.config.wrapped.name}" in repr(tok)


def test_saving_stores_the_place_and_not_the_weights(folder, tmp_path):
    tok = VQTokenizer.from_pretrained(folder)
    tok.save_pretrained(tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.json", "preprocessor_config.json"]
    back = VQTokenizer.from_pretrained(tmp_path / "mine")
    assert back.verify() == tok.fingerprint and back.home == (tmp_path / "mine").resolve()
    codes = tok.encode(sound(999), sampling_rate=8000)
    assert_same_codes(back.encode(sound(999), sampling_rate=8000), codes)
    assert np.array_equal(back.decode(codes)[0], tok.decode(codes)[0])
    again = pickle.loads(pickle.dumps(back))
    assert len(pickle.dumps(back)) < 2000 and again.fingerprint == tok.fingerprint


def test_weights_go_along_on_request_under_their_license(folder, tmp_path):
    tok = VQTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="under their license only"):
        tok.save_pretrained(tmp_path / "mine", weights=True)
    assert not (tmp_path / "mine").exists()
    tok.save_pretrained(tmp_path / "mine", weights=True, license="cc-by-4.0")
    assert str(folder) not in (tmp_path / "mine" / "config.json").read_text()
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "mine", moved)
    back = VQTokenizer.from_pretrained(moved)
    assert back.verify() == tok.fingerprint and "its weights under cc-by-4.0" in repr(back)
    codes = tok.encode(sound(999), sampling_rate=8000)
    assert_same_codes(back.encode(sound(999), sampling_rate=8000), codes)
    assert np.array_equal(back.decode(codes)[0], tok.decode(codes)[0])
    back.save_pretrained(tmp_path / "third")
    assert (tmp_path / "third" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="name another folder"):
        tok.save_pretrained(moved)


def test_a_codec_that_is_gone_or_another_is_named(encodec, tmp_path):
    shutil.copytree(encodec, tmp_path / "codec")
    VQTokenizer.from_pretrained(tmp_path / "codec").save_pretrained(tmp_path / "mine")
    save_codec("encodec", tmp_path / "codec", seed=1)
    with pytest.raises(ValueError, match=r"the codec that .*config.json names .* is not the one that was saved"):
        VQTokenizer.from_pretrained(tmp_path / "mine")
    shutil.rmtree(tmp_path / "codec")
    with pytest.raises(FileNotFoundError, match=r"names the codec in the folder .*codec, which is gone: put it back"):
        VQTokenizer.from_pretrained(tmp_path / "mine")


def test_another_decoder_is_noticed(encodec, tmp_path):
    tok = VQTokenizer.from_pretrained(encodec)
    tok.save_pretrained(tmp_path / "mine")
    edit(tmp_path / "mine" / "config.json", decoder_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="its decoder has other weights"):
        VQTokenizer.from_pretrained(tmp_path / "mine")
    with torch.no_grad():
        next(tok.model.decoder.parameters()).add_(1)
    assert tok.verify()
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        tok.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    tok.save_pretrained(tmp_path / "changed", weights=True, license="mit")
    assert VQTokenizer.from_pretrained(tmp_path / "changed").fingerprint == tok.fingerprint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chunk_length_s": 1.0, "overlap": 0.01}, "chunks of 1 s that overlap .* use facebook/encodec_24khz"),
        ({"normalize": True}, "divides each clip by its loudness .* use facebook/encodec_24khz"),
        ({"num_residual_layers": 10**6}, "num_residual_layers 1000000 is more than 128"),
        ({"upsampling_ratios": [2] * 20}, "a hop of 1048576 samples"),
        ({"num_filters": 64}, "do not fit the config"),
        ({"target_bandwidths": [1e12]}, "target_bandwidths"),
        ({"attn_implementation": "somebody/kernels"}, "names code outside transformers"),
        ({"audio_channels": 3}, "3 channels are neither mono nor stereo"),
        ({"sampling_rate": 16000}, "sampling_rate is 8000 and not 16000"),
    ],
)
def test_what_cannot_keep_the_promises_is_refused(encodec, tmp_path, changes, reason):
    shutil.copytree(encodec, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=reason):
        VQTokenizer.from_pretrained(tmp_path)


def test_a_codec_without_safetensors_is_refused(encodec, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(encodec / name, tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        VQTokenizer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((encodec / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        VQTokenizer.from_pretrained(tmp_path)


def test_what_is_no_wrapped_codec_is_named(encodec, tmp_path):
    EncodecConfig().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", model_type="snac")
    with pytest.raises(ValueError, match=r"model_type 'snac', which is no VQ tokenizer .*encodec, dac, mimi, xcodec"):
        VQTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use from_pretrained"):
        VQTokenizer.from_config(encodec)


def test_half_precision_keeps_the_code_space(encodec, tmp_path):
    tok, half = (VQTokenizer.from_pretrained(encodec, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.fingerprint == tok.fingerprint and half.model.dtype == torch.bfloat16
    assert half.reconstruct(sound(500), sampling_rate=8000)[0].shape == (500,)
    with pytest.raises(ValueError, match="load it in float32"):
        half.save_pretrained(tmp_path / "half")


def test_a_wrong_rate_is_refused_unless_resampling_is_asked_for(encodec):
    tok = VQTokenizer.from_pretrained(encodec)
    with pytest.raises(ValueError, match="has 16000 Hz, the tokenizer takes 8000 Hz"):
        tok.encode(sound(500), sampling_rate=16_000)
    tok.processor.resample = True
    assert tok.encode(sound(500), sampling_rate=16_000).sizes.tolist() == [[250]]
    with pytest.raises(ValueError, match="a clip lasts 601.0 s"):
        tok.encode(np.zeros(601 * 8000, np.float32), sampling_rate=8000)


def test_the_command_line(encodec, tmp_path, capsys):
    write_file(tmp_path / "voice.wav", sound(1234), 8000)
    model = ["--tokenizer", str(encodec)]
    assert cli.main(["encode", str(tmp_path / "voice.wav"), str(tmp_path / "voice.vq"), *model]) == 0
    assert cli.main(["decode", str(tmp_path / "voice.vq"), str(tmp_path / "back.wav"), *model]) == 0
    assert cli.main(["info", str(tmp_path / "voice.vq")]) == 0
    tok = VQTokenizer.from_pretrained(encodec)
    codes = tok.encode(tmp_path / "voice.wav")
    assert_same_codes(Codes.load(tmp_path / "voice.vq"), codes)
    back = tok.processor.prepare(tmp_path / "back.wav")[0][0].numpy()
    np.testing.assert_allclose(back, tok.decode(codes)[0].clip(-1, 1), atol=1e-4)
    capsys.readouterr()
    assert cli.main(["info", str(encodec)]) == 0
    assert "wraps EnCodec" in capsys.readouterr().out


def test_a_code_cache_and_an_evaluation(encodec, tmp_path):
    tok = VQTokenizer.from_pretrained(encodec)
    clips = [{"audio": sound(2000 + 37 * i)[None], "sampling_rate": 8000, "text": f"clip {i}"} for i in range(3)]
    encode_dataset(tok, clips, tmp_path / "codes", batch_size=2)
    codes = CodeDataset(tmp_path / "codes")
    assert len(codes) == 3 and codes.fingerprint == tok.fingerprint
    found = audio_report.evaluate(tok, clips, name="encodec", speech=False)
    assert (
        found["tokenizer"]["nominal_kbps"] == pytest.approx(3.2) and found["tokenizer"]["class"] == "WrappedAudioModel"
    )


def on_the_hub(hub, folder, name="somebody/codec"):
    hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})


def test_a_push_names_the_codec_and_holds_no_weights(hub, encodec, tmp_path, monkeypatch):
    on_the_hub(hub, encodec)
    monkeypatch.setenv("HF_TOKEN", MINE)
    tok = VQTokenizer.from_pretrained("somebody/codec")
    revision = tok.model.config.source["revision"]
    assert tok.source == {"repo": "somebody/codec", "revision": revision, "fingerprint": tok.fingerprint}
    tok.push_to_hub("me/wrapped")
    files = hub.repos["me/wrapped"].files()
    assert set(files) == {".gitattributes", "README.md", "config.json", "preprocessor_config.json"}
    card = files["README.md"].decode()
    assert "base_model: somebody/codec" in card and f"at revision `{revision}`" in card
    assert "It wraps EnCodec" in card and "stay under the licence of their authors" in card
    on_the_hub(hub, encodec)  # a later commit does not matter
    back = VQTokenizer.from_pretrained("me/wrapped")
    assert back.verify() == tok.fingerprint and back.model.config.source["revision"] == revision
    assert_same_codes(*(each.encode(sound(999), sampling_rate=8000) for each in (back, tok)))
    tok.save_pretrained(tmp_path / "whole", weights=True, license="mit")
    assert cli.main(["push", str(tmp_path / "whole"), "me/whole"]) == 0
    files = hub.repos["me/whole"].files()
    card = files["README.md"].decode()
    assert "model.safetensors" in files and "license: mit" in card and "are its authors', under mit" in card


def test_a_codec_of_this_machine_is_not_pushed_by_name(hub, encodec, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", MINE)
    tok = VQTokenizer.from_pretrained(encodec)
    with pytest.raises(ValueError, match="which nobody else has"):
        tok.push_to_hub("me/wrapped")
    with pytest.raises(ValueError, match="push the VQTokenizer"):
        tok.model.push_to_hub("me/wrapped")
    assert "me/wrapped" not in hub.repos


def test_a_stranger_cannot_name_a_folder_here(hub, encodec, tmp_path):
    VQTokenizer.from_pretrained(encodec).save_pretrained(tmp_path / "mine")
    on_the_hub(hub, tmp_path / "mine", "stranger/wrapped")
    with pytest.raises(ValueError, match="names a folder of another machine"):
        VQTokenizer.from_pretrained("stranger/wrapped")
    edit(tmp_path / "mine" / "config.json", source={"repo": "../../etc", "revision": "main"})
    with pytest.raises(ValueError, match="is no repository and revision"):
        VQTokenizer.from_pretrained(tmp_path / "mine")


def test_a_pipeline_of_a_stranger_cannot_either(hub, encodec, tmp_path):
    VQTokenizer.from_pretrained(encodec).save_pretrained(tmp_path / "mine")
    on_the_hub(hub, tmp_path / "mine", "stranger/wrapped")
    fetched, _ = fetch_folder("stranger/wrapped", ["*"])
    with pytest.raises(ValueError, match="names a folder of another machine"):
        VQTokenizer.from_pretrained(fetched)


def test_a_prior_over_a_wrapped_codec_is_saved_with_its_name(encodec, tmp_path):
    tok = VQTokenizer.from_pretrained(encodec)
    backbone = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    told = {"condition": "class", "text_size": 3, "fingerprint": tok.fingerprint, "max_grid": 5}
    torch.manual_seed(0)
    prior = CodePriorModel(CodePriorConfig(layout=tok.layout.to_dict(), backbone_config=backbone, **told)).eval()
    pipe = VQPipeline(prior, tok)
    pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe" / "vq_tokenizer" / "model.safetensors").exists()
    back = VQPipeline.from_pretrained(tmp_path / "pipe")
    made = [each([1], num_samples=2, seed=3) for each in (pipe, back)]
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True)) and back.sampling_rate == 8000
