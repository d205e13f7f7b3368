"""A judge of captioned handwriting: does the picture show what the caption says?

It knows the real digits of the *train* split and the ink colours, nothing else: no generated picture and no
reconstruction ever trained or tuned it, and its two settings come from cross-validation on those same real digits. So
what it says of generated pictures can be set beside what it says of real held-out ones.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vqtok.image.digits import INKS, PLACES, QUADRANT, SIZE, CaptionedDigits, Glyph, Scene, check_scene, handwriting


class DigitJudge:
    """Reads 32x32 pictures quadrant by quadrant: is there ink, of which colour, and which digit.

    Per quadrant, with pixels in [0, 1]:

    - colour: the pixels' sum, each weighted by its largest channel; the ink whose RGB direction is nearest by angle;
    - ink: each pixel's largest channel divided by that of the ink found, cut at 1; there is a digit when its mean
      reaches half of what the faintest real train digit has (`ink_threshold`);
    - digit: the ink averaged to 8x8, classified by a support vector machine (RBF) trained on the real train digits,
      each drawn cleanly and brought to 8x8 in the same way.

    Raises:
        ImportError: if scikit-learn is missing.

    Example:
        >>> from vqtok.image.digits import CaptionedDigits
        >>> items = [CaptionedDigits("test", num_samples=100)[i] for i in range(100)]
        >>> scores = DigitJudge().judge([item["image"] for item in items], [item["scene"] for item in items])
        >>> scores["place_accuracy"], scores["num_images"]
        (1.0, 100)
    """

    def __init__(self) -> None:
        digits = handwriting()  # raises the clear ImportError when scikit-learn is missing
        from sklearn.svm import SVC

        train = np.concatenate(digits.train)
        ink = digits.ink[train] / 255.0
        # Best of 24 pairs in tenfold cross-validation on the train digits, 99.1 %; 98.8 to 99.1 % for all C >= 3 and
        # gamma >= 0.1, so the choice hardly matters. One nearest neighbour has 98.7 %.
        self._classifier = SVC(C=3.0, gamma=0.3).fit(_features(ink), digits.labels[train])
        self.ink_threshold = float(ink.mean(axis=(1, 2)).min() / 2)

    def read(self, images: Sequence[Image.Image | np.ndarray] | np.ndarray) -> list[Scene]:
        """Return what each picture shows: a tuple of zero to four `Glyph`, in the order of `PLACES`.

        Args:
            images: PIL pictures or uint8 arrays (32, 32, 3) in [0, 255], or one array (B, 32, 32, 3).

        Raises:
            ValueError: if a picture has another size or dtype.
        """
        pixels = np.stack([_pixels(image) for image in images]) if len(images) else np.zeros((0, SIZE, SIZE, 3))
        quadrants = np.stack(
            [pixels[:, row : row + QUADRANT, column : column + QUADRANT] for row, column in PLACES.values()], axis=1
        )  # (B, 4, 16, 16, 3)
        brightness = quadrants.max(axis=-1)
        direction = np.einsum("bqhwc,bqhw->bqc", quadrants, brightness)
        inks = np.array(list(INKS.values())) / 255.0
        # The angle to each ink, up to the length of `direction`, which is the same for all inks.
        nearest = np.argmax(direction @ (inks / np.linalg.norm(inks, axis=1, keepdims=True)).T, axis=-1)  # (B, 4)
        ink = np.minimum(brightness / inks.max(axis=1)[nearest][..., None, None], 1.0)
        inked = ink.mean(axis=(-1, -2)) >= self.ink_threshold
        digits = np.full(inked.shape, -1)
        if inked.any():
            digits[inked] = self._classifier.predict(_features(ink[inked]))
        colours, places = list(INKS), list(PLACES)
        return [
            tuple(Glyph(int(digits[b, q]), colours[nearest[b, q]], places[q]) for q in range(4) if inked[b, q])
            for b in range(len(pixels))
        ]

    def judge(
        self, images: Sequence[Image.Image | np.ndarray] | np.ndarray, scenes: Sequence[Scene]
    ) -> dict[str, float | int]:
        """Return how many of the asked digits were drawn right, as fractions in [0, 1] of all digits of all scenes.

        A digit object counts as right in
        `place`: its quadrant has ink, and the picture has ink in no quadrant that its scene leaves empty (so one
        quadrant too many makes every object of that picture wrong); `colour` and `digit`: its quadrant has ink of this
        colour, and the shape of this digit, whatever the other quadrants hold.

        Args:
            images: B pictures, as in `read`.
            scenes: B scenes, what each picture should show.

        Returns:
            `place_accuracy`, `colour_accuracy`, `digit_accuracy`, `colour_and_digit_accuracy` (both right in the same
            object), and the counts `num_images`, `num_objects`, `num_missing` (objects without ink) and `num_extra`
            (quadrants with ink that the scene leaves empty).

        Raises:
            ValueError: if there are no pictures, their number differs from the scenes', a scene is not drawable, or a
                picture has another size or dtype.
        """
        if len(images) != len(scenes):
            raise ValueError(f"{len(images)} pictures and {len(scenes)} scenes: give one scene per picture")
        if not len(images):
            raise ValueError("there is nothing to judge: give at least one picture")
        count = dict.fromkeys(("place", "colour", "digit", "colour_and_digit", "objects", "missing", "extra"), 0)
        for scene, read in zip(scenes, self.read(images), strict=True):
            check_scene(scene)
            found = {glyph.place: glyph for glyph in read}
            num_extra = len(found.keys() - {glyph.place for glyph in scene})
            count["extra"] += num_extra
            for digit, colour, place in scene:
                count["objects"] += 1
                if place not in found:
                    count["missing"] += 1
                    continue
                colour_right, digit_right = found[place].colour == colour, found[place].digit == digit
                count["place"] += num_extra == 0
                count["colour"] += colour_right
                count["digit"] += digit_right
                count["colour_and_digit"] += colour_right and digit_right
        accuracies = {
            f"{key}_accuracy": count[key] / count["objects"] for key in ("place", "colour", "digit", "colour_and_digit")
        }
        counts = {f"num_{key}": count[key] for key in ("objects", "missing", "extra")}
        return {**accuracies, "num_images": len(images), **counts}


def judge_drawings(pipeline: Any, tokenizer: Any, number: int) -> dict[str, Any]:
    """Draw held-out captions and captions with pairs of digit and colour that were never seen together, and judge both.

    Args:
        pipeline: a `VQPipeline` that was trained on `CaptionedDigits`.
        tokenizer: its `VQTokenizer`.
        number: captions of each kind.

    Returns:
        For `held_out` and `unseen_pairs` a dict of `captions`, `pictures`, `samples_per_second`, and what `DigitJudge.judge` says of
        the pictures that were `drawn`, of the `real` ones, and of these `reconstructed` by the tokenizer.
    """
    judge = DigitJudge()
    scenes = {
        "held_out": CaptionedDigits("test", num_samples=number, seed=1),
        "unseen_pairs": CaptionedDigits("test", num_samples=number, seed=1, unseen_pairs=True),
    }
    out: dict[str, Any] = {}
    for name, data in scenes.items():
        items = [data[i] for i in range(len(data))]
        truth = [item["scene"] for item in items]
        start = time.monotonic()
        drawn = pipeline([item["text"] for item in items], seed=0, sizes=(SIZE, SIZE))
        seconds = time.monotonic() - start
        real = [item["image"] for item in items]
        out[name] = {
            "captions": [item["text"] for item in items],
            "pictures": drawn,
            "drawn": judge.judge(drawn, truth),
            "real": judge.judge(real, truth),
            "reconstructed": judge.judge(tokenizer.reconstruct(real), truth),
            "samples_per_second": len(items) / seconds,
        }
    return out


def _features(ink: np.ndarray) -> np.ndarray:
    """(n, 16, 16) ink in [0, 1] -> (n, 64): the mean of each 2x2 block, the resolution the real digits have."""
    return ink.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(-1, 64)


def _pixels(image: Any) -> np.ndarray:
    """(32, 32, 3) in [0, 1]."""
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.shape != (SIZE, SIZE, 3) or array.dtype != np.uint8:
        raise ValueError(
            f"the judge reads uint8 pictures of shape {(SIZE, SIZE, 3)}, not {array.dtype} of shape {array.shape}: "
            "give the decoded pictures as they come from the tokenizer"
        )
    return array / 255.0
