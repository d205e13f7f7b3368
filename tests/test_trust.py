"""What SECURITY.md promises about folders, repositories and media that a stranger made. Fuzzing is in test_fuzz.py."""

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
)

from tests.hub.loopback import MINE
from tests.test_pipeline import make_prior
from tests.tiny import CONFIG, assert_same_codes, make_tokenizer, picture, vectors
from vqtok import VQPipeline, VQTokenizer
from vqtok.hub.weights import INDEX, WEIGHTS
from vqtok.image import ImageVQConfig, ImageVQModel
from vqtok.image import image_processing_image_vq as processing
from vqtok.prior import CodePriorConfig, CodePriorModel


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory, saved):
    folder = tmp_path_factory.mktemp("pipeline")
    vq_tokenizer = VQTokenizer.from_pretrained(saved)
    VQPipeline(make_prior(vq_tokenizer, condition="class", text_size=10), vq_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(pipeline_folder, tmp_path):
    """The same folder, to spoil."""
    return shutil.copytree(pipeline_folder, tmp_path / "pipeline")


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class Touch:
    """A pickle of it touches a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# -- safetensors only


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "model.pt", "weights.pth"])
@pytest.mark.parametrize("load", [VQTokenizer, ImageVQModel, AutoModel], ids=lambda each: each.__name__)
def test_a_pickle_is_named_and_never_opened(copied, name, load):
    (copied / WEIGHTS).unlink()
    (copied / name).write_bytes(pickle.dumps(Touch(copied / "touched")))
    with pytest.raises(
        OSError, match=f"only {name}, a pickle, which vqtok never loads.*save it again with save_pretrained"
    ):
        load.from_pretrained(copied)
    assert not (copied / "touched").exists()


def test_a_pickle_named_like_weights_is_damaged_weights(copied):
    (copied / WEIGHTS).write_bytes(pickle.dumps(Touch(copied / "touched")))
    with pytest.raises(ValueError, match="truncated or damaged"):
        VQTokenizer.from_pretrained(copied)
    assert not (copied / "touched").exists()


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", r"..\x.safetensors", 3, "x.bin"]
)
def test_an_index_names_files_beside_it(copied, file):
    (copied / WEIGHTS).rename(copied.parent / "other.safetensors")
    (copied / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": file}}))
    with pytest.raises(ValueError, match=f"{INDEX} (must name safetensors files beside it|makes no sense)"):
        VQTokenizer.from_pretrained(copied)


# -- no code


EVIL = """
from pathlib import Path
Path({touched!r}).touch()
from transformers import *
class Evil(PreTrainedModel): ...
class EvilConfig(PreTrainedConfig): ...
class EvilProcessor: ...
class EvilTokenizer: ...
def generate(*args, **kwargs): ...
"""


def trap(folder, touched):
    """Everything that makes transformers run the code of a repository."""
    for name in ("modeling_evil.py", "custom_generate/generate.py", "handler.py", "vqtok.py", "pipeline.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(EVIL.format(touched=str(touched)))
    (folder / "custom_generate" / "requirements.txt").write_text("")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(touched)))
    names = {"AutoConfig": "EvilConfig", "AutoModel": "Evil", "AutoImageProcessor": "EvilProcessor"}
    names |= {"AutoTokenizer": ["EvilTokenizer", None]}
    for file in folder.rglob("*config.json"):
        words = {
            key: f"modeling_evil.{v}" if isinstance(v, str) else [f"modeling_evil.{v[0]}", None]
            for key, v in names.items()
        }
        edit(file, auto_map=words)


def test_the_code_of_a_folder_is_never_run(copied, pipeline, tmp_path):
    touched = tmp_path / "touched"
    for folder in (copied, pipeline):
        trap(folder, touched)
    assert_same_codes(
        VQTokenizer.from_pretrained(copied).encode(picture(16, 16)), make_tokenizer().encode(picture(16, 16))
    )
    assert len(VQPipeline.from_pretrained(pipeline)([3], seed=0)) == 1
    assert type(AutoModel.from_pretrained(copied)) is ImageVQModel
    assert type(AutoModel.from_pretrained(pipeline)) is CodePriorModel
    assert type(AutoConfig.from_pretrained(copied)) is ImageVQConfig
    if getattr(AutoImageProcessor, "_backends", None) != [
        "torchvision"
    ]:  # the placeholder of older transformers loads nothing
        assert type(AutoImageProcessor.from_pretrained(copied)) is processing.ImageVQImageProcessor
    assert not touched.exists() and not [name for name in sys.modules if "evil" in name]


def test_the_code_of_a_repository_is_not_even_downloaded(hub, pipeline, tmp_path):
    trap(pipeline, tmp_path / "touched")
    files = {path.relative_to(pipeline).as_posix(): path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    hub.add("me/evil", files)
    assert len(VQPipeline.from_pretrained("me/evil")([3], seed=0)) == 1
    assert type(AutoModel.from_pretrained("me/evil")) is CodePriorModel
    asked = [seen.path for seen in hub.seen]
    assert [path for path in asked if "model.safetensors" in path]
    assert [path for path in asked if path.endswith((".py", ".bin", ".txt"))] == []
    assert not (tmp_path / "touched").exists()


KERNELS = [
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel@main:forward"},
    {"_attn_implementation_internal": "evil/kernel"},
    {"attn_implementation": {"backbone_config": "evil/kernel"}},
    {"experts_implementation": "evil/kernel"},
    {"_experts_implementation_internal": "evil/kernel"},
    {"kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"}},
]


@pytest.mark.parametrize("fields", KERNELS, ids=str)
@pytest.mark.parametrize("place", ["top", "backbone"])
def test_kernels_from_the_hub_are_refused(hub, copied, pipeline, fields, place):
    """CVE-2026-4372: such a field fetched and ran code, without trust_remote_code."""
    path = pipeline / "config.json"
    backbone = json.loads(path.read_text())["backbone_config"]
    edit(path, **(fields if place == "top" else {"backbone_config": {**backbone, **fields}}))
    edit(copied / "config.json", **fields)
    loads = [(VQPipeline, pipeline), (AutoModel, pipeline), *([(VQTokenizer, copied)] if place == "top" else [])]
    for load, folder in loads:
        with pytest.raises(ValueError, match="evil/kernel.*names code outside transformers, which vqtok never loads"):
            load.from_pretrained(folder)
    assert hub.seen == []


# -- nothing is allocated that the files do not pay for


LARGE = {"hidden_size": 4096, "residual_size": 4096, "num_residual_layers": 64}


@pytest.mark.parametrize(
    "fields",
    [
        LARGE,
        {"quantizer": vectors(1 << 24, 1 << 24)},
        {"quantizer": vectors(16, 32, codebook_dim=65_536)},
        {"num_residual_layers": 64},
        {"latent_size": 4096},
    ],
    ids=str,
)
@pytest.mark.parametrize("load", [VQTokenizer, ImageVQModel, AutoModel], ids=lambda each: each.__name__)
def test_a_small_file_cannot_ask_for_a_large_model(copied, fields, load, loader_is_not_reached):
    edit(copied / "config.json", **fields)
    with pytest.raises(ValueError, match="weights do not fit the config|numbers, more than"):
        load.from_pretrained(copied)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 65_536},
        {"hidden_size": 65_536, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2},
        {"intermediate_size": 1 << 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("load", [VQPipeline, CodePriorModel, AutoModel], ids=lambda each: each.__name__)
def test_nor_for_a_large_prior(pipeline, fields, load, loader_is_not_reached, monkeypatch):
    monkeypatch.setattr(VQTokenizer, "from_pretrained", lambda folder, **options: make_loaded(folder))
    backbone = json.loads((pipeline / "config.json").read_text())["backbone_config"]
    edit(pipeline / "config.json", backbone_config={**backbone, **fields})
    with pytest.raises(ValueError, match="weights do not fit the config|numbers, more than"):
        load.from_pretrained(pipeline)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "vector"},
        {"rope_parameters": {"rope_type": "x", "rope_theta": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        {"num_key_value_heads": -2},
    ],
    ids=str,
)
def test_values_that_only_the_backbone_understands_are_refused(pipeline, fields):
    backbone = json.loads((pipeline / "config.json").read_text())["backbone_config"]
    edit(pipeline / "config.json", backbone_config={**backbone, **fields})
    with pytest.raises(ValueError, match="no CodePriorModel can be built from this config"):
        VQPipeline.from_pretrained(pipeline)


@pytest.mark.parametrize("number", [1 << 17, 10**9, 1 << 63, 10**30])
def test_a_layout_of_very_many_codebooks_fills_no_memory(pipeline, number):
    layout = json.loads((pipeline / "config.json").read_text())["layout"]
    layout["levels"][1]["num_codebooks"] = number
    edit(pipeline / "config.json", layout=layout)
    with pytest.raises(ValueError, match=f"a layout of {number + 1} codebooks"):
        VQPipeline.from_pretrained(pipeline)


def make_loaded(folder):
    """The tokenizer of a folder without transformers' loader, which the test above has closed."""
    tokenizer = make_tokenizer()
    tokenizer.model.config.fingerprint = json.loads((folder / "config.json").read_text())["fingerprint"]
    return tokenizer


def test_a_recipe_cannot_ask_for_more_than_any_machine_has(copied):
    edit(copied / "config.json", **LARGE, strides=[64, 32, 16, 8, 4, 2], quantizer={"type": "vector"})
    with pytest.raises(ValueError, match="numbers, more than 8,589,934,592: make it smaller"):
        VQTokenizer.from_config(copied)


def change_weights(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


BOOK = "quantizer.levels.0.codebook.embedding"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(BOOK), f"missing_keys.*{BOOK}"),
        (
            lambda t: t.update({BOOK: t[BOOK][:, :-1].clone()}),
            rf"mismatched_keys.*{BOOK} \(16, 3\) instead of \(16, 4\)",
        ),
        (lambda t: t.update({BOOK: t[BOOK].repeat(2, 1)}), rf"{BOOK} \(32, 4\) instead of \(16, 4\)"),
        (lambda t: t.update({"quantizer.levels.7.codebook.embedding": t[BOOK].clone()}), "unexpected_keys.*levels.7"),
        (lambda t: t.update({"other": t.pop(BOOK)}), f"missing_keys.*{BOOK}.*unexpected_keys.*other"),
        (lambda t: t.clear(), "missing_keys"),
    ],
)
def test_weights_that_do_not_fit_are_named(copied, change, words):
    change_weights(change)(copied)
    for load in (VQTokenizer, AutoModel):
        with pytest.raises(ValueError, match=f"weights do not fit the config: .*{words}"):
            load.from_pretrained(copied)


# -- configs


def test_a_newer_format_is_refused_by_number(copied):
    edit(copied / "config.json", vqtok_format=99)
    with pytest.raises(ValueError, match=r"config\.json: .*vqtok_format 99, this vqtok knows 1: upgrade"):
        VQTokenizer.from_pretrained(copied)


# What PreTrainedConfig writes or reads by itself, of transformers 5.17 to 5.23.
BASE_KEYS = {
    "return_dict": True, "output_hidden_states": False, "dtype": "float32", "torch_dtype": "float32", "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": None, "architectures": ["X"],
    "transformers_version": "5.17.0", "output_attentions": False, "_name_or_path": "x", "attn_implementation": "eager",
    "use_return_dict": True,
}  # fmt: skip


@pytest.mark.parametrize("key", BASE_KEYS)
def test_keys_of_the_base_class_are_no_typing_errors(copied, key):
    edit(copied / "config.json", **{key: BASE_KEYS[key]})
    assert VQTokenizer.from_pretrained(copied).verify()


def test_every_key_of_the_installed_base_class_is_known(copied):
    edit(copied / "config.json", **{key: v for key, v in PreTrainedConfig().to_dict().items() if key != "model_type"})
    assert VQTokenizer.from_pretrained(copied).verify()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "3", "", "\x00", '{"a": ' * 5000, "NaN"], ids=lambda text: repr(text[:9])
)
def test_what_is_no_json_object_is_named(copied, name, text):
    (copied / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}"):
        VQTokenizer.from_pretrained(copied)


@pytest.mark.parametrize("name", ["pipeline.json", "config.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "", '{"model_type": ["x"]}', '{"a": ' * 5000], ids=lambda text: repr(text[:9])
)
def test_nor_in_a_pipeline(pipeline, name, text):
    (pipeline / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}"):
        VQPipeline.from_pretrained(pipeline)


def test_an_implausibly_large_json_is_not_read(copied):
    with (copied / "config.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="1,073,741,824 bytes, more than"):
        VQTokenizer.from_pretrained(copied)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text_ids_seen": [[0, (1 << 22) - 1]] * 1000}, "makes no sense"),
        ({"vq_tokenizer": {"repo": "vq_tokenizer", "revision": "main"}}, "makes no sense"),
        ({"vq_tokenizer": {"repo": "../vq", "revision": "main"}}, "makes no sense"),
        ({"vq_tokenizer": {"repo": "me/vq", "revision": 3}}, "makes no sense"),
        ({"vq_tokenizer": {"repo": "me/vq", "revision": "../../../../pwned"}}, "makes no sense"),
        ({"vq_tokenizer_source": {"repo": "http://evil", "revision": "main", "fingerprint": "f"}}, "makes no sense"),
        ({"vq_tokenizer": "C:x"}, "inside the pipeline"),
        ({"text_ids_seen": [[0.5, 3.5]]}, "makes no sense"),
        ({"text_ids_seen": 3}, "makes no sense"),
        ({"text_encoder_source": {"repo": "a/b", "revision": "x)](http://evil"}}, "makes no sense"),
    ],
    ids=str,
)
def test_a_pipeline_names_its_parts_and_nothing_else(pipeline, fields, words, monkeypatch):
    monkeypatch.chdir(pipeline)  # so that a repository could be taken for a folder
    edit(pipeline / "pipeline.json", **fields)
    with pytest.raises(ValueError, match=words):
        VQPipeline.from_pretrained(pipeline)


# -- media


def test_pixels_are_counted_before_they_are_decoded(saved, tmp_path):
    """Forty thousand pixels a side, 1.6 billion in all, in a file of 200 kB."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9))
    )
    for call in (VQTokenizer.from_pretrained(saved).encode, processing.ImageVQImageProcessor.from_pretrained(saved)):
        with pytest.raises(ValueError, match=r"bomb\.png.*exceeds limit|more than the limit of"):
            call(tmp_path / "bomb.png")


def test_a_call_may_raise_the_bound_and_a_file_may_not(copied, tmp_path):
    picture(24, 24).save(tmp_path / "a.png")
    edit(copied / "preprocessor_config.json", max_pixels=500)
    tokenizer = VQTokenizer.from_pretrained(copied)
    with pytest.raises(
        ValueError, match="24x24 = 576 pixels, more than the limit of 500: .*raise max_pixels in this call"
    ):
        tokenizer.encode(tmp_path / "a.png")
    assert len(tokenizer.encode([tmp_path / "a.png", picture(24, 24)], max_pixels=576)) == 2
    with pytest.raises(ValueError, match="item 1: .*more than the limit of 575"):
        tokenizer.encode([picture(16, 16), tmp_path / "a.png"], max_pixels=575)
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        tokenizer.encode([], max_pixels=0)
    edit(copied / "preprocessor_config.json", max_pixels=10**12)
    with pytest.raises(ValueError, match="max_pixels 1,000,000,000,000 is more than .* a file cannot raise this bound"):
        VQTokenizer.from_pretrained(copied)


def test_a_bound_above_pils_own_holds_for_the_call_alone(saved, tmp_path, monkeypatch):
    picture(24, 24).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.setattr(processing, "MAX_PIXELS", 100)
    tokenizer = VQTokenizer.from_pretrained(saved)
    with pytest.raises(ValueError, match="exceeds limit of 100 pixels"):
        tokenizer.encode(tmp_path / "a.png", max_pixels=100)
    assert len(tokenizer.encode(tmp_path / "a.png", max_pixels=1000)) == 1
    assert Image.MAX_IMAGE_PIXELS == 50


@pytest.mark.parametrize("address", ["{}/cat.png", "http://evil.invalid/cat.png", "HTTP://evil.invalid/a.png", "ftp://evil.invalid/a.png",
                                     "file:///etc/passwd", "data:image/png;base64,iVBORw0KGgo=", "iVBORw0KGgo="])  # fmt: skip
def test_no_address_is_fetched(hub, saved, address):
    address = address.format(hub.endpoint)
    for call in (VQTokenizer.from_pretrained(saved).encode, processing.ImageVQImageProcessor.from_pretrained(saved)):
        with pytest.raises((ValueError, OSError), match="is an address|there is no file"):
            call([address])
    assert hub.seen == []


# -- secrets


def test_the_token_stands_in_nothing_that_is_kept(hub, tmp_path, monkeypatch):
    make_tokenizer().push_to_hub("me/vq", token=MINE, private=True)
    tokenizer = VQTokenizer.from_pretrained("me/vq", token=MINE)
    tokenizer.save_pretrained(tmp_path / "vq")
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 5 and not [data for data in kept if MINE.encode() in data]
    assert (
        MINE.encode() not in pickle.dumps(VQTokenizer.from_pretrained("me/vq", token=MINE)) + repr(tokenizer).encode()
    )
    assert not any(MINE in str(value) for value in os.environ.values())


def test_the_tiny_config_is_what_these_tests_think(saved):
    assert json.loads((saved / "config.json").read_text())["latent_size"] == CONFIG["latent_size"] == 4
    assert BOOK in load_file(saved / WEIGHTS) and torch.is_tensor(load_file(saved / WEIGHTS)[BOOK])
    assert CodePriorConfig.model_type == "vqtok_prior"
