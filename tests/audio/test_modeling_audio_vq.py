"""AudioVQModel: the promises of every room, and what only sound has."""

import pytest
import torch
from torch import nn

from tests.common import TokenizerTests
from tests.tiny import vectors
from vqtok.audio.configuration_audio_vq import AudioVQConfig
from vqtok.audio.modeling_audio_vq import AudioVQModel

TINY = {"sampling_rate": 8000, "downsampling_ratios": [4, 5, 2], "strides": [40], "hidden_sizes": [8, 12, 16]}
TINY |= {"latent_size": 6, "residual_kernel_size": 3, "dilations": [1, 3], "loss_windows": [256, 64]}
FIELDS = {"sampling_rate", "num_channels", "downsampling_ratios", "strides", "quantizer", "hidden_sizes"}
FIELDS |= {"decoder_hidden_sizes", "latent_size", "kernel_size", "residual_kernel_size", "dilations", "compress"}
FIELDS |= {
    "activation",
    "encoder_front",
    "decoder_head",
    "spectral_window",
    "causal",
    "level_dropout",
    "reconstruction_weight",
    "mel_weight",
    "stft_weight",
    "loss_windows",
    "loss_floor",
}


def residual(num_codebooks=3, size=16, **layer):
    layer = {"type": "vector", "codebook_size": size, **layer}
    return {"type": "residual", "num_codebooks": num_codebooks, "layer": layer}


class AudioTests(TokenizerTests):
    model_class = AudioVQModel
    config_fields = FIELDS
    options: dict = {}
    sizes = [(640,), (880,), (80,)]
    media_terms = {"reconstruction_loss": 1.0, "mel_loss": 1.0}
    quantizer_terms = {"commitment_loss": 0.25}

    def make_config(self, **changes):
        return AudioVQConfig(**{**TINY, **self.options, **changes})

    def make_model(self, **changes):
        """With residual units that do something: they start as the identity."""
        model = super().make_model(**changes)
        with torch.no_grad():
            waking = [module for module in model.modules() if getattr(module, "starts_at_zero", False)]
            for module in waking:
                module.weight.normal_(0, 0.3 / module.in_channels**0.5)
                module.bias.normal_(0, 0.05)
        assert waking and not any(module.weight.eq(0).all() for module in waking)
        model.init_codebooks([self.make_media(8, self.sizes[0], seed=100)])
        return model

    def make_media(self, batch, size, seed=0):
        """Tones that come and go, in noise, so that neighbouring codes differ and coarse levels have something to say."""
        generator = torch.Generator().manual_seed(seed)
        channels = self.make_config().num_channels
        loudness = torch.rand(batch, channels, 8, generator=generator)
        loudness = nn.functional.interpolate(loudness, size, mode="linear")
        pitch = 0.05 + torch.rand(batch, channels, 1, generator=generator)
        tones = loudness * (pitch * torch.arange(size[0])).sin()
        return tones + 0.1 * torch.randn(batch, channels, *size, generator=generator)


class TestResidual(AudioTests):
    options = {"quantizer": residual()}


class TestOneCausalCodebook(AudioTests):
    options = {"quantizer": {"type": "vector", "codebook_size": 32}, "causal": True, "stft_weight": 0.5}
    media_terms = {"reconstruction_loss": 1.0, "mel_loss": 1.0, "stft_loss": 0.5}


class TestAsDAC(AudioTests):
    """Stereo, a stage at the full rate, each codebook with projections of its own on the unit sphere, by gradient."""

    options = {"num_channels": 2, "downsampling_ratios": [1, 2, 4, 5], "hidden_sizes": [4, 8, 12, 16]}
    options |= {"quantizer": residual(codebook_dim=4, metric="cosine", update="gradient"), "mel_weight": 15.0}
    media_terms = {"reconstruction_loss": 1.0, "mel_loss": 15.0}
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0}


class TestAsEnCodec(AudioTests):
    options = {"causal": True, "activation": "elu", "compress": 2, "dilations": [1], "quantizer": residual()}
    options |= {"decoder_hidden_sizes": [16, 16, 24], "reconstruction_weight": 0.1}
    media_terms = {"reconstruction_loss": 0.1, "mel_loss": 1.0}


class TestFSQ(AudioTests):
    options = {"latent_size": 4, "quantizer": {"type": "fsq", "scalar_levels": [8, 5, 5, 5]}, "mel_weight": 0}
    media_terms = {"reconstruction_loss": 1.0}
    quantizer_terms = {}


class TestLevels(AudioTests):
    """As VQ-VAE-2 and Jukebox: three strides, one of them two stages from the next."""

    options = {"downsampling_ratios": [4, 5, 2, 2], "strides": [80, 20, 4], "hidden_sizes": [8, 12, 16, 16]}
    options |= {"quantizer": vectors(16, 24, 32), "activation": "elu"}


class TestCausalLevels(AudioTests):
    options = {"strides": [40, 20, 4], "quantizer": [*vectors(16, 24), residual(2)], "causal": True}


class TestSpectra(AudioTests):
    """Nothing at the rate of samples but Fourier transforms; a window of four frames, of stereo."""

    options = {"num_channels": 2, "downsampling_ratios": [20, 2], "hidden_sizes": [16, 16], "quantizer": residual()}
    options |= {"encoder_front": "stft", "decoder_head": "istft", "spectral_window": 80}


class TestCausalSpectra(AudioTests):
    """Levels, and a window of three frames."""

    options = {"downsampling_ratios": [20, 2], "strides": [40, 20], "hidden_sizes": [16, 16], "activation": "elu"}
    options |= {"quantizer": [*vectors(16), residual(2)], "causal": True}
    options |= {"encoder_front": "stft", "decoder_head": "istft", "spectral_window": 60}


class TestAsSNAC(AudioTests):
    layer = {"type": "vector", "codebook_size": 16, "codebook_dim": 4, "metric": "cosine", "update": "gradient"}
    options = {"downsampling_ratios": [4, 5], "strides": [20], "hidden_sizes": [8, 12]}
    options |= {"quantizer": {"type": "multi_rate", "strides": [4, 2, 1], "layer": layer}}
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0}


KINDS = [TestResidual, TestOneCausalCodebook, TestAsDAC, TestAsEnCodec, TestLevels, TestCausalLevels, TestAsSNAC]
KINDS += [TestSpectra, TestCausalSpectra]


def made(kind) -> tuple[AudioVQModel, AudioTests]:
    case = kind()
    return case.make_model(), case


@pytest.mark.parametrize("kind", KINDS)
def test_clips_padded_to_each_other_have_the_codes_they_have_alone(kind):
    """Of any lengths, with noise where the padding is: alone and in a batch latents agree to 1e-5 of their spread."""
    model, case = made(kind)
    stride = model.layout.stride
    sizes = torch.tensor([[stride * 9], [1], [stride * 3 + 1], [stride * 7 - 1]])
    batch = case.make_media(4, (stride * 9,), seed=3)
    together = model.encode(batch, sizes)
    for i, (size,) in enumerate(sizes.tolist()):
        clip = nn.functional.pad(batch[i : i + 1, :, :size], (0, -size % stride))
        alone = model.encode(clip)
        for z, alone_z, codes, alone_codes in zip(
            together.latents, alone.latents, together.codes, alone.codes, strict=True
        ):
            # The spread is that of the batch: of one code there is none.
            assert (z[i : i + 1, : alone_z.shape[1]] - alone_z).abs().max() <= 1e-5 * float(z.std())
            assert codes[i : i + 1, :, : alone_codes.shape[2]].equal(alone_codes)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_padded_to_each_other_decode_as_alone(kind):
    model, case = made(kind)
    stride = model.layout.stride
    sizes = torch.tensor([[stride * 9], [1], [stride * 3 + 1]])
    codes = model.encode(case.make_media(3, (stride * 9,), seed=4)).codes
    sound = model.decode(codes, sizes).reconstruction.detach()
    spread = float(sound.std())
    for i, (size,) in enumerate(sizes.tolist()):
        steps = -(-size // stride)
        part = [level[i : i + 1, :, : steps * (level.shape[2] // 9)] for level in codes]
        alone = model.decode(part).reconstruction
        assert (sound[i : i + 1, :, : steps * stride] - alone).abs().max() <= 1e-5 * spread
        assert not sound[i, :, steps * stride :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_sees_no_further_than_the_context(kind):
    """And to both its ends, or chunks would be computed with too little or too much around them."""
    model, case = made(kind)
    stride, context = model.config.strides[0], model.encoder.context  # of a multi-rate model the encoder's own step
    steps = 2 * (max(context) // stride + 2) + 1
    middle = steps // 2
    sound = case.make_media(1, (steps * stride,)).requires_grad_()
    features = model.extract(sound)
    coarser: list = []
    for level, each in enumerate(model.config.strides):
        z = model.propose(features, level, coarser)
        coarser.append(z)
        ratio = stride // each
        z[:, middle * ratio : (middle + 1) * ratio].sum().backward(retain_graph=True)
    seen = sound.grad.abs().sum((0, 1)).nonzero().flatten()
    assert (middle * stride - int(seen.min()), int(seen.max()) - ((middle + 1) * stride - 1)) == context


@pytest.mark.parametrize("kind", KINDS)
def test_sound_depends_on_codes_no_further_than_the_context(kind):
    model, case = made(kind)
    context, stride = model.decoder.context, model.config.strides[0]
    steps = 2 * (max(context) // stride + 2) + 1
    middle = steps // 2
    latents = [
        torch.randn(1, steps * stride // each, model.config.latent_size).requires_grad_()
        for each in model.config.strides
    ]
    sound = model.decoder([z.transpose(1, 2) for z in latents])
    sound[..., middle * stride : (middle + 1) * stride].sum().backward()
    for z, each in zip(latents, model.config.strides, strict=True):
        seen = z.grad.abs().sum((0, 2)).nonzero().flatten()
        found = (middle * stride - int(seen.min()) * each, (int(seen.max()) + 1) * each - (middle + 1) * stride)
        assert all(a <= b for a, b in zip(found, context, strict=True))
        assert each != stride or found == context
