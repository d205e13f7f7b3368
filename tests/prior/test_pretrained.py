"""A prior that starts from text weights: what is kept is kept exactly, what is new is of the right size, what cannot be is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel

from tests.prior.conftest import BACKBONES, TWO_LEVELS
from vqtok.prior import CodePriorConfig, CodePriorModel, prior_from_text_model, train_text_tokenizer
from vqtok.prior.pretrained import begin_with_vectors, load_text_weights, text_backbone

ROWS = 37


def text_config(kind, **changes):
    return AutoConfig.for_model(kind, **{"vocab_size": ROWS, "num_hidden_layers": 2, **BACKBONES[kind], **changes})


@pytest.fixture
def text_model(tmp_path):
    """Saves a random text model, its rows around a mean that is not zero and of another spread than any default."""

    def make(kind="llama", build=AutoModelForCausalLM, **changes):
        torch.manual_seed(3)
        model = build.from_config(text_config(kind, **changes)).eval()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(5).add_(torch.randn(32))
        model.save_pretrained(tmp_path / "text")
        return model, str(tmp_path / "text")

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_text_has_the_hidden_states_of_the_text_model(text_model, kind, tied):
    model, folder = text_model(kind, tie_word_embeddings=tied)
    prior = prior_from_text_model(folder, TWO_LEVELS, max_grid=4).eval()
    assert (prior.config.text_size, prior.config.condition) == (ROWS, "text")
    ids = torch.randint(ROWS, (2, 9))
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
        found = prior.backbone(inputs_embeds=prior.get_input_embeddings()(ids)).last_hidden_state
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", BACKBONES)
def test_it_starts_uniform_and_learns(text_model, random_codes, kind):
    _, folder = text_model(kind)
    prior = prior_from_text_model(folder, TWO_LEVELS, max_grid=4, max_text_length=8)
    codes, words = random_codes(TWO_LEVELS, 4, (2, 2)), torch.randint(ROWS, (4, 3))
    before = prior(codes=codes, condition_ids=words)
    assert torch.allclose(before.nats_per_code, torch.tensor([11.0, 7.0]).log())
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss = prior(codes=codes, condition_ids=words).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.9 * before.loss
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())


def test_new_rows_look_like_the_old_ones(text_model):
    model, folder = text_model()
    big = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 4000}]}
    prior = prior_from_text_model(folder, big, max_grid=4)
    old, table = model.get_input_embeddings().weight, prior.get_input_embeddings().weight
    assert torch.equal(table[:ROWS], old)
    new = table[ROWS:]
    assert len(new) > 4000
    # Means over 4000 rows are within five standard errors.
    assert ((new.mean(0) - old.mean(0)).abs() < 5 * old.std(0) / 4000**0.5).all()
    assert torch.allclose(new.std(0), old.std(0), rtol=0.1)
    sums = prior._unit_vectors(prior._table(((1, 2, 2),))).unit_UM[1:].std()
    assert 0.5 < sums / old.std(0).mean() < 2, "a place weighs about as much as a token"


def test_a_tokenizer_decides_how_many_rows_are_text(text_model):
    model, folder = text_model(vocab_size=300)
    tokenizer = train_text_tokenizer(["a red three"], 260)
    prior = prior_from_text_model(folder, TWO_LEVELS, tokenizer, max_grid=4)
    size = prior.config.text_size
    assert size == len(tokenizer) < 300
    table = prior.get_input_embeddings().weight
    assert torch.equal(table[:size], model.get_input_embeddings().weight[:size])
    assert not torch.equal(table[size : size + 4], model.get_input_embeddings().weight[size : size + 4])
    longer = prior_from_text_model(folder, TWO_LEVELS, text_size=310, max_grid=4)
    assert torch.equal(longer.get_input_embeddings().weight[:300], model.get_input_embeddings().weight)


def test_a_prior_of_classes_or_of_other_words_keeps_the_layers_alone(text_model):
    model, folder = text_model()
    for fields in ({"condition": "class", "text_size": 5}, {"condition": "none", "text_size": 0}):
        prior = prior_from_text_model(folder, TWO_LEVELS, max_grid=4, **fields)
        assert torch.equal(prior.backbone.norm.weight, model.model.norm.weight)
        assert not torch.equal(prior.get_input_embeddings().weight[0], model.get_input_embeddings().weight[0])
    config = CodePriorConfig(layout=TWO_LEVELS, condition="text", text_size=9, backbone_config=text_backbone(folder))
    prior = CodePriorModel(config)
    assert load_text_weights(prior, folder, keep_text=False) == 0
    assert load_text_weights(prior, folder) == 9


def test_a_head_of_another_kind_is_left_over(text_model):
    model, folder = text_model("mistral", AutoModelForSequenceClassification)
    prior = prior_from_text_model(folder, TWO_LEVELS, max_grid=4)
    assert torch.equal(prior.backbone.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_saved_it_needs_no_text_model_and_names_no_path(text_model, tmp_path, random_codes):
    _, folder = text_model("qwen3")
    prior = prior_from_text_model(folder, TWO_LEVELS, max_grid=4).eval()
    prior.save_pretrained(tmp_path / "prior")
    assert str(tmp_path) not in (tmp_path / "prior" / "config.json").read_text()
    again = CodePriorModel.from_pretrained(tmp_path / "prior").eval()
    codes = random_codes(TWO_LEVELS, 2, (2, 2))
    assert torch.equal(prior(codes=codes).loss, again(codes=codes).loss)


def test_loading_in_bf16(text_model):
    model, folder = text_model()
    config = CodePriorConfig(layout=TWO_LEVELS, condition="text", text_size=ROWS, backbone_config=text_backbone(folder))
    prior = CodePriorModel(config).to(torch.bfloat16)
    load_text_weights(prior, folder)
    assert torch.equal(prior.backbone.norm.weight, model.model.norm.weight.bfloat16())
    assert {p.dtype for p in prior.parameters()} == {torch.bfloat16}


def test_an_encoder_is_refused_by_name(tmp_path):
    BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="'bert' is an encoder"):
        prior_from_text_model(str(tmp_path), TWO_LEVELS)


def test_remote_code_is_refused(tmp_path):
    facts = {"model_type": "mystery", "auto_map": {"AutoConfig": "mystery.Config"}, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    (tmp_path / "mystery.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="'mystery', which transformers does not know.*no remote code"):
        prior_from_text_model(str(tmp_path), TWO_LEVELS)


@pytest.mark.parametrize("how", ["missing", "shape", "unknown", "truncated", "pickle"])
def test_weights_that_do_not_fit_are_named(text_model, tmp_path, how):
    _, folder = text_model()
    file = tmp_path / "text" / "model.safetensors"
    weights, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "pickle":
        torch.save(weights, tmp_path / "text" / "pytorch_model.bin")
        file.unlink()
    else:
        changed = {
            "missing": {k: v for k, v in weights.items() if k != name},
            "shape": {**weights, name: torch.zeros(2, 2)},
            "unknown": {**weights, "model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)},
        }
        save_file(changed[how], file, {"format": "pt"})
    words = {"truncated": "truncated or damaged", "pickle": "safetensors", "unknown": "unknown.*layers.2"}
    with pytest.raises((ValueError, OSError), match=words.get(how, "(missing|another shape).*layers.1.mlp.up_proj")):
        prior_from_text_model(folder, TWO_LEVELS, max_grid=4)


def test_another_backbone_is_refused_and_left_alone(text_model, make_prior):
    _, folder = text_model()
    prior = make_prior(layers=1)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    with pytest.raises(ValueError, match="other weights than the backbone of this prior"):
        load_text_weights(prior, folder)
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())


def test_a_fresh_prior_begins_with_the_vectors_of_the_codes(make_prior):
    prior, again = (make_prior(TWO_LEVELS) for _ in range(2))
    generator = torch.Generator().manual_seed(4)
    sizes = {(stream.level, stream.codebook): stream.size for stream in prior.vocabulary.streams}
    vectors = {name: 3 + torch.randn(size, 5, generator=generator) for name, size in sizes.items()}
    before = {name: value.clone() for name, value in prior.named_parameters()}
    for each in (prior, again):
        begin_with_vectors(each, vectors.items())
    embed, head = prior.get_input_embeddings().weight.detach(), prior.lm_head.weight.detach()
    for name, points in vectors.items():
        offset, size = prior._streams[name]
        rows = slice(offset, offset + size), slice(offset - prior.vocabulary.size_offset, None)
        own = embed[rows[0]], head[rows[1]][:size]
        old = before["backbone.embed_tokens.weight"][rows[0]], before["lm_head.weight"][rows[1]][:size]
        far = torch.triu_indices(size, size, 1).unbind()
        for new, was in zip(own, old, strict=True):
            assert torch.allclose(new.std(), was.std(), rtol=1e-4)
            pair = torch.stack([torch.cdist(points, points)[far], torch.cdist(new, new)[far]])
            assert float(torch.corrcoef(pair)[0, 1]) > 0.7, "what is near stays near"
        with torch.no_grad():
            own[0].copy_(old[0])
            own[1].copy_(old[1])
    assert all(torch.equal(value, before[name]) for name, value in prior.named_parameters()), "nothing else changed"
    begin_with_vectors(prior, vectors.items())
    assert all(torch.equal(a, b) for a, b in zip(prior.parameters(), again.parameters(), strict=True))
