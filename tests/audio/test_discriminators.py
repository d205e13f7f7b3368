"""AudioDiscriminator: shapes, what it sees, and its folder."""

import pytest
import torch

from vqtok.audio.discriminators import (
    AudioDiscriminator,
    AudioDiscriminatorConfig,
    load_discriminator,
    read_discriminator_config,
    save_discriminator,
)

TINY = {"periods": [2, 3], "windows": [256, 64], "period_hidden_size": 4, "spectrum_hidden_size": 4}


def make(**changes):
    torch.manual_seed(0)
    return AudioDiscriminator(AudioDiscriminatorConfig(**{**TINY, **changes}))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("samples", [1, 500, 1601])
def test_sound_of_any_length_is_judged(channels, samples):
    output = make(num_channels=channels)(torch.randn(3, channels, samples))
    assert len(output.logits) == len(output.features) == 4
    for logits, features in zip(output.logits, output.features, strict=True):
        assert logits.shape[:2] == (3, 1) and logits.isfinite().all() and logits.numel() >= 3
        assert len(features) == 5 and all(len(each) == 3 for each in features)


def test_each_clip_is_judged_alone():
    model, sound = make().eval(), torch.randn(3, 1, 800)
    together, alone = model(sound), model(sound[1:2])
    for a, b in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(a[1:2], b)


def test_a_period_discriminator_sees_every_pth_sample():
    """One whose kernels are 5 rows long and never mix columns: a change of sample i moves column i mod p only."""
    model = make(periods=[3], windows=[]).eval()
    sound = torch.randn(1, 1, 300)
    moved = sound.clone()
    moved[..., 100] += 1
    changed = (model(sound).logits[0] - model(moved).logits[0]).abs().sum((0, 1, 2)) > 0
    assert changed.tolist() == [False, True, False]


def test_it_learns_to_tell_and_the_codec_learns_to_fool():
    """Noise against tones: its own loss falls far below that of not knowing; the gradient of the codec's loss reaches the sound."""
    model = make(loss="hinge")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    time = torch.arange(800)
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        pitch = 0.1 + 0.3 * torch.rand(4, 1, 1, generator=generator)
        real, fake = (pitch * time).sin() * 0.3, 0.3 * torch.randn(4, 1, 800, generator=generator)
        loss = model.own_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.5, "2 is not knowing"
    fake.requires_grad_()
    terms = model.codec_losses(model(real), model(fake))
    assert set(terms) == {"adversarial_loss", "feature_matching_loss"}
    sum(terms.values()).backward()
    assert fake.grad.abs().sum() > 0


def test_saved_and_loaded_it_says_the_same(tmp_path):
    model, sound = make(loss="least_squares"), torch.randn(1, 1, 700)
    save_discriminator(model, tmp_path / "training")
    assert sorted(p.name for p in (tmp_path / "training").iterdir()) == [
        "discriminator.safetensors",
        "discriminator_config.json",
    ]
    back = load_discriminator(tmp_path / "training")
    assert back.config.to_dict() == model.config.to_dict()
    assert all(a.equal(b) for a, b in zip(back(sound).logits, model(sound).logits, strict=True))
    model.save_pretrained(tmp_path / "plain")
    plain = AudioDiscriminator.from_pretrained(tmp_path / "plain")
    assert all(a.equal(b) for a, b in zip(plain(sound).logits, model(sound).logits, strict=True))


def test_damaged_folders_are_named(tmp_path):
    save_discriminator(make(), tmp_path)
    weights = tmp_path / "discriminator.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:100])
    with pytest.raises(ValueError, match="discriminator.safetensors is damaged"):
        load_discriminator(tmp_path)
    save_discriminator(make(periods=[2]), tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "discriminator.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not fit discriminator_config.json"):
        load_discriminator(tmp_path)
    for text in ("{", "[]", '{"model_type": "bert"}', '{"model_type": "vqtok_audio_discriminator", "perods": [2]}'):
        (tmp_path / "discriminator_config.json").write_text(text)
        with pytest.raises(ValueError, match="discriminator_config.json: "):
            read_discriminator_config(tmp_path / "discriminator_config.json")


@pytest.mark.parametrize(
    "changes",
    [{"num_channels": 3}, {"periods": [1]}, {"windows": [30]}, {"periods": [], "windows": []}, {"loss": "l2"}]
    + [{"period_hidden_size": 0}, {"spectrum_hidden_size": 5000}],
)
def test_impossible_values_are_refused(changes):
    with pytest.raises(ValueError, match="AudioDiscriminatorConfig"):
        make(**changes)
