"""A frozen text encoder as the condition: its features, their cache, and what is no encoder."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from vqtok.prior.features import FeatureCache, FeatureConditions, TextEncoder
from vqtok.prior.text import train_text_tokenizer

CAPTIONS = ["a red three", "a very very blue seven", "one", "a red seven on the left of a blue three", "a blue one"]
TOKENIZER = train_text_tokenizer(CAPTIONS, 300)
SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
ENCODERS = {
    "bert": lambda: BertModel(BertConfig(**SMALL, max_position_embeddings=20), add_pooling_layer=False),
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**SMALL, max_position_embeddings=20)),
    "t5": lambda: T5EncoderModel(T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=20)),
    "bart": lambda: BartModel(
        BartConfig(
            vocab_size=300,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_attention_heads=2,
            decoder_ffn_dim=16,
            max_position_embeddings=20,
        )
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL, max_position_embeddings=20)),
}


def make_encoder(name="t5", seed=0):
    torch.manual_seed(seed)
    model = ENCODERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return TextEncoder(model, TOKENIZER)


@pytest.mark.parametrize("name", ENCODERS)
def test_texts_of_any_length_have_the_features_they_have_alone(name):
    encoder = make_encoder(name)
    together = encoder.features(CAPTIONS, 20)
    for caption, features in zip(CAPTIONS, together, strict=True):
        ids = torch.tensor([TOKENIZER(caption).input_ids])
        model = encoder.model.encoder if name == "bart" else encoder.model
        alone = model(input_ids=ids).last_hidden_state[0]
        assert features.shape == (ids.shape[1], 16) == alone.shape and features.dtype == torch.float32
        assert (features - alone).abs().max() < 1e-5 * alone.abs().max()
    lengths = [len(features) for features in together]
    assert len(set(lengths)) == 4 and lengths.count(3) == 2, "short and long ones, and two of one length"
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters()) and not encoder.model.training


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_encoder_says_the_same(name, tmp_path):
    encoder = make_encoder(name)
    encoder.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    assert (again.size, again.fingerprint) == (16, encoder.fingerprint) != (16, make_encoder(name, 1).fingerprint)
    for one, other in zip(encoder.features(CAPTIONS, 20), again.features(CAPTIONS, 20), strict=True):
        assert torch.equal(one, other)


def test_the_text_half_of_clip(tmp_path):
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
    }
    text = {**SMALL, "max_position_embeddings": 20}
    both = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    both.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    encoder = TextEncoder.from_pretrained(tmp_path)
    (features,) = encoder.features(["a red three"], 20)
    ids = torch.tensor([TOKENIZER("a red three").input_ids])
    assert torch.allclose(features, both.text_model(input_ids=ids).last_hidden_state[0], atol=1e-5)


def test_each_distinct_caption_is_encoded_once(tmp_path):
    encoder = make_encoder()
    seen = []
    encoder.model.register_forward_pre_hook(lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()),
                                            with_kwargs=True)  # fmt: skip
    conditions = FeatureConditions(encoder, [*CAPTIONS, *CAPTIONS])
    assert conditions.prepare(tmp_path) == len(conditions) == len(CAPTIONS) == len(seen)
    samples = [{"text": caption} for caption in CAPTIONS]
    wanted = dict(zip(CAPTIONS, encoder.features(CAPTIONS, 20), strict=True))
    seen.clear()
    for sample in samples * 2:
        assert torch.equal(conditions.ids(sample), wanted[sample["text"]])
    more = FeatureConditions(encoder, [*CAPTIONS, "a blue seven"])
    assert more.prepare(tmp_path) == 1 and len(seen) == 1, "a later run encodes what is new"
    assert torch.equal(more.ids(samples[3]), wanted[CAPTIONS[3]])
    assert more.fields == {"condition": "features", "feature_size": 16, "max_text_length": 2 * 10}
    assert more.knows(samples[0]) and not more.knows({"text": "unseen"}) and not more.knows({})
    with pytest.raises(ValueError, match="no features of the caption 'unseen'"):
        more.ids({"text": "unseen"})
    assert more.prompt(samples[1]) == CAPTIONS[1]


def test_the_cache_is_shards_that_are_mapped(tmp_path):
    encoder = make_encoder()
    rows = encoder.tokenize(CAPTIONS, 20)
    cache = FeatureCache(tmp_path, encoder, shard_bytes=1)  # every caption fills a shard
    assert cache.add(encoder, rows) == len(cache) == len(list(tmp_path.glob("*.safetensors"))) == 5
    assert not list(tmp_path.glob("*.tmp"))
    again = FeatureCache(tmp_path, encoder)
    for ids, features in zip(rows, encoder.features(CAPTIONS, 20), strict=True):
        assert ids in again and torch.equal(again[ids], features)
    assert torch.equal(pickle.loads(pickle.dumps(again))[rows[0]], again[rows[0]])
    other = make_encoder(seed=1)
    assert rows[0] not in FeatureCache(tmp_path, other), "another encoder has features of its own"


def test_encoding_that_was_cut_off_goes_on(tmp_path):
    encoder = make_encoder()
    rows = encoder.tokenize(CAPTIONS, 20)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = encoder.model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, encoder, shard_bytes=1).add(encoder, rows)
    handle.remove()
    cache = FeatureCache(tmp_path, encoder)
    assert len(cache) == 3 and cache.add(encoder, rows) == 2
    assert all(ids in cache for ids in rows)


def test_a_damaged_shard_is_named(tmp_path):
    encoder = make_encoder()
    FeatureCache(tmp_path, encoder).add(encoder, encoder.tokenize(CAPTIONS, 20))
    (path,) = tmp_path.glob("*.safetensors")
    save_file(load_file(path), path, metadata={"text_encoder": "another"})
    with pytest.raises(ValueError, match=f"{path.name} cannot be read .*does not belong"):
        FeatureCache(tmp_path, encoder)
    path.write_bytes(b"\x00" * 50)
    with pytest.raises(ValueError, match=f"{path.name} cannot be read .*delete it"):
        FeatureCache(tmp_path, encoder)


@pytest.mark.parametrize(
    ("texts", "most", "message"),
    [
        (["one", " "], 20, "prompt 1 is empty"),
        ([3], 20, "prompt 0 must be a text"),
        (["one " * 12], 8, "prompt 0 has 12 tokens, this prior takes at most 8"),
        (["one " * 30], 100, "prompt 0 has 30 tokens, this prior takes at most 20"),  # of the encoder itself
    ],
)
def test_bad_texts(texts, most, message):
    with pytest.raises(ValueError, match=message):
        make_encoder("bert").features(texts, most)


def test_what_is_no_text_encoder(tmp_path):
    vit = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    )
    with pytest.raises(ValueError, match="ViTModel is no text encoder"):
        TextEncoder(vit, TOKENIZER)
    with pytest.raises(ValueError, match="Linear is no text encoder"):
        TextEncoder(nn.Linear(2, 2), TOKENIZER)
    small = BertModel(BertConfig(**{**SMALL, "vocab_size": 30}))
    with pytest.raises(ValueError, match=f"has {len(TOKENIZER)} tokens, the text encoder BertModel knows 30"):
        TextEncoder(small, TOKENIZER)
    vit.save_pretrained(tmp_path / "vit")
    TOKENIZER.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="no text encoder"):
        TextEncoder.from_pretrained(tmp_path / "vit")
    with pytest.raises(OSError, match="cannot be loaded as a text encoder"):
        TextEncoder.from_pretrained(tmp_path / "nowhere")
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "t5")
    weights = load_file(tmp_path / "t5" / "model.safetensors")
    half = {name: value for name, value in weights.items() if "block.1" not in name}
    save_file(half, tmp_path / "t5" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights do not fit the config: .*missing_keys.*block.1"):
        TextEncoder.from_pretrained(tmp_path / "t5")
    torch.save(weights, tmp_path / "t5" / "pytorch_model.bin")
    (tmp_path / "t5" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        TextEncoder.from_pretrained(tmp_path / "t5")
