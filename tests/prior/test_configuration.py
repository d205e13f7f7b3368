"""The config: what it accepts, what it refuses and in which words, and that it survives a file."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BloomConfig, GPT2Config, OPTConfig

from vqtok.prior import CodePriorConfig, CodePriorModel

LAYOUT = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 256}]}
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}


def test_round_trip_through_a_file(tmp_path):
    config = CodePriorConfig(
        layout=LAYOUT, condition="text", text_size=50, backbone_config={"model_type": "gpt2", "n_embd": 48}
    )
    config.fingerprint = "ab" * 32
    config.save_pretrained(tmp_path)
    again = CodePriorConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.vocabulary == config.vocabulary
    assert type(again.backbone_config) is GPT2Config and again.backbone_config.hidden_size == 48
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "vqtok_prior" and saved["layout"] == LAYOUT


def test_the_backbone_speaks_our_vocabulary():
    given = OPTConfig(vocab_size=7, pad_token_id=1, word_embed_proj_dim=16, ffn_dim=16, **SMALL)
    config = CodePriorConfig(layout=LAYOUT, condition="text", text_size=50, max_grid=8, backbone_config=given)
    assert config.backbone_config.vocab_size == config.vocabulary.padded_size == 320
    assert given.vocab_size == 7, "the caller's config stays"
    model = CodePriorModel(config)
    assert model.get_input_embeddings().padding_idx is None, "no text token is frozen as padding"
    assert model.get_input_embeddings().weight.shape == (320, 16)
    assert config.get_text_config() is config.backbone_config


def test_default_backbone_is_a_small_llama():
    config = CodePriorConfig(layout=LAYOUT)
    assert config.backbone_config.model_type == "llama" and config.backbone_config.hidden_size == 256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": {}}, "layout must be the dict of a CodeLayout"),
        ({"layout": {"ndim": 2}}, "'ndim' and 'levels'"),
        ({"layout": {"ndim": 2, "levels": [{"stride": 0}]}}, "stride must be a positive integer, got 0"),
        ({"condition": "caption"}, "condition must be one of .* got 'caption'"),
        ({"condition": "text"}, "text_size must be .* got 0"),
        ({"condition": "none", "text_size": 3}, "text_size must be 0"),
        ({"max_text_length": 0}, "max_text_length must be .* got 0"),
        ({"max_grid": -1}, "max_grid must be .* got -1"),
        ({"max_grid": 1 << 20, "layout": {"ndim": 1, "levels": [{"stride": 640}, {"stride": 1}]}}, "smaller max_grid"),
        ({"order": "zigzag"}, "order must be 'flat' or .* got 'zigzag'"),
        ({"condition_dropout": 1.0}, r"condition_dropout must be .* got 1\.0"),
        ({"condition_dropout": float("nan")}, "condition_dropout must be .* got nan"),
        ({"max_txt_length": 3}, "no field 'max_txt_length'. Did you mean 'max_text_length'"),
        ({"backbone_config": {"model_type": "llamma"}}, "Did you mean 'llama'"),
        ({"backbone_config": {"hidden_size": 8}}, "needs a model_type"),
        (
            {"backbone_config": {"model_type": "llama", "hiden_size": 8}},
            "no field 'hiden_size'. Did you mean 'hidden_size'",
        ),
        ({"backbone_config": {"model_type": "llama", "hidden_size": 1 << 20}}, "hidden_size must be from 1 to 65536"),
        ({"backbone_config": {"model_type": "bert"}}, "'bert' is an encoder"),
        ({"backbone_config": {"model_type": "t5"}}, "'t5' is an encoder-decoder"),
        ({"backbone_config": {"model_type": "vit"}}, "'vit' is an encoder, or no language model"),
    ],
)
def test_impossible_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CodePriorConfig(**{"layout": LAYOUT, **fields})


@pytest.mark.parametrize("fields", [{"text_size": "ten"}, {"condition": 3}, {"layout": [1]}, {"max_grid": 8.0}])
def test_wrong_types_are_refused(fields):
    with pytest.raises(StrictDataclassError, match=next(iter(fields))):
        CodePriorConfig(**{"layout": LAYOUT, **fields})


def test_bert_as_a_decoder_is_a_decoder():
    backbone = {"model_type": "bert", "is_decoder": True, "intermediate_size": 16, **SMALL}
    assert CodePriorConfig(layout=LAYOUT, backbone_config=backbone).backbone_config.is_decoder


def test_a_backbone_that_cannot_be_told_positions_is_refused():
    config = CodePriorConfig(layout=LAYOUT, backbone_config=BloomConfig(n_layer=1, hidden_size=16, n_head=2))
    with pytest.raises(ValueError, match="BloomModel takes no position_ids"):
        CodePriorModel(config)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mistral", "gpt_neox", "gemma2", "phi3", "olmo2"])
def test_saved_backbones_are_accepted_again(model_type):
    CodePriorConfig(layout=LAYOUT, backbone_config=AutoConfig.for_model(model_type).to_dict())
