"""Ids of several modalities: arithmetic both ways, names for other programs, and the order of codes against plain loops."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqtok import CodeLayout, Codes, LevelLayout, Modality, MultimodalVocabulary
from vqtok.multimodal.vocabulary import plan

IMAGE = Modality("image", CodeLayout(2, (LevelLayout(8, 1, 4), LevelLayout(4, 2, 3))), max_grid=2, fingerprint="f" * 64)
AUDIO = Modality("audio", CodeLayout(1, (LevelLayout(6, 2, 5), LevelLayout(2, 1, 1 << 17))), max_grid=3)
BOTH = MultimodalVocabulary(10, (IMAGE, AUDIO))

layouts = st.builds(
    lambda ndim, levels: CodeLayout(
        ndim, tuple(LevelLayout(stride, q, k) for stride, (q, k) in zip((8, 4, 2), levels, strict=False))
    ),
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 1 << 17])), min_size=1, max_size=3),
)


def random_codes(layout, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = tuple(
        torch.randint(level.codebook_size, (1, level.num_codebooks, *grid), generator=generator)
        for level, grid in zip(layout.levels, layout.grids(size), strict=True)
    )
    return Codes(levels, torch.tensor([size]), layout)


def slow_ids(vocabulary, name, codes):
    """The sequence of one sample, spelled out."""
    layout, size = codes.layout, codes.sizes[0].tolist()
    ids = [vocabulary.special_id(name, "begin")]
    ids += [vocabulary.size_id(name, -(-n // layout.stride)) for n in size]
    for level, value in enumerate(vocabulary.block(name).split(codes.levels)):
        grid = value.shape[2:]
        for y in range(grid[0]):
            for x in range(grid[1] if layout.ndim == 2 else 1):
                for q in range(value.shape[1]):
                    place = (y, x) if layout.ndim == 2 else (y,)
                    ids.append(vocabulary.id(name, level, q, int(value[(0, q, *place)])))
            if layout.ndim == 2:
                ids.append(vocabulary.special_id(name, "row"))
    return [*ids, vocabulary.special_id(name, "end")]


def test_ids_by_hand():
    assert [BOTH.special_id("image", special) for special in ("begin", "end", "row")] == [10, 11, 12]
    assert [BOTH.size_id("image", extent) for extent in (1, 2)] == [13, 14]
    assert [BOTH.id("image", *where) for where in ((0, 0, 0), (0, 0, 3), (1, 0, 0), (1, 1, 2))] == [15, 18, 19, 24]
    assert (BOTH.special_id("audio", "begin"), BOTH.size_id("audio", 3), BOTH.id("audio", 0, 1, 4)) == (25, 29, 39)
    assert (BOTH.size, BOTH.padded_size) == (40 + 512 + 256, 832)
    codes = Codes(
        (torch.tensor([[[[2]]]]), torch.tensor([[[[0, 1], [2, 0]], [[1, 1], [1, 2]]]])), [[8, 8]], IMAGE.layout
    )
    ids = [10, 13, 13, 17, 12, 19, 23, 20, 23, 12, 21, 23, 19, 24, 12, 11]
    assert BOTH.write("image", codes) == [ids]
    assert BOTH.num_tokens("image", (8, 8)) == len(ids)
    allowed = [range(int(first), int(first + count)) for first, count in plan(BOTH.block("image"), (1, 1))]
    assert all(token in those for token, those in zip(ids[3:], allowed, strict=True))


def test_every_id_has_one_meaning_and_one_name():
    small = MultimodalVocabulary(7, (IMAGE, Modality("sound", CodeLayout(1, (LevelLayout(6, 2, 5),)), 3)))
    names = list(small.names())
    assert len(names) == len(set(names)) == small.size - 7
    for token, name in enumerate(names, 7):
        assert small.name(token) == name
        modality, kind, *rest = small.locate(token)
        back = {"code": small.id, "size": small.size_id}.get(kind)
        assert token == (back(modality, *rest) if back else small.special_id(modality, kind))
    assert names[:6] == [
        "<|image_begin|>", "<|image_end|>", "<|image_row|>", "<|image_size_1|>", "<|image_size_2|>", "<|image_0_0_0|>",
    ]  # fmt: skip
    assert (small.locate(6), small.locate(small.size)) == (("text", 6), ("padding",))
    for token in (6, small.size):
        with pytest.raises(ValueError, match="only ids of media have names"):
            small.name(token)


@settings(max_examples=40, deadline=None)
@given(layouts, st.lists(st.integers(1, 20), min_size=2, max_size=2), st.integers(0, 99))
def test_the_sequence_is_that_of_plain_loops_and_comes_back(layout, size, seed):
    vocabulary = MultimodalVocabulary(
        5, (Modality("other", CodeLayout(2, (LevelLayout(8, 1, 9),))), Modality("it", layout, 3))
    )
    codes = random_codes(layout, size[: layout.ndim], seed)
    (ids,) = vocabulary.write("it", codes)
    assert ids == slow_ids(vocabulary, "it", codes)
    assert len(ids) == vocabulary.num_tokens("it", size[: layout.ndim])
    grid = layout.grids(size[: layout.ndim])[0]
    places = plan(vocabulary.block("it"), grid)
    body = torch.tensor(ids[1 + layout.ndim :])
    assert len(body) == len(places) and bool(((body >= places[:, 0]) & (body < places.sum(1))).all())
    back = vocabulary.read("it", grid, body.tolist())
    assert all(a.equal(b) for a, b in zip(back, codes.levels, strict=True))
    ends = [len(vocabulary.read("it", grid, body[:stop].tolist())) for stop in range(len(body) + 1)]
    assert ends == sorted(ends) and ends[0] == 0 and ends[-2] == len(layout.levels), "whole levels of any beginning"


def test_a_vocabulary_survives_json():
    back = MultimodalVocabulary.from_dict(json.loads(json.dumps(BOTH.to_dict())))
    assert back == BOTH and back.blocks == BOTH.blocks
    for wrong in ({}, None, {**BOTH.to_dict(), "extra": 1}, {**BOTH.to_dict(), "modalities": [{"name": "image"}]}):
        with pytest.raises(ValueError, match="multimodal vocabulary|layout"):
            MultimodalVocabulary.from_dict(wrong)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Modality("Image", IMAGE.layout), "small letters"),
        (lambda: Modality("text", IMAGE.layout), "not 'text'"),
        (lambda: Modality("a_b", IMAGE.layout), "small letters"),
        (lambda: MultimodalVocabulary(10, (IMAGE, IMAGE)), "each of its own name"),
        (lambda: MultimodalVocabulary(10, ()), "needs modalities"),
        (lambda: MultimodalVocabulary(0, (IMAGE,)), "text_size must be"),
        (lambda: BOTH.id("image", 0, 0, 4), "no code 4 in level 0"),
        (lambda: BOTH.id("video", 0, 0, 4), "no modality 'video': there are image, audio"),
        (lambda: BOTH.size_id("image", 3), "coarsest grid of 3.*larger max_grid"),
        (lambda: BOTH.locate(-1), "below 0"),
        (lambda: BOTH.write("audio", random_codes(IMAGE.layout, (8, 8))), "codes of the layout"),
        (
            lambda: BOTH.write("image", random_codes(IMAGE.layout, (8, 8)).prefix(num_levels=1)),
            "all levels and codebooks",
        ),
        (lambda: BOTH.write("image", random_codes(IMAGE.layout, (24, 8))), "coarsest grid of 3"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
