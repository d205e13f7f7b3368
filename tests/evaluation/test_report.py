"""The protocol against slow or foreign computations, and the report against counting by hand."""

import collections
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import make_tokenizer, picture, vectors
from vqtok.codes import Codes
from vqtok.evaluation import report
from vqtok.evaluation.protocols import PROTOCOL, mean_psnr, psnr, ssim


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def pictures():
    sizes = [(30, 21), (16, 16), (9, 40), (31, 20), (12, 12), (16, 16), (8, 33)]
    return [picture(*size, seed=i) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def result(tokenizer, pictures):
    return report.evaluate(tokenizer, pictures, stability_samples=5)


# -- the protocol


def test_psnr_by_hand():
    black, dark = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 0, 0))
    assert psnr(dark, black) == pytest.approx(
        10 * math.log10(3 / 0.2**2), abs=1e-5
    )  # one of three channels is off by 0.2
    assert psnr(black, black) == math.inf
    assert psnr(black.convert("L"), Image.new("L", (4, 4), 51)) == pytest.approx(20 * math.log10(5), abs=1e-5)
    with pytest.raises(ValueError, match="cannot compare"):
        psnr(black, Image.new("RGB", (4, 5)))
    assert mean_psnr([10.0, math.inf, 20.0]) == 15
    assert mean_psnr([math.inf]) is None


@pytest.mark.parity
@pytest.mark.parametrize("size", [(11, 11), (24, 33)])
def test_ssim_and_psnr_are_those_of_scikit_image(size):
    metrics = pytest.importorskip("skimage.metrics")
    original = np.asarray(picture(*size))
    noisy = np.clip(original + np.random.default_rng(0).normal(0, 20, original.shape), 0, 255).astype(np.uint8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    expected = metrics.structural_similarity(noisy / 255, original / 255, data_range=1, **options)
    pair = Image.fromarray(noisy), Image.fromarray(original)
    assert ssim(*pair) == pytest.approx(expected, abs=1e-5)
    assert psnr(*pair) == pytest.approx(metrics.peak_signal_noise_ratio(original, noisy), abs=1e-5)


def test_ssim_of_pictures_without_a_window():
    assert ssim(picture(10, 40), picture(10, 40)) is None
    assert ssim(picture(11, 40), picture(11, 40)) == 1


# -- the report


def test_codes_are_counted_without_padding(tokenizer, pictures, result):
    for level, size in enumerate([16, 32]):
        seen = collections.Counter()
        for image in pictures:
            seen.update(tokenizer.encode(image).levels[level].flatten().tolist())
        total = sum(seen.values())
        entropy = -sum(n / total * math.log2(n / total) for n in seen.values())
        assert result["usage"][level] == len(seen) / size
        assert result["entropy_bits"][level] == pytest.approx(entropy)
        assert result["perplexity"][level] == pytest.approx(2**entropy)
        assert result["codes_per_entry"][level] == total / size
        assert len(seen) > size / 2, "these pictures use too few codes to test anything"


def test_quality_is_a_mean_over_pictures(tokenizer, pictures, result):
    reconstructions = [tokenizer.reconstruct(image)[0] for image in pictures]
    assert result["psnr_db"] == pytest.approx(
        np.mean([psnr(a, b) for a, b in zip(reconstructions, pictures, strict=True)])
    )
    by_hand = [ssim(a, b) for a, b in zip(reconstructions, pictures, strict=True)]
    assert by_hand.count(None) == result["ssim_too_small"] == 2
    assert result["ssim"] == pytest.approx(np.mean([value for value in by_hand if value is not None]))
    coarse = [tokenizer.decode(tokenizer.encode(image, num_levels=1))[0] for image in pictures]
    expected = np.mean([psnr(a, b) for a, b in zip(coarse, pictures, strict=True)])
    assert result["psnr_db_by_levels"] == [pytest.approx(expected), result["psnr_db"]]
    assert expected != pytest.approx(result["psnr_db"])


def test_the_rate_counts_padding(pictures, result):
    codes = sum(math.ceil(p.height / 8) * math.ceil(p.width / 8) for p in pictures)
    pixels = sum(p.height * p.width for p in pictures)
    assert result["bits_per_pixel"] == pytest.approx(codes * (4 + 4 * 5) / pixels)
    assert result["tokenizer"]["nominal_bits_per_pixel"] == 4 / 64 + 5 / 16


def test_the_result_is_json_and_complete(tokenizer, result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["protocol"] == PROTOCOL == "vqtok-eval v1"
    assert result["data"]["num_images"] == 7 and result["data"]["num_skipped"] == 0
    assert result["tokenizer"]["layout"] == tokenizer.layout.to_dict()
    assert min(result["speed"].values()) > 0 and len(result["speed"]) == 4
    assert result["machine"]["threads"] == 1 and result["machine"]["processor"]
    assert set(result["versions"]) == {"vqtok", "torch", "torchmetrics", "transformers", "pillow"}
    stability = result["code_stability"]
    assert stability["num_images"] == 5
    assert min(stability["batch_and_alone"]) > 0.98 and min(stability["float32_and_bfloat16"]) > 0.5


def test_perfect_pictures_are_counted_apart(tokenizer, pictures, monkeypatch):
    def decode(codes, batch_size=None):
        return [pictures[0] if i == 0 else Image.new("RGB", (w, h)) for i, (h, w) in enumerate(codes.sizes.tolist())]

    monkeypatch.setattr(tokenizer, "decode", decode)
    result = report.evaluate(tokenizer, pictures[:3], stability_samples=0)
    expected = np.mean([psnr(Image.new("RGB", p.size), p) for p in pictures[1:3]])
    assert result["psnr_perfect"] == 1 and result["psnr_db"] == pytest.approx(expected)
    assert result["code_stability"] is None
    alone = report.evaluate(tokenizer, pictures[:1], stability_samples=0)
    assert alone["psnr_db"] is None and "perfect" in report.to_markdown([alone])
    json.dumps(alone, allow_nan=False)


def test_stability_sees_codes_that_depend_on_the_batch(tokenizer, pictures, monkeypatch):
    encode = tokenizer.encode

    def unstable(media, **options):
        codes = encode(media, **options)
        if not isinstance(media, list):
            codes = Codes(tuple((level + 1) % 16 for level in codes.levels), codes.sizes, codes.layout)
        return codes

    monkeypatch.setattr(tokenizer, "encode", unstable)
    stability = report.code_stability(tokenizer, pictures[:3])
    assert max(stability["batch_and_alone"]) == 0
    assert tokenizer.model.dtype == torch.float32


def test_chunks_do_not_change_the_numbers(tokenizer, pictures, result, monkeypatch):
    monkeypatch.setattr(report, "_CHUNK_PICTURES", 2)
    again = report.evaluate(tokenizer, [{"image": np.asarray(p), "text": None} for p in pictures], stability_samples=0)
    for key in ("usage", "perplexity", "bits_per_pixel", "data", "ssim_too_small"):
        assert again[key] == result[key], key
    assert again["psnr_db"] == pytest.approx(result["psnr_db"]) and again["ssim"] == pytest.approx(result["ssim"])


def test_a_grey_tokenizer_is_compared_in_grey(pictures):
    grey = make_tokenizer(num_channels=1)
    (decoded,) = grey.reconstruct(pictures[0])
    result = report.evaluate(grey, pictures[:1], stability_samples=1)
    assert result["psnr_db"] == pytest.approx(psnr(decoded, pictures[0].convert("L")))


def test_bad_data(tokenizer, pictures):
    with pytest.raises(ValueError, match="no pictures"):
        report.evaluate(tokenizer, [])
    with pytest.raises(ValueError, match="picture 1 has 20x7 pixels, a side smaller than the stride of 8"):
        report.evaluate(tokenizer, [pictures[0], picture(7, 20)])


def test_tables(tokenizer, pictures):
    results = report.compare(
        {"a|b": tokenizer, "other": make_tokenizer(strides=[4], quantizer=vectors(8))}, pictures[:3]
    )
    assert results[0]["data"] == results[1]["data"] and [r["name"] for r in results] == ["a|b", "other"]
    lines = report.to_markdown(results).splitlines()
    assert len(lines) == 4 and "a\\|b" in lines[2]
    assert {line.replace("\\|", "").count("|") for line in lines} == {11}
    assert f"{results[1]['psnr_db']:.2f}" in lines[3] and "16 / 32" in lines[2]
    with pytest.raises(ValueError, match="different protocols"):
        report.to_markdown([results[0], {**results[1], "protocol": "vqtok-eval v0"}])
