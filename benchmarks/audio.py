"""Our audio codecs beside transformers' EnCodec and DAC: real-time factors in one run, memory by the length of a file, streams.

    python benchmarks/audio.py                    # all recipes, fresh random weights, all threads
    python benchmarks/audio.py --json speed.json --seconds 10 --rounds 5

Weights are random everywhere: speed, memory and agreement do not depend on them, quality is not measured here.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel

from vqtok import VQTokenizer
from vqtok.audio import StreamingDecoder, StreamingEncoder
from vqtok.audio.long import decode_to_file
from vqtok.evaluation.report import machine

RECIPES = ("spoken-16khz", "speech-spectra-16khz", "speech-16khz", "vqvae2-16khz")
RECIPES += ("general-24khz", "snac-24khz", "music-44khz")
Calls = tuple[Callable[[], Any], Callable[[], Any], int]  # encode, decode, parameters


def ours(name: str, seconds: float) -> Calls:
    """Encoding and decoding of one clip with a recipe of ours."""
    model = VQTokenizer.from_config(f"audio/{name}").model
    rate, stride = model.config.sampling_rate, model.layout.stride
    sound = 0.1 * torch.randn(1, 1, round(seconds * rate / stride) * stride)
    codes = model.encode(sound).codes
    return lambda: model.encode(sound), lambda: model.decode(codes), _size(model)


def encodec(seconds: float) -> Calls:
    """The same with the architecture of facebook/encodec_24khz, at 6 kbps."""
    model = EncodecModel(EncodecConfig()).eval()
    sound = 0.1 * torch.randn(1, 1, round(seconds * 24_000))
    out = model.encode(sound, bandwidth=6.0)
    return (
        lambda: model.encode(sound, bandwidth=6.0),
        lambda: model.decode(out.audio_codes, out.audio_scales),
        _size(model),
    )


def dac(seconds: float) -> Calls:
    """The same with the architecture of descript/dac_16khz, at 6 kbps."""
    config = DacConfig(
        downsampling_ratios=[2, 4, 5, 8], upsampling_ratios=[8, 5, 4, 2], n_codebooks=12, sampling_rate=16_000
    )
    model = DacModel(config).eval()
    sound = 0.1 * torch.randn(1, 1, round(seconds * 16_000))
    codes = model.encode(sound).audio_codes
    return lambda: model.encode(sound), lambda: model.decode(audio_codes=codes), _size(model)


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def speeds(seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Median real-time factors, the contestants taking turns."""
    contestants = {f"vqtok {name}": ours(name, seconds) for name in RECIPES}
    contestants |= {"transformers EnCodec 24 kHz": encodec(seconds), "transformers DAC 16 kHz": dac(seconds)}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contestants}
    for turn in range(rounds + 1):
        for name, (encode, decode, _) in contestants.items():
            for call, taken in zip((encode, decode), times[name], strict=True):
                start = time.perf_counter()
                call()
                if turn:  # the first call of everything is slow
                    taken.append((time.perf_counter() - start) / seconds)
    return [
        {"name": name, "parameters": contestants[name][2], **dict(zip(("encode", "decode"), map(statistics.median, pair), strict=True))}
        for name, pair in times.items()
    ]  # fmt: skip


def memory(minutes: int) -> dict[str, float]:
    """Peak MiB of a process that encodes a file of that length and decodes it to another, and the seconds it takes."""
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        rng = np.random.default_rng(0)
        with soundfile.SoundFile(path, "w", 16_000, 1) as file:
            for _ in range(minutes):
                file.write((0.1 * rng.standard_normal(16_000 * 60)).astype(np.float32))
        tok = VQTokenizer.from_config("audio/speech-16khz")
        start = time.perf_counter()
        codes = tok.encode(path)
        encoded = time.perf_counter() - start
        decode_to_file(tok.model, codes, Path(folder) / "back.wav")
        return {
            "minutes": minutes,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "encode_seconds": encoded,
            "decode_seconds": time.perf_counter() - start - encoded,
        }


@torch.no_grad()
def streaming(seconds: float = 10.0) -> dict[str, float]:
    """How far streams in 80 ms chunks are from the whole: largest difference as a share of the spread, share of equal codes."""
    model = VQTokenizer.from_config("audio/general-24khz").model
    sound = 0.1 * torch.randn(1, 1, round(seconds * 12.5) * 1920)
    model.init_codebooks(
        [0.1 * torch.randn(4, 1, 24_000 * 20 // 320 * 320)]
    )  # more latents than codes, or all are ties
    whole = model.encode(sound)
    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model)
    start = time.perf_counter()
    parts = [encoder.outputs(chunk)[0] for chunk in sound.split(1920, -1)]
    middle = time.perf_counter()
    heard = torch.cat([decoder.push([chunk]) for chunk in whole.codes[0].split(6, 2)], -1)
    end = time.perf_counter()
    latents, codes = torch.cat([p.latents for p in parts], 1), torch.cat([p.codes for p in parts], 2)
    made = model.decode(whole.codes).reconstruction
    return {
        "latents": float((latents - whole.latents[0]).abs().max() / whole.latents[0].std()),
        "equal_codes": float((codes == whole.codes[0]).double().mean()),
        "sound": float((heard - made).abs().max() / made.std()),
        "encode": (middle - start) / seconds,
        "decode": (end - middle) / seconds,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=int, nargs="*", default=[2, 60], help="lengths of the files for memory")
    parser.add_argument("--only_memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only_memory:
        print(json.dumps(memory(args.only_memory)))
        return {}
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "threads": torch.get_num_threads()}
    results["speed"] = speeds(args.seconds, args.rounds)
    for row in results["speed"]:
        print(f"| {row['name']} | {row['parameters'] / 1e6:.1f} M | {row['encode']:.4f} | {row['decode']:.4f} |")
    results["streaming"] = streaming()
    print("streaming", results["streaming"])
    results["memory"] = []
    for minutes in args.minutes:  # each in a process of its own, whose peak it is
        command = [sys.executable, __file__, "--only_memory", str(minutes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results["memory"].append(json.loads(done.stdout.splitlines()[-1]))
        print("memory", results["memory"][-1])
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
