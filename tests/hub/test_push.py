"""Pushing to a Hub on the loopback interface, with the real client: one commit, our card, nothing half-written, no secret."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from tests.hub.loopback import MINE, OTHERS
from tests.test_pipeline import CAPTIONS, make_prior
from tests.tiny import assert_same_codes, make_tokenizer, needs_auto_image_processor, picture
from vqtok import VQPipeline, VQTokenizer, cli
from vqtok.prior import encode_prompts, train_text_tokenizer
from vqtok.prior.text import seen_token_ids

METRICS = {
    "psnr_db": 31.25, "ssim": 0.95, "bits_per_pixel": 0.609375, "usage": [1.0, 0.5], "perplexity": [10.5, 20.25],
    "protocol": "vqtok-eval v1", "date": "2026-01-02T03:04:05", "machine": {"cores": 2}, "data": {"num_images": 512},
}  # fmt: skip
THREE = ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.fixture
def home(tmp_path):
    """A tokenizer's folder as training leaves it: with figures, arguments, pictures, and things that are nobody's business."""
    folder = tmp_path / "out" / "vq"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    arguments = {"config": "image/x", "dataset": "me/cats", "max_steps": 7, "output_dir": str(folder), "seed": 0}
    (folder / "training.json").write_text(json.dumps({"arguments": arguments, "history": [{"step": 7, "loss": 0.5}]}))
    for name in ("samples/reconstructions.png", "samples/step-5.png", "checkpoints/step-5/sheet.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(16, 24).save(folder / name)
    (folder / "checkpoints/step-5/optimizer.bin").write_bytes(b"\x80\x04.")
    (folder / "notes.txt").write_text("mine")
    return folder


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def card_of(hub, repo="me/vq", revision="main"):
    return hub.repos[repo].files(revision)["README.md"].decode()


# -- what is pushed


def test_a_tokenizer_is_one_commit_and_comes_back(hub, home):
    tokenizer = VQTokenizer.from_pretrained(home)
    address = tokenizer.push_to_hub("me/vq", token=MINE)
    repo = hub.repos["me/vq"]
    assert repo.messages == ["initial commit", "Upload with vqtok"] and address.endswith(repo.branches["main"])
    files = repo.files()
    extras = ["README.md", "metrics.json", "samples/reconstructions.png", "training.json"]
    assert sorted(files) == sorted([".gitattributes", *THREE, *extras])
    assert files["model.safetensors"] == (home / "model.safetensors").read_bytes()
    loaded = VQTokenizer.from_pretrained("me/vq")
    assert loaded.verify() == tokenizer.fingerprint
    assert_same_codes(loaded.encode(picture(30, 21)), tokenizer.encode(picture(30, 21)))
    assert str(home.parent) not in "".join(data.decode("latin-1") for data in files.values())
    assert json.loads(files["training.json"])["arguments"]["output_dir"] == "vq"
    assert str(home) in (home / "training.json").read_text(), "one's own copy is left alone"


def test_the_card_is_ours_and_says_what_was_measured(hub, home):
    hub.datasets.add("me/cats")
    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE, license="apache-2.0")
    card = card_of(hub)
    fields = header(card)
    assert fields["library_name"] == "vqtok" and fields["pipeline_tag"] == "image-feature-extraction"
    assert fields["license"] == "apache-2.0" and fields["datasets"] == ["me/cats"]
    (model,) = fields["model-index"]
    figures = {each["type"]: each for each in model["results"][0]["metrics"]}
    assert figures["psnr"]["value"] == 31.25
    assert figures["psnr"]["args"] == {"protocol": "vqtok-eval v1", "num_samples": 512}
    for words in (
        "![reconstructions](samples/reconstructions.png)",
        "| 0 | 8 | 16 | 100.0% | 10.5 |",
        "| max_steps | 7 |",
    ):
        assert words in card
    assert VQTokenizer.from_pretrained(home).fingerprint in card


def test_a_folder_called_like_a_data_set_is_not_claimed_to_be_one(hub, home):
    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)
    assert "datasets" not in header(card_of(hub))


def test_figures_of_other_weights_are_not_pushed(hub, home):
    tokenizer = VQTokenizer.from_pretrained(home)
    with torch.no_grad():
        tokenizer.model.decoder.null.add_(1)
    tokenizer.push_to_hub("me/vq", token=MINE)
    assert sorted(hub.repos["me/vq"].files()) == sorted([".gitattributes", "README.md", *THREE])
    assert "Measured" not in card_of(hub) and "model-index" not in header(card_of(hub))


def test_the_snippet_of_the_card_runs(hub, home, tmp_path, monkeypatch):
    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)
    monkeypatch.chdir(tmp_path)
    picture(30, 21).save("cat.png")
    (code,) = re.findall(r"```python\n(.*?)```", card_of(hub), re.S)
    names = {}
    exec(compile(code, "the card", "exec"), names)
    assert names["images"][0].size == (21, 30)


def test_pushing_again_makes_no_commit(hub, home):
    first = VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)
    assert VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE) == first
    assert len(hub.repos["me/vq"].messages) == 2
    tokenizer = VQTokenizer.from_pretrained(home)
    with torch.no_grad():
        tokenizer.model.decoder.null.add_(1)
    assert tokenizer.push_to_hub("me/vq", token=MINE) != first and len(hub.repos["me/vq"].messages) == 3


def test_a_branch_and_its_commit(hub, home):
    VQTokenizer.from_pretrained(home).push_to_hub("vq", token=MINE)
    other = make_tokenizer(seed=1)
    other.push_to_hub("me/vq", token=MINE, revision="other", commit_message="Try another seed")
    repo = hub.repos["me/vq"]
    assert repo.messages[-1] == "Try another seed" and sorted(repo.branches) == ["main", "other"]
    prints = [
        VQTokenizer.from_pretrained("me/vq", revision=revision).verify()
        for revision in (None, "other", repo.branches["main"], repo.branches["other"])
    ]
    assert prints[0] == prints[2] != prints[1] == prints[3]
    with pytest.raises(
        OSError, match="Hub repository of that name at revision 'no-such' cannot be read: it has no such revision"
    ):
        VQTokenizer.from_pretrained("me/vq", revision="no-such")


def test_a_pull_request(hub, home):
    hub.add("other/vq", {"README.md": b"theirs"})
    address = VQTokenizer.from_pretrained(home).push_to_hub("other/vq", token=MINE, create_pr=True)
    assert address.endswith("/discussions/1")
    assert list(hub.repos["other/vq"].files()) == ["README.md"] and "config.json" in hub.repos["other/vq"].files(
        "refs/pr/1"
    )


def test_stale_weights_go_in_the_same_commit(hub, home):
    """Two shards of yesterday beside today's one file would be loaded by somebody."""
    stale = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "paper.pdf": b"kept"}
    hub.add("me/vq", stale)
    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)
    files = hub.repos["me/vq"].files()
    assert not set(files) & {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert files["paper.pdf"] == b"kept" and len(hub.repos["me/vq"].messages) == 2


@pytest.mark.parametrize("words", [["a red three"], None])
def test_a_pipeline_is_one_commit_and_draws_the_same(hub, tmp_path, words):
    make_tokenizer().push_to_hub("me/vq", token=MINE)
    vq_tokenizer = VQTokenizer.from_pretrained("me/vq")
    text, fields = None, {}
    if words:
        text = train_text_tokenizer(CAPTIONS)
        fields = {"condition": "text", "text_size": len(text), "max_text_length": 4}
    prior = make_prior(vq_tokenizer, **fields)
    seen = seen_token_ids(encode_prompts(text, CAPTIONS, 4)) if words else None
    pipe = VQPipeline(prior, vq_tokenizer, text, seen)
    home = tmp_path / "pipeline"
    pipe.save_pretrained(home)
    (home / "samples").mkdir()
    picture(16, 16).save(home / "samples" / "samples.png")
    facts = {
        "nats_per_code": [1.5, 2.0],
        "ln_codebook_size": [2.77, 3.47],
        "prior_bits_per_pixel": 0.2,
        "held_out_samples": 9,
    }
    (home / "metrics.json").write_text(json.dumps(facts))
    VQPipeline.from_pretrained(home).push_to_hub("me/dalle", token=MINE)
    repo = hub.repos["me/dalle"]
    assert len(repo.messages) == 2
    own = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    assert set(repo.files()) == own | {"README.md", ".gitattributes"}
    again = VQPipeline.from_pretrained("me/dalle")
    options = {"num_samples": 2, "seed": 3, "sizes": (16, 24)}
    for mine, theirs in zip(pipe(words, **options), again(words, **options), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    card = card_of(hub, "me/dalle")
    fields = header(card)
    commit = hub.repos["me/vq"].branches["main"]
    assert fields["base_model"] == "me/vq" and commit in card, "prior -> tokenizer, with its revision"
    assert fields["pipeline_tag"] == ("text-to-image" if words else "unconditional-image-generation")
    assert fields["model-index"][0]["results"][0]["metrics"][1]["value"] == 2.0
    names = {}
    exec(compile(re.findall(r"```python\n(.*?)```", card, re.S)[0], "the card", "exec"), names)
    assert len(names["samples"]) == 4
    again.push_to_hub("me/again", token=MINE)
    assert header(card_of(hub, "me/again"))["base_model"] == "me/vq"


def test_figures_of_another_prior_are_not_pushed(hub, tmp_path):
    vq_tokenizer = make_tokenizer()
    vq_tokenizer.save_pretrained(tmp_path / "vq")
    VQPipeline(make_prior(vq_tokenizer), vq_tokenizer).save_pretrained(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    pipe = VQPipeline.from_pretrained(tmp_path)
    pipe.push_to_hub("me/same", token=MINE)
    with torch.no_grad():
        pipe.prior.lm_head.weight.add_(1)
    pipe.push_to_hub("me/changed", token=MINE)
    assert "metrics.json" in hub.repos["me/same"].files() and "metrics.json" not in hub.repos["me/changed"].files()


@pytest.mark.parametrize("kind", ["vqtok_image", "vqtok_prior"])
def test_a_model_alone(hub, kind):
    tokenizer = make_tokenizer()
    model = tokenizer.model if kind == "vqtok_image" else make_prior(tokenizer)
    model.push_to_hub("me/bare", token=MINE)
    files = hub.repos["me/bare"].files()
    assert set(files) - {"generation_config.json"} == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
    }
    card = card_of(hub, "me/bare")
    assert header(card)["library_name"] == "vqtok" and "pipeline_tag" not in header(card)
    names = {}
    exec(compile(re.findall(r"```python\n(.*?)```", card, re.S)[0], "the card", "exec"), names)
    assert names["model"].config.model_type == kind
    for one, other in zip(names["model"].state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# -- the command


def run(*arguments, capsys):
    status = cli.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_the_command_pushes_both_kinds(hub, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", MINE)
    status, out, _ = run("push", home, "me/vq", "--private", "--message", "First", "--license", "mit", capsys=capsys)
    assert status == 0 and hub.endpoint + "/me/vq" in out
    assert hub.repos["me/vq"].private and hub.repos["me/vq"].messages[-1] == "First"
    assert header(card_of(hub))["license"] == "mit" and "samples/reconstructions.png" in hub.repos["me/vq"].files()
    vq_tokenizer = VQTokenizer.from_pretrained(home)
    VQPipeline(make_prior(vq_tokenizer), vq_tokenizer).save_pretrained(tmp_path / "pipeline")
    assert run("push", tmp_path / "pipeline", "me/dalle", "--revision", "v1", capsys=capsys)[0] == 0
    assert "pipeline.json" in hub.repos["me/dalle"].files("v1") and "pipeline.json" not in hub.repos["me/dalle"].files()


def test_the_command_refuses_in_one_line(hub, home, tmp_path, capsys):
    status, _, err = run("push", home, "me/vq", capsys=capsys)  # nobody is logged in
    assert status == 2 and err.count("\n") == 1 and "hf auth login" in err
    status, _, err = run("push", tmp_path / "none", "me/vq", capsys=capsys)
    assert status == 2 and "there is no folder" in err
    (home / "model.safetensors").write_bytes(b"spoilt")
    status, _, err = run("push", home, "me/vq", capsys=capsys)
    assert status == 2 and "truncated or damaged" in err and hub.repos == {}


# -- whose repository it is


def test_a_private_repository_needs_the_token(hub, home):
    VQTokenizer.from_pretrained(home).push_to_hub("me/secret", token=MINE, private=True)
    assert hub.repos["me/secret"].private
    for token in (None, False, OTHERS, "hf_" + "x" * 34):
        with pytest.raises(OSError, match="check the name, and whether it is private"):
            VQTokenizer.from_pretrained("me/secret", token=token)
    assert VQTokenizer.from_pretrained("me/secret", token=MINE).verify()
    with pytest.raises(OSError, match="me/secret was not pushed: the Hub answered 403.*hf auth login"):
        make_tokenizer().push_to_hub("me/secret", token=OTHERS)


def test_private_means_private(hub, home):
    hub.add("me/vq", {".gitattributes": b""})
    with pytest.raises(ValueError, match="me/vq exists already and is public"):
        VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE, private=True)
    assert len(hub.repos["me/vq"].messages) == 1 and not hub.large


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, home):
    VQTokenizer.from_pretrained(home).push_to_hub("me/secret", token=MINE, private=True)
    VQTokenizer.from_pretrained("me/secret", token=MINE)
    hosts = {seen.host for seen in hub.seen}
    assert hosts == {hub.endpoint.removeprefix("http://"), hub.storage_url.removeprefix("http://")}
    storage = [seen for seen in hub.seen if seen.host == hub.storage_url.removeprefix("http://")]
    assert {seen.method for seen in storage} >= {"PUT", "GET"}, "files went both ways"
    assert [seen for seen in storage if seen.token] == []
    assert MINE.encode() not in b"".join(hub.repos["me/secret"].files().values())


# -- what goes wrong


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/commit/", 500, "the Hub answered 500 .injected 500., push again"),
        ("POST", "/commit/", 429, "the Hub answered 429 .*wait a few minutes"),
        ("POST", "/commit/", 412, "the Hub answered 412 .*somebody else has pushed in the meantime"),
        ("POST", "/preupload/", 500, "the Hub answered 500"),
        ("POST", "/objects/batch", 429, "the Hub answered 429"),
        ("PUT", "/storage/", 500, "the Hub answered 500"),
        ("PUT", "/storage/", "cut", "the connection broke .*push again"),
        ("POST", "/commit/", "cut", "the connection broke .*push again"),
        ("POST", "/repos/create", 500, "the Hub answered 500"),
        ("GET", "/revision/|/models/me/vq$", 500, "the Hub answered 500"),
    ],
)
def test_a_failed_push_leaves_nothing_half_written(hub, home, method, path, status, words):
    repo = hub.add("me/vq", {"README.md": b"old", ".gitattributes": b""})
    before, tokenizer = everything(home), VQTokenizer.from_pretrained(home)
    hub.fail(method, path, status)
    with pytest.raises(OSError, match=f"^me/vq was not pushed: {words}") as caught:
        tokenizer.push_to_hub("me/vq", token=MINE)
    assert "\n" not in str(caught.value) and MINE not in str(caught.value)
    assert everything(home) == before and len(repo.messages) == 1
    hub.failures.clear()
    tokenizer.push_to_hub("me/vq", token=MINE)
    assert len(repo.messages) == 2 and VQTokenizer.from_pretrained("me/vq").verify()


def test_what_somebody_else_pushed_meanwhile_is_not_overwritten(hub, home):
    repo = hub.add("me/vq", {".gitattributes": b""})
    hub.meanwhile = ("/preupload/", lambda: repo.commit("main", {"README.md": b"theirs"}, "somebody else"))
    tokenizer = VQTokenizer.from_pretrained(home)
    with pytest.raises(OSError, match="somebody else has pushed in the meantime: push again"):
        tokenizer.push_to_hub("me/vq", token=MINE)
    assert repo.files() == {"README.md": b"theirs"}
    tokenizer.push_to_hub("me/vq", token=MINE)
    assert card_of(hub).endswith("theirs\n"), "and their words are kept"


def test_an_upload_that_is_cut_once_is_finished(hub, home):
    hub.fail("PUT", "/storage/", "cut", times=1)
    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)
    assert VQTokenizer.from_pretrained("me/vq").verify()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/storage/", "cut"), ("GET", "/storage/", 500), ("GET", "/revision/", 429), ("HEAD", "/resolve/", 500)],
)
def test_a_failed_download_is_one_sentence_and_can_be_repeated(hub, home, method, path, status):
    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)
    hub.fail(method, path, status)
    with pytest.raises(OSError, match="Hub repository of that name cannot be read") as caught:
        VQTokenizer.from_pretrained("me/vq")
    assert "\n" not in str(caught.value)
    hub.failures.clear()
    assert VQTokenizer.from_pretrained("me/vq").verify()


# -- loading


def test_a_warm_load_asks_no_more_than_transformers(hub, home, tmp_path):
    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)

    def requests(load):
        load()  # fills the cache
        before = len(hub.seen)
        load()
        return len(hub.seen) - before

    theirs = requests(lambda: AutoConfig.from_pretrained("me/vq"))
    ours = requests(lambda: VQTokenizer.from_pretrained("me/vq"))
    assert 1 <= ours <= max(theirs, requests(lambda: AutoModel.from_pretrained("me/vq")))
    before = len(hub.seen)
    assert VQTokenizer.from_pretrained("me/vq", local_files_only=True).verify()
    assert len(hub.seen) == before


def test_offline_it_loads_from_the_cache(hub, home, tmp_path, monkeypatch):
    from huggingface_hub import constants

    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)
    mine = VQTokenizer.from_pretrained("me/vq", cache_dir=tmp_path / "elsewhere").verify()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.seen)
    assert VQTokenizer.from_pretrained("me/vq", cache_dir=tmp_path / "elsewhere").verify() == mine
    with pytest.raises(OSError, match="cannot be read"):
        VQTokenizer.from_pretrained("me/vq", cache_dir=tmp_path / "empty")
    assert len(hub.seen) == before


def test_a_subfolder(hub, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "vq")
    files = {f"deep/er/{path.name}": path.read_bytes() for path in (tmp_path / "vq").iterdir()}
    hub.add("me/several", {**files, "deep/other.safetensors": b"not fetched"})
    assert VQTokenizer.from_pretrained("me/several", subfolder="deep/er").verify()
    assert not [seen for seen in hub.seen if "other" in seen.path]
    with pytest.raises(OSError, match="no subfolder 'nowhere'"):
        VQTokenizer.from_pretrained("me/several", subfolder="nowhere")


@needs_auto_image_processor
def test_auto_classes_load_from_the_hub(hub, home):
    VQTokenizer.from_pretrained(home).push_to_hub("me/vq", token=MINE)
    tokenizer = VQTokenizer.from_pretrained("me/vq")
    model, config = AutoModel.from_pretrained("me/vq"), AutoConfig.from_pretrained("me/vq")
    assert type(model) is type(tokenizer.model) and config.fingerprint == tokenizer.fingerprint
    processor = AutoImageProcessor.from_pretrained("me/vq")
    pixels = processor(picture(16, 16), return_tensors="pt")["pixel_values"]
    assert torch.equal(model.encode(pixels).codes[0], tokenizer.encode(picture(16, 16)).levels[0])
