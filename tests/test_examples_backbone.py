"""`train_prior.py` with a text model to start from, adapters, attention back ends, checkpointing and bf16: each resumes exactly."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from examples import train_prior
from tests.prior.conftest import BACKBONES
from tests.tiny import make_tokenizer, picture
from vqtok import CodePriorModel, VQPipeline, VQTokenizer
from vqtok.prior import train_text_tokenizer
from vqtok.prior.data import write_code_cache

WORDS = ["red", "blue", "green", "small", "large"]
TRAINING = {"max_steps": 4, "batch_size": 4, "save_every": 2, "log_every": 2, "warmup_steps": 1, "num_threads": 1,
            "eval_samples": 2, "learning_rate": 1e-2}  # fmt: skip
WAYS = {
    "scratch": [],
    "text": ["--init_from", "TEXT"],
    "lora": ["--init_from", "TEXT", "--lora_rank", "2"],
    "checkpointing": ["--gradient_checkpointing", "true", "--attn_implementation", "eager"],
    "bf16": ["--init_from", "TEXT", "--mixed_precision", "bf16", "--attn_implementation", "sdpa"],
    "all": ["--init_from", "TEXT", "--lora_rank", "2", "--gradient_checkpointing", "true", "--mixed_precision", "bf16"],
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, codes with captions, a recipe, and a text model with its own tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer().save_pretrained(folder / "vq")
    tokenizer = VQTokenizer.from_pretrained(folder / "vq")
    captions = [f"a {WORDS[i % 5]} thing {i % 3}" for i in range(60)]
    batch = tokenizer.encode([picture(16, 16, seed) for seed in range(60)])
    write_code_cache(folder / "codes", [(batch, [{"text": text} for text in captions])], {})
    (folder / "recipe").mkdir()
    backbone = {"model_type": "llama", "num_hidden_layers": 1, **BACKBONES["llama"]}
    config = {"model_type": "vqtok_prior", "condition": "text", "backbone_config": backbone}
    (folder / "recipe" / "config.json").write_text(json.dumps(config))
    (folder / "recipe" / "training.json").write_text(json.dumps(TRAINING))
    words = train_text_tokenizer([*captions, "words that no caption has"], 300)
    words.save_pretrained(folder / "text")
    torch.manual_seed(0)
    text = AutoConfig.for_model("qwen3", vocab_size=len(words) + 5, num_hidden_layers=2, **BACKBONES["qwen3"])
    AutoModelForCausalLM.from_config(text).save_pretrained(folder / "text")
    return folder


def train(made, output, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    folders = [
        "--config",
        made / "recipe",
        "--tokenizer",
        made / "vq",
        "--codes",
        made / "codes",
        "--output_dir",
        output,
    ]
    flags = [str(made / "text") if flag == "TEXT" else flag for flag in flags]
    train_prior.main([*map(str, folders), *flags])
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("way", WAYS)
def test_a_crash_and_the_same_command_again_ends_with_equal_weights(made, tmp_path, monkeypatch, way):
    whole = train(made, tmp_path / "whole", *WAYS[way])
    calls = []

    class Crashing(train_prior.PriorStep):
        def __call__(self, batches, rate):
            calls.append(rate)
            if len(calls) == 4:
                raise RuntimeError("crash")
            return super().__call__(batches, rate)

    with monkeypatch.context() as patched:
        patched.setattr(train_prior, "PriorStep", Crashing)
        with pytest.raises(RuntimeError, match="crash"):
            train(made, tmp_path / "cut", *WAYS[way])
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-2"]
    again = train(made, tmp_path / "cut", *WAYS[way])
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("flags", [["--init_from", "TEXT"], ["--init_from", "TEXT", "--lora_rank", "2"]])
def test_the_published_pipeline_is_plain_and_knows_the_words_of_the_text_model(made, tmp_path, flags):
    weights = train(made, tmp_path, *flags)
    pipeline = VQPipeline.from_pretrained(tmp_path)
    assert set(weights) == set(CodePriorModel(pipeline.prior.config).state_dict())
    assert pipeline.prior.config.backbone_config.model_type == "qwen3"
    text = load_file(made / "text" / "model.safetensors")
    rows = pipeline.prior.config.text_size
    assert rows == len(AutoTokenizer.from_pretrained(made / "text"))
    kept = torch.equal(weights["backbone.embed_tokens.weight"][:rows], text["model.embed_tokens.weight"][:rows])
    assert kept == ("--lora_rank" in flags), "adapters leave words alone, training everything does not"
    assert not torch.equal(weights["backbone.layers.0.mlp.up_proj.weight"], text["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(weights["backbone.norm.weight"], text["model.norm.weight"]) == ("--lora_rank" in flags)
    assert pipeline(["that no caption"], seed=0, sizes=(16, 16))[0].size == (16, 16)
    for path in tmp_path.glob("*.json"):
        assert str(made) not in path.read_text(), path


def test_another_text_tokenizer_has_words_of_its_own(made, tmp_path):
    train_text_tokenizer(["quite another"], 260).save_pretrained(tmp_path / "words")
    flags = ["--init_from", "TEXT", "--lora_rank", "2", "--text_tokenizer", str(tmp_path / "words")]
    weights = train(made, tmp_path / "out", *flags)
    text = load_file(made / "text" / "model.safetensors")["model.embed_tokens.weight"]
    table = weights["backbone.embed_tokens.weight"]
    assert not any(torch.equal(table[i], text[i]) for i in range(100))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_rank", "4"], "--lora_rank 4 .*needs --init_from"),
        (["--lora_rank", "-1", "--init_from", "TEXT"], "--lora_rank -1 must be at least 0"),
        (["--attn_implementation", "flex_attention"], "flex_attention' does not train on a CPU"),
        (["--init_from", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_flags_are_said_before_training(made, tmp_path, flags, words):
    with pytest.raises((ValueError, OSError), match=words):
        train(made, tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "checkpoints").exists()
