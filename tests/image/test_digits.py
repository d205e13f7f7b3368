"""The captioned handwriting: what a picture shows is what its caption says, and train and test share nothing."""

import builtins
import pickle
import re
import time
from collections import Counter
from itertools import product

import numpy as np
import pytest

from vqtok.image import digits as module
from vqtok.image.digits import (
    DIGIT_WORDS,
    INKS,
    NUM_WORDINGS,
    PLACES,
    UNSEEN_PAIRS,
    CaptionedDigits,
    Glyph,
    caption,
    draw,
    handwriting,
    parse_caption,
    scene_split,
)

DATASETS = {
    "train": CaptionedDigits("train", 4000),
    "test": CaptionedDigits("test", 4000),
    "unseen": CaptionedDigits("test", 2000, unseen_pairs=True),
}


def _scenes(name: str) -> list[tuple[Glyph, ...]]:
    return [item["scene"] for item in DATASETS[name]]


def _quadrant(image: np.ndarray, place: str) -> np.ndarray:
    row, column = {"top": 0, "bottom": 16}[place.split()[0]], {"left": 0, "right": 16}[place.split()[1]]
    return image[row : row + 16, column : column + 16]


def test_the_picture_shows_the_scene_and_nothing_else():
    for index in range(300):
        item = DATASETS["train"][index]
        image, scene = item["image"], item["scene"]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        used = {glyph.place: glyph for glyph in scene}
        for place in PLACES:
            pixels = _quadrant(image, place).astype(float)
            if place not in used:
                assert pixels.max() == 0
                continue
            rgb = np.array(INKS[used[place].colour])
            amount = pixels @ rgb / (rgb @ rgb)
            assert np.abs(amount[..., None] * rgb - pixels).max() <= 1.0, "every pixel is the ink at some strength"
            assert amount.max() > 0.9


def test_the_shapes_are_the_real_digits_enlarged():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    real, store = load_digits(), handwriting()
    assert np.array_equal(store.labels, real.target)
    back = store.ink.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4)) / 255
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(back, real.images, strict=True)]
    assert min(correlation) > 0.95
    # A lone dot is enlarged symmetrically about its own 2x2 block: no shift by half a pixel.
    matrix = module._enlarging_matrix()
    assert np.allclose(matrix, matrix[::-1, ::-1]) and np.allclose(matrix[4:12].sum(axis=1), 1)
    assert np.isclose(matrix[:, 3] @ np.arange(16) / matrix[:, 3].sum(), 6.5)


def test_the_digit_drawn_is_the_digit_said():
    store = handwriting()
    stamps = {store.ink[i].tobytes(): int(store.labels[i]) for i in range(len(store.labels))}
    for index in range(100):
        item = DATASETS["test"][index]
        for glyph in item["scene"]:
            if glyph.colour == "white":
                assert stamps[_quadrant(item["image"], glyph.place)[..., 0].tobytes()] == glyph.digit


def test_no_digit_picture_is_in_both_splits_and_each_class_gives_a_fifth():
    store = handwriting()
    train, test = np.concatenate(store.train), np.concatenate(store.test)
    assert sorted([*train, *test]) == list(range(1797))
    for digit in range(10):
        assert set(store.labels[store.train[digit]]) == set(store.labels[store.test[digit]]) == {digit}
        assert 0.18 < len(store.test[digit]) / (len(store.test[digit]) + len(store.train[digit])) < 0.22
    assert len({store.ink[i].tobytes() for i in train} & {store.ink[i].tobytes() for i in test}) == 0


@pytest.mark.parametrize(("name", "split"), [("train", "train"), ("test", "test"), ("unseen", "test")])
def test_items_draw_from_their_own_digit_pictures(name, split):
    store = handwriting()
    allowed = {store.ink[i].tobytes() for i in np.concatenate(getattr(store, split))}
    seen = set()
    for item in (DATASETS[name][i] for i in range(1000)):
        for glyph in item["scene"]:
            if INKS[glyph.colour][2] == 255:  # blue, white, purple: the blue channel is the stamp itself
                seen.add(_quadrant(item["image"], glyph.place)[..., 2].tobytes())
    assert seen <= allowed and len(seen) > 100


def test_train_and_test_share_no_scene_and_no_caption():
    train, test = DATASETS["train"], DATASETS["test"]
    assert not {frozenset(scene) for scene in _scenes("train")} & {frozenset(scene) for scene in _scenes("test")}
    assert not {item["text"] for item in train} & {item["text"] for item in test}
    for name in DATASETS:
        assert {scene_split(scene) for scene in _scenes(name)} == {name}
    a, b = Glyph(3, "red", "top left"), Glyph(7, "blue", "bottom right")
    assert scene_split((a, b)) == scene_split((b, a))


def test_a_tenth_of_the_scenes_is_held_out():
    scenes = module._all_scenes()
    for count, total in ((0, 216), (1, 6 * 54 * 54)):
        train, test = len(scenes["train"][count]), len(scenes["test"][count])
        assert train + test == total and 0.08 < test / total < 0.12
    assert len(scenes["unseen"][0]) == 24 and len(scenes["unseen"][1]) == 6 * 36


def test_unseen_pairs_are_held_out_and_their_parts_are_learnt():
    assert len(UNSEEN_PAIRS) == 6 and {colour for _, colour in UNSEEN_PAIRS} == set(INKS)
    assert len({digit for digit, _ in UNSEEN_PAIRS}) == 6
    for name in ("train", "test"):
        assert not {(d, c) for scene in _scenes(name) for d, c, _ in scene} & UNSEEN_PAIRS
    assert {(d, c) for scene in _scenes("unseen") for d, c, _ in scene} == UNSEEN_PAIRS
    lone = [scene[0] for scene in _scenes("train") if len(scene) == 1]
    assert {(d, c) for d, c, _ in lone} == set(product(range(10), INKS)) - UNSEEN_PAIRS
    assert {(d, p) for d, _, p in lone} == set(product(range(10), PLACES))
    assert {(c, p) for _, c, p in lone} == set(product(INKS, PLACES))


def test_one_digit_in_a_third_of_the_scenes_and_both_orders_are_said():
    scenes = _scenes("train")
    assert 0.30 < np.mean([len(scene) == 1 for scene in scenes]) < 0.37
    order = [list(PLACES).index(a.place) < list(PLACES).index(b.place) for a, b in (s for s in scenes if len(s) == 2)]
    assert 0.45 < np.mean(order) < 0.55
    same = Counter(item["text"].count("in the") > 0 for item in DATASETS["train"])
    assert 0.2 < same[True] / 4000 < 0.3


def test_an_item_depends_on_seed_split_and_index_alone():
    first, second = CaptionedDigits("train", 50, seed=7), CaptionedDigits("train", 90_000, seed=7)
    copy = pickle.loads(pickle.dumps(first))
    for index in (49, 0, 17):
        for other in (second, copy):
            assert np.array_equal(first[index]["image"], other[index]["image"])
            assert first[index]["text"] == other[index]["text"]
    assert first[-1]["text"] == first[49]["text"] and len(pickle.dumps(first)) < 1000
    assert len([item["text"] for item in first]) == 50
    for bad in (50, -51):
        with pytest.raises(IndexError):
            first[bad]
    others = CaptionedDigits("train", 50, seed=8)
    assert sum(first[i]["text"] == others[i]["text"] for i in range(50)) < 5
    first[3]["image"][:] = 7
    assert first[3]["image"].min() == 0, "each item is a new array"


def test_recorded_items_never_change():
    """The hash of content decides everything; a change of these lines makes published numbers incomparable."""
    assert [CaptionedDigits("train")[i]["text"] for i in (0, 3)] == [
        "a blue six in the bottom right and a purple two in the top left",
        "a blue zero in the bottom right",
    ]
    assert CaptionedDigits("test")[0]["text"] == "there is a white three bottom right"
    sums = [int(CaptionedDigits(split)[i]["image"].sum()) for split in ("train", "test") for i in range(3)]
    assert sums == [66273, 62548, 23340, 65136, 54036, 47224]


def test_every_wording_reads_back_exactly():
    scenes = [(Glyph(3, "red", "top left"),), (Glyph(7, "blue", "bottom right"), Glyph(3, "red", "top left"))]
    texts = {caption(scene, wording) for scene in scenes for wording in range(NUM_WORDINGS)}
    assert len(texts) == 2 * NUM_WORDINGS
    assert {"a red three top left", "top left: a red three", "there is a red three top left"} <= texts
    for scene, wording in product(scenes, range(NUM_WORDINGS)):
        assert parse_caption(caption(scene, wording)) == scene
    for name in DATASETS:
        assert all(parse_caption(item["text"]) == item["scene"] for item in (DATASETS[name][i] for i in range(500)))
    assert parse_caption("  A Red THREE\ttop left ") == scenes[0]


def test_captions_are_short_and_use_few_words():
    texts = [item["text"] for name in DATASETS for item in DATASETS[name]]
    words = Counter(word for text in texts for word in re.findall(r"\w+", text))
    assert set(words) == {*DIGIT_WORDS, *INKS, "top", "bottom", "left", "right"} | {
        "a",
        "and",
        "in",
        "the",
        "there",
        "is",
    }
    assert max(len(text.split()) for text in texts) == 15


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a magenta three top left", ["'magenta'", "red, green, blue"]),
        ("a red eleven top left", ["'eleven'", "zero to nine"]),
        ("a red three", ["cannot read", "'a red three'", "say for example"]),
        ("a red three top left and", ["cannot read"]),
        ("", ["cannot read the caption ''"]),
        ("a red three top left and a blue two top left", ["share the place 'top left'"]),
        ("a red three top left and a blue two in the top right", ["cannot read"]),
    ],
)
def test_a_caption_that_says_no_scene_is_refused_with_the_remedy(text, words):
    with pytest.raises(ValueError) as caught:
        parse_caption(text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_bad_arguments_are_named():
    for arguments, words in [
        (("validation",), "unknown split 'validation'.*'train' or 'test'"),
        (("train", 0), "num_samples is 0"),
        (("train", 5, 0, True), "held out of split 'train': use split='test'"),
    ]:
        with pytest.raises(ValueError, match=words):
            CaptionedDigits(*arguments)
    glyph = Glyph(3, "red", "top left")
    for scene, wording, words in [
        ((), 0, "not 0"),
        ((glyph,) * 3, 0, "not 3"),
        ((Glyph(10, "red", "top left"),), 0, "unknown glyph .10"),
        ((Glyph(1, "pink", "top left"),), 0, "pink.*purple"),
        ((Glyph(1, "red", "middle"),), 0, "middle.*bottom right"),
        ((glyph, glyph), 0, "share the place"),
        ((glyph,), NUM_WORDINGS, f"use 0 to {NUM_WORDINGS - 1}"),
    ]:
        with pytest.raises(ValueError, match=words):
            caption(scene, wording)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **options):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    handwriting.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pip install 'vqtok\[demo\]'"):
            CaptionedDigits()
    finally:
        monkeypatch.undo()
        handwriting.cache_clear()
    CaptionedDigits()


def test_it_wraps_as_a_hugging_face_data_set():
    plain = CaptionedDigits("test", 6)
    wrapped = plain.to_hf_dataset()
    assert len(wrapped) == 6 and wrapped.column_names == ["image", "text", "scene"]
    for index in range(6):
        assert np.array_equal(np.asarray(wrapped[index]["image"]), plain[index]["image"])
        assert tuple(Glyph(**glyph) for glyph in wrapped[index]["scene"]) == plain[index]["scene"]
    assert wrapped["text"][:] == [item["text"] for item in plain]


def test_inks_are_far_apart_in_direction():
    inks = np.array(list(INKS.values()), float)
    inks /= np.linalg.norm(inks, axis=1, keepdims=True)
    angles = np.degrees(np.arccos(np.clip(inks @ inks.T, -1, 1)))
    assert angles[~np.eye(len(INKS), dtype=bool)].min() > 33


def test_items_are_quick():
    dataset = DATASETS["train"]
    start = time.process_time()
    for index in range(2000):
        dataset[index]
    assert (time.process_time() - start) / 2000 < 200e-6  # it is 10


def test_draw_puts_each_picture_at_its_place():
    image = draw([Glyph(0, "white", "top right"), Glyph(1, "green", "bottom left")], [5, 9])
    assert np.array_equal(image[:16, 16:, 0], handwriting().ink[5])
    assert np.array_equal(image[16:, :16, 1], np.round(handwriting().ink[9] * (220 / 255)))
    assert image[:16, :16].max() == image[16:, 16:].max() == 0
