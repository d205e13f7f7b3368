"""Losses of sound, worked out by hand and against slow versions."""

import math

import numpy as np
import pytest
import torch
import torchaudio

from vqtok.audio.losses import (
    adversarial_loss,
    amplitudes,
    discriminator_loss,
    feature_matching_loss,
    mel_bank,
    spectral_losses,
)


def tone(frequency, rate=8000, samples=4000, loudness=0.5):
    return loudness * torch.sin(2 * math.pi * frequency * torch.arange(samples, dtype=torch.float64) / rate).float()


def test_a_sine_of_amplitude_one_peaks_at_one_half():
    spectrum = amplitudes(tone(1000, loudness=1)[None, None], 256)
    assert spectrum.shape == (1, 129, 63)
    middle = spectrum[0, :, 30]
    assert int(middle.argmax()) == 32 and float(middle.max()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("window", "floor"), [(64, 1e-5), (512, 1e-5), (512, 3e-3)])
def test_the_distances_against_numpy(window, floor):
    """Frame by frame in float64, from the definition."""
    generator = torch.Generator().manual_seed(0)
    x, y = 0.1 * torch.randn(2, 2, 1, 2000, generator=generator)
    found = spectral_losses(x, y, 8000, [window], floor=floor)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    bank = mel_bank(8000, window).double().numpy()
    mel, stft = [], []
    for own, other in zip(x[:, 0].double().numpy(), y[:, 0].double().numpy(), strict=True):
        spectra = []
        for sound in (own, other):
            padded = np.pad(sound, window // 2)
            starts = range(0, len(sound) + 1, window // 4)
            spectra.append(np.array([np.abs(np.fft.rfft(hann * padded[a : a + window])) for a in starts]) / hann.sum())
        mels = [np.log10(np.maximum(s @ bank.T, floor)) for s in spectra]
        mel.append(np.abs(mels[0] - mels[1]).mean())
        ratio = np.linalg.norm(spectra[0] - spectra[1]) / np.linalg.norm(spectra[1])
        logs = [np.log(np.maximum(s, floor)) for s in spectra]
        stft.append(ratio + np.abs(logs[0] - logs[1]).mean())
    assert float(found["mel_loss"]) == pytest.approx(np.mean(mel), rel=1e-4)
    assert float(found["stft_loss"]) == pytest.approx(np.mean(stft), rel=1e-4)


@pytest.mark.parametrize(("rate", "window"), [(16_000, 2048), (44_100, 32), (8000, 64), (24_000, 512)])
def test_no_band_is_empty(rate, window):
    bank = mel_bank(rate, window)
    assert bank.shape[1] == window // 2 + 1 and bool((bank.sum(1) > 0).all())
    assert len(bank) <= max(5, round(window / 6.4))
    expected = torchaudio.functional.melscale_fbanks(window // 2 + 1, 0, rate / 2, len(bank), rate)
    assert bank.equal(expected.T)


def test_equal_sound_has_no_distance_and_windows_are_averaged():
    sound = tone(700)[None, None]
    assert all(float(v) < 1e-5 for v in spectral_losses(sound, sound, 8000, [64, 256]).values()), "rounding of the FFT"
    parts = [spectral_losses(0 * sound, sound, 8000, [w])["mel_loss"] for w in (64, 256)]
    both = spectral_losses(0 * sound, sound, 8000, [64, 256], ["mel"])
    assert set(both) == {"mel_loss"} and both["mel_loss"] == pytest.approx(float(sum(parts)) / 2)


def test_below_the_floor_nothing_is_heard():
    sound, whisper = tone(700)[None, None], 1e-3 * tone(2000)[None, None]
    losses = [
        spectral_losses(sound + whisper, sound, 8000, [256], ["mel"], floor)["mel_loss"] for floor in (1e-5, 1e-2)
    ]
    assert losses[0] > 0.05 and losses[1] < 1e-3


@pytest.mark.parametrize("samples", [1, 100, 4000])
def test_silence_and_short_clips_have_finite_gradients(samples):
    sound = torch.zeros(1, 1, samples)
    made = (1e-3 * torch.randn(1, 1, samples)).requires_grad_()
    for start in (made, torch.zeros(1, 1, samples, requires_grad=True)):
        terms = spectral_losses(start, sound, 8000, [2048, 64])
        sum(terms.values()).backward()
        assert all(term.isfinite() for term in terms.values()) and start.grad.isfinite().all()


def test_hinge_and_least_squares_by_hand():
    real, fake = (
        [torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0]])],
        [torch.tensor([[-2.0, 0.0]]), torch.tensor([[1.0]])],
    )
    # hinge: first (0 + 0.5) / 2 + (0 + 1) / 2 = 0.75, second 0 + 2; least squares: first (1 + 0.25) / 2 + 4 / 2, second 0 + 1
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx((0.75 + 2) / 2)
    assert float(discriminator_loss(real, fake, "least_squares")) == pytest.approx((2.625 + 1) / 2)
    assert float(adversarial_loss(fake, "hinge")) == pytest.approx((1 - 1) / 2)
    assert float(adversarial_loss(fake, "least_squares")) == pytest.approx(((9 + 1) / 2 + 0) / 2)


def test_feature_matching_is_relative_and_moves_the_made_side_only():
    real = [[torch.tensor([2.0, -2.0]).requires_grad_()], [torch.tensor([100.0])]]
    fake = [[torch.tensor([1.0, -2.0]).requires_grad_()], [torch.tensor([150.0])]]
    loss = feature_matching_loss(real, fake)
    assert loss.item() == pytest.approx((0.25 + 0.5) / 2)
    loss.backward()
    assert real[0][0].grad is None and fake[0][0].grad.tolist() == [-0.125, 0.0]
