"""One literal dict makes a quantizer; whatever does not fit is named before anything is allocated."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.quantizers.cases import CASES, build, state
from vqtok.quantizers import (
    QUANTIZERS,
    HierarchicalQuantizer,
    Hierarchy,
    VectorQuantizer,
    build_hierarchy,
    build_quantizer,
    check_hierarchy,
    quantizer_config,
)

LAYERED = ("product", "residual", "multi_scale", "multi_rate")


def test_every_kind_is_among_the_cases():
    assert {case.config["type"] for case in CASES.values()} == set(QUANTIZERS)
    for name, (config_class, quantizer_class) in QUANTIZERS.items():
        assert config_class.type == name
        assert type(build_quantizer({"type": name}, 8 if name != "fsq" else 4, 1)) is quantizer_class


def test_a_literal_dict():
    quantizer = build_quantizer({"type": "vector", "codebook_size": 64, "codebook_dim": 8, "metric": "cosine"}, dim=32)
    assert isinstance(quantizer, VectorQuantizer) and quantizer.codebook.embedding.shape == (64, 8)
    assert quantizer.config.metric == quantizer.codebook.metric == "cosine"
    same = VectorQuantizer(32, codebook_size=64, codebook_dim=8, metric="cosine")
    assert same.config.to_dict() == quantizer.config.to_dict()
    assert build_quantizer(same.config, dim=32).config.to_dict() == same.config.to_dict()


DEFAULTS = {
    "vector": {
        "codebook_size": 512,
        "codebook_dim": None,
        "metric": "euclidean",
        "update": "ema",
        "start": "kmeans",
        "decay": 0.99,
        "revival_threshold": 0.05,
        "gradient": "straight_through",
        "commitment_weight": 0.25,
        "codebook_loss_weight": 1.0,
        "entropy_weight": 0.0,
        "entropy_temperature": 1.0,
    },
    "sim": {
        "codebook_size": 512,
        "codebook_dim": None,
        "gradient": "straight_through",
        "commitment_weight": 0.25,
        "codebook_loss_weight": 1.0,
    },
    "gumbel": {
        "codebook_size": 512,
        "temperature": 1.0,
        "final_temperature": 0.0625,
        "anneal_steps": 10_000,
        "kl_weight": 5e-4,
    },
    "fsq": {"scalar_levels": [8, 5, 5, 5], "symmetric": True},
    "lfq": {
        "bits": 10,
        "commitment_weight": 0.25,
        "entropy_weight": 0.1,
        "entropy_temperature": 1.0,
        "entropy_group_bits": 8,
    },
    "product": {"num_codebooks": 4, "layer": {"type": "vector"}},
    "residual": {
        "num_codebooks": 4,
        "layer": {"type": "vector"},
        "shared": False,
        "depth_dropout": 0.0,
        "dropout_depths": None,
    },
    "multi_scale": {
        "scales": [1, 2, 4, 8, 16],
        "layer": {"type": "vector"},
        "shared": True,
        "smoothing": 0.5,
        "num_smoothings": 4,
    },
    "multi_rate": {"strides": [4, 2, 1], "layer": {"type": "vector"}},
}
DEFAULTS["bsq"] = DEFAULTS["lfq"]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_fields_and_defaults_are_the_format(name):
    """Configs are published: a change of these is a change of the format."""
    assert quantizer_config({"type": name}).to_dict() == {"type": name, **DEFAULTS[name]}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    case, quantizer = CASES[name], build(name)
    config = quantizer_config(json.loads(json.dumps(quantizer.config.to_dict())))
    assert type(config) is type(quantizer.config) and config == quantizer.config
    assert config.to_dict() == quantizer.config.to_dict()
    given = {key: value for key, value in config.to_dict().items() if key in case.config}
    assert given == case.config
    torch.manual_seed(0)
    again = build_quantizer(config, case.dim, ndim=len(case.grids[0]))
    assert type(again) is type(quantizer)
    first, second = state(quantizer), state(again)
    assert list(first) == list(second) and all(first[key].equal(second[key]) for key in first)


def test_what_the_caller_changes_afterwards_changes_no_quantizer():
    values = {"type": "residual", "num_codebooks": 2, "layer": {"type": "vector", "codebook_size": 8}}
    quantizer = build_quantizer(values, 4)
    config = quantizer_config(values)
    values["layer"]["codebook_size"] = 4
    assert quantizer.config.size == 8 and config.size == 8
    config.to_dict()["layer"]["codebook_size"] = 4
    assert config.size == 8
    assert quantizer_config({"type": "residual"}).layer is not quantizer_config({"type": "residual"}).layer


@pytest.mark.parametrize("name", QUANTIZERS)
def test_only_what_decides_codes_is_in_the_fingerprint(name):
    fields = quantizer_config({"type": name}).code_fields
    training = {"decay", "update", "start", "gradient", "temperature", "depth_dropout", "dropout_depths"}
    training |= {"revival_threshold", "anneal_steps"}
    assert fields["type"] == name
    for found in (fields, fields.get("layer", {})):
        assert not any("weight" in key or "entropy" in key or key in training for key in found)
    deciding = {
        "scales",
        "strides",
        "num_codebooks",
        "codebook_size",
        "codebook_dim",
        "metric",
        "bits",
        "scalar_levels",
    }
    deciding |= {"symmetric", "shared", "smoothing", "num_smoothings"}
    wanted = deciding & DEFAULTS[name].keys()
    assert wanted and wanted <= fields.keys()
    assert name not in LAYERED or fields["layer"] == {
        "type": "vector",
        "codebook_size": 512,
        "codebook_dim": None,
        "metric": "euclidean",
    }


class Nothing(TorchDispatchMode):
    """Refuses every operation on tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called before the config was refused")


def refused(values: dict, *named: str, dim: int = 8) -> None:
    """By the reader of configs and by the builder, in words that name all of it, with nothing allocated."""
    for call in (quantizer_config, lambda values: build_quantizer(values, dim)):
        with pytest.raises(ValueError) as error, Nothing():
            call(values)
        assert all(text in str(error.value) for text in named), f"{error.value} does not name {named}"


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_misspelt_field_is_named_with_the_right_one(name):
    for field in DEFAULTS[name]:
        refused({"type": name, field[:-1] + "q": 1}, name, field[:-1] + "q", f"Did you mean {field!r}?")
    refused({"type": name, "zzz": 1}, name, "zzz")
    with pytest.raises(ValueError, match="zzz"):
        QUANTIZERS[name][1](8, zzz=1)


@pytest.mark.parametrize("value", [None, "vecto", 3, "", True, ["vector"], {"vector": 1}])
def test_an_unknown_type_is_named_with_those_there_are(value):
    refused({"type": value, "codebook_size": 4}, "type must be one of vector, sim", repr(value))
    refused({"type": "residual", "layer": {"type": value}}, "layer: type must be one of vector, sim", repr(value))


@pytest.mark.parametrize("value", [None, "vector", 3, [("type", "vector")]])
def test_what_is_no_dict_is_named(value):
    for call in (quantizer_config, lambda values: build_quantizer(values, 8)):
        with pytest.raises(ValueError, match="must be a dict"):
            call(value)
    refused({"type": "vector", "codebook_size": {}}, "codebook_size")
    with pytest.raises(ValueError, match="layer"):
        quantizer_config({"type": "residual", "layer": value})


def test_no_type_is_told():
    refused({"codebook_size": 4}, "type must be one of", "None")
    refused({}, "type must be one of", "None")


WRONG = {
    "codebook_size": [0, -1, 1.5, "64", None, True, 2**24 + 1, [4]],
    "codebook_dim": [0, -1, 8.0, "8", True, 70_000],
    "metric": ["l2", None, 1, True],
    "update": ["adam", None],
    "start": ["random", None],
    "decay": [1, 1.0, -0.1, math.nan, math.inf, "0.9", None, True],
    "revival_threshold": [1.0, -0.1, math.nan, None, True],
    "gradient": ["ste", None],
    "commitment_weight": [-0.1, math.nan, math.inf, "1", None, True],
    "codebook_loss_weight": [-0.1, math.nan, math.inf, True],
    "entropy_weight": [-0.1, math.nan, math.inf, True],
    "entropy_temperature": [0, 0.0, -1, math.nan, math.inf, True],
    "temperature": [0, -1, 101, math.nan, None, True],
    "final_temperature": [0, 2.0, math.nan, True],
    "anneal_steps": [0, -5, 1.5, True],
    "kl_weight": [-1, math.nan, math.inf, True],
    "scalar_levels": [[], [1], [8, 0], [8, -5], [8, 1.5], [8, True], 8, "85", None, [65_537], [2] * 62, [2] * 65],
    "symmetric": [1, None, "yes"],
    "bits": [0, -1, 62, 1.5, "8", None, True],
    "entropy_group_bits": [0, 17, 1.5, True],
    "num_codebooks": [0, -1, 1025, 2.0, None, True],
    "shared": [1, None, "yes"],
    "depth_dropout": [-0.1, 1.1, math.nan, None, True],
    "dropout_depths": [[], [0], [5], [1, 5], [1.0], [True], 3, "3"],
    "layer": [{}, {"type": "fsq"}, {"type": "residual"}, 3, None, {"codebook_size": 3}],
    "scales": [[], [0, 1], [2, 1], [1, 1], [1, 2000], [1.0, 2], [True, 2], 4, None, list(range(1, 34))],
    "smoothing": [-0.1, 1.1, math.nan, None, True],
    "num_smoothings": [0, 33, 1.5, True],
    "strides": [[], [2], [1, 2], [4, 3, 1], [4, 4, 1], [4, 2], [8192, 1], [2.0, 1], [2, True], 1, None],
}


def test_every_field_has_values_that_are_wrong():
    assert {field for fields in DEFAULTS.values() for field in fields} == WRONG.keys()


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in QUANTIZERS for field in DEFAULTS[name]])
def test_values_that_cannot_be_are_named(name, field):
    """JSON gives `true` where a number was wanted, and `1.0` where an integer was: neither is one."""
    for value in WRONG[field]:
        shown = {"layer": ""}.get(field, str(value) if isinstance(value, str) else repr(value))
        refused({"type": name, field: value}, field, shown)


@pytest.mark.parametrize("name", LAYERED)
def test_values_of_a_layer_that_cannot_be_are_named(name):
    refused({"type": name, "layer": {"type": "vector", "codebook_size": 0}}, "codebook_size", "0")
    refused({"type": name, "layer": {"type": "vector", "codebook_sise": 8}}, "codebook_sise", "'codebook_size'")
    refused({"type": name, "layer": {"type": "sim", "metric": "cosine"}}, "sim", "metric")
    refused({"type": name, "layer": {"type": "vector", "metric": "inner_product"}}, "update", "'ema'")


def test_options_that_exclude_each_other():
    inner = {"type": "vector", "metric": "inner_product"}
    refused(inner, "update", "'gradient' with inner products", "'ema'")
    refused({**inner, "update": "gradient", "gradient": "rotation"}, "gradient", "inner products", "'rotation'")
    refused(
        {"type": "gumbel", "temperature": 0.5, "final_temperature": 0.7}, "final_temperature", "at most temperature"
    )
    assert quantizer_config({**inner, "update": "gradient"}).metric == "inner_product"


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dim", [0, -3, True, 2.0, "8", None])
def test_a_width_that_cannot_be_is_named(name, dim):
    with pytest.raises(ValueError, match="dim.*" + repr(dim)), Nothing():
        build_quantizer({"type": name}, dim)


def test_integers_are_numbers_and_tuples_are_lists():
    assert quantizer_config({"type": "vector", "decay": 0, "commitment_weight": 1}).decay == 0
    assert quantizer_config({"type": "fsq", "scalar_levels": (8, 5)}).to_dict()["scalar_levels"] == [8, 5]
    assert quantizer_config({"type": "multi_scale", "scales": (1, 3)}).scales == [1, 3]
    assert quantizer_config({"type": "multi_rate", "strides": (2, 1)}) == quantizer_config(
        {"type": "multi_rate", "strides": [2, 1]}
    )


def test_the_largest_there_are():
    for values, size in (
        ({"type": "fsq", "scalar_levels": [2] * 61}, 2**61),
        ({"type": "lfq", "bits": 61}, 2**61),
        ({"type": "vector", "codebook_size": 2**24}, 2**24),
    ):
        config = quantizer_config(values)
        assert config.size == size and config.depth == 1


def test_sizes_depths_and_ratios():
    layer = {"type": "vector", "codebook_size": 32}
    residual = quantizer_config({"type": "residual", "num_codebooks": 3, "layer": layer})
    assert (residual.size, residual.depth, residual.ratios) == (32, 3, (1,))
    scales = quantizer_config({"type": "multi_scale", "scales": [1, 2, 8], "layer": layer})
    assert (scales.size, scales.depth, scales.ratios) == (32, 1, (8, 4, 1))
    assert [(level.stride, level.num_codebooks, level.codebook_size) for level in scales.levels(16)] == [
        (128, 1, 32),
        (64, 1, 32),
        (16, 1, 32),
    ]
    rates = quantizer_config({"type": "multi_rate", "strides": [4, 2, 1], "layer": layer})
    assert rates.ratios == (4, 2, 1)
    apart = quantizer_config({"type": "multi_scale", "scales": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"scales must be multiples of the one before.*\[1, 2, 3\]"):
        _ = apart.ratios


# -- hierarchies


def configs(*values: dict) -> list:
    return [quantizer_config(value) for value in values]


def test_a_hierarchy_of_levels_or_of_one_grid():
    vector, fsq = {"type": "vector", "codebook_size": 8}, {"type": "fsq", "scalar_levels": [5, 5]}
    two = build_hierarchy(configs(vector, fsq), dim=4, ndim=2)
    assert isinstance(two, HierarchicalQuantizer)
    assert [config.type for config in two.level_configs] == ["vector", "fsq"]
    alone = build_hierarchy(configs({"type": "multi_scale", "scales": [1, 2], "layer": vector}), dim=4, ndim=2)
    assert isinstance(alone, Hierarchy) and alone.ndim == 2 and len(alone.level_configs) == 2
    rates = build_hierarchy(configs({"type": "multi_rate", "layer": vector}), dim=4, ndim=1)
    assert len(rates(torch.randn(2, 8, 4))) == 3


@pytest.mark.parametrize(
    ("values", "ndim", "named"),
    [
        ([{"type": "multi_scale"}, {"type": "vector"}], 2, "multi_scale.*not 2"),
        ([{"type": "vector"}, {"type": "multi_rate"}], 1, "multi_rate.*not 2"),
        ([{"type": "multi_rate"}], 2, "multi_rate.*multi_scale"),
        ([{"type": "multi_scale"}], 1, "multi_scale.*multi_rate"),
        ([{"type": "vector"}, {"type": "product", "num_codebooks": 3}], 2, "num_codebooks.*8.*3"),
    ],
)
def test_hierarchies_that_cannot_be_are_refused_before_anything_is_allocated(values, ndim, named):
    for call in (check_hierarchy, build_hierarchy):
        with pytest.raises(ValueError, match=named), Nothing():
            call(configs(*values), 8, ndim)


def test_the_finer_levels_know_the_coarser_ones():
    """`propose` sees what was quantized so far; in eval those are the rows, and codes decode to the same."""
    quantizer = build_hierarchy(
        configs({"type": "vector", "codebook_size": 8}, {"type": "lfq", "bits": 4}), 4, 2
    ).eval()
    z = torch.randn(3, 4, 4, 4)
    asked = []

    def propose(level, quantized):
        asked.append((level, len(quantized)))
        coarse = z[:, ::2, ::2]
        return coarse if level == 0 else z - quantized[0].repeat_interleave(2, 1).repeat_interleave(2, 2)

    out = quantizer(propose)
    assert asked == [(0, 0), (1, 1)]
    parts = quantizer.embed_codes([level.codes for level in out])
    assert all(part.equal(level.quantized) for part, level in zip(parts, out, strict=True))
    assert len(quantizer.embed_codes([out[0].codes])) == 1
    merged, keep = quantizer.merge(parts, torch.tensor([1, 2, 2]))
    assert len(merged) == 2 and keep.tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match="2 levels need a function"):
        quantizer(z)
    with pytest.raises(ValueError, match="3"):
        quantizer.embed_codes([*(level.codes for level in out), out[1].codes])


def test_a_hierarchy_is_initialised_coarse_to_fine():
    quantizer = build_hierarchy(
        configs({"type": "vector", "codebook_size": 8}, {"type": "vector", "codebook_size": 16}), 4, 2
    ).eval()
    batches = [torch.randn(10, 4, 4, 4) + 30, torch.randn(10, 4, 6, 4) + 30]  # of two sizes

    def proposals():
        for z in batches:
            yield lambda level, quantized, z=z: z if level == 0 else z - quantized[0]

    quantizer.initialise(proposals, 500)
    assert quantizer.is_initialised
    first, second = quantizer.codebooks
    assert (first.embedding - 30).abs().max() < 5 and second.embedding.abs().max() < 5, "of what the first one left"


def test_a_process_whose_batch_is_empty_takes_part_in_the_initialisation():
    """It must not raise where the others wait for it: its rows are none."""
    quantizer = build_hierarchy(configs({"type": "vector", "codebook_size": 4}), 4, 2)
    z = torch.randn(3, 4, 4, 4)
    quantizer.initialise(lambda: iter([lambda level, quantized: z[:0], lambda level, quantized: z]), 500)
    assert quantizer.is_initialised


def test_a_start_from_no_batch_is_refused():
    for kinds in ([{"type": "vector"}], [{"type": "multi_scale", "scales": [1, 2]}]):
        with pytest.raises(ValueError, match="at least one batch"):
            build_hierarchy(configs(*kinds), 4, 2).initialise(lambda: iter([]), 500)


@pytest.mark.parametrize("kind", ["vector", "sim", "gumbel", "residual"])
def test_a_frozen_quantizer_is_not_started_anew(kind):
    quantizer = build_quantizer({"type": kind}, 4)
    quantizer.freeze()
    with pytest.raises(ValueError, match=r"frozen.*freeze\(False\)"):
        quantizer.initialise(torch.randn(600, 4))


def test_what_was_seen_before_other_weights_came_is_forgotten():
    quantizer = build_quantizer({"type": "vector", "codebook_size": 8}, 4).train()
    other = build_quantizer({"type": "vector", "codebook_size": 8}, 4).state_dict()
    quantizer(torch.randn(3, 20, 4))
    quantizer.load_state_dict(other)
    quantizer.update()
    assert quantizer.codebook.embedding.equal(other["codebook.embedding"])
