"""How well the judge of spoken numbers hears real joins of test phrases, as they are and disturbed; prints a Markdown table.

    python benchmarks/word_judge.py [--num_phrases 200]

Nothing here was used to choose the judge's settings: those come from phrases of the train split.
"""

import argparse
import platform
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import torch

from vqtok.audio.phrases import SpokenNumbers
from vqtok.audio.resampling import resample
from vqtok.audio.words import SAMPLING_RATE
from vqtok.evaluation.report import machine
from vqtok.evaluation.word_judge import WordJudge


def noisy(sound: np.ndarray, decibels: float) -> np.ndarray:
    """White noise at a ratio of energies."""
    noise = np.random.default_rng(0).standard_normal(len(sound))
    return (sound + noise * np.sqrt((sound**2).mean() / 10 ** (decibels / 10))).astype(np.float32)


def coarse(sound: np.ndarray, decibels: float) -> np.ndarray:
    """Every point of the spectrogram off by some decibels and about a radian at random, as of a codec with few bits."""
    generator, window = torch.Generator().manual_seed(0), torch.hann_window(512)
    spectrum = torch.stft(torch.from_numpy(sound), 512, 128, window=window, return_complex=True)
    jitter, turn = (torch.randn(spectrum.shape, generator=generator) for _ in range(2))
    spectrum = spectrum * 10 ** (decibels * jitter / 20) * torch.exp(1j * turn)
    return torch.istft(spectrum, 512, 128, window=window, length=len(sound)).numpy()


def mu_law(sound: np.ndarray, bits: int) -> np.ndarray:
    """Each sample companded (mu = 255) and rounded to a few bits."""
    steps = 2**bits - 1
    peak = np.abs(sound).max()
    companded = np.sign(sound) * np.log1p(255 * np.abs(sound) / peak) / np.log(256)
    rounded = np.round((companded + 1) / 2 * steps) / steps * 2 - 1
    return (np.sign(rounded) * (256 ** np.abs(rounded) - 1) / 255 * peak).astype(np.float32)


def low_pass(sound: np.ndarray, hertz: float) -> np.ndarray:
    """Without anything above a frequency."""
    spectrum = np.fft.rfft(sound)
    spectrum[np.fft.rfftfreq(len(sound), 1 / SAMPLING_RATE) > hertz] = 0
    return np.fft.irfft(spectrum, len(sound)).astype(np.float32)


CONDITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "real joins (gaps, gains and speeds of the data set)": lambda sound: sound,
    "20 dB softer": lambda sound: sound * np.float32(0.1),
    "4 % faster again": lambda sound: resample(sound[None], 104, 100)[0],
    "4 % slower again": lambda sound: resample(sound[None], 96, 100)[0],
    "half a second of silence around": lambda sound: np.pad(sound, SAMPLING_RATE // 2),
    "white noise at 15 dB": lambda sound: noisy(sound, 15),
    "white noise at 10 dB": lambda sound: noisy(sound, 10),
    "magnitudes off by 4 dB, phases by a radian": lambda sound: coarse(sound, 4),
    "magnitudes off by 6 dB, phases by a radian": lambda sound: coarse(sound, 6),
    "mu-law with 4 bits": lambda sound: mu_law(sound, 4),
    "nothing above 3.5 kHz": lambda sound: low_pass(sound, 3500),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_phrases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    judge = WordJudge()
    dataset = SpokenNumbers("test", arguments.num_phrases, arguments.seed)
    items = [dataset[i] for i in range(len(dataset))]
    texts = [item["text"] for item in items]
    print("| disturbance | word accuracy % | right phrases % | subst. / del. / ins. | CPU seconds per 100 phrases |")
    print("|---|---:|---:|---:|---:|")
    for name, disturb in CONDITIONS.items():
        sounds = [disturb(item["audio"][0]) for item in items]
        start = time.process_time()
        scores = judge.judge(sounds, texts, SAMPLING_RATE)
        seconds = (time.process_time() - start) * 100 / len(items)
        edits = " / ".join(str(scores[f"num_{kind}"]) for kind in ("substitutions", "deletions", "insertions"))
        accuracy, right = 100 * scores["word_accuracy"], 100 * scores["phrase_accuracy"]
        print(f"| {name} | {accuracy:.1f} | {right:.1f} | {edits} | {seconds:.1f} |", flush=True)
    words = sum(len(text.split()) for text in texts)
    facts = machine(torch.device("cpu"))
    print(f"\n{len(items)} phrases with {words} words, seed {arguments.seed}; {date.today()}, ", end="")
    print(f"{facts['processor']}, {facts['threads']} threads, Python {platform.python_version()}.")


if __name__ == "__main__":
    main()
