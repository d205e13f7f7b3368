"""AudioCropDataset: crops that depend on seed and draw alone."""

import numpy as np
import pytest

from vqtok.audio.crops import AudioCropDataset
from vqtok.sources.dataset import skipped_summary


def clips(*lengths, channels=1):
    return [
        {"audio": (np.arange(1, n + 1) / 1000 * np.ones((channels, 1))).astype(np.float32), "sampling_rate": 8000}
        for n in lengths
    ]


def test_a_crop_is_a_stretch_of_its_clip_with_one_gain():
    crops = AudioCropDataset(clips(500, 300), 100, seed=1)
    starts, gains = set(), set()
    for draw in range(60):
        crop = crops[draw]["audio"]
        assert crop.shape == (1, 100) and crop.dtype == np.float32
        steps = np.diff(crop[0].astype(np.float64))
        gain = steps.mean() * 1000
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-2)
        start = round(float(crop[0, 0]) * 1000 / gain) - 1
        assert 0 <= start <= (400 if draw % 2 == 0 else 200)
        starts.add(start)
        gains.add(round(gain, 3))
        assert 0.49 < gain < 2.01
    assert len(starts) > 40 and len(gains) > 40
    assert max(starts) > 350 and min(starts) < 20


def test_a_draw_gives_the_same_crop_always():
    one, other = (AudioCropDataset(clips(500, 300), 100, seed=3, cache_bytes=size) for size in (0, 1 << 20))
    for draw in (7, 3, 7, 12):
        assert np.array_equal(one[draw]["audio"], other[draw]["audio"])
    assert not np.array_equal(one[7]["audio"], one[9]["audio"]), "another visit, another crop"
    assert not np.array_equal(one[7]["audio"], AudioCropDataset(clips(500, 300), 100, seed=4)[7]["audio"])
    assert len(list(one)) == 2


def test_a_short_clip_lies_whole_in_silence():
    crops = AudioCropDataset(clips(30, channels=2), 100, gain_db=0)
    places = set()
    for draw in range(20):
        crop = crops[draw]["audio"]
        assert crop.shape == (2, 100)
        (places_now,) = np.nonzero(crop[0])
        places.add(int(places_now[0]))
        np.testing.assert_array_equal(crop[:, places_now[0] : places_now[0] + 30], clips(30, channels=2)[0]["audio"])
        assert np.count_nonzero(crop[0]) == 30
    assert len(places) > 10


def test_gain_never_clips_and_leaves_silence():
    loud = [{"audio": np.full((1, 50), 0.9, np.float32), "sampling_rate": 8000}]
    assert max(AudioCropDataset(loud, 50, gain_db=40)[d]["audio"].max() for d in range(50)) <= 1.0
    silent = [{"audio": np.zeros((1, 50), np.float32), "sampling_rate": 8000}]
    assert not AudioCropDataset(silent, 50)[0]["audio"].any()


def test_what_was_left_out_of_the_clips_is_still_known():
    class Clips(list):
        skipped = [("a.wav", "it is broken")]

    assert skipped_summary(AudioCropDataset(Clips(clips(9)), 3)) == "1 recording was skipped:\n  a.wav: it is broken"
    assert skipped_summary(AudioCropDataset(clips(9), 3)) == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(([], 10), "no clip"), ((clips(9), 0), "num_samples"), ((clips(9), 5, -1), "seed")],
)
def test_bad_arguments_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        AudioCropDataset(*arguments)
    with pytest.raises(IndexError, match="counts from 0"):
        AudioCropDataset(clips(9), 3)[-1]
