"""The examples with text: train, evaluate, encode, a prior over the codes, and texts drawn from it."""

import json

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from examples import generate, train_prior, train_tokenizer
from tests.tiny import TEXT_CONFIG
from vqtok import VQPipeline, VQTokenizer
from vqtok.cli import main as vqtok


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "recipe").mkdir()
    parts = {
        "config": {"model_type": "vqtok_text", **TEXT_CONFIG, "continuous_steps": 2},
        "preprocessor_config": {"stride": 4},
        "training": {"max_steps": 4, "batch_size": 4, "text_units": 32, "warmup_steps": 1, "log_every": 2},
    }
    for name, value in parts.items():
        (tmp_path / "recipe" / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i}: once upon a time." for i in range(400)))
    return tmp_path


def train(place, output, *more):
    flags = ["--config", str(place / "recipe"), "--dataset", str(place / "book.txt"), "--output_dir", str(output)]
    return train_tokenizer.main([*flags, "--num_threads", "1", "--eval_every", "2", *more])


def test_a_recipe_may_keep_the_codes_of_the_start_from_data(place):
    """Encoder and codebook are those of the first look at the data, whatever was trained."""
    recipe = place / "recipe" / "training.json"
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "decoder_only": True, "init_steps": 2}))
    states = []
    for steps in ("2", "4"):
        train(place, place / f"vq-{steps}", "--max_steps", steps, "--average_decay", "0")
        AcceleratorState._reset_state(reset_partial_state=True)
        states.append(load_file(place / f"vq-{steps}" / "model.safetensors"))
    changed = {name.split(".")[0] for name in states[0] if not states[0][name].equal(states[1][name])}
    assert changed == {"decoder"}
    start = VQTokenizer.from_config(place / "recipe").model.state_dict()
    table = next(name for name in start if name.endswith("embedding") and name.startswith("quantizer."))
    assert not states[0][table].equal(start[table])


def test_from_a_file_to_texts_that_a_prior_writes(place, capsys):
    metrics = train(place, place / "vq")
    assert 0 <= metrics["unit_accuracy"] < 1 and metrics["data"]["num_texts"] > 1
    assert "held-out bytes" in (place / "vq" / "README.md").read_text()
    assert "--- from its codes" in (place / "vq" / "samples" / "reconstructions.txt").read_text()
    assert (place / "vq" / "samples" / "step-2.txt").is_file()
    tokenizer = VQTokenizer.from_pretrained(place / "vq")
    assert tokenizer.verify() and not (place / "vq" / "config.json").read_text().count('"fingerprint": null')
    assert vqtok(["evaluate", str(place / "vq"), str(place / "book.txt"), "--num_samples", "3"]) == 0
    assert "bytes right %" in capsys.readouterr().out
    AcceleratorState._reset_state(reset_partial_state=True)

    (place / "prior").mkdir()
    backbone = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    model = {"model_type": "vqtok_prior", "condition": "none", "stops": True, "backbone_config": backbone}
    for name, value in (("config", model), ("training", {})):
        (place / "prior" / f"{name}.json").write_text(json.dumps(value))
    flags = ["--config", str(place / "prior"), "--tokenizer", str(place / "vq"), "--dataset", str(place / "book.txt")]
    flags += ["--max_steps", "3", "--batch_size", "4", "--num_threads", "1", "--warmup_steps", "1"]
    scores = train_prior.main([*flags, "--output_dir", str(place / "pipeline")])
    assert 0 < scores["prior_bits_per_byte"] < 5
    assert (place / "pipeline" / "samples" / "samples.txt").read_text().count("---") >= 7
    texts = VQPipeline.from_pretrained(place / "pipeline")(num_samples=2, seed=0)
    assert all(type(text) is str and text for text in texts)
    made = ["--pipeline", str(place / "pipeline"), "--num_samples", "2", "--output_dir", str(place / "drawn")]
    assert [path.read_text() for path in generate.main(made)] == texts
