"""Pictures of every mode, depth and orientation become upright 8-bit RGB, or are refused with the remedy."""

import numpy as np
import pytest
from PIL import Image

from vqtok.image.image_processing_image_vq import to_rgb


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    for picture in (Image.fromarray(values), Image.open(tmp_path / "a.png"), Image.fromarray(values.astype(np.int32))):
        assert np.asarray(to_rgb(picture))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255], picture.mode
    assert np.asarray(to_rgb(Image.new("I;16B", (1, 1), 65535))).max() == 255
    with pytest.raises(ValueError, match="values from -1 to 70000, outside 16 bits"):
        to_rgb(Image.fromarray(np.array([[-1, 70000]], np.int32)))


def test_transparent_parts_lie_on_white(tmp_path):
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)
    assert to_rgb(Image.new("LA", (1, 1), (10, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 9)
    grey.save(tmp_path / "l.png", transparency=9)
    for name, ink in (("p.png", (255, 0, 0)), ("l.png", (7, 7, 7))):
        with Image.open(tmp_path / name) as picture:
            out = to_rgb(picture)
        assert [out.getpixel((x, 0)) for x in (0, 1)] == [ink, (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "La", "RGBX", "CMYK", "YCbCr", "HSV", "RGBa"])
def test_every_other_mode_becomes_rgb(mode):
    out = to_rgb(Image.new(mode, (5, 4)))
    assert out.mode == "RGB" and out.size == (5, 4)


def test_exif_rotation_is_applied_and_broken_exif_ignored(tmp_path):
    picture = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "broken.jpg", exif=b"Exif\x00\x00garbage")
    with Image.open(tmp_path / "turned.jpg") as turned, Image.open(tmp_path / "broken.jpg") as broken:
        out = to_rgb(turned)
        assert out.size == (4, 8) and 0x0112 not in out.getexif()
        assert to_rgb(broken).size == (8, 4)


def test_arrays_and_what_is_refused():
    colours = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(to_rgb(colours), colours)
    assert np.array_equal(to_rgb(colours[..., 0]), colours[..., [0, 0, 0]])
    assert np.array_equal(to_rgb(colours[..., :1]), colours[..., [0, 0, 0]])
    assert np.asarray(to_rgb(np.zeros((2, 2, 4), np.uint8))).min() == 255
    original = Image.new("RGB", (2, 2))
    to_rgb(original).putpixel((0, 0), (9, 9, 9))
    assert original.getpixel((0, 0)) == (0, 0, 0), "the given picture is not changed"
    for bad, words in [
        (colours.astype(np.float32), r"dtype float32 .*astype\('uint8'\)"),
        (colours.transpose(2, 0, 1)[..., :2], r"shape \(3, 2, 2\) is no picture.*channels last"),
        (np.zeros((0, 4, 3), np.uint8), "no pixel"),
        (Image.new("F", (1, 1)), r"mode F .*convert\('L'\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            to_rgb(bad)
    with pytest.raises(TypeError, match="not str: open files with PIL"):
        to_rgb("cat.png")
