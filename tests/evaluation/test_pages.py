"""Contact sheets, plots and the report page: looked at by their pixels and their text."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from vqtok.evaluation.html import Page
from vqtok.evaluation.pictures import contact_sheet
from vqtok.evaluation.plots import code_map, curves, usage_bars


def test_a_sheet_puts_every_picture_in_its_place_without_smoothing():
    red, blue = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (2, 4), "blue")
    sheet = contact_sheet([[red], [blue, red]], tile=8, gap=1)
    assert sheet.size == (2 * 9 + 1, 2 * 9 + 1)
    assert sheet.getpixel((1, 1)) == (255, 0, 0) and sheet.getpixel((8, 4)) == (255, 0, 0)
    assert sheet.getpixel((8, 5)) == (96, 96, 96)  # the red one is twice as wide as high
    assert sheet.getpixel((1, 10)) == (0, 0, 255) and sheet.getpixel((10, 10)) == (255, 0, 0)
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([[]])


def test_equal_codes_have_equal_colours_and_different_ones_do_not():
    codes = torch.tensor([[0, 1], [1, 5]])
    pixels = np.asarray(code_map(codes, 8))
    assert pixels.shape == (2, 2, 3)
    assert (
        (pixels[0, 1] == pixels[1, 0]).all()
        and (pixels[0, 0] != pixels[0, 1]).any()
        and (pixels[1, 1] != pixels[0, 1]).any()
    )


def test_plots_are_pictures_that_change_with_the_numbers():
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "other": 3.0}]
    one = curves(history, {"loss": "loss", "absent": "never there"}, "nats")
    two = curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}], {"loss": "loss"}, "nats")
    assert one.size == two.size and one.tobytes() != two.tobytes()
    bars = usage_bars([torch.tensor([3, 0, 1]), torch.tensor([1, 1])], ["a", "b"])
    assert bars.size[0] > bars.size[1]


def test_a_page_is_one_file_and_escapes_what_it_is_given():
    page = Page("<b>title", "lead & more")
    page.heading("<i>heading")
    page.text("a < b")
    page.table(["name", "value"], [["<x>", 0.123456], ["goal", "met"]])
    page.tiles([Image.new("RGB", (2, 2))], ['say "hi" <now>'])
    page.picture(Image.new("RGB", (3, 3)), "plot")
    text = page.render()
    assert "<b>title" not in text and "<i>heading" not in text and "<x>" not in text and "<now>" not in text
    assert "0.1235" in text and "class='met'" in text and 'alt="say &quot;hi&quot; &lt;now&gt;"' in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)


def test_spectrograms_stand_under_one_another_and_show_a_tone_where_it_is():
    from vqtok.evaluation.spectrograms import _decibels, spectrograms

    times = np.arange(16_000) / 16_000
    tone = np.sin(2 * np.pi * 2000 * times).astype(np.float32)
    level = _decibels(tone, 16_000)
    assert level.mean(axis=1).argmax() == 64  # 2000 Hz in steps of 16000 / 512
    one = spectrograms({"tone": tone}, 16_000)
    two = spectrograms({"tone": tone, "half": tone[None, :8000]}, 16_000, {"tone": [("seven", 0, 8000)]})
    assert two.width == one.width and two.height > one.height + 100
    quiet = spectrograms({"tone": 0.001 * tone, "loud": tone}, 16_000)
    assert np.asarray(two).mean() != np.asarray(quiet).mean()
    with pytest.raises(ValueError, match="no sound to draw"):
        spectrograms({}, 16_000)


def test_a_page_plays_what_it_was_given():
    import base64
    import io

    soundfile = pytest.importorskip("soundfile")
    sound = (np.random.default_rng(0).integers(-32768, 32768, 900) / 32768).astype(np.float32)
    page = Page("Sounds", "")
    page.sounds([sound, np.stack([2 * sound, sound])], 16_000, ["<one>", "two"], [Image.new("RGB", (4, 4))] * 2)
    text = page.render()
    assert (
        text.count("<audio controls") == 2 and text.count("<img") == 2 and "&lt;one&gt;" in text and "<one>" not in text
    )
    found = re.findall(r"data:audio/flac;base64,([A-Za-z0-9+/=]+)", text)
    mono, rate = soundfile.read(io.BytesIO(base64.b64decode(found[0])))
    assert rate == 16_000 and np.array_equal(mono, sound)
    stereo, _ = soundfile.read(io.BytesIO(base64.b64decode(found[1])))
    assert stereo.shape == (900, 2) and np.array_equal(stereo[:, 1], sound)
    assert np.allclose(stereo[:, 0], np.clip(2 * sound, -1, 1 - 2**-15), atol=1e-7)
    with pytest.raises(ValueError, match="cannot be played"):
        page.sounds([np.array([np.nan])], 16_000, ["bad"])
    with pytest.raises(ValueError, match="cannot be played"):
        page.sounds([np.zeros(0)], 16_000, ["empty"])
