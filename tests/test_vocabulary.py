"""Ids: every code, text token and special token has exactly one, and comes back from it."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqtok.codes import CodeLayout, LevelLayout
from vqtok.vocabulary import MAX_CODEBOOK_SIZE, CodeVocabulary, Stream, factors

SIZES = [1, 2, 31, 512, 65_536, 65_538, 1 << 18, 1_000_000]

vocabularies = st.builds(
    lambda ndim, levels, text, grid, multiple: CodeVocabulary(
        CodeLayout(ndim, tuple(LevelLayout(4, q, k) for q, k in levels)), text, grid, multiple
    ),
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(SIZES)), min_size=1, max_size=3),
    st.integers(0, 1000),
    st.integers(1, 40),
    st.sampled_from([1, 7, 64]),
)


def random_codes(layout: CodeLayout, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Codes of each level, the first and the last of the codebook among them."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for level in layout.levels:
        grid = (3, 2) if layout.ndim == 2 else (6,)
        codes = torch.randint(level.codebook_size, (2, level.num_codebooks, *grid), generator=generator)
        codes.view(-1)[0], codes.view(-1)[-1] = 0, level.codebook_size - 1
        out.append(codes)
    return tuple(out)


def test_ranges_by_hand():
    layout = CodeLayout(2, (LevelLayout(8, 2, 16), LevelLayout(4, 1, 1 << 18)))
    vocabulary = CodeVocabulary(layout, text_size=100, max_grid=8)
    assert (vocabulary.special_id("null"), vocabulary.special_id("begin"), vocabulary.size_offset) == (100, 101, 102)
    assert vocabulary.streams == (
        Stream(0, 0, 16, 110),
        Stream(0, 1, 16, 126),
        Stream(1, 0, 512, 142),
        Stream(1, 1, 512, 654),
    )
    assert (vocabulary.size, vocabulary.padded_size) == (1166, 1216)
    coarse, fine = torch.tensor([[[[3]], [[15]]]]), torch.tensor([[[[513]]]])
    ids = vocabulary.to_ids((coarse, fine))
    assert [level.flatten().tolist() for level in ids] == [[113, 141], [142 + 1, 654 + 1]]


@settings(max_examples=60, deadline=None)
@given(vocabularies)
def test_codes_come_back_and_ids_are_what_locate_says(vocabulary):
    codes = random_codes(vocabulary.layout)
    ids = vocabulary.to_ids(codes)
    back = vocabulary.from_ids(ids)
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(back, codes, strict=True))
    assert all(a.equal(b) for a, b in zip(vocabulary.merge(vocabulary.split(codes)), codes, strict=True))
    split = vocabulary.split(codes)
    for level, values in enumerate(ids):
        for stream in range(values.shape[1]):
            found = [vocabulary.locate(token) for token in values[:, stream].flatten().tolist()]
            assert found == [("code", level, stream, code) for code in split[level][:, stream].flatten().tolist()]
    one = random_codes(vocabulary.layout)[:1]
    assert vocabulary.to_ids(one)[0].equal(ids[0]), "a prefix of levels"
    fewer = (codes[0][:, :1],)
    assert vocabulary.from_ids(vocabulary.to_ids(fewer))[0].equal(fewer[0]), "a prefix of codebooks"


@settings(max_examples=60, deadline=None)
@given(vocabularies)
def test_the_ranges_fill_the_vocabulary_without_overlap(vocabulary):
    edges = [0, vocabulary.text_size, vocabulary.size_offset, vocabulary.size_offset + vocabulary.max_grid]
    assert vocabulary.size_offset == vocabulary.text_size + 2
    for stream in vocabulary.streams:
        assert stream.offset == edges[-1] and stream.size <= MAX_CODEBOOK_SIZE
        assert vocabulary.offset(stream.level, stream.codebook) == stream.offset
        edges.append(stream.offset + stream.size)
    assert edges == sorted(edges) and edges[-1] == vocabulary.size
    assert 0 <= vocabulary.padded_size - vocabulary.size < vocabulary.multiple
    assert vocabulary.padded_size % vocabulary.multiple == 0
    product = [math.prod(factors(level.codebook_size)) for level in vocabulary.layout.levels]
    assert product == [level.codebook_size for level in vocabulary.layout.levels]


def test_every_id_means_one_thing():
    vocabulary = CodeVocabulary(CodeLayout(1, (LevelLayout(4, 2, 3), LevelLayout(2, 1, 2))), 5, 4, 16)
    meanings = [vocabulary.locate(token) for token in range(vocabulary.padded_size)]
    assert meanings[:5] == [("text", token) for token in range(5)]
    assert meanings[5:11] == [("null", 0), ("begin", 0), *(("size", extent) for extent in (1, 2, 3, 4))]
    codes = [(0, 0, 3), (0, 1, 3), (1, 0, 2)]
    assert meanings[11:19] == [("code", level, q, code) for level, q, k in codes for code in range(k)]
    assert meanings[19:] == [("padding", 0)] * 13
    for token in (-1, vocabulary.padded_size):
        with pytest.raises(ValueError, match=str(token)):
            vocabulary.locate(token)


def test_text_keeps_its_ids_whatever_follows():
    layouts = [CodeLayout(2, (LevelLayout(8, 1, size),)) for size in (4, 999)]
    assert all(CodeVocabulary(layout, 50).locate(49) == ("text", 49) for layout in layouts)
    assert CodeVocabulary(layouts[0], 0).special_id("null") == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, (1,)), (65_536, (65_536,)), (65_537 * 2, None), (1 << 17, (512, 256)), (1 << 20, (1024, 1024)), (65_537, None)]
    + [
        (1_000_000, (1000, 1000)),
        (1 << 32, (65_536, 65_536)),
        (1 << 33, None),
        (2 * 65_521, (65_521, 2)),
        (1 << 62, None),
    ],
)
def test_factors(size, expected):
    if expected is None:
        with pytest.raises(ValueError, match=f"{size} entries.*power of two"):
            factors(size)
    else:
        assert factors(size) == expected


def test_a_vocabulary_survives_json():
    vocabulary = CodeVocabulary(CodeLayout(2, (LevelLayout(8, 2, 16),)), 100, 8, 32)
    back = CodeVocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert back == vocabulary and back.streams == vocabulary.streams
    for wrong in ({}, None, {**vocabulary.to_dict(), "extra": 1}, {"layout": vocabulary.to_dict()["layout"]}):
        with pytest.raises(ValueError, match="code vocabulary"):
            CodeVocabulary.from_dict(wrong)
    for wrong in ("ab", 5, None, [1], ["a", "a"], [["a"]]):
        with pytest.raises(ValueError, match="specials must be different names"):
            CodeVocabulary.from_dict({**vocabulary.to_dict(), "specials": wrong})


@pytest.mark.parametrize(("field", "value"), [("text_size", -1), ("max_grid", 0), ("multiple", 0), ("text_size", 1.5)])
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(ValueError, match=f"CodeVocabulary.{field} must be an integer"):
        CodeVocabulary(CodeLayout(2, (LevelLayout(8),)), **{field: value})


def test_wrong_codes_and_names_are_refused():
    vocabulary = CodeVocabulary(CodeLayout(1, (LevelLayout(4, 1, 16), LevelLayout(2, 1, 1 << 18))))
    for level, bad in ((0, 16), (0, -1), (1, 1 << 18)):
        codes = [torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 4, dtype=torch.int64)]
        codes[level][0, 0, 1] = bad
        with pytest.raises(ValueError, match=f"level {level}: code {bad}"):
            vocabulary.to_ids(codes)
    with pytest.raises(ValueError, match="null, begin"):
        vocabulary.special_id("end")
    for level, codebook in ((2, 0), (0, 1), (1, 2)):
        with pytest.raises(ValueError, match=f"level {level} codebook {codebook}"):
            vocabulary.offset(level, codebook)
    with pytest.raises(ValueError, match="no level 0 codebook 1"):
        vocabulary.to_ids([torch.zeros(1, 2, 2, dtype=torch.int64)])
