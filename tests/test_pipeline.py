"""Prompts to pictures through a tiny pipeline: the same after saving, and clear words for everything that does not fit."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from vqtok import VQPipeline, VQTokenizer
from vqtok.image.configuration_image_vq import ImageVQConfig
from vqtok.image.image_processing_image_vq import ImageVQImageProcessor
from vqtok.image.modeling_image_vq import ImageVQModel
from vqtok.prior import (
    PRIORS,
    CodePriorConfig,
    CodePriorModel,
    MaskedCodePriorModel,
    encode_prompts,
    train_text_tokenizer,
)
from vqtok.prior.text import seen_token_ids

CAPTIONS = [f"a {colour} {digit}" for colour in ("red", "green", "blue") for digit in ("zero", "three", "seven")]
BACKBONE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
SIZE = {"sizes": (16, 24)}


def make_vq_tokenizer(folder, seed=0):
    torch.manual_seed(seed)
    config = ImageVQConfig(
        strides=[8, 4],
        quantizer={"type": "vector", "codebook_size": 16},
        hidden_size=16,
        residual_size=8,
        latent_size=4,
    )
    model = ImageVQModel(config).eval()
    VQTokenizer(model, ImageVQImageProcessor(stride=8)).save_pretrained(folder)
    return VQTokenizer.from_pretrained(folder)


def make_prior(vq_tokenizer, model_type="vqtok_prior", **fields):
    torch.manual_seed(1)
    config_class, model_class = PRIORS[model_type]
    config = config_class(
        layout=vq_tokenizer.layout.to_dict(),
        fingerprint=vq_tokenizer.fingerprint,
        max_grid=4,
        backbone_config=BACKBONE,
        **fields,
    )
    prior = model_class(config).eval()
    with torch.no_grad():
        for name, value in prior.named_parameters():
            if "norm" not in name:
                value.mul_(6)
    return prior


@pytest.fixture
def vq_tokenizer(tmp_path):
    return make_vq_tokenizer(tmp_path / "vq")


@pytest.fixture
def pipe(vq_tokenizer):
    text = train_text_tokenizer(CAPTIONS)
    prior = make_prior(vq_tokenizer, condition="text", text_size=len(text), max_text_length=4)
    prior.generation_config.guidance_scale = 1.5
    return VQPipeline(prior, vq_tokenizer, text, seen_token_ids(encode_prompts(text, CAPTIONS, 4)))


def pixels(pictures):
    return [np.asarray(picture).tolist() for picture in pictures]


def test_prompts_become_pictures_prompt_by_prompt(pipe):
    pictures = pipe(["a red three", "a blue seven"], num_samples=2, seed=3, **SIZE)
    assert [picture.size for picture in pictures] == [(24, 16)] * 4
    assert pixels(pictures[:2]) == pixels(pipe("a red three", num_samples=2, seed=3, **SIZE))
    assert pixels(pictures) != pixels(pipe(["a red three", "a blue seven"], num_samples=2, seed=4, **SIZE))
    assert len(pipe(None, num_samples=3, seed=0)) == 3 and len(pipe([None, "a red zero"], seed=0, **SIZE)) == 2
    assert pipe.sampling_rate is None and pipe.to("cpu") is pipe


def test_the_stored_guidance_is_the_default(pipe):
    given = pipe("a red three", seed=0, guidance_scale=1.5, num_samples=8, **SIZE)
    assert pixels(pipe("a red three", seed=0, num_samples=8, **SIZE)) == pixels(given)
    assert pixels(pipe("a red three", seed=0, guidance_scale=1.0, num_samples=8, **SIZE)) != pixels(given)


def test_saved_and_loaded_it_draws_the_same_pixels(pipe, tmp_path):
    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "pipeline.json",
        "vq_tokenizer/config.json", "vq_tokenizer/model.safetensors", "vq_tokenizer/preprocessor_config.json",
    }  # fmt: skip
    again = VQPipeline.from_pretrained(folder)
    prompts = ["a green zero", "a blue seven"]
    assert pixels(again(prompts, num_samples=2, seed=9)) == pixels(pipe(prompts, num_samples=2, seed=9))
    assert again.text_ids_seen == pipe.text_ids_seen and again.prior.generation_config.guidance_scale == 1.5
    assert again.vq_tokenizer.fingerprint == again.prior.config.fingerprint == pipe.vq_tokenizer.fingerprint
    again.save_pretrained(tmp_path / "copy")
    for path in files:
        if path not in ("config.json", "tokenizer_config.json", "pipeline.json"):
            assert (tmp_path / "copy" / path).read_bytes() == (folder / path).read_bytes(), path
    facts = [json.loads((place / "pipeline.json").read_text(encoding="utf-8")) for place in (folder, tmp_path / "copy")]
    for each in facts:  # transformers says more in it of a tokenizer that was loaded
        assert each["text_files"].pop("tokenizer_config.json")
    assert facts[0] == facts[1]
    assert type(AutoModel.from_pretrained(folder)) is CodePriorModel
    assert VQTokenizer.from_pretrained(folder, subfolder="vq_tokenizer").fingerprint == pipe.vq_tokenizer.fingerprint
    half = VQPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in half.prior.parameters()} == {torch.bfloat16} and len(
        half("a red zero", seed=0)
    ) == 1
    assert half.vq_tokenizer.model.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    fresh = CodePriorModel(CodePriorConfig.from_pretrained(tmp_path / "half"))
    assert {value.dtype for value in fresh.parameters()} == {torch.float32}, "a config's dtype is not half a model's"
    assert "llama prior" in repr(again) and again.vq_tokenizer.fingerprint in repr(again)


def test_saving_keeps_other_files_and_survives_a_full_disk(pipe, tmp_path, monkeypatch):
    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state").write_text("precious")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vqtok.pipeline.write_json", full)
        with pytest.raises(OSError, match="No space left"):
            pipe.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    pipe.save_pretrained(folder)
    assert (folder / "checkpoints" / "state").read_text() == "precious"
    # A first save that fails leaves nothing that looks like a pipeline.
    with monkeypatch.context() as patch:
        patch.setattr("vqtok.pipeline.write_json", full)
        with pytest.raises(OSError, match="No space left"):
            pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_tokenizer_in_use_keeps_its_home(pipe, tmp_path):
    import pickle

    size = len(pickle.dumps(pipe.vq_tokenizer))
    pipe.save_pretrained(tmp_path / "pipeline")
    data = pickle.dumps(pipe.vq_tokenizer)
    assert len(data) == size and pickle.loads(data).fingerprint == pipe.vq_tokenizer.fingerprint


def test_classes_and_no_condition(vq_tokenizer, tmp_path):
    by_class = VQPipeline(make_prior(vq_tokenizer, condition="class", text_size=10), vq_tokenizer)
    by_class.save_pretrained(tmp_path / "class")
    assert not (tmp_path / "class" / "tokenizer.json").exists()
    again = VQPipeline.from_pretrained(tmp_path / "class")
    assert pixels(again([3, np.int64(7)], seed=0, **SIZE)) == pixels(by_class([3, 7], seed=0, **SIZE))
    for bad in ([10], [-1], ["3"], [True]):
        with pytest.raises(ValueError, match="class labels from 0 to 9"):
            by_class(bad)
    without = VQPipeline(make_prior(vq_tokenizer), vq_tokenizer)
    assert len(without(num_samples=2, seed=0)) == 2
    with pytest.raises(ValueError, match="without conditions"):
        without(["a red three"])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a red three", ""], "prompt 1 is empty"),
        ([], "there are no prompts"),
        ([3], "prompt 0 must be a text, got 3"),
        (["a red three a red three"], "prompt 0 has 6 tokens, this prior takes at most 4"),
        (["a reed three"], "the word 'reed'; the nearest known words are 'red'"),
    ],
)
def test_bad_prompts_are_named(pipe, prompts, message):
    with pytest.raises(ValueError, match=message):
        pipe(prompts)


def test_another_tokenizer_is_refused_with_both_fingerprints(pipe, tmp_path):
    other = make_vq_tokenizer(tmp_path / "other", seed=7)
    mine, theirs = pipe.prior.config.fingerprint, other.fingerprint
    assert mine != theirs
    with pytest.raises(ValueError, match=f"{theirs}.*{mine}"):
        VQPipeline(pipe.prior, other, pipe.text_tokenizer)
    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "vq_tokenizer")
    shutil.copytree(tmp_path / "other", folder / "vq_tokenizer")
    with pytest.raises(ValueError, match=f"{theirs}.*{mine}"):
        VQPipeline.from_pretrained(folder)


def test_parts_that_do_not_belong_together(pipe, vq_tokenizer):
    with pytest.raises(ValueError, match="condition 'text' was given the text tokenizer NoneType"):
        VQPipeline(pipe.prior, vq_tokenizer)
    by_class = make_prior(vq_tokenizer, condition="class", text_size=10)
    with pytest.raises(ValueError, match="leave it away"):
        VQPipeline(by_class, vq_tokenizer, pipe.text_tokenizer)
    small = make_prior(vq_tokenizer, condition="text", text_size=10)
    with pytest.raises(ValueError, match="the prior knows 10"):
        VQPipeline(small, vq_tokenizer, pipe.text_tokenizer)
    layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 16}]}
    other = CodePriorModel(CodePriorConfig(layout=layout, backbone_config=BACKBONE))
    with pytest.raises(ValueError, match="was made for codes of the layout"):
        VQPipeline(other, vq_tokenizer)


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "pipeline.json").unlink(), OSError, "no pipeline.json and is no pipeline"),
        (lambda f: (f / "pipeline.json").write_text("{"), ValueError, "pipeline.json makes no sense"),
        (lambda f: (f / "pipeline.json").write_text("[]"), ValueError, "pipeline.json makes no sense"),
        (lambda f: _edit(f / "pipeline.json", format=99), ValueError, "upgrade vqtok"),
        (lambda f: _edit(f / "pipeline.json", stages=["stage_1"]), ValueError, "makes no sense"),
        (lambda f: _edit(f / "pipeline.json", stages=[".", "../stage_1"]), ValueError, "makes no sense"),
        (
            lambda f: _edit(f / "pipeline.json", stages=[".", "stage_1"]),
            FileNotFoundError,
            "stage_1 has no config.json",
        ),
        (lambda f: _edit(f / "pipeline.json", text_ids_seen=[[0, 1 << 40]]), ValueError, "makes no sense"),
        (lambda f: _edit(f / "pipeline.json", vq_tokenizer="../vq"), ValueError, "inside the pipeline, got '../vq'"),
        (lambda f: _edit(f / "pipeline.json", vq_tokenizer="/etc"), ValueError, "inside the pipeline, got '/etc'"),
        (lambda f: _edit(f / "pipeline.json", vq_tokenizer="elsewhere"), OSError, "no folder 'elsewhere'"),
        (lambda f: _edit(f / "pipeline.json", fingerprint="0" * 64), ValueError, "0000"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            OSError,
            "no model.safetensors .*pytorch_model.bin",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 40), ValueError, "truncated or damaged"),
        (lambda f: (f / "config.json").unlink(), OSError, "no config.json"),
        (lambda f: _edit(f / "config.json", text_size="many"), ValueError, "config.json.*text_size"),
        (lambda f: _edit(f / "config.json", max_gird=3), ValueError, "Did you mean 'max_grid'"),
        (lambda f: _edit(f / "config.json", text_size=301), ValueError, "do not fit|the prior knows"),
        (lambda f: (f / "tokenizer_config.json").unlink(), OSError, "no tokenizer_config.json"),
    ],
)
def test_damaged_folders_are_named(pipe, tmp_path, damage, error, message):
    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    damage(folder)
    with pytest.raises(error, match=message):
        VQPipeline.from_pretrained(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(OSError, match="there is no folder"):
        VQPipeline.from_pretrained(tmp_path / "nowhere")


# -- masked priors and editing


def noise(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_pipeline_of_a_masked_prior_draws_the_same_pixels_after_saving(vq_tokenizer, tmp_path):
    prior = make_prior(vq_tokenizer, "vqtok_masked_prior", condition="class", text_size=5)
    prior.generation_config.num_passes = 5
    pipe = VQPipeline(prior, vq_tokenizer)
    pipe.save_pretrained(tmp_path / "pipeline")
    again = VQPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(again.prior) is MaskedCodePriorModel and again.prior.generation_config.num_passes == 5
    drawn = pipe([1, 2], num_samples=2, seed=3, guidance_scale=2.0)
    assert pixels(drawn) == pixels(again([1, 2], num_samples=2, seed=3, guidance_scale=2.0))
    assert pixels(pipe([1], seed=3, num_passes=2, **SIZE)) == pixels(again([1], seed=3, num_passes=2, **SIZE))
    half = VQPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.bfloat16)
    assert half([1], seed=0, **SIZE)[0].size == (24, 16)


@pytest.mark.parametrize("model_type", PRIORS)
def test_media_are_edited_where_they_are_not_kept(vq_tokenizer, model_type):
    """The codes of what is kept stay; both kinds of prior draw the rest."""
    pipe = VQPipeline(make_prior(vq_tokenizer, model_type, condition="class", text_size=5), vq_tokenizer)
    picture, keep = noise(16, 24, 0), np.zeros((16, 24), dtype=bool)
    keep[:, :12] = True  # the second column of coarse cells is cut in half
    before = vq_tokenizer.encode(picture)
    known = pipe._known(picture, keep)
    assert known.keep[0][0].tolist() == [[True, False, False]] * 2
    assert known.keep[1][0].tolist() == [[True] * 3 + [False] * 3] * 4
    codes = pipe.prior.sample_codes([3], known=known, seed=1)
    for got, given, kept in zip(codes.levels, before.levels, known.keep, strict=True):
        assert torch.equal(got[0, 0][kept[0]], given[0, 0][kept[0]]) and not torch.equal(got, given)
    edited = pipe(3, media=picture, keep=keep, seed=1)
    assert [one.size for one in edited] == [(24, 16)] and pixels(edited) == pixels(vq_tokenizer.decode(codes))
    mask = Image.fromarray(keep.astype(np.uint8) * 255)
    for other in (mask, mask.convert("1"), torch.from_numpy(keep), keep[None]):
        assert pixels(pipe(3, media=Image.fromarray(picture), keep=other, seed=1)) == pixels(edited)
    several = pipe([3, 1], num_samples=2, media=picture, keep=keep, seed=1)
    assert len(several) == 4 and pixels(several[:1]) == pixels(edited)
    each = pipe([3, 1], media=[picture, noise(16, 24, 1)], keep=keep, seed=1)
    assert pixels(each[:1]) == pixels(edited) and pixels(each[1:]) != pixels(several[1:2])
    assert pixels(pipe(3, media=picture, seed=1)) == pixels(vq_tokenizer.decode(before)), "all is kept"
    assert pipe(3, media=picture, sizes=(16, 32), seed=1)[0].size == (32, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": np.ones((16, 24), dtype=bool)}, "give media too"),
        ({"media": noise(16, 24, 0), "keep": np.ones((16, 16), dtype=bool)}, r"the size of the media, \(16, 24\)"),
        ({"media": noise(16, 24, 0), "keep": np.ones((16, 24))}, "is bool"),
        ({"media": noise(16, 24, 0), "sizes": (8, 8)}, "does not fit into"),
        ({"media": [noise(16, 24, 0)] * 3, "prompts": [1, 2]}, "3 known samples for 2 conditions"),
    ],
)
def test_edits_that_do_not_fit_are_named(vq_tokenizer, arguments, words):
    pipe = VQPipeline(make_prior(vq_tokenizer, condition="class", text_size=5), vq_tokenizer)
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompts": 3, "seed": 0, **arguments})
