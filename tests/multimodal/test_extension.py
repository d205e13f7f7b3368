"""A language model gets rows for codes: what was there keeps every bit, what is new begins near what is known."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.multimodal.conftest import MODELS, make_model, make_text_tokenizer
from vqtok import VQTokenizer, extend
from vqtok.multimodal.extension import _code_vectors
from vqtok.multimodal.frozen import vocabulary_parameters


@pytest.mark.parametrize("init", ["codebook", "mean"])
@pytest.mark.parametrize("kind", MODELS)
def test_old_rows_keep_every_bit_and_old_logits_stay(kind, init, vqs, tmp_path):
    tokenizer = make_text_tokenizer()
    rows = len(tokenizer)
    model = make_model(kind, rows)
    before = [parameter.clone() for parameter in vocabulary_parameters(model)]
    ids = torch.arange(40).view(2, 20)
    old_logits = model(ids).logits
    processor = extend(tokenizer, model, vqs, init=init, max_grid=8)
    vocabulary = processor.vocabulary
    after = vocabulary_parameters(model)
    assert len(after) == len(before) == {"llama": 2, "phi": 3}.get(kind, 1), "tied tables stay tied"
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:rows], old) and len(new) == vocabulary.padded_size and len(new) % 64 == 0
        assert new.isfinite().all() and (new.ndim == 1 or new[rows:].std(0).min() > 0)
    assert torch.equal(model(ids).logits[..., :rows], old_logits)
    assert model.config.vocab_size == vocabulary.padded_size
    assert vocabulary.text_size == rows and len(tokenizer) == vocabulary.size
    assert tokenizer.convert_tokens_to_ids("<|image_1_0_31|>") == vocabulary.id("image", 1, 0, 31)
    assert tokenizer.decode([vocabulary.id("audio", 0, 2, 15)], skip_special_tokens=False) == "<|audio_0_2_15|>"
    assert tokenizer("a red three").input_ids == make_text_tokenizer()("a red three").input_ids
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    new_ids = torch.randint(vocabulary.size, (2, 12))
    assert torch.equal(again(new_ids).logits, model(new_ids).logits)
    assert again.config.vqtok_vocabulary == vocabulary.to_dict()


def test_rows_that_begin_with_the_codebook_keep_what_is_near(vqs):
    def distances(rows):
        return torch.cdist(rows.double(), rows.double())[torch.triu_indices(len(rows), len(rows), 1).unbind()]

    alike = {}
    for init in ("codebook", "mean"):
        tokenizer = make_text_tokenizer()
        model = make_model("llama", len(tokenizer), hidden_size=256)
        vocabulary = extend(tokenizer, model, vqs, init=init).vocabulary
        rows = model.get_input_embeddings().weight.detach()
        old = rows[: vocabulary.text_size]
        for (name, level, codebook), points in _code_vectors(vocabulary, vqs):
            start = vocabulary.id(name, level, codebook, 0)
            own = rows[start : start + len(points)]
            pair = torch.stack([distances(points), distances((own - old.mean(0)) / old.std(0))])
            alike.setdefault(init, []).append(float(torch.corrcoef(pair)[0, 1]))
            share = float((own - own.mean(0)).square().mean().sqrt() / old.std(0).square().mean().sqrt())
            assert (0.9 < share < 1.1) if init == "codebook" else (0.015 < share < 0.025)
            assert float((own.mean(0) - old.mean(0)).abs().mean() / old.std(0).mean()) < 0.05
    assert min(alike["codebook"]) > 0.9, alike
    assert len(alike["mean"]) == 5 and max(map(abs, alike["mean"])) < 0.5, alike


def test_the_vectors_are_the_tables(vqs):
    """Of a vector quantizer the rows of its table, of residual ones each codebook's, up to a constant."""
    processor = extend(tokenizer := make_text_tokenizer(), make_model("gpt2", len(tokenizer)), vqs)
    vectors = dict(_code_vectors(processor.vocabulary, vqs))
    assert {key: len(value) for key, value in vectors.items()} == {
        ("image", 0, 0): 16, ("image", 1, 0): 32, ("audio", 0, 0): 16, ("audio", 0, 1): 16, ("audio", 0, 2): 16,
    }  # fmt: skip
    codes = torch.arange(16).view(16, 1, 1, 1)
    assert torch.equal(vectors["image", 0, 0], vqs["image"].model.embed_codes([codes])[0][:, 0, 0])
    pair = torch.zeros(2, 3, 1, dtype=torch.int64)
    pair[1, 2] = 7
    rows = vqs["audio"].model.embed_codes([pair])[0][:, 0]
    own = vectors["audio", 0, 2]
    torch.testing.assert_close(own[7] - own[0], rows[1] - rows[0], rtol=1e-5, atol=1e-6)


def test_spare_rows_and_other_added_tokens_are_taken_as_they_are(vqs):
    tokenizer = make_text_tokenizer()
    tokenizer.add_tokens(["<custom>", "another"])
    assert tokenizer.convert_tokens_to_ids("another") == len(tokenizer) - 1
    model = make_model("llama", 1024)
    before = model.get_input_embeddings().weight.clone()
    processor = extend(tokenizer, model, vqs, max_grid=8)
    rows = processor.vocabulary.text_size
    assert (
        tokenizer.convert_tokens_to_ids("<|image_begin|>") == rows == processor.vocabulary.special_id("image", "begin")
    )
    assert tokenizer.convert_tokens_to_ids("<custom>") == rows - 2
    after = model.get_input_embeddings().weight
    assert len(after) == 1024 and torch.equal(after[:rows], before[:rows])
    assert not torch.equal(after[rows], before[rows]), "a spare row is an id now"
    assert processor("see <custom>").input_ids[0, -1] == rows - 2


def refusals(vqs):
    def fresh(rows=None):
        tokenizer = make_text_tokenizer()
        return tokenizer, make_model("llama", rows or len(tokenizer))

    def twice(tokenizer, model):
        extend(tokenizer, model, vqs["image"])
        return tokenizer, model

    def other_tokenizer(tokenizer, model):
        extend(tokenizer, model, vqs["image"])
        return make_text_tokenizer(), model

    def other_model(tokenizer, model):
        extend(tokenizer, model, vqs["audio"])
        return tokenizer, make_model("llama", len(tokenizer))

    def named(tokenizer, model):
        tokenizer.add_tokens(["<|image_row|>"])
        return tokenizer, make_model("llama", len(tokenizer))

    def small(tokenizer, model):
        return tokenizer, make_model("llama", len(tokenizer) - 1)

    def on_meta(tokenizer, model):
        return tokenizer, model.to("meta")

    return {
        "twice": (twice, "this tokenizer was extended before: '<.image_0_0_0.>' is id"),
        "twice, other tokenizer": (other_tokenizer, "this model was extended before"),
        "twice, other modality": (other_model, "this tokenizer was extended before: '<.audio_0_0_0.>'"),
        "name": (named, "a token '<.image_row.>' of its own"),
        "small": (small, "rows: they do not belong together"),
        "meta": (on_meta, "before it is sharded"),
    }, fresh


@pytest.mark.parametrize("case", ["twice", "twice, other tokenizer", "twice, other modality", "name", "small", "meta"])
def test_what_would_go_wrong_is_refused_and_nothing_changed(case, vqs):
    cases, fresh = refusals(vqs)
    spoil, words = cases[case]
    tokenizer, model = spoil(*fresh())
    length, rows = len(tokenizer), len(model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=words):
        extend(tokenizer, model, vqs["image"])
    assert (len(tokenizer), len(model.get_input_embeddings().weight)) == (length, rows)


def test_ids_that_would_clash_are_named(vqs):
    """A tokenizer whose ids leave some out gives new tokens the ids of others."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 7}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="ids would clash: this tokenizer has 3 tokens, but 'c' is id 7"):
        extend(tokenizer, make_model("llama", 64), vqs["image"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "zero"}, "codebook, mean, got 'zero'"),
        ({"max_grid": {"audio": 3}}, "max_grid is given for"),
        ({"max_grid": 0}, "max_grid must be"),
    ],
)
def test_wrong_options_are_named(options, words, vqs):
    tokenizer = make_text_tokenizer()
    model = make_model("llama", len(tokenizer))
    with pytest.raises(ValueError, match=words):
        extend(tokenizer, model, vqs["image"], **options)
    assert model.config.vocab_size == len(tokenizer) == len(make_text_tokenizer())


def test_a_model_without_a_head_and_a_slow_tokenizer_are_refused(vqs):
    tokenizer = make_text_tokenizer()
    model = make_model("llama", len(tokenizer))
    with pytest.raises(ValueError, match="has no head over the vocabulary"):
        extend(tokenizer, model.model, vqs["image"])
    tokenizer = copy.copy(tokenizer)
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    with pytest.raises(TypeError, match="Slow is no fast tokenizer"):
        extend(tokenizer, model, vqs["image"])


def test_a_tokenizer_that_was_never_saved_may_be_used_and_has_a_fingerprint_once_saved(tmp_path):
    vq = VQTokenizer.from_config("image/vqvae2-digits")
    tokenizer = make_text_tokenizer()
    processor = extend(tokenizer, make_model("llama", len(tokenizer)), vq)
    assert processor.vocabulary.modalities[0].fingerprint is None
    processor.save_pretrained(tmp_path)
    assert processor.vocabulary.modalities[0].fingerprint == vq.fingerprint is not None
