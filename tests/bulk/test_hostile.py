"""Inputs and records that are damaged or meant to do harm: what can be read is read, the rest is named, and nothing else happens."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bulk.making import contents, parquet_shards, png, tar_shard
from tests.test_fuzz import loads_or_is_refused, mutations
from vqtok import VQTokenizer, tokenize_dataset
from vqtok.bulk.inputs import Item, open_input
from vqtok.bulk.tables import Columns
from vqtok.image.pictures import PICTURES

few_and_many = pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """An input of each kind, of one shard."""
    folder = tmp_path_factory.mktemp("shards")
    parquet_shards(folder / "parquet", 1, 3)
    (folder / "tar").mkdir()
    members = [("a.png", png()), ("a.json", b'{"text": "one", "label": 3}'), ("b.png", png(seed=1)), ("b.txt", b"two")]
    tar_shard(folder / "tar" / "part-0.tar", members)
    return folder


@few_and_many
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_damaged_shards_are_read_as_far_as_they_go(shards, kind, tmp_path, examples):
    path = tmp_path / f"part-0.{kind}"
    good = (shards / kind / path.name).read_bytes()
    # Of an archive headers are what is interesting, of a table its ends.
    places = (
        st.integers(0, len(good) - 1)
        | st.integers(0, min(600, len(good) - 1))
        | st.integers(len(good) - 800, len(good) - 1)
    )

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4), st.just(0) | st.integers(0, len(good)))
    def run(changes, cut):
        data = bytearray(good)
        for at, value in changes:
            data[at] = value
        path.write_bytes(bytes(data[: len(data) - cut]))

        def read():
            source = open_input(tmp_path, PICTURES, Columns(), 100)
            for item in source.read(0):
                assert isinstance(item, Item) and (item.medium is None) == (item.problem is not None)
                assert isinstance(item.extras.get("text", ""), str) and type(item.extras.get("label", 0)) is int

        loads_or_is_refused(read)

    run()
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("examples", [8, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["job.json", "codes-00001.json", "manifest.json"])
def test_a_spoilt_folder_is_refused_or_mended(saved, tmp_path, name, examples):
    tok = VQTokenizer.from_pretrained(saved)
    parquet_shards(tmp_path / "in", 2, 2)
    tokenize_dataset(tmp_path / "in", tmp_path / "good", tok)
    whole = contents(tmp_path / "good")

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(changed=mutations(json.loads(whole[name])) | st.sampled_from([[], None, 3]))
    def run(changed):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        (tmp_path / "bad" / name).write_text(json.dumps(changed))
        if loads_or_is_refused(lambda: tokenize_dataset(tmp_path / "in", tmp_path / "bad", tok)):
            found = contents(tmp_path / "bad")
            assert {each: found[each] for each in found if each.endswith(".parquet")} == {
                each: whole[each] for each in whole if each.endswith(".parquet")
            }

    run()
