"""What a push leaves in a repository, and what it refuses: nothing of other weights, nothing of a person's lost, no links."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from tests.hub.loopback import MINE
from tests.test_pipeline import make_prior
from tests.test_pipeline_conditions import make_encoder
from tests.tiny import make_audio_tokenizer, make_tokenizer, picture
from vqtok import VQPipeline, VQTokenizer
from vqtok.hub.folders import fetch_folder
from vqtok.prior import CodeCascade

FIGURES = {
    "nats_per_code": [1.5, 2.0],
    "ln_codebook_size": [2.77, 3.47],
    "prior_bits_per_pixel": 0.2,
    "held_out_samples": 9,
}


@pytest.fixture
def home(tmp_path):
    """A pipeline's folder as training leaves it."""
    folder, vq_tokenizer = tmp_path / "pipeline", make_tokenizer()
    vq_tokenizer.save_pretrained(tmp_path / "vq")
    VQPipeline(make_prior(vq_tokenizer), vq_tokenizer).save_pretrained(folder)
    add_figures(folder)
    return folder


def add_figures(folder):
    (folder / "samples").mkdir()
    picture(16, 16).save(folder / "samples" / "samples.png")
    (folder / "metrics.json").write_text(json.dumps(FIGURES))
    (folder / "training.json").write_text("{}")


def files_of(hub, repo="me/x"):
    return set(hub.repos[repo].files())


GENERATED = {"metrics.json", "training.json", "samples/samples.png"}


# -- links


@pytest.mark.parametrize("name", ["LICENSE", "training.json", "samples/more.png", "samples"])
def test_a_link_is_refused_by_name(hub, home, tmp_path, name):
    secret = tmp_path / "private"
    if name == "samples":
        (home / "samples").rename(secret)
    else:
        secret.write_text('{"password": "x"}')
        (home / name).unlink(missing_ok=True)
    (home / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"^{name}.* is a link, and only files are published"):
        VQPipeline.from_pretrained(home).push_to_hub("me/x", token=MINE)
    assert hub.repos == {}


def test_a_folder_that_is_a_link_itself_is_ones_own(hub, home, tmp_path):
    (tmp_path / "link").symlink_to(home)
    VQPipeline.from_pretrained(tmp_path / "link").push_to_hub("me/x", token=MINE)
    assert files_of(hub) >= GENERATED


# -- what is removed


def test_only_weights_that_a_push_replaces_are_removed(hub, home):
    kept = ["lora/other.safetensors", "best.safetensors", "stage_1/model.safetensors", "samples/mine.png"]
    stale = ["model-00001-of-00002.safetensors", "vq_tokenizer/model.safetensors.index.json"]
    hub.add("me/x", dict.fromkeys([*kept, *stale, "pipeline.json"], b"{}"))
    VQPipeline.from_pretrained(home).push_to_hub("me/x", token=MINE)
    assert files_of(hub) >= {*kept, "vq_tokenizer/model.safetensors"} and not files_of(hub) & set(stale)


@pytest.mark.parametrize("part", ["tokenizer", "model", "prior"])
def test_a_pipelines_repository_is_not_overwritten_by_a_part(hub, home, part):
    pipe = VQPipeline.from_pretrained(home)
    pipe.push_to_hub("me/x", token=MINE)
    before = hub.repos["me/x"].files()
    pushed = {"tokenizer": pipe.vq_tokenizer, "model": pipe.vq_tokenizer.model, "prior": pipe.prior}[part]
    with pytest.raises(ValueError, match="me/x holds a pipeline, which this would overwrite"):
        pushed.push_to_hub("me/x", token=MINE)
    assert hub.repos["me/x"].files() == before


def test_nor_is_a_pipelines_folder(home):
    before = (home / "config.json").read_bytes()
    with pytest.raises(ValueError, match="holds a pipeline, which this would overwrite: name another folder"):
        make_tokenizer().save_pretrained(home)
    assert (home / "config.json").read_bytes() == before and not (home / "preprocessor_config.json").exists()


def test_figures_go_with_the_weights_they_are_of(hub, home):
    pipe = VQPipeline.from_pretrained(home)
    pipe.push_to_hub("me/x", token=MINE)
    assert files_of(hub) >= GENERATED
    VQPipeline.from_pretrained("me/x").push_to_hub("me/x", token=MINE, license="mit")
    assert files_of(hub) >= GENERATED, "the same weights, from another machine"
    change(pipe.prior.lm_head.weight)
    pipe.push_to_hub("me/x", token=MINE)
    assert not files_of(hub) & GENERATED


def change(parameter):
    with torch.no_grad():
        parameter.add_(1)


CHANGES = {
    "prior": lambda pipe, other: setattr(pipe, "prior", other.prior),
    "tokenizer": lambda pipe, other: setattr(pipe.vq_tokenizer, "model", other.vq_tokenizer.model),
    "decoder": lambda pipe, other: change(pipe.vq_tokenizer.model.decoder.null),
    "data": lambda pipe, other: setattr(pipe.prior.lm_head.weight, "data", pipe.prior.lm_head.weight.data * 2),
    "drawing": lambda pipe, other: setattr(pipe.prior.generation_config, "temperature", 0.5),
    "seen": lambda pipe, other: setattr(pipe, "text_ids_seen", [1, 2]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_figures_of_another_pipeline_are_not_pushed(hub, home, what):
    pipe, other = (VQPipeline.from_pretrained(home) for _ in range(2))
    CHANGES[what](pipe, other)
    pipe.push_to_hub("me/x", token=MINE)
    assert not files_of(hub) & GENERATED


def test_figures_of_another_tokenizer_are_not_pushed(hub, tmp_path):
    for seed in (0, 1):
        make_tokenizer(seed).save_pretrained(tmp_path / str(seed))
        (tmp_path / str(seed) / "metrics.json").write_text("{}")
    tokenizer = VQTokenizer.from_pretrained(tmp_path / "0")
    tokenizer.model = VQTokenizer.from_pretrained(tmp_path / "1").model
    tokenizer.push_to_hub("me/x", token=MINE)
    assert "metrics.json" not in files_of(hub)


def test_a_pipeline_that_was_just_saved_is_at_home_there(hub, tmp_path):
    vq_tokenizer = make_tokenizer()
    vq_tokenizer.save_pretrained(tmp_path / "vq")
    pipe = VQPipeline(make_prior(vq_tokenizer), vq_tokenizer)
    pipe.save_pretrained(tmp_path / "pipeline")
    add_figures(tmp_path / "pipeline")
    pipe.to("cpu").push_to_hub("me/x", token=MINE)
    assert files_of(hub) >= GENERATED


# -- a model alone


def test_a_model_alone_claims_no_code_space(hub, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    stale = tokenizer.fingerprint
    with torch.no_grad():
        for parameter in tokenizer.model.encoder.parameters():
            parameter.zero_()
    tokenizer.model.push_to_hub("me/x", token=MINE)
    files = hub.repos["me/x"].files()
    assert not [name for name, data in files.items() if stale.encode() in data]
    assert AutoModel.from_pretrained("me/x").config.fingerprint is None
    assert tokenizer.model.config.fingerprint == stale, "one's own copy is left alone"
    prior = make_prior(make_tokenizer())
    prior.push_to_hub("me/prior", token=MINE)
    assert AutoModel.from_pretrained("me/prior").config.fingerprint == prior.config.fingerprint


def test_saving_does_not_push(hub, tmp_path):
    for model in (make_tokenizer().model, make_prior(make_tokenizer())):
        with pytest.raises(ValueError, match="call push_to_hub"):
            model.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not (tmp_path / "x").exists() and hub.seen == []


# -- sentences


def test_bad_options_and_cards_are_sentences(hub, home):
    pipe = VQPipeline.from_pretrained(home)
    for each in (pipe, pipe.vq_tokenizer, pipe.prior):
        with pytest.raises(ValueError, match="push_to_hub has no option 'max_shard_size': it takes private, token"):
            each.push_to_hub("me/x", token=MINE, max_shard_size="1GB")
    with pytest.raises(ValueError, match="revision must name a branch"):
        pipe.push_to_hub("me/x", token=MINE, revision="../main")
    assert hub.repos == {}
    hub.add("me/x", {"README.md": b"\xff\xfe"})
    with pytest.raises(ValueError, match="README.md on the Hub is no UTF-8 .*: mend it first"):
        pipe.push_to_hub("me/x", token=MINE)
    (home / "README.md").write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match="the folder's README.md is no UTF-8"):
        pipe.push_to_hub("me/y", token=MINE)


@pytest.mark.parametrize("revision", ["../../../../pwned", "/etc", "a/../b", "", "a b", "-x"])
def test_a_revision_is_no_path(hub, tmp_path, revision):
    for load in (VQTokenizer, VQPipeline):
        with pytest.raises(ValueError, match="revision must name a branch, a tag or a commit"):
            load.from_pretrained("me/x", revision=revision, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="revision must name"):
        fetch_folder("me/x", ["*"], revision=revision)
    assert hub.seen == [] and list(tmp_path.iterdir()) == []


# -- every kind of pipeline comes back


def parts_of(kind, vq_tokenizer):
    if kind == "features":
        encoder = make_encoder()
        encoder.source = {"repo": "google/t5", "revision": "a" * 40}
        fields = {"condition": "features", "feature_size": 16, "max_text_length": 12}
        return make_prior(vq_tokenizer, **fields), {"text_encoder": encoder}
    if kind == "cascade":
        return CodeCascade([make_prior(vq_tokenizer, **each) for each in ({"num_levels": 1}, {"first_level": 1})]), {}
    return make_prior(vq_tokenizer, "vqtok_masked_prior" if kind == "masked" else "vqtok_prior"), {}


KINDS = {
    "features": "text encoder [google/t5]", "cascade": "A cascade of 2 priors", "masked": "A masked prior", "audio": "A prior over",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pipeline_is_pushed_and_comes_back(hub, tmp_path, kind):
    vq_tokenizer = make_audio_tokenizer() if kind == "audio" else make_tokenizer()
    vq_tokenizer.save_pretrained(tmp_path / "vq")
    prior, others = parts_of(kind, vq_tokenizer)
    pipe = VQPipeline(prior, vq_tokenizer, **others)
    pipe.push_to_hub("me/x", token=MINE)
    again = VQPipeline.from_pretrained("me/x")
    words, sizes = (["one", None] if kind == "features" else None), ((120,) if kind == "audio" else (16, 24))
    for mine, theirs in zip(*(each(words, seed=3, sizes=sizes) for each in (pipe, again)), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    assert KINDS[kind] in hub.repos["me/x"].files()["README.md"].decode()
    again.push_to_hub("me/again", token=MINE)
    for name in ("config.json", "pipeline.json", "model.safetensors"):
        one, other = (hub.repos[repo].files()[name] for repo in ("me/x", "me/again"))
        assert one == other or name == "pipeline.json", name
    assert KINDS[kind] in hub.repos["me/again"].files()["README.md"].decode()


def test_the_feature_extractor_of_a_tokenizer_of_sound_comes_back(hub):
    tokenizer = make_audio_tokenizer()
    tokenizer.push_to_hub("me/voice", token=MINE)
    assert AutoFeatureExtractor.from_pretrained("me/voice").to_dict() == tokenizer.processor.to_dict()
