"""The judge: right on real held-out digits, and each figure falls when, and only when, its own thing is wrong."""

import numpy as np
import pytest
from PIL import Image

from vqtok.evaluation.digit_judge import DigitJudge, _features
from vqtok.image.digits import INKS, PLACES, CaptionedDigits, Glyph, draw, handwriting


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge()


def _items(num: int, **options) -> tuple[list[np.ndarray], list[tuple[Glyph, ...]]]:
    items = list(CaptionedDigits("test", num, **options))
    return [item["image"] for item in items], [item["scene"] for item in items]


def _clear(judge: DigitJudge) -> dict[int, int]:
    """Per digit a held-out picture that the judge reads rightly, so that other things can be tested."""
    store = handwriting()
    found = {}
    for digit in range(10):
        for index in store.test[digit]:
            if judge.read([draw([Glyph(digit, "white", "top left")], [index])])[0][0].digit == digit:
                found[digit] = int(index)
                break
    return found


@pytest.mark.parametrize("unseen", [False, True])
def test_real_held_out_scenes_are_read_rightly(judge, unseen):
    images, scenes = _items(1500, seed=11, unseen_pairs=unseen)
    scores = judge.judge(images, scenes)
    assert scores["place_accuracy"] == scores["colour_accuracy"] == 1.0
    assert scores["digit_accuracy"] == scores["colour_and_digit_accuracy"] > 0.975
    assert scores["num_images"] == 1500 and scores["num_objects"] == sum(map(len, scenes))
    assert scores["num_missing"] == scores["num_extra"] == 0


def test_every_distinct_held_out_digit_in_every_ink(judge):
    store = handwriting()
    indices = np.concatenate(store.test)
    for colour in INKS:
        glyphs = [Glyph(int(store.labels[i]), colour, "bottom left") for i in indices]
        scores = judge.judge([draw([g], [i]) for g, i in zip(glyphs, indices, strict=True)], [(g,) for g in glyphs])
        assert scores["digit_accuracy"] > 0.98 and scores["colour_accuracy"] == 1.0, colour


def test_it_learnt_from_train_digits_alone(judge, monkeypatch):
    store = handwriting()
    assert len(judge._classifier.shape_fit_) == 2 and judge._classifier.shape_fit_[0] == sum(map(len, store.train))
    # With test digits destroyed, the same judge comes out.
    ink = store.ink.copy()
    ink[np.concatenate(store.test)] = 255
    monkeypatch.setattr("vqtok.evaluation.digit_judge.handwriting", lambda: store._replace(ink=ink))
    blind = DigitJudge()
    assert blind.ink_threshold == judge.ink_threshold
    images, _ = _items(200)
    assert blind.read(images) == judge.read(images)


def test_it_reads_places_colours_and_digits(judge):
    clear = _clear(judge)
    assert len(clear) == 10
    scene = (Glyph(3, "red", "top left"), Glyph(7, "blue", "bottom right"))
    picture = draw(scene, [clear[3], clear[7]])
    assert judge.read([picture, np.zeros_like(picture)]) == [scene, ()]
    assert judge.read([Image.fromarray(picture)]) == judge.read(picture[None]) == [scene]
    for digit, colour, place in [(d, c, p) for d in clear for c in INKS for p in PLACES]:
        glyph = Glyph(digit, colour, place)
        assert judge.read([draw([glyph], [clear[digit]])]) == [(glyph,)]
    assert judge.read([]) == []


def test_each_figure_falls_for_its_own_fault(judge):
    clear = _clear(judge)
    a, b = Glyph(3, "red", "top left"), Glyph(7, "blue", "bottom right")
    scene = (a, b)

    def scores(*drawn: Glyph) -> tuple[float, ...]:
        picture = np.zeros((32, 32, 3), np.uint8)
        for glyph in drawn:
            picture = np.maximum(picture, draw([glyph], [clear[glyph.digit]]))
        result = judge.judge([picture], [scene])
        keys = ("place_accuracy", "colour_accuracy", "digit_accuracy", "colour_and_digit_accuracy")
        return (*(result[key] for key in keys), result["num_missing"], result["num_extra"])

    assert scores(a, b) == scores(b, a) == (1, 1, 1, 1, 0, 0)
    assert scores(a, b._replace(colour="green")) == (1, 0.5, 1, 0.5, 0, 0)
    assert scores(a, b._replace(digit=8)) == (1, 1, 0.5, 0.5, 0, 0)
    assert scores(a._replace(colour="white"), b._replace(digit=8)) == (1, 0.5, 0.5, 0, 0, 0)
    assert scores(a) == (0.5, 0.5, 0.5, 0.5, 1, 0), "missing: that object is wrong in everything"
    assert scores(a, b, a._replace(place="top right")) == (0, 1, 1, 1, 0, 1), "one too many: no place is right"
    assert scores(a, b._replace(place="top right")) == (0, 0.5, 0.5, 0.5, 1, 1), "moved: missing and one too many"
    assert scores(a._replace(place=b.place), b._replace(place=a.place)) == (1, 0, 0, 0, 0, 0), "swapped"


def test_accuracies_count_digit_objects_not_pictures(judge):
    clear = _clear(judge)
    single, pair = (Glyph(1, "red", "top left"),), (Glyph(2, "blue", "top left"), Glyph(3, "green", "top right"))
    pictures = [np.zeros((32, 32, 3), np.uint8), draw(pair, [clear[2], clear[3]])]
    scores = judge.judge(pictures, [single, pair])
    assert scores["place_accuracy"] == scores["digit_accuracy"] == pytest.approx(2 / 3)
    assert (scores["num_images"], scores["num_objects"], scores["num_missing"]) == (2, 3, 1)


def test_faint_ink_is_none_and_dim_ink_keeps_its_colour(judge):
    images, scenes = _items(200)
    assert all(read == () for read in judge.read([(image * 0.2).astype(np.uint8) for image in images]))
    dim = judge.judge([(image * 0.7).astype(np.uint8) for image in images], scenes)
    assert dim["place_accuracy"] == dim["colour_accuracy"] == 1.0
    noise = np.random.default_rng(0).normal(0, 12, (200, 32, 32, 3))
    noisy = judge.judge(np.clip(np.stack(images) + noise, 0, 255).astype(np.uint8), scenes)
    assert noisy["place_accuracy"] == noisy["colour_accuracy"] == 1.0 and noisy["digit_accuracy"] > 0.96


def test_features_are_the_means_of_two_by_two_blocks():
    ink = np.zeros((1, 16, 16))
    ink[0, 2:4, 4:6] = [[0.1, 0.2], [0.3, 0.4]]  # the block of row 1, column 2
    expected = np.zeros(64)
    expected[1 * 8 + 2] = 0.25
    assert np.allclose(_features(ink), expected[None])


def test_bad_input_is_named(judge):
    picture, scene = np.zeros((32, 32, 3), np.uint8), (Glyph(1, "red", "top left"),)
    for images, scenes, words in [
        ([picture], [], "1 pictures and 0 scenes"),
        ([], [], "nothing to judge"),
        ([picture[:16]], [scene], r"not uint8 of shape \(16, 32, 3\)"),
        ([picture / 255.0], [scene], "not float64 of shape"),
        ([Image.new("RGB", (64, 64))], [scene], r"\(64, 64, 3\)"),
        ([picture], [()], "not 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            judge.judge(images, scenes)
