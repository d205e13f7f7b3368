"""ImageVQConfig: typed, closed, and impossible values named before anything is built."""

import dataclasses
import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from vqtok.codes import CodeLayout, LevelLayout
from vqtok.configuration import FORMAT
from vqtok.image.configuration_image_vq import ImageVQConfig
from vqtok.quantizers import QUANTIZERS


def vector(**fields):
    return {"type": "vector", **fields}


def test_the_layout_is_derived():
    config = ImageVQConfig(strides=[16, 8, 2], quantizer=[vector(codebook_size=size) for size in (256, 512, 1024)])
    assert config.layout == CodeLayout(2, (LevelLayout(16, 1, 256), LevelLayout(8, 1, 512), LevelLayout(2, 1, 1024)))


@pytest.mark.parametrize(
    ("strides", "quantizer", "levels"),
    [
        ([8, 4], vector(codebook_size=16), [(8, 1, 16), (4, 1, 16)]),
        ([4], {"type": "sim", "codebook_size": 24}, [(4, 1, 24)]),
        ([4], {"type": "gumbel", "codebook_size": 24}, [(4, 1, 24)]),
        ([4], {"type": "fsq", "scalar_levels": [8, 6, 5]}, [(4, 1, 240)]),
        ([4], {"type": "lfq", "bits": 18}, [(4, 1, 1 << 18)]),
        ([4], {"type": "bsq", "bits": 36}, [(4, 1, 1 << 36)]),
        ([4], {"type": "product", "num_codebooks": 2, "layer": vector(codebook_size=32)}, [(4, 2, 32)]),
        ([8, 4], [vector(), {"type": "residual", "num_codebooks": 3}], [(8, 1, 512), (4, 3, 512)]),
        ([4], {"type": "multi_scale", "scales": [1, 2, 6], "layer": vector(codebook_size=9)},
         [(24, 1, 9), (12, 1, 9), (4, 1, 9)]),
    ],
)  # fmt: skip
def test_every_quantizer_has_its_levels(strides, quantizer, levels):
    config = ImageVQConfig(strides=strides, quantizer=quantizer)
    assert config.layout == CodeLayout(2, tuple(LevelLayout(*level) for level in levels))


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
        ("quantizer", "vector"),
        ("quantizer", None),
        ("quantizer", ["vector", "vector"]),
        ("quantizer", [{"type": "vector"}, 4]),
        ("latent_size", [64]),
        ("latent_size", 64.0),
        ("level_dropout", "0.1"),
        ("level_dropout", False),
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
    ("field", "value", "got"),
    [
        ("codebook_size", "16", "str"),
        ("codebook_size", True, "bool"),
        ("codebook_size", 16.0, "float"),
        ("codebook_dim", [4], "list"),
        ("update", 1, "int"),
        ("decay", "0.99", "str"),
        ("decay", False, "bool"),
        ("commitment_weight", None, "NoneType"),
    ],
)
def test_wrong_types_inside_the_quantizer_name_it_the_field_and_the_value(field, value, got, tmp_path):
    named = f"(?s)quantizer type 'vector': Field '{field}' .*got {got}"
    for quantizer in (vector(**{field: value}), [vector(), vector(**{field: value})]):
        with pytest.raises(ValueError, match=named):
            ImageVQConfig(quantizer=quantizer)
    spoil(tmp_path, quantizer=vector(**{field: value}))
    with pytest.raises(ValueError, match=named):
        ImageVQConfig.from_pretrained(tmp_path)


def spoil(folder, **values):
    """A config's folder in which somebody edited the JSON."""
    ImageVQConfig().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_whole_numbers_are_numbers():
    """JSON and people write 0 for 0.0."""
    assert ImageVQConfig(level_dropout=0).level_dropout == 0
    for field in ("decay", "revival_threshold", "commitment_weight", "codebook_loss_weight", "entropy_weight"):
        (first, second) = ImageVQConfig(quantizer=vector(**{field: 0})).quantizers
        assert getattr(first, field) == getattr(second, field) == 0


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("stride", "strides"),
        ("quantiser", "quantizer"),
        ("quantizers", "quantizer"),
        ("latent_dim", "latent_size"),
        ("hidden_dim", "hidden_size"),
        ("level_drop_out", "level_dropout"),
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


@pytest.mark.parametrize(
    ("quantizer", "kind", "field", "nearest"),
    [
        (vector(codebok_size=16), "vector", "codebok_size", "codebook_size"),
        (vector(comitment_weight=1), "vector", "comitment_weight", "commitment_weight"),
        (vector(ema_decay=0.9), "vector", "ema_decay", "decay"),
        (vector(scalar_levels=[8]), "vector", "scalar_levels", "start"),
        ({"type": "fsq", "levels": [8, 5]}, "fsq", "levels", "scalar_levels"),
        ({"type": "lfq", "bit": 8}, "lfq", "bit", "bits"),
        ({"type": "residual", "num_codebook": 3}, "residual", "num_codebook", "num_codebooks"),
        ({"type": "residual", "layer": vector(metrik="cosine")}, "vector", "metrik", "metric"),
        ({"type": "product", "layer": {"type": "sim", "gradients": 1}}, "sim", "gradients", "gradient"),
    ],
)
def test_unknown_fields_of_a_quantizer_name_the_nearest_of_its_type(quantizer, kind, field, nearest, tmp_path):
    named = f"quantizer type '{kind}' has no field '{field}'. Did you mean '{nearest}'"
    for value in (quantizer, [vector(), quantizer]):
        with pytest.raises(ValueError, match=named):
            ImageVQConfig(quantizer=value)
    spoil(tmp_path, quantizer=quantizer)
    with pytest.raises(ValueError, match=named):
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
        ({"strides": [128, 64, 32, 16, 8, 4, 2]}, "1 to 6 strides"),
        ({"strides": [6, 3]}, r"powers of two.*got \[6, 3\]"),
        ({"strides": [2, 1]}, "from 2 to 256"),
        ({"strides": [512, 4]}, "from 2 to 256"),
        ({"strides": [4, 8]}, r"coarse to fine.*got \[4, 8\]"),
        ({"strides": [4, 4]}, "each larger than the next"),
        ({"strides": [0, -4]}, "powers of two"),
        ({"strides": [4], "quantizer": [vector()] * 2}, r"quantizer must be one dict, or 1 of them, one per stride, got \["),
        ({"quantizer": [vector(codebook_size=7)]}, "quantizer must be one dict, or 2 of them, .*'codebook_size': 7"),
        ({"quantizer": []}, r"quantizer must be one dict, or 2 of them, one per stride, got \[\]"),
        ({"quantizer": {}}, "quantizer: type must be one of vector, .*, multi_rate, got None"),
        ({"quantizer": {"codebook_size": 16}}, "type must be one of vector, .*got None"),
        ({"quantizer": {"type": "vectr"}}, "type must be one of vector, .*got 'vectr'"),
        ({"quantizer": {"type": 3}}, "type must be one of vector, .*got 3"),
        ({"quantizer": {"type": ["vector"]}}, r"type must be one of vector, .*got \['vector'\]"),
        ({"quantizer": [vector(), {"type": "VQ"}]}, "type must be one of vector, .*got 'VQ'"),
        ({"quantizer": {"type": "residual", "layer": {"type": "fsq"}}}, "layer: type must be one of vector, sim, got 'fsq'"),
        ({"quantizer": {"type": "residual", "layer": {}}}, "layer: type must be one of vector, sim, got None"),
        ({"quantizer": {"type": "multi_scale"}}, "'multi_scale' makes several levels of one grid: .*one stride, not 2"),
        ({"quantizer": [vector(), {"type": "multi_scale"}]}, "'multi_scale' makes several levels"),
        ({"quantizer": {"type": "multi_rate"}}, "'multi_rate' makes several levels"),
        ({"strides": [4], "quantizer": {"type": "multi_rate"}}, "'multi_rate' is for sequences: .*'multi_scale'"),
        ({"strides": [4], "quantizer": {"type": "multi_scale", "scales": [2, 3]}},
         r"scales must be multiples of the one before.*got \[2, 3\]"),
        ({"strides": [4], "quantizer": {"type": "multi_scale", "scales": [1, 2, 4, 6]}}, "multiples of the one before"),
        ({"strides": [4], "quantizer": {"type": "multi_scale", "scales": [4, 2]}}, r"growing numbers .*got \[4, 2\]"),
        ({"quantizer": {"type": "product", "num_codebooks": 3}}, "num_codebooks must be a divisor of .* width 64, got 3"),
        ({"latent_size": 5, "quantizer": [vector(), {"type": "product"}]}, "a divisor of the latents' width 5, got 4"),
        ({"quantizer": [vector(), vector(codebook_size=0)]}, "codebook_size must be from 1 to 16777216, got 0"),
        ({"quantizer": vector(codebook_size=(1 << 24) + 1)}, "codebook_size must be from 1 to 16777216, got 16777217"),
        ({"quantizer": vector(codebook_dim=0)}, "codebook_dim must be from 1 to 65536, got 0"),
        ({"quantizer": {"type": "fsq", "scalar_levels": [8, 1]}}, r"scalar_levels .*got \[8, 1\]"),
        ({"quantizer": {"type": "lfq", "bits": 62}}, "bits must be from 1 to 61, got 62"),
        ({"latent_size": 0}, "latent_size must be from 1 to 4096, got 0"),
        ({"latent_size": 4097}, "latent_size must be from 1 to 4096, got 4097"),
        ({"hidden_size": -1}, "hidden_size .*got -1"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"residual_size": 0}, "residual_size"),
        ({"num_residual_layers": -1}, "num_residual_layers"),
        ({"quantizer": vector(metric="l2")}, "'euclidean', 'cosine' or 'inner_product', got 'l2'"),
        ({"quantizer": vector(metric="inner_product")}, "update must be 'gradient' with inner products, got 'ema'"),
        ({"quantizer": vector(update="EMA")}, "'ema' or 'gradient', got 'EMA'"),
        ({"quantizer": vector(decay=1.0)}, r"decay must be in \[0, 1\), got 1.0"),
        ({"quantizer": vector(decay=math.nan)}, "decay .*got nan"),
        ({"quantizer": vector(revival_threshold=1)}, "revival_threshold .*got 1"),
        ({"quantizer": vector(commitment_weight=-0.1)}, "commitment_weight .*got -0.1"),
        ({"quantizer": vector(commitment_weight=math.inf)}, "commitment_weight .*got inf"),
        ({"quantizer": vector(codebook_loss_weight=math.nan)}, "codebook_loss_weight .*got nan"),
        ({"quantizer": {"type": "residual", "layer": vector(decay=1)}}, r"decay must be in \[0, 1\), got 1"),
        ({"level_dropout": 1.01}, "level_dropout .*got 1.01"),
        ({"reconstruction_loss": "huber"}, "'l2', 'l1' or 'l1.l2', got 'huber'"),
        ({"vqtok_format": FORMAT + 1}, f"vqtok_format {FORMAT + 1}.*upgrade"),
    ],
)  # fmt: skip
def test_impossible_values_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        ImageVQConfig(**changes)


def test_tuples_and_lists_are_one_config(tmp_path):
    config = ImageVQConfig(strides=(8, 4), quantizer=[vector(codebook_size=16)] * 2)
    assert config.to_dict() == ImageVQConfig(strides=[8, 4], quantizer=[vector(codebook_size=16)] * 2).to_dict()
    config.save_pretrained(tmp_path)
    assert ImageVQConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    scales = ImageVQConfig(strides=[4], quantizer={"type": "multi_scale", "scales": (1, 2)})
    scales.save_pretrained(tmp_path / "scales")
    assert ImageVQConfig.from_pretrained(tmp_path / "scales").to_dict() == scales.to_dict()
    assert ImageVQConfig().strides == [8, 4]
    ImageVQConfig().strides.append(2)
    assert ImageVQConfig().strides == [8, 4], "defaults are not shared"
    ImageVQConfig().quantizer["codebook_size"] = 7
    assert ImageVQConfig().layout.levels[0].codebook_size == 512, "defaults are not shared"


def test_what_decides_codes_and_what_does_not():
    """A field is in one of the two lists: a new one has to be put into either."""
    values = {"strides": [8, 4], "quantizer": vector(codebook_size=16)}
    base = ImageVQConfig(**values)
    decide = {"num_channels": 1, "strides": [8, 2], "quantizer": vector(codebook_size=8), "latent_size": 5}
    decide |= {"hidden_size": 7, "residual_size": 9, "num_residual_layers": 1}
    do_not = {"level_dropout": 0.5, "reconstruction_loss": "l1", "fingerprint": "f", "vqtok_format": FORMAT}
    own = {name for cls in ImageVQConfig.__mro__[:2] for name in cls.__annotations__}
    assert own == decide.keys() | do_not.keys()
    for name, value in decide.items():
        assert ImageVQConfig(**{**values, name: value}).code_fields != base.code_fields, name
    for name, value in do_not.items():
        assert ImageVQConfig(**{**values, name: value}).code_fields == base.code_fields, name
    assert json.loads(json.dumps(base.code_fields)) == base.code_fields
    assert base.code_fields["model_type"] == "vqtok_image"


LAYER = {"codebook_size": 5, "codebook_dim": 3}
# type: the fields that decide codes and those that do not, each with a value that is not its default.
FIELDS = {
    "vector": (
        {**LAYER, "metric": "cosine"},
        {"update": "gradient", "start": "commonest", "decay": 0.5, "revival_threshold": 0.5, "gradient": "rotation",
         "commitment_weight": 2.0, "codebook_loss_weight": 2.0, "entropy_weight": 2.0, "entropy_temperature": 2.0},
    ),
    "sim": (LAYER, {"gradient": "rotation", "commitment_weight": 2.0, "codebook_loss_weight": 2.0}),
    "gumbel": (
        {"codebook_size": 5},
        {"temperature": 2.0, "final_temperature": 0.5, "anneal_steps": 7, "kl_weight": 2.0},
    ),
    "fsq": ({"scalar_levels": [3, 4], "symmetric": False}, {}),
    "lfq": (
        {"bits": 7},
        {"commitment_weight": 2.0, "entropy_weight": 2.0, "entropy_temperature": 2.0, "entropy_group_bits": 7},
    ),
    "product": ({"num_codebooks": 2, "layer": vector(codebook_size=5)}, {}),
    "residual": ({"num_codebooks": 2, "layer": {"type": "sim"}, "shared": True}, {"depth_dropout": 0.5, "dropout_depths": [1, 2]}),
    "multi_scale": (
        {"scales": [1, 4], "layer": vector(metric="cosine"), "shared": False, "smoothing": 0.25, "num_smoothings": 2},
        {},
    ),
}  # fmt: skip
FIELDS["bsq"] = FIELDS["lfq"]


@pytest.mark.parametrize("kind", FIELDS)
def test_what_of_a_quantizer_decides_codes_and_what_does_not(kind):
    decide, do_not = FIELDS[kind]
    fields = {field.name for field in dataclasses.fields(QUANTIZERS[kind][0])}
    assert fields == decide.keys() | do_not.keys() and not decide.keys() & do_not.keys()

    def code_fields(**changes):
        return ImageVQConfig(strides=[4], quantizer={"type": kind, **changes}).code_fields

    base = code_fields()
    assert len({json.dumps(code_fields(**{name: value})) for name, value in decide.items()} | {json.dumps(base)}) == (
        len(decide) + 1
    )
    for name, value in do_not.items():
        assert code_fields(**{name: value}) == base, name
    assert json.loads(json.dumps(base)) == base


def test_the_layers_of_a_quantizer_decide_codes_by_the_same_fields():
    def code_fields(kind, **fields):
        return ImageVQConfig(strides=[4], quantizer={"type": kind, "layer": vector(**fields)}).code_fields

    for kind in ("product", "residual", "multi_scale"):
        base = code_fields(kind)
        assert code_fields(kind, codebook_size=512) == base, "said or not, it is the default"
        for name, value in FIELDS["vector"][0].items():
            assert code_fields(kind, **{name: value}) != base, name
        for name, value in FIELDS["vector"][1].items():
            assert code_fields(kind, **{name: value}) == base, name


def test_one_quantizer_for_all_strides_is_the_list_of_it():
    one, each = ImageVQConfig(quantizer=vector()), ImageVQConfig(quantizer=[vector(codebook_size=512), vector()])
    assert one.code_fields == each.code_fields and one.layout == each.layout
