"""LoRA: only what should moves, merged is unmerged, nothing of peft stays, and samples come out all the way."""

import peft
import pytest
import torch
from torch import nn

from tests.prior.conftest import BACKBONES, TWO_LEVELS
from vqtok.prior import CodePriorModel
from vqtok.prior.adapters import SplitEmbedding, add_lora, merge_lora
from vqtok.prior.fast import has_fast_path

TEXT = 20  # rows of text of `make_prior`


def train(prior, codes, steps=3):
    optimizer = torch.optim.AdamW([p for p in prior.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    words = torch.randint(TEXT, (len(codes[0]), 3))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = prior(codes=codes, condition_ids=words).loss
        loss.backward()
        optimizer.step()
    return loss


def draw(prior):
    codes = prior.sample_codes([[3, 1], [2]], sizes=(16, 16), seed=1)
    return [level.tolist() for level in codes.levels]


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_fresh_adapter_changes_nothing(make_prior, random_codes, kind):
    prior, codes = make_prior(backbone=kind), random_codes(TWO_LEVELS, 2, (2, 2))
    before, words = prior(codes=codes, condition_ids=torch.tensor([[3], [19]])).loss, torch.tensor([[3], [19]])
    add_lora(prior, 4, TEXT)
    assert torch.equal(prior(codes=codes, condition_ids=words).loss, before)
    assert sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in prior.modules()) >= 8


@pytest.mark.parametrize("kind", BACKBONES)
def test_only_what_should_moves_and_merging_keeps_the_outputs(make_prior, random_codes, kind):
    prior, codes = make_prior(backbone=kind), random_codes(TWO_LEVELS, 4, (2, 2))
    names = list(prior.state_dict())
    add_lora(prior, 4, TEXT)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    train(prior, codes)
    moved = {name for name, value in prior.state_dict().items() if not torch.equal(value, before[name])}
    new = {name for name in before if not name.startswith("backbone.")}
    adapters = {name for name in before if ".lora_" in name}
    table = {name for name in before if name.endswith(".learned.weight")}
    assert len(table) == 1 and len(adapters) >= 16 and "lm_head.weight" in new
    assert moved == new | adapters | table
    prior.eval()
    words = torch.tensor([[3], [19], [0], [7]])
    with torch.no_grad():
        unmerged = prior(codes=codes, condition_ids=words)
        ids = torch.randint(prior.vocabulary.padded_size, (2, 9))
        rows = prior.get_input_embeddings()(ids)
        merge_lora(prior)
        merged = prior(codes=codes, condition_ids=words)
        assert torch.equal(prior.get_input_embeddings()(ids), rows)
    torch.testing.assert_close(merged.nats_per_code, unmerged.nats_per_code, rtol=1e-5, atol=1e-5)
    assert list(prior.state_dict()) == names
    assert all(p.requires_grad for p in prior.parameters())
    assert not any("peft" in type(module).__module__ for module in prior.modules())


def test_adapters_and_new_rows_lower_the_loss(make_prior, random_codes):
    prior, codes = make_prior(scale=1.0), random_codes(TWO_LEVELS, 4, (2, 2))
    add_lora(prior, 4, TEXT)
    first = train(prior, codes, 1)
    assert train(prior, codes, 15) < 0.8 * first


def test_samples_come_out_wrapped_and_merged(make_prior, random_codes):
    """The path of our own steps aside for adapters, and works again without them."""
    prior = make_prior()
    add_lora(prior, 4, TEXT)
    train(prior, random_codes(TWO_LEVELS, 4, (2, 2)))
    prior.eval()
    assert not has_fast_path(prior.backbone)
    wrapped = draw(prior)
    merge_lora(prior)
    assert has_fast_path(prior.backbone)
    assert draw(prior) == wrapped


def test_a_prior_that_somebody_wrapped_samples_too(make_prior):
    prior = make_prior()
    plain = draw(prior)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(prior, config)
    assert not has_fast_path(prior.backbone)
    adapted = draw(wrapped)
    assert adapted != plain
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, CodePriorModel) and has_fast_path(merged.backbone)
    assert draw(merged) == adapted


def test_merged_it_is_saved_and_loaded_without_peft(make_prior, random_codes, tmp_path):
    prior = make_prior()
    add_lora(prior, 4, TEXT)
    train(prior, random_codes(TWO_LEVELS, 4, (2, 2)))
    merge_lora(prior.eval())
    prior.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert draw(CodePriorModel.from_pretrained(tmp_path).eval()) == draw(prior)


def test_without_rows_to_keep_the_whole_embedding_learns(make_prior):
    prior = make_prior()
    add_lora(prior, 2)
    assert type(prior.get_input_embeddings()) is nn.Embedding
    assert prior.get_input_embeddings().weight.requires_grad


def test_split_rows_are_the_tables_rows():
    table = nn.Embedding(9, 3)
    split = SplitEmbedding(table, 4)
    ids = torch.arange(9).view(3, 3)
    assert torch.equal(split(ids), table(ids))
    assert torch.equal(split.joined().weight, table.weight)
    split(ids).sum().backward()
    assert split.frozen.weight.grad is None and torch.equal(split.learned.weight.grad, torch.ones(5, 3))


def test_what_cannot_be_adapted_is_refused(make_prior, monkeypatch):
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank of adapters must be an integer of at least 1"):
            add_lora(make_prior(), rank)
    prior = make_prior()

    class Scaled(nn.Embedding):
        """As Gemma's."""

    prior.backbone.set_input_embeddings(Scaled(64, 32))
    with pytest.raises(ValueError, match="is a Scaled"):
        add_lora(prior, 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vqtok\[peft\]'"):
        add_lora(make_prior(), 2)
