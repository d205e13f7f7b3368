"""ImageVQConfig: typed, closed, and impossible values named before anything is built."""

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from vqtok.codes import CodeLayout, LevelLayout
from vqtok.configuration import FORMAT
from vqtok.image.configuration_image_vq import ImageVQConfig


def test_the_layout_is_derived():
    config = ImageVQConfig(strides=[16, 8, 2], codebook_sizes=[256, 512, 1024])
    assert config.layout == CodeLayout(2, (LevelLayout(16, 1, 256), LevelLayout(8, 1, 512), LevelLayout(2, 1, 1024)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_channels", "3"),
        ("num_channels", 3.0),
        ("num_channels", True),
        ("num_channels", None),
        ("strides", 8),
        ("strides", "84"),
        ("strides", [8.0, 4.0]),
        ("strides", ["8", "4"]),
        ("codebook_sizes", [True, 4]),
        ("codebook_sizes", {"a": 4}),
        ("codebook_dim", [64]),
        ("codebook_update", 1),
        ("ema_decay", "0.99"),
        ("ema_decay", False),
        ("level_dropout", None),
        ("reconstruction_loss", ["l2"]),
        ("fingerprint", 7),
        ("vqtok_format", "1"),
    ],
)
def test_wrong_types_name_the_field_and_the_value(field, value, tmp_path):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){field}.*expected|{field}.*match any type"):
        ImageVQConfig(**{field: value})
    ImageVQConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        ImageVQConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field", ["ema_decay", "revival_threshold", "commitment_weight", "codebook_loss_weight", "level_dropout"]
)
def test_whole_numbers_are_numbers(field):
    """JSON and people write 0 for 0.0."""
    assert getattr(ImageVQConfig(**{field: 0}), field) == 0


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("stride", "strides"),
        ("codebook_size", "codebook_sizes"),
        ("hidden_dim", "hidden_size"),
        ("comitment_weight", "commitment_weight"),
        ("level_drop_out", "level_dropout"),
        ("ema_decy", "ema_decay"),
        ("finger_print", "fingerprint"),
    ],
)
def test_unknown_fields_name_the_nearest(field, nearest, tmp_path):
    with pytest.raises(ValueError, match=f"ImageVQConfig has no field '{field}'. Did you mean '{nearest}'"):
        ImageVQConfig(**{field: 1})
    ImageVQConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 1}))
    with pytest.raises(ValueError, match=nearest):
        ImageVQConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", ["top_k", "temperature", "max_length", "do_sample", "vocab_size", "x"])
def test_fields_of_other_models_are_unknown_too(field):
    with pytest.raises(ValueError, match=f"no field '{field}'"):
        ImageVQConfig(**{field: 1})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_channels": 4}, r"num_channels must be 1 or 3, got 4"),
        ({"strides": []}, r"strides must be a list of 1 to 6 strides, got \[\]"),
        ({"strides": [128, 64, 32, 16, 8, 4, 2], "codebook_sizes": [4] * 7}, "1 to 6 strides"),
        ({"strides": [6, 3]}, r"powers of two.*got \[6, 3\]"),
        ({"strides": [2, 1]}, "from 2 to 256"),
        ({"strides": [512, 4]}, "from 2 to 256"),
        ({"strides": [4, 8]}, r"coarse to fine.*got \[4, 8\]"),
        ({"strides": [4, 4]}, "each larger than the next"),
        ({"strides": [0, -4]}, "powers of two"),
        ({"strides": [4]}, r"codebook_sizes must be 1 sizes, one per stride, got \[512, 512\]"),
        ({"codebook_sizes": [512, 0]}, r"codebook_sizes .*got \[512, 0\]"),
        ({"codebook_sizes": [512, 1 << 21]}, "1048576"),
        ({"codebook_dim": 0}, "codebook_dim must be from 1 to 4096, got 0"),
        ({"hidden_size": -1}, "hidden_size .*got -1"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"residual_size": 0}, "residual_size"),
        ({"num_residual_layers": -1}, "num_residual_layers"),
        ({"codebook_update": "EMA"}, "'ema' or 'gradient', got 'EMA'"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_decay": math.nan}, "ema_decay .*got nan"),
        ({"revival_threshold": 1}, "revival_threshold"),
        ({"commitment_weight": -0.1}, "commitment_weight .*got -0.1"),
        ({"commitment_weight": math.inf}, "commitment_weight .*got inf"),
        ({"codebook_loss_weight": math.nan}, "codebook_loss_weight .*got nan"),
        ({"level_dropout": 1.01}, "level_dropout .*got 1.01"),
        ({"reconstruction_loss": "huber"}, "'l2', 'l1' or 'l1.l2', got 'huber'"),
        ({"vqtok_format": FORMAT + 1}, f"vqtok_format {FORMAT + 1}.*upgrade"),
    ],
)
def test_impossible_values_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        ImageVQConfig(**changes)


def test_tuples_and_lists_are_one_config(tmp_path):
    config = ImageVQConfig(strides=(8, 4), codebook_sizes=(16, 16))
    assert config.to_dict() == ImageVQConfig(strides=[8, 4], codebook_sizes=[16, 16]).to_dict()
    config.save_pretrained(tmp_path)
    assert ImageVQConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert ImageVQConfig().strides == [8, 4]
    ImageVQConfig().strides.append(2)
    assert ImageVQConfig().strides == [8, 4], "defaults are not shared"


def test_what_decides_codes_and_what_does_not():
    """A field is in one of the two lists: a new one has to be put into either."""
    base = ImageVQConfig(strides=[8, 4], codebook_sizes=[16, 16])
    decide = {"num_channels": 1, "strides": [8, 2], "codebook_sizes": [16, 8], "codebook_dim": 5, "hidden_size": 7}
    decide |= {"residual_size": 9, "num_residual_layers": 1}
    do_not = {"codebook_update": "gradient", "ema_decay": 0.5, "revival_threshold": 0.5, "commitment_weight": 2.0}
    do_not |= {"codebook_loss_weight": 2.0, "level_dropout": 0.5, "reconstruction_loss": "l1", "fingerprint": "f"}
    do_not |= {"vqtok_format": FORMAT}
    values = {"strides": [8, 4], "codebook_sizes": [16, 16]}
    own = {name for cls in ImageVQConfig.__mro__[:2] for name in cls.__annotations__}
    assert own == decide.keys() | do_not.keys()
    for name, value in decide.items():
        assert ImageVQConfig(**{**values, name: value}).code_fields != base.code_fields, name
    for name, value in do_not.items():
        assert ImageVQConfig(**{**values, name: value}).code_fields == base.code_fields, name
    assert json.loads(json.dumps(base.code_fields)) == base.code_fields
    assert base.code_fields["model_type"] == "vqtok_image"
