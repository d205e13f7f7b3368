"""Random crops: pieces of their pictures, a pure function of seed and draw number."""

import pickle

import numpy as np
import pytest
from PIL import Image

from vqtok.image.data import CropDataset, load_images, skipped_summary


class _Ramps:
    """Pictures whose pixels say which picture, row and column they are."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes
        self.reads = 0

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict:
        self.reads += 1
        height, width = self.sizes[index]
        rows, columns = np.mgrid[:height, :width]
        return {"image": np.stack([np.full_like(rows, index), rows, columns], -1).astype(np.uint8), "text": f"t{index}"}


def test_a_crop_is_a_piece_of_its_picture_and_all_places_occur():
    images = _Ramps([(40, 60), (33, 50)])
    crops = CropDataset(images, 32, seed=1)
    tops, lefts, flips = set(), set(), 0
    for draw in range(600):
        item = crops[draw]
        pixels = item["image"].astype(int)
        index, top = pixels[0, 0, 0], pixels[0, 0, 1]
        flipped = pixels[0, 0, 2] > pixels[0, -1, 2]
        columns = pixels[0, ::-1, 2] if flipped else pixels[0, :, 2]
        assert pixels.shape == (32, 32, 3) and item["image"].dtype == np.uint8 and item["text"] == f"t{index}"
        assert np.array_equal(columns, columns[0] + np.arange(32)) and np.array_equal(
            pixels[:, 0, 1], top + np.arange(32)
        )
        flips += flipped
        if index == 0:
            tops.add(top)
            lefts.add(columns[0])
    assert tops == set(range(9)) and lefts == set(range(29)) and 240 < flips < 360
    assert not any(
        np.diff(CropDataset(images, 32, flip=False)[i]["image"][0, :, 2].astype(int)).min() < 0 for i in range(40)
    )


def test_a_draw_depends_on_seed_and_number_alone():
    images = _Ramps([(40, 60)] * 7)
    first, second = CropDataset(images, (16, 24), seed=5), CropDataset(images, (16, 24), seed=5, cache_bytes=0)
    assert first[0]["image"].shape == (16, 24, 3)
    forwards = [first[draw]["image"] for draw in range(50)]
    second[49], second[3]  # an order of its own
    backwards = [pickle.loads(pickle.dumps(second))[draw]["image"] for draw in reversed(range(50))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    other = [CropDataset(images, (16, 24), seed=6)[draw]["image"] for draw in range(50)]
    assert sum(np.array_equal(a, b) for a, b in zip(forwards, other, strict=True)) < 5
    assert sum(np.array_equal(a, b) for a, b in zip(forwards[:7], forwards[7:14], strict=True)) < 3
    lone = [CropDataset(_Ramps([(40, 60)]), 16, seed=seed) for seed in (5, 6)]  # no order that could differ
    assert sum(np.array_equal(lone[0][draw]["image"], lone[1][draw]["image"]) for draw in range(50)) < 5


def test_every_epoch_visits_every_picture_once_in_a_new_order():
    crops = CropDataset(_Ramps([(16, 16)] * 12), 16)
    epochs = [[int(crops[draw]["image"][0, 0, 0]) for draw in range(12 * e, 12 * e + 12)] for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    plain = CropDataset(_Ramps([(16, 16)] * 3), 16, shuffle=False)
    assert [int(plain[draw]["image"][0, 0, 0]) for draw in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert len(list(plain)) == 3


def test_small_pictures_are_enlarged_and_the_cache_has_a_limit():
    small = CropDataset(_Ramps([(10, 40)]), 32)
    assert small[0]["image"].shape == (32, 32, 3)
    images = _Ramps([(16, 16)] * 4)
    crops = CropDataset(images, 16, cache_bytes=2 * 16 * 16 * 3)
    for draw in range(12):
        crops[draw]["image"][:] = 99  # must not write into the cache
    assert images.reads == 4 + 2 * 2, "two pictures fit, two are read in every epoch"
    assert all(crops[draw]["image"][0, 0, 0] < 4 for draw in range(4))
    assert len(pickle.dumps(crops)) < 2_000
    for arguments, words in [
        (([], 16), "no pictures"),
        ((images, 0), "size is 0"),
        ((images, (16, -1)), "size is"),
        ((images, 16, -2), "seed is -2"),
    ]:
        with pytest.raises(ValueError, match=words):
            CropDataset(*arguments)
    with pytest.raises(IndexError, match="draw -1"):
        crops[-1]


def test_crops_know_what_was_skipped(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no")
    crops = CropDataset(load_images(tmp_path, "all"), 8)
    assert skipped_summary(crops).startswith("1 picture was skipped:\n  b.png: ")
