"""The image processor: values, padding, files, batches, and its place among transformers' Auto classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import vqtok.auto  # noqa: F401 (registers the Auto classes)
from tests.tiny import needs_auto_image_processor
from vqtok.image.image_processing_image_vq import MAX_PIXELS, ImageVQImageProcessor


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def processor():
    return ImageVQImageProcessor(stride=8)


def test_all_256_values_survive(processor):
    array = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, -1)
    pixels, size = processor.prepare(array)
    assert pixels.dtype == torch.float32 and size == (16, 16)
    assert pixels.min() == -1 and pixels.max() == 1
    np.testing.assert_allclose(pixels[0].flatten().numpy(), np.arange(256) / 127.5 - 1, atol=1e-7)
    (picture,) = processor.postprocess(pixels[None], [size])
    np.testing.assert_array_equal(np.asarray(picture), array)


def test_postprocess_clamps_and_rounds_half_up(processor):
    values = torch.tensor([-7.0, -1.0, 10.5 / 127.5 - 1, 10.49 / 127.5 - 1, 1.0, 3.0], dtype=torch.float64)
    pixels = values.view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert np.asarray(processor.postprocess(pixels, [(1, 6)])[0])[0, :, 0].tolist() == [0, 0, 11, 10, 255, 255]
    assert processor.postprocess(pixels.to(torch.bfloat16), [(1, 6)])[0].size == (6, 1)


def test_padding_repeats_the_last_row_and_column(processor):
    array = noise(13, 18)
    pixels, size = processor.prepare(array)
    assert tuple(pixels.shape) == (3, 16, 24) and size == (13, 18)
    whole = np.asarray(processor.postprocess(pixels[None], [(16, 24)])[0])
    np.testing.assert_array_equal(whole, np.pad(array, [(0, 3), (0, 6), (0, 0)], mode="edge"))
    np.testing.assert_array_equal(np.asarray(processor.postprocess(pixels[None], [size])[0]), array)


def test_grey(processor):
    grey = ImageVQImageProcessor(stride=8, num_channels=1)
    array = noise(9, 8)[..., 0]
    pixels, size = grey.prepare(array)
    assert tuple(pixels.shape) == (1, 16, 8)
    (picture,) = grey.postprocess(pixels[None], torch.tensor([size]))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), array)


def test_files(processor, tmp_path):
    array = noise(8, 10)
    Image.fromarray(array).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(processor.prepare(path)[0].numpy(), processor.prepare(array)[0].numpy())
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert processor.prepare(tmp_path / "moving.gif")[0][:, 0, 0].tolist() == [1, -1, -1], "not the first frame"


def test_bad_files_are_named(processor, tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    small = tmp_path / "small.png"
    Image.new("RGB", (30, 7)).save(small)
    for path, why in [
        (cut, "truncated"),
        (text, "no picture"),
        (tmp_path, "folder"),
        (small, "30x7 pixels, a side smaller than the stride of 8: enlarge"),
    ]:
        with pytest.raises(ValueError, match=why) as caught:
            processor.prepare(path)
        assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nothing\.png: check the path"):
        processor.prepare(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="nothing is downloaded"):
        processor.prepare("https://example.com/cat.png")


def test_the_bound_on_pixels_comes_before_decoding(tmp_path):
    processor = ImageVQImageProcessor(stride=8, max_pixels=100)
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "a.png").read_bytes()[:3000])  # decoding it would fail for another reason
    for image in (cut, noise(64, 64), Image.fromarray(noise(64, 64))):
        with pytest.raises(ValueError, match=r"64x64 = 4,096 pixels, more than the limit of 100"):
            processor.prepare(image)
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("wrong", [torch.zeros(3, 8, 8), 3, None, {"image": 1}])
def test_other_types_are_refused(processor, wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        processor.prepare(wrong)


def test_preprocess_makes_batches(processor):
    batch = processor([noise(13, 18), Image.fromarray(noise(16, 17))])
    assert tuple(batch["pixel_values"].shape) == (2, 3, 16, 24)
    assert batch["sizes"].tolist() == [[13, 18], [16, 17]]
    assert processor(noise(8, 8)).pixel_values.shape[0] == 1
    assert isinstance(processor(noise(8, 8), return_tensors="np")["pixel_values"], np.ndarray)
    with pytest.raises(ValueError, match=r"got 8x8, 16x8: VQTokenizer\.encode takes mixed sizes"):
        processor([noise(8, 8), noise(9, 8)])
    with pytest.raises(ValueError, match="no pictures"):
        processor([])
    with pytest.raises(ValueError, match="'tf'"):
        processor(noise(8, 8), return_tensors="tf")


@needs_auto_image_processor
def test_auto_gives_it_back(tmp_path):
    ImageVQImageProcessor(stride=16, num_channels=1, max_pixels=12345).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "image_processor_type": "ImageVQImageProcessor",
        "stride": 16,
        "num_channels": 1,
        "max_pixels": 12345,
    }
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is ImageVQImageProcessor
    assert (again.stride, again.num_channels, again.max_pixels) == (16, 1, 12345)


def test_code_fields_leave_out_what_decides_no_codes():
    fields = ImageVQImageProcessor(stride=8).code_fields
    assert fields == ImageVQImageProcessor(stride=8, max_pixels=99).code_fields
    assert fields != ImageVQImageProcessor(stride=16).code_fields
    assert fields != ImageVQImageProcessor(stride=8, num_channels=1).code_fields
    json.dumps(fields)


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"stried": 8}, "'stried'. Did you mean 'stride'"),
        ({"stride": "8"}, "positive integer, got '8'"),
        ({"stride": True}, "positive integer, got True"),
        ({"num_channels": 4}, "3 .RGB. or 1 .grey., got 4"),
        ({"max_pixels": 0}, "positive integer, got 0"),
    ],
)
def test_bad_state_is_refused(state, complaint):
    with pytest.raises(ValueError, match=complaint):
        ImageVQImageProcessor(**state)
