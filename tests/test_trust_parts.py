"""The promises of SECURITY.md for the parts of a pipeline: its text tokenizer, its text encoder, the later stages of a cascade."""

import hashlib
import json
import pickle
import shutil
import sys

import pytest
from transformers import AutoModel, BartConfig, BartModel, PreTrainedModel

from tests.test_pipeline import make_prior
from tests.test_pipeline_conditions import TOKENIZER, make_encoder
from tests.test_trust import KERNELS, Touch, edit, trap
from vqtok import VQPipeline, VQTokenizer
from vqtok.hub.weights import WEIGHTS
from vqtok.prior import CodeCascade
from vqtok.prior.features import TextEncoder
from vqtok.prior.text import open_text_tokenizer

WORDS = {"text": ["one"], "features": ["one"], "cascade": None}
SIZE = {"sizes": (16, 24), "seed": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, saved):
    """A pipeline of each kind."""
    home, vq_tokenizer = tmp_path_factory.mktemp("parts"), VQTokenizer.from_pretrained(saved)
    text = make_prior(vq_tokenizer, condition="text", text_size=len(TOKENIZER), max_text_length=12)
    VQPipeline(text, vq_tokenizer, TOKENIZER).save_pretrained(home / "text")
    features = make_prior(vq_tokenizer, condition="features", feature_size=16, max_text_length=12)
    VQPipeline(features, vq_tokenizer, text_encoder=make_encoder()).save_pretrained(home / "features")
    stages = [make_prior(vq_tokenizer, **levels) for levels in ({"num_levels": 1}, {"first_level": 1})]
    VQPipeline(CodeCascade(stages), vq_tokenizer).save_pretrained(home / "cascade")
    return home


@pytest.fixture
def parts(folders, tmp_path):
    """The same folders, to spoil."""
    return shutil.copytree(folders, tmp_path / "parts")


@pytest.fixture
def reading(parts):
    return parts / "features"


@pytest.mark.parametrize("kind", WORDS)
def test_the_code_of_no_part_is_run(parts, tmp_path, kind):
    touched, folder = tmp_path / "touched", parts / kind
    for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        trap(place, touched)
    edit(folder / "pipeline.json", text_files=None)  # whoever sets traps writes no checksums that would give them away
    assert len(VQPipeline.from_pretrained(folder)(WORDS[kind], **SIZE)) == 1
    assert not touched.exists() and not [name for name in sys.modules if "evil" in name]


@pytest.mark.parametrize("fields", KERNELS, ids=str)
def test_kernels_of_a_later_stage_are_refused(hub, parts, fields):
    edit(parts / "cascade/stage_1/config.json", **fields)
    with pytest.raises(ValueError, match="evil/kernel.*names code outside transformers, which vqtok never loads"):
        VQPipeline.from_pretrained(parts / "cascade")
    assert hub.seen == []


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 65_536}, {"intermediate_size": 1 << 40}], ids=str)
def test_a_later_stage_cannot_ask_for_a_large_model(parts, fields, monkeypatch):
    load = PreTrainedModel.from_pretrained.__func__

    def checked(cls, source, *args, **kwargs):
        assert not str(source).endswith("stage_1"), "the weights would be allocated now"
        return load(cls, source, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(checked))
    path = parts / "cascade/stage_1/config.json"
    edit(path, backbone_config={**json.loads(path.read_text())["backbone_config"], **fields})
    with pytest.raises(ValueError, match="weights do not fit the config|numbers, more than"):
        VQPipeline.from_pretrained(parts / "cascade")


# -- text tokenizers and text encoders


@pytest.mark.parametrize(
    ("kind", "name"),
    [("text", "tokenizer.json"), ("features", "text_encoder/tokenizer.json"), ("features", "text_encoder/model.safetensors")],
)  # fmt: skip
def test_what_reads_the_prompts_is_what_was_saved(parts, kind, name):
    folder, path = parts / kind, parts / kind / name
    digests = json.loads((folder / "pipeline.json").read_text())["text_files"]
    assert digests[name] == hashlib.sha256(path.read_bytes()).hexdigest()
    data = path.read_bytes()
    if name.endswith(".json"):  # another vocabulary of the same size
        path.write_bytes(data.replace(b'"a"', b'"#"', 1).replace(b'"b"', b'"a"', 1).replace(b'"#"', b'"b"', 1))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert path.read_bytes() != data
    with pytest.raises(ValueError, match=f"{name} is not the file that this pipeline was saved with"):
        VQPipeline.from_pretrained(folder)
    edit(folder / "pipeline.json", text_files=None)  # of a pipeline that was saved before there were checksums
    VQPipeline.from_pretrained(folder)
    path.write_bytes(data)
    for wrong in ({name: "x"}, {"../x.json": "0" * 64}, {"text_encoder/model-/../../x.safetensors": "0" * 64}, [name]):
        edit(folder / "pipeline.json", text_files=wrong)
        with pytest.raises(ValueError, match="makes no sense"):
            VQPipeline.from_pretrained(folder)


def test_a_pipeline_says_where_its_text_tokenizer_is_from(hub, parts):
    files = {path.name: path.read_bytes() for path in (parts / "text").glob("*token*.json")}
    hub.add("me/words", files)
    words, source = open_text_tokenizer("me/words")
    assert source == {"repo": "me/words", "revision": hub.repos["me/words"].branches["main"]}
    assert words("one").input_ids == TOKENIZER("one").input_ids
    assert open_text_tokenizer(parts / "text")[1] is None
    pipe = VQPipeline.from_pretrained(parts / "text")
    assert pipe.text_tokenizer_source is None
    pipe.text_tokenizer_source = source
    pipe.save_pretrained(parts / "again")
    assert VQPipeline.from_pretrained(parts / "again").text_tokenizer_source == source
    edit(parts / "again/pipeline.json", text_tokenizer_source={"repo": "me/words", "revision": "../x"})
    with pytest.raises(ValueError, match="makes no sense"):
        VQPipeline.from_pretrained(parts / "again")


@pytest.mark.parametrize("fields", KERNELS, ids=str)
def test_kernels_of_a_text_encoder_are_refused(hub, reading, fields):
    edit(reading / "text_encoder/config.json", **fields)
    with pytest.raises(ValueError, match="evil/kernel.*names code outside transformers, which vqtok never loads"):
        VQPipeline.from_pretrained(reading)
    assert hub.seen == []


@pytest.mark.parametrize(
    "fields",
    [
        {"transformers_weights": "adapter_model.bin"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"text_config": {"transformers_weights": "x.bin"}},
        {"use_timm_backbone": True},
        {"model_type": "grounding-dino", "backbone": "evil/backbone"},
    ],
    ids=str,
)
def test_a_text_encoder_is_nothing_but_the_plain_weights_of_its_folder(hub, reading, fields, loader_is_not_reached):
    edit(reading / "text_encoder/config.json", **fields)
    (reading / "text_encoder/adapter_model.bin").write_bytes(pickle.dumps(Touch(reading / "touched")))
    with pytest.raises(ValueError, match="only the plain weights of the folder are loaded: remove it"):
        TextEncoder.from_pretrained(reading / "text_encoder")
    assert not (reading / "touched").exists() and hub.seen == []


def test_a_backbone_of_a_prior_names_no_other_repository(hub, parts):
    edit(parts / "text/config.json", backbone_config={"model_type": "grounding-dino", "backbone": "evil/backbone"})
    with pytest.raises(ValueError, match="only the plain weights of the folder are loaded: remove it"):
        VQPipeline.from_pretrained(parts / "text")
    assert hub.seen == []


def test_a_pickle_in_the_place_of_a_text_encoder(reading):
    (reading / "text_encoder" / WEIGHTS).unlink()
    (reading / "text_encoder/pytorch_model.bin").write_bytes(pickle.dumps(Touch(reading / "touched")))
    with pytest.raises(OSError, match="only pytorch_model.bin, a pickle, which vqtok never loads"):
        VQPipeline.from_pretrained(reading)
    assert not (reading / "touched").exists()


ADAPTER = {"base_model_name_or_path": "evil/base", "peft_type": "LORA", "r": 1, "target_modules": ["x"]}


def test_adapters_are_refused(hub, copied, parts, reading):
    """transformers would load their weights over the model's: the same fingerprint, and other codes."""
    loads = [
        (VQTokenizer, copied, "."),
        (AutoModel, copied, "."),
        (VQPipeline, parts / "text", "."),
        (VQPipeline, reading, "text_encoder"),
    ]
    for load, folder, place in loads:
        (folder / place / "adapter_config.json").write_text(json.dumps(ADAPTER))
        with pytest.raises(ValueError, match="has an adapter_config.json, and adapters are never loaded"):
            load.from_pretrained(folder)
    assert hub.seen == []


def test_what_a_pipeline_does_not_consist_of_is_not_downloaded(hub, reading):
    for name in (
        "text_encoder/adapter_config.json",
        "tokenizer_of_mine/x.json",
        "deep/er/x.model",
        "vq_tokenizer/x.json",
    ):
        (reading / name).parent.mkdir(parents=True, exist_ok=True)
        (reading / name).write_text("{}")
    files = {path.relative_to(reading).as_posix(): path.read_bytes() for path in reading.rglob("*") if path.is_file()}
    hub.add("me/reading", files)
    assert len(VQPipeline.from_pretrained("me/reading")(["one"], sizes=(16, 24), seed=0)) == 1
    asked = [seen.path for seen in hub.seen]
    assert [path for path in asked if path.endswith("text_encoder/model.safetensors")]
    assert [path for path in asked if "adapter" in path or path.endswith(("x.json", "x.model"))] == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", '{"model": 3}', '{"added_tokens_decoder": [1], "version": 3}'], ids=lambda t: t[:20]
)
def test_a_damaged_text_tokenizer_is_named(parts, name, text):
    for folder, place in ((parts / "text", "."), (parts / "features", "text_encoder")):
        if name == "tokenizer_config.json" and text.startswith('{"model"'):
            continue  # a field that nobody reads
        (folder / place / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}|text tokenizer is damaged"):
            VQPipeline.from_pretrained(folder)


def test_a_text_tokenizer_is_read_from_its_own_folder(reading):
    """transformers would take this one instead of the one beside the config."""
    shutil.copy(reading / "text_encoder/tokenizer.json", reading.parent / "tokenizer.4.0.0.json")
    edit(reading / "text_encoder/tokenizer_config.json", fast_tokenizer_files=["../../tokenizer.4.0.0.json"])
    with pytest.raises(ValueError, match="fast_tokenizer_files must name files beside it"):
        VQPipeline.from_pretrained(reading)


@pytest.mark.parametrize(
    "fields",
    [{"vocab_size": 100_000_000}, {"num_layers": 65_536}, {"d_ff": 1 << 40}, {"d_model": "x"}, {"num_heads": 0}],
    ids=str,
)
def test_nor_for_a_large_text_encoder(reading, fields, loader_is_not_reached):
    edit(reading / "text_encoder/config.json", **fields)
    with pytest.raises(
        ValueError, match="weights do not fit the config|can be built|cannot be loaded as a text encoder"
    ):
        TextEncoder.from_pretrained(reading / "text_encoder")


@pytest.mark.parametrize("field", ["encoder_layers", "decoder_layers"])
def test_nor_for_both_halves_of_a_text_encoder(tmp_path, field, loader_is_not_reached):
    BartModel(BartConfig(vocab_size=300, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
                         decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8)).save_pretrained(tmp_path)  # fmt: skip
    TOKENIZER.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **{field: 10**6})
    with pytest.raises(ValueError, match="1000000 layers, and the file holds"):
        TextEncoder.from_pretrained(tmp_path)
