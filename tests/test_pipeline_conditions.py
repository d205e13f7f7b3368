"""Pipelines whose prompts a text encoder reads, or that are codes themselves; and the best of many samples."""

import shutil

import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from tests import tiny
from vqtok import VQPipeline, VQTokenizer
from vqtok.codes import CodeLayout, Codes, LevelLayout
from vqtok.pipeline import prior_scorer
from vqtok.prior import CodePriorConfig, CodePriorModel, encode_prompts, train_text_tokenizer
from vqtok.prior.features import TextEncoder

CAPTIONS = ["a red three", "a very very blue seven", "one", "a red seven left of a blue three"]
TOKENIZER = train_text_tokenizer(CAPTIONS, 300)
BACKBONE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
SIZE = {"sizes": (16, 24)}


@pytest.fixture(scope="module")
def vq_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    tiny.make_tokenizer().save_pretrained(folder)
    return VQTokenizer.from_pretrained(folder)


def make_prior(vq_tokenizer, **fields):
    torch.manual_seed(1)
    known = {"layout": vq_tokenizer.layout.to_dict(), "fingerprint": vq_tokenizer.fingerprint, "max_grid": 4}
    prior = CodePriorModel(CodePriorConfig(**known, backbone_config=BACKBONE, **fields)).eval()
    with torch.no_grad():
        for name, value in prior.named_parameters():
            if "norm" not in name:
                value.mul_(6)
    return prior


def make_encoder(width=16):
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=300, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return TextEncoder(model, TOKENIZER)


@pytest.fixture
def reading(vq_tokenizer):
    prior = make_prior(vq_tokenizer, condition="features", feature_size=16, max_text_length=12)
    prior.generation_config.guidance_scale = 1.5
    return VQPipeline(prior, vq_tokenizer, text_encoder=make_encoder())


def pixels(pictures):
    return [np.asarray(picture).tolist() for picture in pictures]


def test_prompts_of_any_length_draw_what_they_draw_alone(reading):
    whole = pixels(reading([*CAPTIONS, None], seed=3, **SIZE))
    for index, caption in enumerate([*CAPTIONS, None]):
        assert pixels(reading([None] * index + [caption], seed=3, **SIZE))[index] == whole[index]
    assert pixels(reading([CAPTIONS[1]] * 5, seed=3, **SIZE)) != whole
    assert "read by a frozen encoder" in repr(reading)


def test_the_folder_keeps_the_text_encoder(reading, tmp_path):
    reading.save_pretrained(tmp_path / "pipe")
    names = {path.name for path in (tmp_path / "pipe/text_encoder").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not (tmp_path / "pipe/tokenizer.json").exists()
    again = VQPipeline.from_pretrained(tmp_path / "pipe", device="cpu")
    assert pixels(again(CAPTIONS, seed=3)) == pixels(reading(CAPTIONS, seed=3))
    again.save_pretrained(tmp_path / "copy")
    saved = [tmp_path / name / "text_encoder/model.safetensors" for name in ("pipe", "copy")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    shutil.rmtree(tmp_path / "pipe/text_encoder")
    with pytest.raises(FileNotFoundError, match="no folder 'text_encoder'"):
        VQPipeline.from_pretrained(tmp_path / "pipe")


def test_bad_prompts_and_encoders_are_named(reading, vq_tokenizer):
    for prompts, message in [
        (["a red three", " "], "prompt 1 is empty"),
        ([3], "prompt 0 must be a text, got 3"),
        (["one " * 13], "prompt 0 has 13 tokens, this prior takes at most 12"),
        ([], "there are no prompts"),
    ]:
        with pytest.raises(ValueError, match=message):
            reading(prompts)
    with pytest.raises(ValueError, match="condition 'features' was given the text encoder NoneType: give the one"):
        VQPipeline(reading.prior, vq_tokenizer)
    with pytest.raises(ValueError, match="have the width 8, the prior takes 16"):
        VQPipeline(reading.prior, vq_tokenizer, text_encoder=make_encoder(8))
    with pytest.raises(ValueError, match="condition 'none' was given the text encoder TextEncoder: leave it away"):
        VQPipeline(make_prior(vq_tokenizer), vq_tokenizer, text_encoder=make_encoder())


def test_codes_as_prompts(vq_tokenizer, tmp_path):
    layout = CodeLayout(1, (LevelLayout(4, 2, 9),))
    fields = {"condition_layout": layout.to_dict(), "condition_fingerprint": "a" * 64, "max_text_length": 12}
    pipe = VQPipeline(make_prior(vq_tokenizer, condition="codes", **fields), vq_tokenizer)
    sounds = Codes((torch.arange(12).view(2, 2, 3) % 9,), [[12], [8]], layout, "a" * 64)
    pictures = pipe(sounds, seed=0, num_samples=2, **SIZE)
    assert len(pictures) == 4 and pixels(pictures) == pixels(pipe(list(sounds), seed=0, num_samples=2, **SIZE))
    assert pixels(pictures)[:2] == pixels(pipe(sounds[[0]], seed=0, num_samples=2, **SIZE))
    pipe.save_pretrained(tmp_path)
    again = VQPipeline.from_pretrained(tmp_path)
    assert pixels(again(sounds, seed=0, num_samples=2, **SIZE)) == pixels(pictures)
    with pytest.raises(ValueError, match="b{64}.*a{64}"):
        pipe(Codes(sounds.levels, sounds.sizes, layout, "b" * 64))
    assert "codes of {'ndim': 1" in repr(pipe)


@pytest.fixture
def told(vq_tokenizer):
    prior = make_prior(vq_tokenizer, condition="text", text_size=len(TOKENIZER), max_text_length=12)
    return VQPipeline(prior, vq_tokenizer, TOKENIZER)


def test_the_best_of_many(told):
    def brightness(prompts, media):
        assert prompts == ["a red three"] * 4 + [None] * 4
        return [np.asarray(medium).mean() for medium in media]

    prompts, options = ["a red three", None], {"num_samples": 4, "seed": 1, **SIZE}
    drawn = pixels(told(prompts, **options))
    best = pixels(told(prompts, rerank=brightness, keep_best=1, **options))
    wanted = [max(drawn[first : first + 4], key=np.mean) for first in (0, 4)]
    assert best == wanted
    everything = pixels(told(prompts, rerank=brightness, **options))
    assert [np.mean(p) for p in everything[:4]] == sorted((np.mean(p) for p in drawn[:4]), reverse=True)
    with pytest.raises(ValueError, match="returned 3 scores for 8 media"):
        told(prompts, rerank=lambda *_: [1.0] * 3, **options)
    for keep, message in ((5, "more than num_samples 4"), (0, "at least 1")):
        with pytest.raises(ValueError, match=message):
            told(prompts, rerank=brightness, keep_best=keep, **options)
    with pytest.raises(ValueError, match="needs a scorer"):
        told(prompts, keep_best=1, **options)


def test_the_priors_own_scorer(told, vq_tokenizer):
    """The likelihood ratio, against two sums that are made by hand from what `score` says of each code."""
    prompts = ["a red three", None, "one"]
    media = told(prompts, seed=1, sizes=(16, 16))
    scores = prior_scorer(told)(prompts, media)
    codes = vq_tokenizer.encode(media)
    ids = [encode_prompts(TOKENIZER, [prompt], 12)[0] if prompt else None for prompt in prompts]
    for index, score in enumerate(scores):
        with_prompt = sum(float(nats.sum()) for nats in told.prior.score(codes[[index]], [ids[index]]).maps)
        without = sum(float(nats.sum()) for nats in told.prior.score(codes[[index]]).maps)
        assert score == pytest.approx(without - with_prompt, abs=1e-3)
    assert abs(scores[1]) < 1e-3 < abs(scores[0])
    assert len(told("one", num_samples=3, rerank=prior_scorer(told), keep_best=2, **SIZE)) == 2
    with pytest.raises(ValueError, match="condition 'none'.*cannot tell prompts from none"):
        prior_scorer(VQPipeline(make_prior(vq_tokenizer), vq_tokenizer))
