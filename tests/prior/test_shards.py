"""Shards that are mapped into memory: what lies there is what any reader of Parquet finds, and each is checked before it is used."""

import json

import numpy as np
import pyarrow.parquet as parquet
import pytest

from tests.prior.test_data import SIZES, codes, write
from vqtok.prior import data as cache
from vqtok.prior import shards
from vqtok.prior.data import MANIFEST, CodeDataset


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five shards of several row groups: samples of three sizes, 55 in all."""
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)
    extras = [{"text": f"t{i}"} for i in range(55)]
    write(tmp_path, [(codes(SIZES * 11), extras)], rows_per_shard=11)
    return tmp_path


def test_codes_are_read_where_they_lie(folder):
    data = CodeDataset(folder)
    for number, shard in enumerate(data._shards):
        assert isinstance(shard, shards.MappedShard) and parquet.ParquetFile(shard.path).num_row_groups == 3
        table = parquet.read_table(shard.path)
        for row in range(11):
            for level in range(2):
                mine = shard.level(level, row)
                assert np.shares_memory(mine, shard._data) and isinstance(shard._data, np.memmap)
                assert mine.tolist() == table[f"level_{level}"][row].as_py()
            assert data[11 * number + row]["text"] == table["text"][row].as_py()


def test_of_a_large_cache_a_shard_is_checked_when_it_is_first_touched(folder, monkeypatch):
    wanted = [[level.tolist() for level in CodeDataset(folder)[i]["codes"]] for i in range(55)]
    monkeypatch.setattr(cache, "_CHECKED_AT_ONCE", 0)
    monkeypatch.setattr(cache, "_MAPPED_AT_ONCE", 2)
    data = CodeDataset(folder)
    for i in np.random.default_rng(0).permutation(55):
        assert [level.tolist() for level in data[int(i)]["codes"]] == wanted[i]
        assert sum(shard._data is not None for shard in data._shards) <= 2
    entry = json.loads((folder / MANIFEST).read_text())["shards"][3]
    path = folder / entry["file"]
    spoilt = bytearray(path.read_bytes())
    spoilt[entry["ends"][0][0] - 2] = 0xFF  # of a code: 16 bits of 32 that are never used
    path.write_bytes(bytes(spoilt))
    data = CodeDataset(folder)
    assert [level.tolist() for level in data[0]["codes"]] == wanted[0]
    with pytest.raises(ValueError, match=f"{path.name} .*(outside|cannot be read|not what the manifest says)"):
        data[33]
