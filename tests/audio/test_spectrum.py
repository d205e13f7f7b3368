"""Spectra in the place of convolutions: slow twins, and the sound comes back from its own spectra."""

import math

import pytest
import torch

from vqtok.audio.configuration_audio_vq import AudioVQConfig
from vqtok.layers import TimeSpectrum, TimeSynthesis

SHAPES = [(640, 160, False), (60, 20, False), (60, 20, True), (80, 20, True), (70, 10, False)]


def hann(window):
    return torch.tensor([math.sin(math.pi * (n + 0.5) / window) ** 2 for n in range(window)])


def sound_of(channels, samples, seed=0):
    return 0.3 * torch.randn(2, channels, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("window", "hop", "causal"), [(80, 20, False), (60, 20, True)])
def test_features_of_a_frame_by_hand(window, hop, causal):
    """A transform as a sum of sines; the frame ends with its hop, or lies around it."""
    bins = window // 2 + 1
    layer = TimeSpectrum(2, 6 * bins, window, hop, causal)
    with torch.no_grad():
        layer.conv.weight.copy_(torch.eye(6 * bins)[..., None])
        layer.conv.bias.zero_()
    x = sound_of(2, 5 * hop)
    features = layer(x).detach()
    assert features.shape == (2, 6 * bins, 5)
    start = 2 * hop - (window - hop if causal else (window - hop) // 2)  # of frame 2
    time = torch.arange(window, dtype=torch.float64)
    for channel in range(2):
        piece = torch.zeros(window, dtype=torch.float64)
        for n in range(window):
            if 0 <= start + n < x.shape[-1]:
                piece[n] = x[1, channel, start + n] * hann(window)[n]
        for k in (0, 1, bins - 1):
            angle = 2 * math.pi * k * time / window
            real, imag = (piece * angle.cos()).sum() / window**0.5, -(piece * angle.sin()).sum() / window**0.5
            size = torch.hypot(real, imag)
            level = torch.log1p(size / 0.01)
            wanted = torch.stack([level, level * real / size, level * imag / size])
            own = features[1].unflatten(0, (2, 3, bins))[channel, :, k, 2]
            assert torch.allclose(own.double(), wanted, atol=2e-5)


@pytest.mark.parametrize(("window", "hop", "causal"), SHAPES)
def test_a_head_that_is_told_the_spectra_gives_the_sound(window, hop, causal):
    """Exactly where all frames overlap, so windows and transforms are scaled as they must be."""
    bins, steps = window // 2 + 1, 24
    head = TimeSynthesis(2 * bins, 1, window, hop, causal)
    with torch.no_grad():
        head.conv.weight.copy_(torch.eye(2 * bins)[..., None])
        head.conv.bias.zero_()
    x = sound_of(1, steps * hop, seed=1)
    # Frames as the head lays them: a causal one begins with its hop.
    before, after = (0, window - hop) if causal else ((window - hop) // 2, -(-(window - hop) // 2))
    frames = torch.nn.functional.pad(x, (before, after)).unfold(-1, window, hop)
    spectra = torch.fft.rfft(frames * hann(window), norm="ortho")[:, 0].transpose(1, 2)
    told = torch.cat([spectra.abs().clamp_min(1e-9).log() + 4, spectra.angle()], 1)
    y = head(told).detach()
    assert y.shape == x.shape
    whole = slice(window, steps * hop - window)
    assert (y - x)[..., whole].abs().max() < 1e-5


@pytest.mark.parametrize(("window", "hop", "causal"), SHAPES)
@pytest.mark.parametrize("more", [0, 1, 7])
def test_what_a_result_sees_is_what_the_layers_say(window, hop, causal, more):
    layer = TimeSynthesis(3, 1, window, hop, causal)
    x = torch.randn(1, 3, 31, requires_grad=True)
    layer(x)[..., 15 * hop - more : 16 * hop + more].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero().flatten()
    assert (15 - int(seen.min()), int(seen.max()) - 15) == (layer.seen(more, 0), layer.seen(more, 1))
    front = TimeSpectrum(1, 3, window, hop, causal)
    x = torch.randn(1, 1, 31 * hop, requires_grad=True)
    front(x)[..., 15].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero().flatten()
    assert (15 * hop - int(seen.min()), int(seen.max()) - (16 * hop - 1)) == front.sees
    assert not causal or front.sees[1] == layer.seen(more, 1) - (more > 0) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spectral_window": 300}, "an even multiple of the first ratio 160"),
        ({"spectral_window": 320}, "from 3 times"),
        ({"encoder_front": "mel"}, "encoder_front"),
        ({"decoder_head": "mel"}, "decoder_head"),
        ({"encoder_front": "convolution"}, "downsampling_ratios"),
    ],
)
def test_bad_configs_are_refused(changes, words):
    fields = {"downsampling_ratios": [160, 2], "hidden_sizes": [8, 8], "encoder_front": "stft", "decoder_head": "istft"}
    AudioVQConfig(**fields)
    with pytest.raises(Exception, match=words):
        AudioVQConfig(**{**fields, **changes})


def test_the_head_is_no_part_of_what_decides_codes():
    fields = {"downsampling_ratios": [20, 2], "strides": [40], "hidden_sizes": [8, 8], "spectral_window": 60}
    plain, head, front = (
        AudioVQConfig(**fields, **more).code_fields
        for more in ({}, {"decoder_head": "istft"}, {"encoder_front": "stft"})
    )
    assert plain == head != front and front["spectral_window"] == 60
    assert "encoder_front" not in plain, "codecs of before keep their fingerprints"
