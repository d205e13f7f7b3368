"""Captioned handwriting: real handwritten digits as coloured ink in the quadrants of a black 32x32 picture.

The digits are scikit-learn's `load_digits` (UCI "Optical Recognition of Handwritten Digits", 1797 pictures of 8x8).
Three things are kept apart between training and test, so that three kinds of generalisation can be measured:

- the digit pictures: each belongs to one split for good (20 % of every class are test);
- the scenes: what a caption says, the set of (digit, colour, place), belongs to one split (10 % are test);
- the pairs in `UNSEEN_PAIRS`: these (digit, colour) combinations never occur in training, alone or beside another
  digit.

Every decision is a hash of content, so that it is the same for every seed, platform and numpy version.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from vqtok.sources.hashing import hash64, mix

from .pictures import PICTURES

if TYPE_CHECKING:
    import datasets

SIZE = 32  # pixels along each side of the picture
QUADRANT = 16  # pixels along each side of a quadrant, which one digit fills
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Directions in RGB at least 33 degrees apart, so that a colour can be told from its direction alone, at any brightness.
INKS = {
    "red": (255, 32, 32),
    "green": (0, 220, 50),
    "blue": (0, 80, 255),
    "yellow": (255, 224, 0),
    "white": (255, 255, 255),
    "purple": (190, 0, 255),
}
# Place name -> (first row, first column) of its quadrant.
PLACES = {
    "top left": (0, 0),
    "top right": (0, QUADRANT),
    "bottom left": (QUADRANT, 0),
    "bottom right": (QUADRANT, QUADRANT),
}
# One pair per colour and no digit twice, so every digit and every colour is still learnt from its other pairs.
UNSEEN_PAIRS = frozenset({(0, "purple"), (2, "yellow"), (4, "green"), (5, "red"), (7, "white"), (9, "blue")})


class Glyph(NamedTuple):
    """One digit of a scene.

    Args:
        digit: 0 to 9.
        colour: a key of `INKS`.
        place: a key of `PLACES`.
    """

    digit: int
    colour: str
    place: str


Scene = tuple[Glyph, ...]  # one or two glyphs in different places, in the order the caption names them


class _Wording(NamedTuple):
    opening: str
    glyph: str
    joint: str


_WORDINGS = (
    _Wording("", "a {colour} {digit} {place}", " and "),
    _Wording("", "a {colour} {digit} in the {place}", " and "),
    _Wording("there is ", "a {colour} {digit} {place}", " and "),
    _Wording("", "{place}: a {colour} {digit}", ", "),
)
NUM_WORDINGS = len(_WORDINGS)
_WORDS = frozenset(re.findall(r"\w+", " ".join([*DIGIT_WORDS, *INKS, *PLACES]))) | {
    "a",
    "and",
    "in",
    "is",
    "the",
    "there",
}


def caption(scene: Sequence[Glyph], wording: int = 0) -> str:
    """Return the sentence that describes a scene, its glyphs in the given order.

    Args:
        scene: one or two glyphs in different places.
        wording: which way to say it, 0 to `NUM_WORDINGS - 1`; 0 is the plain one, "a red three top left".

    Raises:
        ValueError: if the scene is not drawable or the wording does not exist.

    Example:
        >>> caption([Glyph(3, "red", "top left"), Glyph(7, "blue", "bottom right")])
        'a red three top left and a blue seven bottom right'
    """
    check_scene(scene)
    if not 0 <= wording < NUM_WORDINGS:
        raise ValueError(f"wording {wording} does not exist: use 0 to {NUM_WORDINGS - 1}")
    return _say(scene, wording)


def _say(scene: Sequence[Glyph], wording: int) -> str:
    opening, glyph, joint = _WORDINGS[wording]
    return opening + joint.join(
        [glyph.format(colour=colour, digit=DIGIT_WORDS[digit], place=place) for digit, colour, place in scene]
    )


def parse_caption(text: str) -> Scene:
    """Return the scene a caption describes: the exact inverse of `caption` for every wording.

    Args:
        text: a caption; case and the amount of white space do not matter.

    Raises:
        ValueError: if the text uses a word no caption has, matches no wording, or names a place twice.

    Example:
        >>> parse_caption("top left: a red three")
        (Glyph(digit=3, colour='red', place='top left'),)
    """
    plain = " ".join(text.lower().split())
    for pattern in _patterns():
        if match := pattern.fullmatch(plain):
            found = match.groupdict()
            scene = tuple(
                Glyph(DIGIT_WORDS.index(found[f"digit{i}"]), found[f"colour{i}"], found[f"place{i}"])
                for i in (0, 1)
                if found[f"digit{i}"]
            )
            check_scene(scene)
            return scene
    unknown = [word for word in re.findall(r"\w+", plain) if word not in _WORDS]
    if unknown:
        raise ValueError(
            f"the captions never had the word {unknown[0]!r} (in {text!r}): use digits zero to nine, "
            f"inks {', '.join(INKS)}, places {', '.join(PLACES)}"
        )
    raise ValueError(
        f"cannot read the caption {text!r}: say for example 'a red three top left and a blue seven top right'"
    )


@lru_cache(maxsize=1)
def _patterns() -> list[re.Pattern[str]]:
    """One pattern per wording, with the groups digit0, colour0, place0 and, optional, digit1, colour1, place1."""
    words = {"digit": DIGIT_WORDS, "colour": INKS, "place": PLACES}
    patterns = []
    for opening, glyph, joint in _WORDINGS:
        first, second = (
            glyph.format(**{key: f"(?P<{key}{i}>{'|'.join(values)})" for key, values in words.items()}) for i in (0, 1)
        )
        patterns.append(re.compile(f"{opening}{first}(?:{joint}{second})?"))
    return patterns


def check_scene(scene: Sequence[Glyph]) -> None:
    """Return nothing if the scene can be drawn.

    Raises:
        ValueError: if there are not one or two glyphs, a digit, colour or place is unknown, or a place occurs twice.
    """
    if not 1 <= len(scene) <= 2:
        raise ValueError(f"a scene holds one or two digits, not {len(scene)}")
    for digit, colour, place in scene:
        if not (0 <= digit <= 9 and colour in INKS and place in PLACES):
            raise ValueError(
                f"unknown glyph {(digit, colour, place)}: "
                f"use digits 0 to 9, inks {', '.join(INKS)}, places {', '.join(PLACES)}"
            )
    if len({glyph.place for glyph in scene}) < len(scene):
        raise ValueError(f"two digits share the place {scene[0].place!r}: give each its own quadrant")


def scene_split(scene: Iterable[Glyph]) -> str:
    """Return where a scene belongs: "train", "test", "unseen" or "mixed".

    "unseen": every (digit, colour) is in `UNSEEN_PAIRS`. "mixed": one of two is, so the scene is used nowhere. The
    order of the glyphs does not matter.
    """
    glyphs = sorted(scene)
    unseen = [(digit, colour) in UNSEEN_PAIRS for digit, colour, _ in glyphs]
    if any(unseen):
        return "unseen" if all(unseen) else "mixed"
    return (
        "test"
        if hash64(";".join(f"{digit} {colour} {place}" for digit, colour, place in glyphs).encode()) % 10 == 0
        else "train"
    )


@lru_cache(maxsize=1)
def _all_scenes() -> dict[str, tuple[list[Scene], list[Scene]]]:
    """Per split, all scenes of one digit and all of two: 240 and 21,600 in all, in a fixed order."""
    scenes: dict[str, tuple[list[Scene], list[Scene]]] = {key: ([], []) for key in ("train", "test", "unseen", "mixed")}
    pairs = list(product(range(10), INKS))
    for (digit, colour), place in product(pairs, PLACES):
        scene: Scene = (Glyph(digit, colour, place),)
        scenes[scene_split(scene)][0].append(scene)
    for (place_a, place_b), (a, b) in product(combinations(PLACES, 2), product(pairs, pairs)):
        scene = (Glyph(*a, place_a), Glyph(*b, place_b))
        scenes[scene_split(scene)][1].append(scene)
    return scenes


class Handwriting(NamedTuple):
    """The real digits, enlarged, with their split.

    Args:
        ink: uint8 (1797, 16, 16), amount of ink in [0, 255].
        labels: int64 (1797,), the digit each picture shows.
        train, test: per digit 0 to 9, int64 indices of the pictures of that split.
    """

    ink: np.ndarray
    labels: np.ndarray
    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]


@lru_cache(maxsize=1)
def handwriting() -> Handwriting:
    """Return the real digits, read once per process and enlarged to 16x16 by cubic interpolation.

    Raises:
        ImportError: if scikit-learn, whose package contains the digits, is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the embedded digits come with scikit-learn: install it with pip install 'vqtok[demo]'"
        ) from error
    bunch: Any = load_digits()
    images, labels = bunch.images, bunch.target.astype(np.int64)
    enlarge = _enlarging_matrix()
    ink = np.clip(np.einsum("ij,njk,lk->nil", enlarge, images / 16.0, enlarge), 0.0, 1.0)
    train, test = [], []
    for digit in range(10):
        # Ordered by a hash of the pixels: a fixed shuffle that needs no generator.
        members = sorted(np.flatnonzero(labels == digit), key=lambda i: hash64(images[i].astype(np.uint8).tobytes()))
        num_test = round(0.2 * len(members))
        test.append(np.array(members[:num_test]))
        train.append(np.array(members[num_test:]))
    return Handwriting(np.round(ink * 255).astype(np.uint8), labels, tuple(train), tuple(test))


def _enlarging_matrix() -> np.ndarray:
    """(16, 8): Catmull-Rom interpolation at the half-pixel positions of twofold enlargement, zeros beyond the
    border."""
    taps = np.array([-0.0234375, 0.2265625, 0.8671875, -0.0703125])  # the cubic at distances 1.75, 0.75, 0.25, 1.25
    matrix = np.zeros((16, 8 + 4))
    for i in range(8):
        matrix[2 * i, i : i + 4] = taps  # a quarter pixel before source pixel i: sources i - 2 to i + 1
        matrix[2 * i + 1, i + 1 : i + 5] = taps[::-1]  # a quarter pixel after it: sources i - 1 to i + 2
    return matrix[:, 2:10]


@lru_cache(maxsize=1)
def _stamps() -> dict[str, np.ndarray]:
    """Colour -> uint8 (1797, 16, 16, 3): every digit in every ink (8 MB), so that drawing is copying."""
    ink = handwriting().ink.astype(np.float32)[..., None]
    return {colour: np.round(ink * np.array(rgb, np.float32) / 255).astype(np.uint8) for colour, rgb in INKS.items()}


def draw(scene: Sequence[Glyph], digit_images: Sequence[int]) -> np.ndarray:
    """Return the picture of a scene, uint8 (32, 32, 3) in [0, 255].

    Args:
        scene: what to draw, already checked.
        digit_images: for each glyph the index, 0 to 1796, of the handwritten digit to use.
    """
    stamps = _stamps()
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    for (_, colour, place), index in zip(scene, digit_images, strict=True):
        row, column = PLACES[place]
        picture[row : row + QUADRANT, column : column + QUADRANT] = stamps[colour][index]
    return picture


class CaptionedDigits(Dataset[dict[str, Any]]):
    """Captioned handwritten digits: item i is drawn in memory and depends on (seed, split, unseen_pairs, i) alone.

    Args:
        split: "train" or "test". They share no digit picture and no scene, hence no caption.
        num_samples: length of the data set; a longer one starts with the items of a shorter one.
        seed: any integer.
        unseen_pairs: test only: scenes whose (digit, colour) pairs are all in `UNSEEN_PAIRS`. Without it, no pair is.

    Items: a dict of `image`, uint8 (32, 32, 3) in [0, 255]; `text`, str; `scene`, a tuple of one (one in three items)
    or two `Glyph` in the order of the text. Each item is a new array.

    Raises:
        ValueError: if the split is unknown, num_samples is below 1, or unseen pairs are asked of the train split.
        ImportError: if scikit-learn is missing.

    Example:
        >>> item = CaptionedDigits("train", num_samples=8, seed=0)[3]
        >>> item["image"].shape, item["text"]
        ((32, 32, 3), 'a blue zero in the bottom right')
    """

    medium = PICTURES
    label_names: list[str] | None = None  # as of every data set: a scene has no one class

    def __init__(
        self, split: str = "train", num_samples: int = 10_000, seed: int = 0, unseen_pairs: bool = False
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"unknown split {split!r} of the digits: use 'train' or 'test'")
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least 1")
        if unseen_pairs and split == "train":
            raise ValueError("the unseen pairs are held out of split 'train': use split='test'")
        self.split = split
        self.num_samples = num_samples
        self.seed = seed
        self.unseen_pairs = unseen_pairs
        self._key = hash64(f"{seed} {split} {unseen_pairs}".encode())
        handwriting()  # say now, not in a worker, that scikit-learn is missing

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(f"item {index} of a data set of {self.num_samples}")
        # The tables live in the module, not in self: pickling a data set for a worker costs nothing.
        singles, pairs = _all_scenes()["unseen" if self.unseen_pairs else self.split]
        digits = handwriting()
        pictures_of = digits.train if self.split == "train" else digits.test
        state = mix(self._key ^ mix(index % self.num_samples))
        num_glyphs, state = 1 + (state % 3 > 0), mix(state)
        scenes = singles if num_glyphs == 1 else pairs
        scene, state = scenes[state % len(scenes)], mix(state)
        swapped, wording, state = state % 2 == 1, (state >> 8) % NUM_WORDINGS, mix(state)
        if swapped:
            scene = scene[::-1]
        chosen = []
        for glyph in scene:
            pictures = pictures_of[glyph.digit]
            chosen.append(int(pictures[state % len(pictures)]))
            state = mix(state)
        return {"image": draw(scene, chosen), "text": _say(scene, wording), "scene": scene}

    def to_hf_dataset(self) -> "datasets.Dataset":
        """Return the same items as a `datasets.Dataset` in memory: columns `image` (PIL when read), `text`, `scene`."""
        # Here, because the package takes a second to import.
        from datasets import Dataset as HFDataset
        from datasets import Features, Image, Value

        glyph = {"digit": Value("int64"), "colour": Value("string"), "place": Value("string")}
        features = Features({"image": Image(), "text": Value("string"), "scene": [glyph]})
        rows = [{**self[i], "scene": [glyph._asdict() for glyph in self[i]["scene"]]} for i in range(len(self))]
        return HFDataset.from_list(rows, features=features)
