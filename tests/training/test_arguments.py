"""Flags and recipes: a recipe fills in, a flag wins, a misspelt key is named."""

import json
from dataclasses import dataclass

import pytest

from vqtok.training import TrainingArguments, parse_arguments, read_recipe


@dataclass
class Script:
    dataset: str = "digits"


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default():
    recipe = {"learning_rate": 0.5, "max_steps": 7, "dataset": "folder"}
    script, args = parse_arguments((Script, TrainingArguments), ["--output_dir", "x", "--max_steps", "9"], recipe)
    assert (args.learning_rate, args.max_steps, script.dataset, args.output_dir) == (0.5, 9, "folder", "x")


def test_a_misspelt_key_of_a_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="'lerning_rate'.*'learning_rate'"):
        parse_arguments((Script, TrainingArguments), ["--output_dir", "x"], {"lerning_rate": 1e-3})


def test_a_misspelt_flag_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="--lerning_rate.*--learning_rate"):
        parse_arguments((Script, TrainingArguments), ["--output_dir", "x", "--lerning_rate", "1"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("average_decay", 1.0),
        ("warmup_steps", -1),
        ("log_every", 0),
    ],
)
def test_impossible_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"--{name} must be .*{value}"):
        TrainingArguments(**{"output_dir": "x", name: value})


def test_a_recipe_that_is_no_json_object_is_refused_by_name(tmp_path):
    assert read_recipe(tmp_path) == {}
    (tmp_path / "training.json").write_text("[1]")
    with pytest.raises(ValueError, match="training.json must hold a JSON object"):
        read_recipe(tmp_path)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ValueError, match="training.json is no JSON"):
        read_recipe(tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({"max_steps": 3}))
    assert read_recipe(tmp_path) == {"max_steps": 3}
