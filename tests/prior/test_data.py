"""The code cache: what is written is what is read, and nothing half-written counts."""

import json

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from vqtok.codes import CodeLayout, Codes, LevelLayout
from vqtok.prior.condition_codes import codes_of_ids
from vqtok.prior.conditions import Conditions
from vqtok.prior.data import MANIFEST, CodeDataset, prior_collate, read_manifest, write_code_cache
from vqtok.vocabulary import CodeVocabulary

LAYOUT = CodeLayout(2, (LevelLayout(8, 1, 16), LevelLayout(4, 2, 70_000)))


def codes(sizes, seed=0, fingerprint="a" * 64, layout=LAYOUT):
    """Random codes of these sizes."""
    generator = torch.Generator().manual_seed(seed)

    def one(size):
        levels = [
            torch.randint(0, level.codebook_size, (1, level.num_codebooks, *grid), generator=generator)
            for level, grid in zip(layout.levels, layout.grids(size), strict=True)
        ]
        return Codes(tuple(levels), torch.tensor([size]), layout, fingerprint)

    return Codes.cat([one(size) for size in sizes])


SIZES = [(8, 8), (20, 9), (8, 8), (16, 24), (20, 9)]


def write(folder, parts=None, **options):
    parts = parts or [
        (codes(SIZES[:3]), [{"text": f"t{i}"} for i in range(3)]),
        (codes(SIZES[3:], 1), [{"text": "t3"}, {"text": "t4"}]),
    ]
    return write_code_cache(folder, iter(parts), {"tokenizer": "x"}, **options)


@pytest.mark.parametrize("rows_per_shard", [1, 2, 100])
def test_what_is_written_is_what_is_read(tmp_path, rows_per_shard):
    manifest = write(tmp_path, rows_per_shard=rows_per_shard)
    assert manifest == read_manifest(tmp_path)
    assert (manifest["num_samples"], manifest["tokenizer"]) == (5, "x")
    data = CodeDataset(tmp_path)
    assert (data.layout, data.fingerprint, len(data)) == (LAYOUT, "a" * 64, 5)
    wanted = [*codes(SIZES[:3]), *codes(SIZES[3:], 1)]
    for i, sample in enumerate(wanted):
        item = data[i]
        assert (item["size"], item["text"]) == (list(SIZES[i]), f"t{i}")
        for mine, theirs in zip(item["codes"], sample.levels, strict=True):
            assert torch.equal(mine, theirs[0])


def test_groups_hold_samples_of_one_grid(tmp_path):
    write(tmp_path)
    data = CodeDataset(tmp_path)
    assert sorted(group.tolist() for group in data.groups()) == [[0, 2], [1, 4], [3]]


def test_where_batches_may_mix_sizes_those_of_like_size_are_together(tmp_path):
    write(tmp_path)
    data = CodeDataset(tmp_path)
    areas = data.sizes.prod(axis=1)
    for least, number in ((1, 5), (2, 2), (3, 1), (100, 1)):
        groups = data.groups(by_grid=False, least=least)
        assert len(groups) == number and sorted(np.concatenate(groups)) == list(range(5))
        assert all(len(group) >= min(least, 5) for group in groups)
        assert all(areas[a].max() <= areas[b].min() for a, b in zip(groups, groups[1:], strict=False))


def test_integers_are_small_in_the_files(tmp_path):
    write(tmp_path)
    schema = parquet.read_schema(tmp_path / "codes-00000.parquet")
    assert [str(schema.field(f"level_{i}").type.value_type) for i in range(2)] == ["uint16", "uint32"]


def test_batches_for_the_prior(tmp_path):
    write(tmp_path)
    data = CodeDataset(tmp_path)
    batch = prior_collate(lambda item: [7] * int(item["text"][1]))([data[0], data[2]])
    assert batch["codes"][1].shape == (2, 2, 2, 2) and batch["sizes"].tolist() == [[8, 8], [8, 8]]
    assert batch["condition_ids"][1].tolist() == [7, 7] and batch["condition_mask"].tolist() == [
        [False, False],
        [True, True],
    ]
    assert "condition_ids" not in prior_collate(lambda item: None)([data[0]])


def test_codes_of_two_code_spaces_or_of_none_are_refused(tmp_path):
    mixed = [(codes([(8, 8)]), [{}]), (codes([(8, 8)], fingerprint="b" * 64), [{}])]
    with pytest.raises(ValueError, match=f"(?s){'b' * 64}.*{'a' * 64}"):
        write(tmp_path / "mixed", mixed)
    with pytest.raises(ValueError, match="unsaved tokenizer"):
        write(tmp_path / "none", [(codes([(8, 8)], fingerprint=None), [{}])])
    with pytest.raises(ValueError, match="nothing to encode"):
        write_code_cache(tmp_path / "empty", iter([]), {})
    assert not list(tmp_path.rglob(MANIFEST))


def test_a_run_that_was_cut_off_is_no_cache_and_starts_over(tmp_path):
    def cut():
        yield codes(SIZES[:3]), [{"text": "old"}] * 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_code_cache(tmp_path, cut(), {}, rows_per_shard=1)
    assert list(tmp_path.glob("codes-*.parquet"))
    with pytest.raises(ValueError, match="no code cache"):
        CodeDataset(tmp_path)
    write(tmp_path)
    assert CodeDataset(tmp_path).columns["text"] == [f"t{i}" for i in range(5)]
    assert len(list(tmp_path.glob("codes-*.parquet"))) == 1


def test_a_finished_cache_is_not_written_over(tmp_path):
    write(tmp_path)
    with pytest.raises(FileExistsError, match="holds a code cache already"):
        write(tmp_path)


def test_damaged_caches_are_refused_by_name(tmp_path):
    def damaged(name, change):
        folder = tmp_path / name
        write(folder)
        change(folder)
        return folder

    def manifest(folder, **changes):
        value = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**value, **changes}))

    def smaller(folder):
        layout = {
            "ndim": 2,
            "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 2}, LAYOUT.to_dict()["levels"][1]],
        }
        manifest(folder, layout=layout)

    cases = {
        "missing": (lambda f: (f / "codes-00000.parquet").unlink(), "codes-00000.parquet cannot be read"),
        "truncated": (
            lambda f: (f / "codes-00000.parquet").write_bytes((f / "codes-00000.parquet").read_bytes()[:-9]),
            "cannot be read",
        ),
        "newer": (lambda f: manifest(f, vqtok_format=99), "upgrade vqtok"),
        "rows": (
            lambda f: manifest(f, shards=[{"file": "codes-00000.parquet", "num_samples": 4}]),
            "5 rows, the manifest says 4",
        ),
        "range": (smaller, r"outside \[0, 2\)"),
    }
    for name, (change, words) in cases.items():
        with pytest.raises(ValueError, match=words):
            CodeDataset(damaged(name, change))


def test_extra_columns_may_be_missing_for_some(tmp_path):
    write(tmp_path, [(codes([(8, 8), (8, 8)]), [{"text": "a", "label": 1}, {"text": None, "label": 2}])])
    data = CodeDataset(tmp_path)
    assert data.columns == {"text": ["a", None], "label": [1, 2]} and np.array(data[1]["label"]) == 2


@pytest.mark.parametrize("rows_per_shard", [1, 2, 3, 4, 100])
def test_a_column_that_comes_late_or_ends_early_stays_with_its_samples(tmp_path, rows_per_shard):
    extras = [{}, {"label": 7}, {"text": "two"}, {"text": "three"}, {}]
    write(tmp_path, [(codes(SIZES), extras)], rows_per_shard=rows_per_shard)
    data = CodeDataset(tmp_path)
    assert [data[i]["text"] for i in range(5)] == [None, None, "two", "three", None]
    assert data.columns["label"] == [None, 7, None, None, None]


def test_the_samples_of_a_second_cache_are_the_conditions_of_the_first(tmp_path):
    write(tmp_path / "one")
    layout = CodeLayout(1, (LevelLayout(4, 2, 9),))
    lengths = [(8,), (12,), (4,), (8,), (20,)]
    given = codes(lengths, 5, "b" * 64, layout)
    for folder, names in (("two", "01234"), ("others", "01243")):
        parts = [(given, [{"text": f"t{name}"} for name in names])]
        write(tmp_path / folder, parts)
    data = CodeDataset(tmp_path / "one")
    data.pair(CodeDataset(tmp_path / "two"))
    conditions = Conditions("codes", data.columns["condition"])
    assert conditions.fields == {
        "condition": "codes", "text_size": 0, "max_text_length": 1 + 2 * 5, "condition_layout": layout.to_dict(),
        "condition_fingerprint": "b" * 64,
    }  # fmt: skip
    vocabulary = CodeVocabulary(layout, 0, 11, 1)
    for index, sample in enumerate(given):
        (back,) = codes_of_ids(conditions.ids(data[index]), vocabulary)
        assert torch.equal(back, sample.levels[0][0])
        prompt = conditions.prompt(data[index])
        assert torch.equal(prompt.levels[0], sample.levels[0]) and prompt.fingerprint == "b" * 64
    batch = prior_collate(conditions.ids)([data[0], data[2]])
    assert batch["condition_mask"].sum(1).tolist() == [1 + 2 * 2, 1 + 2 * 1]
    with pytest.raises(ValueError, match="size .20,., makes 11 ids, more than --max_text_length 10"):
        Conditions("codes", data.columns["condition"], max_length=10)
    with pytest.raises(ValueError, match="sample 3 has the text 't3', its condition 't4'"):
        data.pair(CodeDataset(tmp_path / "others"))
    write(tmp_path / "fewer", [(given[[0, 1]], [{}, {}])])
    with pytest.raises(ValueError, match="5 samples and 2 conditions"):
        data.pair(CodeDataset(tmp_path / "fewer"))


def test_features_are_collated_padded_on_the_left(tmp_path):
    write(tmp_path)
    data, rows = CodeDataset(tmp_path), iter([torch.ones(1, 3), torch.full((2, 3), 5.0)])
    batch = prior_collate(lambda item: next(rows))([data[0], data[2]])
    assert batch["condition_features"][..., 0].tolist() == [[0, 1], [5, 5]] and "condition_ids" not in batch
    assert batch["condition_mask"].tolist() == [[False, True], [True, True]]
