"""What a tokenizer keeps of sound, in short: distances, use of the codes, rates."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from vqtok.audio.losses import spectral_losses
from vqtok.auto import VQTokenizer
from vqtok.quantizers import code_counts, perplexity, usage

MEL_WINDOWS = (2048, 1024, 512, 256, 128, 64, 32)  # the windows of DAC


def sound_metrics(tokenizer: VQTokenizer, clips: Any) -> dict[str, Any]:
    """A JSON-able dict of means over clips, and the use of the codes over all of them.

    Args:
        tokenizer: of audio.
        clips: a data set of `{"audio": float32 (C, T), "sampling_rate": int}`.
    """
    levels, rate = tokenizer.layout.levels, tokenizer.processor.sampling_rate
    counts = [
        [torch.zeros(level.codebook_size, dtype=torch.int64) for _ in range(level.num_codebooks)] for level in levels
    ]
    mel, si_sdr, seconds = [], [], 0.0
    for index in range(len(clips)):
        item = clips[index]
        codes = tokenizer.encode(item)
        made, sound = (
            torch.atleast_2d(torch.as_tensor(each))[None] for each in (tokenizer.decode(codes)[0], item["audio"])
        )
        mel.append(float(spectral_losses(made, sound, rate, MEL_WINDOWS, ["mel"])["mel_loss"]))
        if float(sound.abs().max()) > 0:
            si_sdr.append(float(scale_invariant_signal_distortion_ratio(made.flatten(1), sound.flatten(1)).mean()))
        seconds += sound.shape[-1] / rate
        for own, level, layout in zip(counts, codes.levels, levels, strict=True):
            for each, values in zip(own, level.unbind(1), strict=True):
                each += code_counts(values, layout.codebook_size)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "num_clips": len(clips),
        "seconds": seconds,
        "mel_distance": mean(mel),
        "si_sdr_db": mean(si_sdr),
        "kbps": tokenizer.model.config.kbps(),
        "usage": [mean([usage(each) for each in own]) for own in counts],
        "perplexity": [mean([float(perplexity(each)) for each in own]) for own in counts],
        "fingerprint": tokenizer.fingerprint,
        "parameters": sum(parameter.numel() for parameter in tokenizer.model.parameters()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def audio_card(metrics: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """The README.md of a folder with an audio tokenizer."""
    arguments = training["arguments"]
    return f"""---
library_name: vqtok
tags: [vqtok, audio-tokenization, neural-codec]
---
# {metrics["name"]}

A VQ tokenizer of sound: {metrics["kbps"]:.4g} kbps, {metrics["parameters"]:,} parameters.

```python
from vqtok import VQTokenizer

tok = VQTokenizer.from_pretrained("{metrics["name"]}")
codes = tok.encode(["voice.wav"])
sound = tok.decode(codes)[0]
```

On {metrics["num_clips"]} held-out clips ({metrics["seconds"]:.0f} s, {metrics["date"][:10]}): SI-SDR {metrics["si_sdr_db"]:.2f} dB,
mel distance (log10, mean over DAC's seven windows) {metrics["mel_distance"]:.4f}.
Trained for {arguments["max_steps"]} steps of {arguments["batch_size"]} crops of {arguments["dataset"]}.
The fingerprint of this code space is `{metrics["fingerprint"]}`.
"""
