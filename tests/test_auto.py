"""The facade: order, sizes and state of encode and decode, files, fingerprints, pickling."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

import vqtok.auto.tokenizer
from vqtok.auto import VQTokenizer, bits_per_unit
from vqtok.codes import Codes
from vqtok.hub import folders
from vqtok.image import ImageVQConfig, ImageVQModel
from vqtok.image.image_processing_image_vq import ImageVQImageProcessor

SIZES = [(30, 21), (16, 16), (9, 40), (31, 20), (8, 8), (17, 33), (16, 16), (32, 24)]
TINY = {"strides": [8, 4], "codebook_sizes": [16, 32], "hidden_size": 16, "residual_size": 8, "codebook_dim": 4}


def picture(height, width, seed=0):
    """Coarse noise, so that codes differ from place to place."""
    rng = np.random.default_rng([seed, height, width])
    small = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
    return small.resize((width, height))


def make(seed=0, **changes):
    torch.manual_seed(seed)
    model = ImageVQModel(ImageVQConfig(**{**TINY, **changes})).eval()
    tokenizer = VQTokenizer(model, ImageVQImageProcessor(stride=model.layout.stride))
    pixels = torch.stack([tokenizer.processor.prepare(picture(64, 64, s))[0] for s in range(4)])
    model.init_codebooks([pixels])
    return tokenizer


@pytest.fixture(scope="module")
def shared():
    """For tests that only read."""
    return make()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A folder to spoil."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def assert_same_codes(one, other):
    assert one.sizes.tolist() == other.sizes.tolist()
    for a, b in zip(one.levels, other.levels, strict=True):
        assert torch.equal(a, b)


# -- encode and decode


def test_mixed_sizes_come_back_in_order_and_exactly(shared):
    pictures = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    codes = shared.encode(pictures)
    assert codes.sizes.tolist() == [list(size) for size in SIZES]
    assert [tuple(level.shape) for level in codes.levels] == [(8, 1, 4, 5), (8, 1, 8, 10)]
    assert all(len(level.unique()) > 4 for level in codes.levels), "the pictures do not tell codes apart"
    decoded = shared.decode(codes)
    assert [image.size for image in decoded] == [(width, height) for height, width in SIZES]
    for index, image in enumerate(decoded):
        (alone,) = shared.decode(codes[index])
        np.testing.assert_array_equal(np.asarray(alone), np.asarray(image))


def test_codes_belong_to_the_picture_but_for_near_ties(shared):
    """Every code that differs between alone and in a batch is one whose two distances are equal up to rounding."""
    pictures = [picture(32, 32, seed=i) for i in range(12)]
    together = shared.encode(pictures)
    table = [level.codebook.embedding for level in shared.model.quantizer.levels]
    for index, image in enumerate(pictures):
        alone = shared.encode(image)
        pixels = shared.processor.prepare(image)[0][None]
        latents = shared.model.encode(pixels).latents
        for level, (a, b) in enumerate(zip(alone.levels, together[index].levels, strict=True)):
            differing = (a != b).flatten().nonzero()[:, 0]
            z = latents[level].flatten(0, 2)[differing]
            gap = (z - table[level][a.flatten()[differing]]).norm(dim=1) - (
                z - table[level][b.flatten()[differing]]
            ).norm(dim=1)
            assert (gap.abs() <= 1e-5 * latents[level].std()).all()
            if len(differing):
                break  # finer levels follow the coarser code
    assert_same_codes(together, shared.encode(pictures))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing_that_is_seen(shared, batch_size):
    pictures = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    codes = shared.encode(pictures, batch_size=batch_size)
    equal = [float((a == b).float().mean()) for a, b in zip(codes.levels, shared.encode(pictures).levels, strict=True)]
    assert min(equal) > 0.98
    assert [image.size for image in shared.decode(codes, batch_size)] == [image.size for image in pictures]


def test_batches_have_the_size_asked_for(shared, monkeypatch):
    seen = []
    encode = shared.model.encode
    monkeypatch.setattr(shared.model, "encode", lambda batch: (seen.append(tuple(batch.shape)), encode(batch))[1])
    shared.encode([picture(16, 16)] * 5 + [picture(15, 24)], batch_size=2)
    assert seen == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16), (1, 3, 16, 24)]


def test_pictures_of_many_sizes_do_not_pile_up(shared, monkeypatch):
    monkeypatch.setattr(vqtok.auto.batches, "_MOST_WAITING", 3 * 8 * 64)
    pictures = [picture(8, 8 * n, seed=n) for n in range(1, 9)]
    encode, drawn, when = shared.model.encode, [], []
    monkeypatch.setattr(shared.model, "encode", lambda batch: (when.append(len(drawn)), encode(batch))[1])
    codes = shared.encode(drawn.append(n) or image for n, image in enumerate(pictures))
    assert when[0] < len(pictures), "all were read before the first was encoded"
    assert_same_codes(codes, Codes.cat([shared.encode(image) for image in pictures]))


def test_one_item_none_and_a_generator(shared, tmp_path):
    image = picture(16, 24)
    assert len(shared.encode(image)) == 1
    assert_same_codes(shared.encode(np.asarray(image)), shared.encode(image))
    image.save(tmp_path / "a.png")
    assert_same_codes(shared.encode([str(tmp_path / "a.png"), image]), shared.encode(picture(16, 24) for _ in range(2)))
    assert len(shared.encode([])) == 0 and shared.decode(shared.encode([])) == []
    (again,) = shared.reconstruct(image)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(shared.decode(shared.encode(image))[0]))


def test_prefixes(shared):
    image = picture(16, 16)
    codes = shared.encode(image, num_levels=1, num_codebooks=1)
    assert len(codes.levels) == 1 and torch.equal(codes.levels[0], shared.encode(image).levels[0])
    assert shared.decode(codes)[0].size == (16, 16)
    for name, value in (("num_levels", 3), ("num_levels", 0), ("num_codebooks", 2), ("batch_size", 0)):
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
            shared.encode(image, **{name: value})


def test_bad_items_say_their_place(shared, tmp_path):
    with pytest.raises(ValueError, match=r"^item 1: a picture has 7x16 pixels, a side smaller than the stride of 8"):
        shared.encode([picture(16, 16), picture(16, 7)])
    with pytest.raises(ValueError, match=r"item 0: cannot read .*broken.png"):
        (tmp_path / "broken.png").write_bytes(b"x")
        shared.encode([tmp_path / "broken.png"])
    with pytest.raises(TypeError, match="item 1: .*not NoneType"):
        shared.encode([picture(16, 16), None])
    with pytest.raises(FileNotFoundError, match="missing.png"):
        shared.encode(["missing.png"])
    with pytest.raises(ValueError, match="sampling_rate=16000 is for audio"):
        shared.encode(picture(16, 16), sampling_rate=16000)
    with pytest.raises(TypeError, match="decode takes Codes, got tuple"):
        shared.decode(shared.encode(picture(16, 16)).levels)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_encode_in_train_mode_changes_nothing(update):
    tokenizer = make(codebook_update=update)
    expected = tokenizer.encode([picture(16, 24)])
    tokenizer.model.train()
    tokenizer.model.decoder.eval()
    before = {name: value.clone() for name, value in tokenizer.model.state_dict().items()}
    modes = [module.training for module in tokenizer.model.modules()]
    codes = tokenizer.encode([picture(16, 24)])
    tokenizer.decode(codes)
    assert_same_codes(codes, expected)
    assert modes == [module.training for module in tokenizer.model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.model.state_dict().items())
    assert all(codebook._counts is None for codebook in tokenizer.model.quantizer.codebooks), "statistics were gathered"
    assert not any(level.requires_grad for level in codes.levels)
    with pytest.raises(ValueError):
        tokenizer.encode(picture(3, 3))
    assert modes == [module.training for module in tokenizer.model.modules()], "an error leaves it in eval mode"


# -- code spaces


def test_codes_of_another_tokenizer_are_refused_by_name(saved, tmp_path):
    other = make(seed=1)
    other.save_pretrained(tmp_path)
    mine = VQTokenizer.from_pretrained(saved)
    codes = other.encode(picture(16, 16))
    with pytest.raises(ValueError) as caught:
        mine.decode(codes)
    assert other.fingerprint in str(caught.value) and mine.fingerprint in str(caught.value)
    with pytest.raises(ValueError, match="do not fit this tokenizer's"):
        make(strides=[16, 8]).decode(codes)
    nameless = Codes(codes.levels, codes.sizes, codes.layout, None)
    assert mine.decode(nameless)[0].size == (16, 16)


def test_the_fingerprint_follows_what_decides_codes():
    def of(change=None, stride=8):
        tokenizer = make()
        tokenizer.processor = ImageVQImageProcessor(stride=stride, max_pixels=1000)
        if change:
            with torch.no_grad():
                change(tokenizer.model)
        return tokenizer.model.code_fingerprint(tokenizer.processor.code_fields)

    same = of()
    assert of(lambda model: model.decoder.to_pixels.get_parameter(last(model.decoder.to_pixels)).add_(1)) == same
    assert of(lambda model: model.quantizer.levels[0].codebook.counts.add_(1)) == same
    different = [
        of(lambda model: model.encoder.heads[0].weight[0, 0].add_(1e-3)),
        of(lambda model: model.quantizer.levels[1].codebook.embedding[0].add_(1e-3)),
        of(stride=16),
    ]
    assert len({same, *different}) == 4


def last(module):
    return [name for name, _ in module.named_parameters()][-1]


def test_verify(copied):
    tokenizer = VQTokenizer.from_pretrained(copied)
    assert tokenizer.verify() == tokenizer.fingerprint
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    weights["encoder.heads.0.weight"][0, 0] += 1e-3
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    tampered = VQTokenizer.from_pretrained(copied)
    with pytest.raises(ValueError, match=tokenizer.fingerprint) as caught:
        tampered.verify()
    assert tampered.model.code_fingerprint(tampered.processor.code_fields) in str(caught.value)
    with pytest.raises(ValueError, match="never saved"):
        make().verify()


def test_bfloat16_keeps_codebooks_and_says_why_it_cannot_be_verified(saved):
    tokenizer = VQTokenizer.from_pretrained(saved, dtype="bfloat16")
    assert tokenizer.model.encoder.heads[0].weight.dtype == torch.bfloat16
    assert tokenizer.model.quantizer.levels[0].codebook.embedding.dtype == torch.float32
    assert tokenizer.decode(tokenizer.encode(picture(16, 17)))[0].size == (17, 16)
    with pytest.raises(ValueError, match="load it in float32"):
        tokenizer.verify()


# -- files


def test_saved_and_loaded_are_equal(saved):
    original, loaded = make(), VQTokenizer.from_pretrained(saved)
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
    tokenizer = make(seed=1)
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
    tokenizer = make()
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
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors: save the tokenizer again"),
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
        (lambda f: (f / "preprocessor_config.json").write_text('{"num_channels": 1}'), "gives 1 channels"),
        (lambda f: (f / "pipeline.json").write_text("{}"), "is a pipeline: use VQPipeline"),
        (config_with(codebook_dim="4"), r"config\.json: .*'codebook_dim'.*got str"),
        (config_with(codebok_dim=4), r"config\.json: .*'codebok_dim'. Did you mean 'codebook_dim'"),
        (config_with(strides=[8, 3]), r"config\.json: .*strides must be powers of two"),
        (config_with(codebook_dim=8), "weights do not fit the config"),
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
    model = make().model
    with pytest.raises(ValueError, match="do not make a tokenizer"):
        VQTokenizer(model, object())
    with pytest.raises(ValueError, match="multiples of 4, the model needs multiples of 8"):
        VQTokenizer(model, ImageVQImageProcessor(stride=4))


def test_repr(saved):
    text = repr(VQTokenizer.from_pretrained(saved))
    for part in ("images", "level 0: 1 code of 16 per 8x8 pixels, 4 bits", "0.375 bits per pixel", "M parameters"):
        assert part in text
    assert VQTokenizer.from_pretrained(saved).fingerprint in text
    assert "not saved" in repr(make())
    assert bits_per_unit(make().layout) == 4 / 64 + 5 / 16


# -- the Hub


def test_push_is_one_upload_of_the_three_files(monkeypatch, saved):
    calls = []

    class FakeApi:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            import os

            calls.append(("upload", repo_id, sorted(os.listdir(folder_path)), revision))
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(vqtok.auto.tokenizer, "HfApi", FakeApi)
    tokenizer = VQTokenizer.from_pretrained(saved)
    assert tokenizer.push_to_hub("vq", private=True, token="secret") == "https://hub/commit"
    assert calls == [
        ("token", "secret"),
        ("create", "vq", True, True),
        ("upload", "me/vq", ["config.json", "model.safetensors", "preprocessor_config.json"], None),
    ]
    assert len(pickle.dumps(tokenizer)) < 1000, "it is still what its folder holds"


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
    unsaved = make()
    assert_same_codes(pickle.loads(pickle.dumps(unsaved)).encode(image), unsaved.encode(image))
    pickled = pickle.dumps(again)
    make(seed=1).save_pretrained(copied)
    with pytest.raises(ValueError, match="has changed since the tokenizer was pickled"):
        pickle.loads(pickled)
