"""The promises of SECURITY.md for the parts of a pipeline: its text tokenizer, its text encoder, the later stages of a cascade."""

import json
import shutil
import sys

import pytest
from transformers import PreTrainedModel

from tests.test_pipeline import make_prior
from tests.test_pipeline_conditions import TOKENIZER, make_encoder
from tests.test_trust import KERNELS, edit, trap
from vqtok import VQPipeline, VQTokenizer
from vqtok.prior import CodeCascade

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


@pytest.mark.parametrize("kind", WORDS)
def test_the_code_of_no_part_is_run(parts, tmp_path, kind):
    touched, folder = tmp_path / "touched", parts / kind
    for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        trap(place, touched)
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
