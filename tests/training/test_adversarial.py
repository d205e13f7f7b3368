"""A tokenizer against discriminators: what moves when, accumulation, and resuming to the last bit."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from vqtok.audio import AudioVQConfig, AudioVQModel
from vqtok.audio.discriminators import AudioDiscriminator, AudioDiscriminatorConfig
from vqtok.training import AdversarialArguments, AdversarialStep, StepSampler, TrainingArguments, fit, step_loader

TINY = {
    "sampling_rate": 8000,
    "downsampling_ratios": [4, 5],
    "strides": [20],
    "quantizer": {
        "type": "residual",
        "num_codebooks": 2,
        "depth_dropout": 0.5,
        "layer": {"type": "vector", "codebook_size": 8},
    },
    "hidden_sizes": [4, 6],
    "latent_size": 4,
    "dilations": [1],
    "loss_windows": [64],
}
TERMS = {"discriminator_loss", "adversarial_loss", "feature_matching_loss"}


class Tones(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        pitch = 0.1 + torch.rand(1, generator=generator)
        return (pitch * torch.arange(400)).sin()[None] * 0.5 + 0.05 * torch.randn(1, 400, generator=generator)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not before[name].equal(after[name])}


def run(folder, *, break_at=None, play=None, watch=None, **options):
    """Train; returns the weights of both and the history. `break_at` raises an error before that step, as a crash would."""
    settings = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "save_every": 2}
    args = TrainingArguments(output_dir=str(folder), log_every=1, average_decay=0.9, **{**settings, **options})
    torch.manual_seed(0)
    model = AudioVQModel(AudioVQConfig(**TINY))
    config = AudioDiscriminatorConfig(periods=[2], windows=[64], period_hidden_size=2, spectrum_hidden_size=2)
    discriminator = AudioDiscriminator(config)

    class Step(AdversarialStep):
        number = 0

        def __call__(self, batches, rate):
            if break_at is not None and self.number == break_at:
                raise RuntimeError("crash")
            self.number += 1
            before = state(self.model), state(self.discriminator)
            metrics = super().__call__(batches, rate)
            if watch is not None:
                watch(
                    self, metrics, changed(before[0], state(self.model)), changed(before[1], state(self.discriminator))
                )
            return metrics

    step = Step(
        Accelerator(cpu=True), model, args, 16, discriminator, play or AdversarialArguments(adversarial_start=2)
    )

    def loader(start):
        parts = args.gradient_accumulation_steps
        sampler = StepSampler([np.arange(16)], args.batch_size, args.max_steps, args.seed, start, 0, 1, parts)
        return step_loader(Tones(), torch.stack, sampler)

    history = fit(step.accelerator, step, loader, args)
    assert step.raw.keys() == model.state_dict().keys() and changed(step.raw, state(model)), "the average is published"
    return {**state(model), **{f"d.{n}": v for n, v in state(discriminator).items()}}, history


def equal(a, b):
    assert a.keys() == b.keys() and not changed(a, b)


def test_a_crash_anywhere_and_the_same_command_again_ends_with_equal_weights_of_both(tmp_path):
    whole, history = run(tmp_path / "whole")
    for crash in (1, 3, 5):  # before and after the discriminators join
        with pytest.raises(RuntimeError, match="crash"):
            run(tmp_path / f"cut{crash}", break_at=crash)
        AcceleratorState._reset_state(reset_partial_state=True)
        again, resumed = run(tmp_path / f"cut{crash}")
        equal(whole, again)
        assert resumed[-1] == history[-1]
        AcceleratorState._reset_state(reset_partial_state=True)


def test_discriminators_join_at_their_step_and_then_both_move(tmp_path):
    seen = []

    def watch(step, metrics, codec, discriminator):
        assert metrics.keys() >= {"loss", "mel_loss", "commitment_loss", *TERMS}
        assert any(name.startswith("encoder") for name in codec) and any(name.startswith("decoder") for name in codec)
        assert all(p.grad is None for p in step.discriminator.parameters()), "nothing is left for the next step"
        seen.append((bool(discriminator), float(metrics["discriminator_loss"]) > 0))

    run(tmp_path, watch=watch, final_learning_rate=0.5)
    assert seen == [(False, False)] * 2 + [(True, True)] * 4


def test_accumulated_parts_move_both_as_the_whole_batch_does(tmp_path):
    """Up to rounding and to what is drawn per part: without dropout of depth both see the same losses."""
    plain = {**TINY["quantizer"], "depth_dropout": 0.0}
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = AudioVQModel(AudioVQConfig(**{**TINY, "quantizer": plain}))
        model.init_codebooks([torch.stack([Tones()[i] for i in range(16)])])
        config = AudioDiscriminatorConfig(periods=[2], windows=[64], period_hidden_size=2, spectrum_hidden_size=2)
        discriminator = AudioDiscriminator(config)
        args = TrainingArguments(
            output_dir=str(tmp_path), gradient_accumulation_steps=parts, max_grad_norm=0, average_decay=0
        )
        step = AdversarialStep(Accelerator(cpu=True), model, args, 16, discriminator, AdversarialArguments())
        step.prepared.train()
        batch = torch.stack([Tones()[i] for i in range(8)])
        metrics = step(list(batch.split(8 // parts)), 1e-3)
        results.append((metrics, state(discriminator)))
        AcceleratorState._reset_state(reset_partial_state=True)
    (one, d), (two, e) = results
    for name in TERMS - {"feature_matching_loss"}:  # that one is relative to each part
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    for name in d:
        torch.testing.assert_close(d[name], e[name], rtol=0, atol=2e-4)


def test_fp16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 does not go with discriminators: use bf16 or no"):
        run(tmp_path, mixed_precision="fp16")


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    own = AudioDiscriminator.own_loss
    monkeypatch.setattr(AudioDiscriminator, "own_loss", lambda *outputs: own(*outputs) * torch.nan)
    with pytest.raises(FloatingPointError, match="discriminators' gradient has the norm nan"):
        run(tmp_path, play=AdversarialArguments())
