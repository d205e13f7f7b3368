"""The facade's files: saved and loaded, spoilt, on the Hub, pickled."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.tiny import assert_same_codes, make_tokenizer, picture
from vqtok.auto import VQTokenizer, bits_per_unit
from vqtok.hub import folders
from vqtok.image import ImageVQModel
from vqtok.image.image_processing_image_vq import ImageVQImageProcessor
from vqtok.prior import CodePriorConfig, CodePriorModel

SIZES = [(30, 21), (16, 16), (9, 40), (31, 20), (8, 8), (17, 33), (16, 16), (32, 24)]


# -- files


def test_saved_and_loaded_are_equal(saved):
    original, loaded = make_tokenizer(), VQTokenizer.from_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    pictures = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    codes = loaded.encode(pictures)
    assert_same_codes(codes, original.encode(pictures))
    assert codes.fingerprint == loaded.fingerprint == json.loads((saved / "config.json").read_text())["fingerprint"]
    assert len(loaded.fingerprint) == 64 and original.fingerprint is None
    for a, b in zip(loaded.decode(codes), original.decode(codes), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    auto = AutoModel.from_pretrained(saved)
    assert type(auto) is ImageVQModel and auto.config.fingerprint == loaded.fingerprint


def test_saving_keeps_other_files_and_saving_again_keeps_the_fingerprint(copied):
    (copied / "checkpoints" / "step-1").mkdir(parents=True)
    (copied / "metrics.json").write_text("{}")
    tokenizer = VQTokenizer.from_pretrained(copied)
    before = tokenizer.fingerprint
    tokenizer.save_pretrained(copied)
    assert tokenizer.fingerprint == before
    names = ["checkpoints", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in copied.iterdir()) == names


def test_a_full_disk_keeps_the_previous_files(copied):
    resource = pytest.importorskip("resource")
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    tokenizer = make_tokenizer(seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for folder in (copied, copied / "new"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # enough for the JSON files, not for the weights
        try:
            with pytest.raises(OSError, match=f"could not write {folder}.*What was there is unchanged"):
                tokenizer.save_pretrained(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert tokenizer.fingerprint is None


def test_saving_in_train_mode_does_not_promise_a_code_space(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.model.train()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.fingerprint is None, "the next step changes the codes"
    assert VQTokenizer.from_pretrained(tmp_path).verify()
    tokenizer.model.eval()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.fingerprint == tokenizer.verify()
    tokenizer.model.train()
    assert tokenizer.fingerprint is None


def config_with(**fields):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors: save it again"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"only pytorch_model\.bin, a pickle, which vqtok never loads",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]),
            "truncated or damaged",
        ),
        (lambda f: (f / "config.json").write_text("{"), "JSON"),
        (lambda f: (f / "preprocessor_config.json").write_text('{"strid": 8}'), "'strid'. Did you mean 'stride'"),
        (
            lambda f: (f / "preprocessor_config.json").write_text('{"stride": 4}'),
            "multiples of 4, the model needs .* 8",
        ),
        (lambda f: (f / "preprocessor_config.json").write_text('{"num_channels": 1}'), "gives num_channels 1"),
        (lambda f: (f / "pipeline.json").write_text("{}"), "is a pipeline: use VQPipeline"),
        (config_with(latent_size="4"), r"config\.json: .*'latent_size'.*got str"),
        (config_with(latent_sise=4), r"config\.json: .*'latent_sise'. Did you mean 'latent_size'"),
        (config_with(strides=[8, 3]), r"config\.json: .*strides must be powers of two"),
        (config_with(latent_size=8), "weights do not fit the config"),
        (
            config_with(quantizer={"type": "vector", "codebok_size": 16}),
            r"config\.json: .*'codebok_size'. Did you mean 'codebook_size'",
        ),
        (config_with(quantizer={"type": "vectr"}), r"config\.json: .*type must be one of vector, .*got 'vectr'"),
        (config_with(model_type="bert"), "model_type 'bert', which is no VQ tokenizer"),
    ],
)
def test_bad_folders(copied, spoil, complaint):
    spoil(copied)
    with pytest.raises((ValueError, OSError), match=complaint) as caught:
        VQTokenizer.from_pretrained(copied)
    assert str(copied) in str(caught.value) or "processor" in str(caught.value)


def test_from_config():
    one, other = VQTokenizer.from_config("image/vqvae2-digits"), VQTokenizer.from_config("image/vqvae2-digits")
    assert one.layout == other.layout and one.fingerprint is None and not one.model.training
    assert not torch.equal(one.model.encoder.heads[0].weight, other.model.encoder.heads[0].weight)
    with pytest.raises(ValueError, match="did you mean 'image/vqvae2-digits'"):
        VQTokenizer.from_config("image/vqvae2-digit")


def test_from_config_of_a_trained_folder_does_not_take_over_its_name(saved):
    assert VQTokenizer.from_config(saved).fingerprint is None


def test_model_and_processor_must_belong_together():
    model = make_tokenizer().model
    with pytest.raises(ValueError, match="do not make a tokenizer"):
        VQTokenizer(model, object())
    with pytest.raises(ValueError, match="multiples of 4, the model needs multiples of 8"):
        VQTokenizer(model, ImageVQImageProcessor(stride=4))


def test_repr(saved):
    text = repr(VQTokenizer.from_pretrained(saved))
    for part in ("images", "level 0: 1 code of 16 per 8x8 pixels, 4 bits", "0.375 bits per pixel", "M parameters"):
        assert part in text
    assert VQTokenizer.from_pretrained(saved).fingerprint in text
    assert "not saved" in repr(make_tokenizer())
    assert bits_per_unit(make_tokenizer().layout) == 4 / 64 + 5 / 16


# -- the Hub; tests/hub/test_push.py has the rest


def test_from_the_hub(monkeypatch, saved):
    monkeypatch.setattr(folders, "snapshot_download", lambda repo, **options: str(saved))
    tokenizer = VQTokenizer.from_pretrained("me/vq", token="secret")
    assert tokenizer.verify()
    pickled = pickle.dumps(tokenizer)
    assert b"me/vq" in pickled and saved.name.encode() in pickled, "name and commit"
    assert b"secret" not in pickled
    assert pickle.loads(pickled).fingerprint == tokenizer.fingerprint


# -- pickling and hashing


def test_hashes_are_stable_and_small(saved):
    from datasets.fingerprint import Hasher

    one, other = VQTokenizer.from_pretrained(saved), VQTokenizer.from_pretrained(saved)
    one.encode(picture(16, 16))
    assert Hasher.hash(one.encode) == Hasher.hash(other.encode)
    assert len(pickle.dumps(one)) < 1000
    one.model.to = lambda device: [buffer.copy_(buffer) for buffer in one.model.buffers()]  # as a GPU's: new, but equal
    one.to("cpu")
    assert Hasher.hash(one.encode) == Hasher.hash(other.encode)
    with torch.no_grad():
        one.model.decoder.null.add_(1)
    assert Hasher.hash(one.encode) != Hasher.hash(other.encode)


def test_dataset_map_finds_its_cache(saved):
    from datasets import Dataset

    def run():
        tokenizer = VQTokenizer.from_pretrained(saved)
        rows = Dataset.from_dict({"seed": [0, 1]})
        return rows.map(lambda row: {"codes": tokenizer.encode(picture(16, 16, row["seed"])).levels[0].tolist()})

    one, other = run(), run()
    assert one._fingerprint == other._fingerprint
    assert one[1]["codes"] == VQTokenizer.from_pretrained(saved).encode(picture(16, 16, 1)).levels[0].tolist()


def test_pickles_are_what_was_pickled(copied):
    tokenizer = VQTokenizer.from_pretrained(copied)
    again = pickle.loads(pickle.dumps(tokenizer))
    image = picture(24, 16)
    assert_same_codes(again.encode(image), tokenizer.encode(image))
    with torch.no_grad():
        tokenizer.model.decoder.null.add_(1)  # no longer what the folder holds
    changed = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(changed.model.decoder.null, tokenizer.model.decoder.null)
    unsaved = make_tokenizer()
    assert_same_codes(pickle.loads(pickle.dumps(unsaved)).encode(image), unsaved.encode(image))
    pickled = pickle.dumps(again)
    make_tokenizer(seed=1).save_pretrained(copied)
    with pytest.raises(ValueError, match="has changed since the tokenizer was pickled"):
        pickle.loads(pickled)


def test_priors_are_registered():
    assert type(AutoConfig.for_model("vqtok_prior", layout=make_tokenizer().layout.to_dict())) is CodePriorConfig
    assert AutoModel._model_mapping[CodePriorConfig] is CodePriorModel
