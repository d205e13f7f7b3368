"""Whatever stands in a config, a file of codes or a code cache: it loads, or it is refused in a sentence (ValueError, OSError)."""

import copy
import json
import shutil
import warnings
import zlib

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from tests.prior.test_data import codes, write
from tests.test_pipeline import make_prior
from vqtok import Codes, VQPipeline, VQTokenizer
from vqtok.codes import CodeLayout, LevelLayout
from vqtok.container import frame
from vqtok.prior.data import MANIFEST, CodeDataset

# A few examples at each run of the tests, many in the slow ones.
few_and_many = pytest.mark.parametrize("examples", [8, pytest.param(400, marks=pytest.mark.slow)])


def budget(examples):
    # One folder is spoilt again and again, so the fixtures of a test serve all its examples.
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Where parsers break: borders of types, numbers that wrap around, names of other things.
VALUES = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 1 << 31, 1 << 63, 1 << 64, 10**30, -(1 << 63), 0.5, 1e308, float("nan"), float("inf"), True]),
    st.sampled_from(["", "vector", "residual", "llama", "bert", "../x", "x" * 5000, "\x00", "ü", "1", "cuda", "evil/kernel"]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    st.recursive(st.integers(-3, 70_000), lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=4), c, max_size=2)),
)  # fmt: skip


def places(value, at=()):
    """Every path into a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*at, key))


@st.composite
def mutations(draw, value):
    """The JSON value with one to three places changed, removed or added to."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(value))))
        if not at:
            if isinstance(value, dict):
                value[draw(st.text(max_size=6) | st.sampled_from(["_x", "auto_map", "dtype", "layout"]))] = draw(VALUES)
            continue
        parent = value
        for key in at[:-1]:
            parent = parent[key]
        if draw(st.integers(0, 4)) == 0:
            del parent[at[-1]]
        else:
            parent[at[-1]] = draw(VALUES)
    return value


def loads_or_is_refused(load):
    """Whether it loaded. Anything but a ValueError or an OSError passes through and fails the test."""
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except (ValueError, OSError) as error:
        assert str(error).strip()
        return False
    return True


def spoil(folder, name, data):
    (folder / name).write_text(json.dumps(data.draw(mutations(json.loads((folder / name).read_text())))))


@few_and_many
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_configs_of_tokenizers(saved, tmp_path, name, examples):
    outcomes = set()

    @budget(examples)
    @given(data=st.data())
    def run(data):
        shutil.copytree(saved, tmp_path / "vq", dirs_exist_ok=True)
        spoil(tmp_path / "vq", name, data)
        outcomes.add(loads_or_is_refused(lambda: VQTokenizer.from_pretrained(tmp_path / "vq")))

    run()
    assert examples < 100 or outcomes == {True, False}


@few_and_many
@pytest.mark.parametrize("name", ["config.json", "pipeline.json", "generation_config.json"])
def test_configs_of_pipelines(saved, tmp_path, name, examples):
    vq_tokenizer, outcomes = VQTokenizer.from_pretrained(saved), set()
    VQPipeline(make_prior(vq_tokenizer, condition="class", text_size=10), vq_tokenizer).save_pretrained(
        tmp_path / "good"
    )

    @budget(examples)
    @given(data=st.data())
    def run(data):
        shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        spoil(tmp_path / "bad", name, data)
        outcomes.add(loads_or_is_refused(lambda: VQPipeline.from_pretrained(tmp_path / "bad")))

    run()
    assert examples < 100 or outcomes == {True, False}


# -- files of codes


LAYOUT = CodeLayout(2, (LevelLayout(8, 1, 16), LevelLayout(4, 2, 300)))
GOOD = Codes(
    (torch.arange(6).view(1, 1, 2, 3) % 16, torch.arange(48).view(1, 2, 4, 6)),
    torch.tensor([[16, 24]]),
    LAYOUT,
    "f" * 64,
).to_bytes()
HEADER = json.loads(GOOD[9 : 9 + int.from_bytes(GOOD[5:9], "little")])
PAYLOAD = GOOD[9 + int.from_bytes(GOOD[5:9], "little") : -4]


def reads_or_is_refused(data):
    """Codes that are read are what their layout says."""
    try:
        codes = Codes.from_bytes(data)
    except ValueError as error:
        assert str(error).strip()
        return False
    assert all(
        int(v.max()) < level.codebook_size
        for v, level in zip(codes.levels, codes.layout.levels, strict=False)
        if v.numel()
    )
    assert len(Codes.from_bytes(codes.to_bytes())) == len(codes)
    return True


@settings(max_examples=200, deadline=None)
@given(header=mutations(HEADER), payload=st.just(PAYLOAD) | st.binary(max_size=80))
@example(header={**HEADER, "l": [[8, 1, 1 << 70], [4, 2, 300]]}, payload=b"\0" * 100)
@example(header={**HEADER, "l": [[8, 1, 10**4000], [4, 2, 300]]}, payload=PAYLOAD)
@example(header={**HEADER, "l": [[8, 1, 1], [4, 1, 1]], "q": [1, 1], "s": [[1, 1 << 40, 1 << 40]]}, payload=b"")
@example(header={**HEADER, "x": {"gain": [1 << 62, 4]}}, payload=PAYLOAD)
def test_headers_of_files_of_codes(header, payload):
    reads_or_is_refused(frame(header, payload) if isinstance(header, dict) else GOOD[:30])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 5), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_bytes_of_files_of_codes(changes, with_checksum):
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    if with_checksum:  # as somebody would who means it
        data[-4:] = zlib.crc32(bytes(data[:-4])).to_bytes(4, "little")
    reads_or_is_refused(bytes(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_no_codes(data):
    assert not reads_or_is_refused(data) and not reads_or_is_refused(b"VQTC\x01" + data)
    assert reads_or_is_refused(GOOD)


# -- code caches


def read_all(folder):
    """Every sample of a cache; each must be what the layout says."""
    data = CodeDataset(folder)
    for i in range(len(data)):
        item = data[i]
        for own, level, grid in zip(item["codes"], data.layout.levels, data.layout.grids(item["size"]), strict=True):
            assert own.shape[1:] == grid and 1 <= own.shape[0] <= level.num_codebooks
            assert int(own.min()) >= 0 and int(own.max()) < level.codebook_size
    data.groups()


@few_and_many
def test_manifests_of_code_caches(tmp_path, examples):
    write(tmp_path / "good")

    @budget(examples)
    @given(data=st.data())
    def run(data):
        shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        spoil(tmp_path / "bad", MANIFEST, data)
        loads_or_is_refused(lambda: read_all(tmp_path / "bad"))

    run()


@pytest.mark.parametrize("file", ["../codes-00000.parquet", "/etc/passwd", "", ".", "a/b", r"..\x", "C:x", 3, None])
def test_a_shard_lies_beside_its_manifest(tmp_path, file):
    write(tmp_path / "cache")
    shutil.copy(tmp_path / "cache" / "codes-00000.parquet", tmp_path)
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps({**manifest, "shards": [{"file": file, "num_samples": 5}]}))
    with pytest.raises(ValueError, match="makes no sense .*a shard must be a file beside it"):
        CodeDataset(tmp_path / "cache")


@pytest.mark.parametrize("size", [None, [16, 16]])
@pytest.mark.parametrize("number", [10**12, 1 << 63, 1 << 64])
def test_more_samples_than_a_shard_has_bytes(tmp_path, number, size):
    write(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    manifest["shards"][0] |= {"num_samples": number, "size": size}
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"bytes, the manifest says {number} samples: encode again"):
        CodeDataset(tmp_path / "cache")


COLUMNS = st.one_of(
    st.lists(st.lists(st.integers(0, 20), max_size=6), min_size=2, max_size=2).map(
        lambda v: arrow.array(v, arrow.list_(arrow.uint16()))
    ),
    st.lists(st.none() | st.lists(st.none() | st.integers(-1, 1 << 33)), min_size=2, max_size=2).map(
        lambda v: arrow.array(v, arrow.list_(arrow.int64()))
    ),
    st.lists(st.sampled_from([0, 1, 8, 9, -8, 1 << 31, (1 << 63) - 1]), min_size=2, max_size=2).map(
        lambda v: arrow.array(v, arrow.int64())
    ),
    st.sampled_from([
        arrow.array(["a", "b"]), arrow.array([None, 8]), arrow.array([8.0, 8.0]), arrow.array([(1 << 64) - 1, 8], arrow.uint64()),
        arrow.array([8, 8], arrow.int32()), arrow.array([[[1]], [[2]]]), arrow.array([True, False]), arrow.array([{"a": 1}, {"a": 2}]),
        arrow.nulls(2), arrow.array([[1], [2]], arrow.list_(arrow.int64(), 1)), arrow.array([[1], [2]], arrow.large_list(arrow.int64())),
    ]),
)  # fmt: skip


@few_and_many
def test_columns_of_shards(tmp_path, examples):
    eight = arrow.array([8, 8])
    write(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(
        json.dumps({**manifest, "shards": [{"file": "codes-00000.parquet", "num_samples": 2}]})
    )
    outcomes = set()
    good = {
        "level_0": arrow.array([[1], [2]], arrow.list_(arrow.uint16())),
        "level_1": arrow.array([[1] * 8, [2] * 8], arrow.list_(arrow.uint32())),
        "size_0": eight,
        "size_1": eight,
    }

    @budget(4 * examples)
    @given(changes=st.dictionaries(st.sampled_from([*good, "text", "level_9"]), COLUMNS | st.none(), max_size=3))
    @example(changes={})
    @example(changes={"level_1": arrow.array([[1] * 7, [2] * 8])})
    @example(changes={"level_1": arrow.array([[1] * 4, [2] * 8])})
    @example(changes={"size_0": arrow.array([1 << 31, 8]), "size_1": arrow.array([1 << 31, 8])})
    def run(changes):
        columns = {name: column for name, column in {**good, **changes}.items() if column is not None}
        parquet.write_table(arrow.table(columns), tmp_path / "codes-00000.parquet")
        outcomes.add(loads_or_is_refused(lambda: read_all(tmp_path)))

    run()
    assert outcomes == {True, False}


def fit_manifest(folder, **changes):
    """Lets the manifest say of the shard what is there now, as somebody would who means it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (entry,) = manifest["shards"]
    entry |= {"num_bytes": (folder / "codes-00000.parquet").stat().st_size, **changes}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@few_and_many
def test_bytes_of_shards(tmp_path, examples):
    write(tmp_path)
    path = tmp_path / "codes-00000.parquet"
    good = path.read_bytes()

    @budget(4 * examples)
    @given(
        st.lists(st.tuples(st.integers(4, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=3),
        st.integers(-9, 9) | st.integers(0, len(good)),
        st.booleans(),
    )
    def run(changes, cut, fitting):
        data = bytearray(good)
        for at, value in changes:
            data[at] = value
        path.write_bytes(bytes(data[: len(data) - cut]) if cut >= 0 else bytes(data) + b"x" * -cut)
        fit_manifest(tmp_path, **({} if fitting else {"num_bytes": len(good)}))
        loads_or_is_refused(lambda: read_all(tmp_path))

    run()


@few_and_many
def test_shards_of_strangers_that_ask_to_be_mapped(tmp_path, examples):
    """Whatever a manifest says about the inside of a file, codes come from where Parquet has them, or not at all."""
    write(tmp_path, [(codes([(8, 8), (8, 8)]), [{}, {}])])
    entry = json.loads((tmp_path / MANIFEST).read_text())["shards"][0]
    good, outcomes = (tmp_path / "codes-00000.parquet").read_bytes(), set()
    wanted = {i: [level.tolist() for level in CodeDataset(tmp_path)[i]["codes"]] for i in range(2)}

    @budget(4 * examples)
    @given(
        changed=mutations({name: entry[name] for name in ("size", "columns", "row_groups", "ends")}),
        foreign=st.none() | st.sampled_from(["snappy", "zstd", "NONE"]),
    )
    @example(changed={}, foreign=None)
    @example(changed={"ends": [[], entry["ends"][1]]}, foreign=None)
    @example(changed={"ends": [[end - 4 for end in level] for level in entry["ends"]]}, foreign=None)
    def run(changed, foreign):
        path = tmp_path / "codes-00000.parquet"
        path.write_bytes(good)
        if foreign:  # the same rows, laid out in another way
            parquet.write_table(parquet.read_table(path), path, compression=foreign)
        fit_manifest(tmp_path, **changed)
        outcomes.add(loads_or_is_refused(lambda: read_all(tmp_path)))
        if loads_or_is_refused(lambda: CodeDataset(tmp_path)):
            assert all([level.tolist() for level in CodeDataset(tmp_path)[i]["codes"]] == wanted[i] for i in range(2))

    run()
    assert outcomes == {True, False}
