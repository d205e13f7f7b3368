"""What a tokenizer keeps of recordings, how well it uses its codes and how fast it is: one dict that JSON can hold."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from vqtok import __version__
from vqtok.auto import VQTokenizer, bits_per_unit
from vqtok.codes import Codes
from vqtok.container import unframe
from vqtok.quantizers import code_counts, entropy_bits, perplexity, usage

from .audio_protocols import DESCRIPTION, PROTOCOL, MeasureError, mel_distance, pesq_wb, si_sdr, stoi
from .report import machine

# The measures of speech, and the optional package that each needs.
_SPEECH = {"pesq_wb": "pesq", "stoi": "pystoi"}
_CHUNK_RECORDINGS, _CHUNK_SECONDS = 16, 60.0  # in memory together, at most

# Rows for orientation, and the words that must stand beside them.
PUBLISHED_SOURCE = (
    "published by others on other data with another script: LibriSpeech test-clean, table 1 of arXiv 2502.04128; "
    "it says which league a number plays in and no more"
)
PUBLISHED = (
    {"name": "EnCodec 24 kHz", "kbps": 6.0, "pesq_wb": 2.77, "stoi": 0.94},
    {"name": "EnCodec 24 kHz", "kbps": 1.5, "pesq_wb": 1.56, "stoi": 0.85},
    {"name": "DAC 16 kHz", "kbps": 6.0, "pesq_wb": 4.01, "stoi": 0.95},
    {"name": "DAC 16 kHz", "kbps": 1.0, "pesq_wb": 1.13, "stoi": 0.73},
)


def evaluate(
    tokenizer: VQTokenizer,
    recordings: Any,
    *,
    batch_size: int | None = None,
    name: str | None = None,
    speech: bool = True,
    num_codebooks: int | None = None,
) -> dict[str, Any]:
    """The measures of one tokenizer on one set of recordings, after "vqtok-audio-eval v1" (see `audio_protocols`).

    Args:
        tokenizer: of audio.
        recordings: what `load_audio` gives at the rate of the tokenizer. Read once, a minute at a time.
        batch_size: see `VQTokenizer.encode`.
        name: what to call the tokenizer in tables; None takes the folder it came from.
        speech: measure PESQ and STOI too, which say nothing about music and take most of the time. One whose package is not
            installed is left out, and `not_measured` says so.
        num_codebooks: of residual codes keep this many; rate, use and files are those of what is kept. None: all.

    Returns:
        A dict that JSON can hold, among others:
        `pesq_wb`, `stoi`, `si_sdr_db`, `mel_distance`: means over the recordings where they are defined, None without any;
        `not_measured`: per measure that was left out, why;
        `failures`: per measure the reasons and how often each;
        `kbps`: `nominal`, `payload` and `file`, the bytes that are written;
        `usage`, `perplexity`, `entropy_bits`: per level a list with one number per codebook, over the whole set;
        `speed`: seconds of sound per second of encoding and of decoding, and their inverse, the real-time factors.

    Raises:
        ValueError: there are no recordings, one has another rate, or comes back with another length.
    """
    tally = _Tally(tokenizer, speech, num_codebooks)
    for chunk in _chunks(recordings, tokenizer.processor.sampling_rate):
        if not tally.num_recordings:
            tokenizer.decode(
                tokenizer.encode(chunk[:1], sampling_rate=tally.rate)
            )  # the first call of everything is slow
        tally.add(chunk, batch_size)
    if not tally.num_recordings:
        raise ValueError("there are no recordings to evaluate on: give at least one")
    model = tokenizer.model
    packages = ["torch", "torchaudio", "torchmetrics", "transformers"]
    packages += [package for key, package in _SPEECH.items() if key in tally.measures]
    return {
        "name": name or Path(model.config.name_or_path).name or type(model).__name__,
        "num_codebooks": num_codebooks,
        "protocol": PROTOCOL,
        **tally.results(),
        "not_measured": tally.not_measured,
        "tokenizer": {
            "class": type(model).__name__,
            "fingerprint": tokenizer.fingerprint,
            "layout": tokenizer.layout.to_dict(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "sampling_rate": tally.rate,
            "nominal_kbps": bits_per_unit(tokenizer.layout) * tally.rate / 1000,
        },
        "data": {**tally.data(), "num_skipped": len(getattr(recordings, "skipped", ()))},
        "machine": machine(next(model.parameters(), torch.empty(0)).device),
        "versions": {"vqtok": __version__, **{package: version(package) for package in packages}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol_description": DESCRIPTION,
    }


def compare(tokenizers: Mapping[str, VQTokenizer], recordings: Any, **options: Any) -> list[dict[str, Any]]:
    """The results of `evaluate` for each tokenizer, by name, on the same recordings; `options` go to `evaluate`."""
    return [evaluate(tokenizer, recordings, name=name, **options) for name, tokenizer in tokenizers.items()]


def to_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table with one row per result of `evaluate`, best read beside others of the same data."""
    header = ["tokenizer", "kbps", "file kbps", "PESQ-WB", "STOI", "SI-SDR dB", "mel distance"]
    header += ["usage %", "x real time enc.", "dec.", "M par."]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for result in results:
        levels = (" ".join(f"{100 * share:.0f}" for share in level) for level in result["usage"])
        perfect = result["si_sdr_db"] is None and result["si_sdr_perfect"]
        rows.append(
            [
                result["name"].replace("|", "\\|"),
                f"{result['kbps']['nominal']:.4g}",
                f"{result['kbps']['file']:.4g}",
                *(_with_failures(result, key, digits) for key, digits in (("pesq_wb", 2), ("stoi", 3))),
                "perfect" if perfect else _with_failures(result, "si_sdr_db", 1),
                _with_failures(result, "mel_distance", 2),
                " / ".join(levels),
                f"{result['speed']['encode_seconds_per_second']:.3g}",
                f"{result['speed']['decode_seconds_per_second']:.3g}",
                f"{result['tokenizer']['parameters'] / 1e6:.2f}",
            ]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    missing = {key: why for result in results for key, why in result["not_measured"].items()}
    return "\n\n".join([table, *(f"{key} was not measured: {why}." for key, why in missing.items())])


def _with_failures(result: Mapping[str, Any], key: str, digits: int) -> str:
    failed = sum(result["failures"].get(key, {}).values())
    value = "-" if result[key] is None else f"{result[key]:.{digits}f}"
    return f"{value} ({failed} failed)" if failed else value


class _Tally:
    """Sums over the whole set."""

    def __init__(self, tokenizer: VQTokenizer, speech: bool, num_codebooks: int | None):
        self.tokenizer, self.rate = tokenizer, tokenizer.processor.sampling_rate
        self.num_codebooks, levels = num_codebooks, tokenizer.layout.levels
        depths = [min(num_codebooks or level.num_codebooks, level.num_codebooks) for level in levels]
        self.counts = [
            torch.zeros(depth, level.codebook_size, dtype=torch.int64)
            for depth, level in zip(depths, levels, strict=True)
        ]
        self.measures: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
            "si_sdr_db": si_sdr,
            "mel_distance": partial(mel_distance, sampling_rate=self.rate),
        }
        self.not_measured: dict[str, str] = {}
        for (key, package), measure in zip(_SPEECH.items(), (pesq_wb, stoi), strict=True) if speech else ():
            if find_spec(package) is None:
                self.not_measured[key] = f"{package} is not installed (pip install 'vqtok[speech]')"
            else:
                self.measures[key] = partial(measure, sampling_rate=self.rate)
        self.values: dict[str, list[float]] = {key: [] for key in self.measures}
        self.failures: dict[str, Counter[str]] = {key: Counter() for key in self.measures}
        self.num_recordings = self.num_samples = 0
        self.bits = {"nominal": 0.0, "payload": 0.0, "file": 0.0}
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self.digest = hashlib.sha256()

    def add(self, sounds: list[np.ndarray], batch_size: int | None) -> None:
        """Encode, decode and compare some recordings, (channels, samples) each."""
        start = time.perf_counter()
        codes = self.tokenizer.encode(sounds, sampling_rate=self.rate, batch_size=batch_size)
        codes = codes if self.num_codebooks is None else codes.prefix(num_codebooks=self.num_codebooks)
        middle = time.perf_counter()
        decoded = self.tokenizer.decode(codes, batch_size)
        self.seconds["decode"] += time.perf_counter() - middle
        self.seconds["encode"] += middle - start
        for sound, one, back in zip(sounds, codes, decoded, strict=True):
            self._add_codes(one)
            other = np.asarray(back, dtype=np.float32)
            other = other[None] if other.ndim == 1 else other
            if other.shape != sound.shape:
                raise ValueError(f"a recording of shape {sound.shape} came back as {other.shape}: lengths must be kept")
            for key, measure in self.measures.items():
                try:
                    self.values[key].append(measure(sound, other))
                except MeasureError as error:
                    self.failures[key][str(error)] += 1
            self.num_samples += sound.shape[1]
            self.digest.update(f"{sound.shape}".encode() + sound.astype("<f4").tobytes())
        self.num_recordings += len(sounds)

    def _add_codes(self, codes: Codes) -> None:
        """Of one recording, so that no padding of the grid is counted."""
        for counts, level in zip(self.counts, codes.levels, strict=True):
            counts += torch.stack([code_counts(row, counts.shape[1]) for row in level[0]])
        data = codes.to_bytes()
        pairs = zip(codes.levels, self.tokenizer.layout.levels, strict=True)
        self.bits["nominal"] += sum(value.numel() * math.log2(level.codebook_size) for value, level in pairs)
        self.bits["payload"] += 8 * len(unframe(data)[1])
        self.bits["file"] += 8 * len(data)

    def results(self) -> dict[str, Any]:
        duration = self.num_samples / self.rate
        finite = {key: [value for value in values if math.isfinite(value)] for key, values in self.values.items()}
        means = {key: float(np.mean(values)) if values else None for key, values in finite.items()}
        return {
            **dict.fromkeys(_SPEECH),
            **means,
            "si_sdr_perfect": sum(math.isinf(value) for value in self.values["si_sdr_db"]),
            "failures": {key: dict(reasons) for key, reasons in self.failures.items() if reasons},
            "kbps": {key: bits / duration / 1000 for key, bits in self.bits.items()},
            "usage": self._per_codebook(usage),
            "perplexity": self._per_codebook(perplexity),
            "entropy_bits": self._per_codebook(entropy_bits),
            "codes_per_entry": self._per_codebook(lambda counts: float(counts.sum()) / len(counts)),
            "speed": {
                key: value
                for what, seconds in self.seconds.items()
                for key, value in (
                    (f"{what}_seconds_per_second", duration / max(seconds, 1e-9)),
                    (f"{what}_real_time_factor", seconds / duration),
                )
            },
        }

    def data(self) -> dict[str, Any]:
        return {
            "num_recordings": self.num_recordings,
            "seconds": self.num_samples / self.rate,
            "sha256": self.digest.hexdigest(),
        }

    def _per_codebook(self, measure: Any) -> list[list[float]]:
        return [[float(measure(row)) for row in counts] for counts in self.counts]


def _chunks(recordings: Any, rate: int) -> Iterator[list[np.ndarray]]:
    chunk: list[np.ndarray] = []
    seconds = 0.0
    for place in tqdm(range(len(recordings)), "evaluating", delay=2, leave=False, disable=None):
        item = recordings[place]
        if item["sampling_rate"] != rate:
            raise ValueError(
                f"recording {place} is sampled at {item['sampling_rate']} Hz, the tokenizer at {rate}: load it at that rate"
            )
        chunk.append(item["audio"])
        seconds += item["audio"].shape[1] / rate
        if len(chunk) == _CHUNK_RECORDINGS or seconds >= _CHUNK_SECONDS:
            yield chunk
            chunk, seconds = [], 0.0
    if chunk:
        yield chunk
