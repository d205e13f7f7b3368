"""Wrapped codecs keep the promises of every room, and give the codes that transformers' own models give."""

import pytest
import torch
from torch import nn

from tests.audio.test_modeling_audio_vq import AudioTests
from tests.common import TokenizerTests
from tests.tiny_codecs import codec_config, save_codec, wake
from vqtok.audio.wrapped import WrappedAudioConfig, WrappedAudioModel

LENGTHS = [1, 39, 40, 41, 400, 999, 2000]


class WrappedTests(TokenizerTests):
    """The common tests, with a codec's own modules and tables."""

    model_class = WrappedAudioModel
    config_fields = {"codec", "source", "decoder_fingerprint", "license"}
    sizes = [(640,), (880,), (80,)]
    kind: str
    quantizer_terms = {"commitment_loss": 0.25}

    def make_config(self, **changes):
        return WrappedAudioConfig(codec=codec_config(self.kind).to_diff_dict(), **changes)

    def make_model(self, **changes):
        model = super().make_model(**changes)
        wake(model.encoder)
        wake(model.decoder)
        model.init_codebooks([self.make_media(8, self.sizes[0], seed=100)])
        return model

    make_media = AudioTests.make_media


@pytest.mark.slow
class TestEnCodec(WrappedTests):
    kind = "encodec"


@pytest.mark.slow
class TestDAC(WrappedTests):
    kind = "dac"
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0}


@pytest.mark.slow
class TestMimi(WrappedTests):
    kind = "mimi"


@pytest.mark.slow
class TestXCodec(WrappedTests):
    kind = "xcodec"


@pytest.mark.parametrize("case", [TestEnCodec, TestDAC, TestMimi, TestXCodec])
def test_the_promises_in_short(case, tmp_path):
    """What of the classes above is worth its time in every run."""
    tests = case()
    tests.test_forward_decodes_what_encode_says()
    tests.test_a_batch_has_the_codes_of_its_samples()
    tests.test_save_and_load_are_bit_equal(tmp_path)


@torch.no_grad()
def their_codes(kind, model, clip):
    """Of one clip `(1, 1, T)` at the highest rate, prepared as the codec's own extractor does it: int64 `(1, Q, t)`."""
    if kind in ("dac", "xcodec"):  # whose extractors pad to the hop
        clip = nn.functional.pad(clip, (0, -clip.shape[2] % 40))
    if kind == "encodec":
        return model.encode(clip, bandwidth=model.config.target_bandwidths[-1]).audio_codes[0]
    return model.encode(clip).audio_codes


@torch.no_grad()
def their_sound(kind, model, codes):
    out = model.decode(codes[None], [None]) if kind == "encodec" else model.decode(audio_codes=codes)
    return out.audio_values.reshape(len(codes), 1, -1)


@pytest.mark.parametrize("kind", ["encodec", "dac", "mimi", "xcodec"])
def test_codes_and_sound_are_those_of_transformers(kind, tmp_path):
    theirs = save_codec(kind, tmp_path)
    ours = WrappedAudioModel.from_codec(tmp_path)
    used = set()
    for length in LENGTHS:
        clip = AudioTests().make_media(1, (length,), seed=length)
        expected = their_codes(kind, theirs, clip)
        (codes,) = ours.encode(clip).codes
        assert codes.equal(expected), length
        assert codes.shape[2] == -(-length // 40)
        used |= set(codes.flatten().tolist())
        for depth in range(1, codes.shape[1] + 1):
            sound = their_sound(kind, theirs, expected[:, :depth])
            made = ours.decode((codes[:, :depth],)).reconstruction.detach()
            short = 40 * codes.shape[2] - sound.shape[2]
            assert 0 <= short <= (8 if kind == "dac" else 0)
            torch.testing.assert_close(made[..., : sound.shape[2]], sound, rtol=1e-4, atol=1e-5)
            assert not made[..., sound.shape[2] :].any()
    assert len(used) > 8, "codes are all alike: the test shows nothing"
