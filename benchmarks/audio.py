"""How fast our audio codecs are beside transformers' EnCodec and DAC, what memory long files take, how streams agree with the whole.

    python benchmarks/audio.py --threads 2 --report docs/audio_speed.md

Speed: encoding and decoding of one clip, batch 1, float32, by all recipes, and by transformers' EnCodec 24 kHz and DAC 16 kHz at 6 kbps.
All take turns, so that noise of the machine hits all alike. A real-time factor is seconds of work per second of sound: smaller is better.
The floor of a recipe is its matrix products alone, those of its convolutions and of its searches for codes, each done by torch in blocks.

Memory: the peak of a process of its own that encodes a file and decodes it to another. Streams: sound in chunks of 80 ms through causal
models, beside the same sound at once. A code that differs must be a near-tie: the two codes are as near to the latent as rounding can tell.

The weights are random, which changes no time; what codecs keep of speech is on another page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import MIB, Timing, in_new_process, machine_line, peak_bytes, time_in_turn
from torch import Tensor, nn
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel

from vqtok import VQTokenizer
from vqtok.audio import AudioVQConfig, AudioVQModel, StreamingDecoder, StreamingEncoder
from vqtok.audio.long import decode_to_file
from vqtok.auto import config_folder

SPEECH = "speech-spectra-16khz"  # the recipe whose quality is reported
RECIPES = (SPEECH, "spoken-16khz", "speech-16khz", "vqvae2-16khz", "general-24khz", "snac-24khz", "music-44khz")
ENCODEC, DAC = "transformers EnCodec 24 kHz", "transformers DAC 16 kHz"
STREAMS = (SPEECH, "general-24khz")  # made causal where they are not
CHUNK_SECONDS = 0.08
BLOCK = 4096
Call = Callable[[], object]


class Contender(NamedTuple):
    """Two calls on one clip, and the matrix products in each where they are known."""

    encode: Call
    decode: Call
    parameters: int
    floors: tuple[Call, Call] | None = None


class Goal(NamedTuple):
    """A number that was asked for, at most."""

    what: str
    most: float
    value: float

    def row(self) -> list[str]:
        return [
            self.what,
            f"at most {self.most:g}",
            f"{self.value:.3g}",
            "yes" if self.value <= self.most else "**no**",
        ]


# -- contenders


def ours(name: str, seconds: float) -> Contender:
    """A recipe with fresh weights."""
    model = VQTokenizer.from_config(f"audio/{name}").model
    rate, stride = model.config.sampling_rate, model.layout.stride
    sound = 0.1 * torch.randn(1, 1, round(seconds * rate / stride) * stride)
    with products_of(model) as encoding:
        codes = model.encode(sound).codes
    with products_of(model) as decoding:
        model.decode(codes)
    for config, grid in zip(model.quantizer.level_configs, codes, strict=True):
        layer = getattr(config, "layer_config", config)
        width = layer.codebook_dim or model.config.latent_size
        encoding += [(layer.size, width, grid.shape[2])] * grid.shape[1]
    floors = (multiply(encoding), multiply(decoding))
    return Contender(lambda: model.encode(sound), lambda: model.decode(codes), _size(model), floors)


def encodec(seconds: float) -> Contender:
    """The architecture of facebook/encodec_24khz."""
    model = EncodecModel(EncodecConfig()).eval()
    sound = 0.1 * torch.randn(1, 1, round(seconds * 24_000))
    out = model.encode(sound, bandwidth=6.0)
    return Contender(
        lambda: model.encode(sound, bandwidth=6.0),
        lambda: model.decode(out.audio_codes, out.audio_scales),
        _size(model),
    )


def dac(seconds: float) -> Contender:
    """The architecture of descript/dac_16khz."""
    config = DacConfig(
        downsampling_ratios=[2, 4, 5, 8], upsampling_ratios=[8, 5, 4, 2], n_codebooks=12, sampling_rate=16_000
    )
    model = DacModel(config).eval()
    sound = 0.1 * torch.randn(1, 1, round(seconds * 16_000))
    codes = model.encode(sound).audio_codes
    return Contender(lambda: model.encode(sound), lambda: model.decode(audio_codes=codes), _size(model))


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def products_of(model: nn.Module) -> Iterator[list[tuple[int, int, int]]]:
    """Collects the products (rows, inner, columns) that the convolutions of `model` are, while it runs inside."""
    found: list[tuple[int, int, int]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kernel = layer.kernel_size[0]
        if isinstance(layer, nn.ConvTranspose1d):  # every input step becomes a kernel of output steps
            found.append((layer.out_channels * kernel, layer.in_channels, inputs[0].shape[-1]))
        else:
            found.append((layer.out_channels, layer.in_channels * kernel // layer.groups, output.shape[-1]))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def multiply(sizes: list[tuple[int, int, int]]) -> Call:
    """These products, one after another, in blocks of at most `BLOCK` columns, so that they need no more memory than a convolution."""
    blocks = [
        (torch.randn(rows, inner), torch.randn(inner, min(columns, BLOCK)), columns) for rows, inner, columns in sizes
    ]

    @torch.no_grad()
    def run() -> None:
        for one, other, columns in blocks:
            for _ in range(columns // BLOCK):
                one @ other
            if columns % BLOCK:
                one @ other[:, : columns % BLOCK]

    return run


# -- measuring


@torch.no_grad()
def speeds(seconds: float, rounds: int) -> dict[str, tuple[Contender, dict[str, float]]]:
    """Of every contender the median real-time factors of encoding and decoding, and of their floors."""
    contenders = {f"audio/{name}": ours(name, seconds) for name in RECIPES}
    contenders |= {ENCODEC: encodec(seconds), DAC: dac(seconds)}
    calls: dict[str, Call] = {}
    for name, each in contenders.items():
        calls |= {f"{name} encode": each.encode, f"{name} decode": each.decode}
        if each.floors:
            calls |= {f"{name} encode floor": each.floors[0], f"{name} decode floor": each.floors[1]}
    timings: dict[str, Timing] = time_in_turn(calls, rounds, {}, torch.device("cpu"))
    return {
        name: (
            each,
            {
                call.removeprefix(name).strip(): timing.median / seconds
                for call, timing in timings.items()
                if call.startswith(f"{name} ")
            },
        )
        for name, each in contenders.items()
    }


def memory(minutes: int) -> dict[str, float]:
    """Peak bytes of this process, which encodes a file of that length and decodes it to another; seconds of both."""
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        rng = np.random.default_rng(0)
        with soundfile.SoundFile(path, "w", 16_000, 1) as file:
            for _ in range(minutes):
                file.write((0.1 * rng.standard_normal(16_000 * 60)).astype(np.float32))
        tok = VQTokenizer.from_config(f"audio/{SPEECH}")
        start = time.perf_counter()
        codes = tok.encode(path)
        encoded, peak = time.perf_counter(), peak_bytes()
        decode_to_file(tok.model, codes, Path(folder) / "back.wav")
        return {
            "minutes": minutes,
            "encode_peak": peak,
            "peak": peak_bytes(),
            "codes": sum(level.numel() * level.element_size() for level in codes.levels),
            "encode_seconds": encoded - start,
            "decode_seconds": time.perf_counter() - encoded,
        }


@torch.no_grad()
def spread_codebooks(model: AudioVQModel, sound: Tensor) -> None:
    """Random tables as wide as what they are to code, so that codes differ from place to place and ties are rare."""
    rest = model.encode(sound).latents[0]
    for layer in model.quantizer.levels[0].layers:
        layer.codebook.embedding.copy_(0.3 * rest.std() * torch.randn_like(layer.codebook.embedding))
        rest = rest - layer.encode(rest).quantized


@torch.no_grad()
def stream(name: str, seconds: float) -> dict[str, float]:
    """How far sound in chunks is from the same sound at once, and how long it takes."""
    config = AudioVQConfig.from_pretrained(config_folder(f"audio/{name}"))
    config.causal = True
    model, rate = AudioVQModel(config).eval(), config.sampling_rate
    chunk = round(CHUNK_SECONDS * rate)
    assert chunk % model.layout.stride == 0
    sound = 0.1 * torch.randn(1, 1, round(seconds / CHUNK_SECONDS) * chunk)
    spread_codebooks(model, sound)
    whole = model.encode(sound)
    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model)
    start = time.perf_counter()
    parts = [encoder.outputs(each)[0] for each in sound.split(chunk, -1)]
    middle = time.perf_counter()
    heard = torch.cat([decoder.push([each]) for each in whole.codes[0].split(chunk // model.layout.stride, 2)], -1)
    end = time.perf_counter()
    latents, codes = torch.cat([p.latents for p in parts], 1), torch.cat([p.codes for p in parts], 2)
    made = model.decode(whole.codes).reconstruction
    return {
        "latents": float((latents - whole.latents[0]).abs().max() / whole.latents[0].std()),
        "equal_codes": float((codes == whole.codes[0]).double().mean()),
        "wrong_codes": wrong_codes(model, (latents, codes), (whole.latents[0], whole.codes[0])),
        "sound": float((heard - made).abs().max() / made.std()),
        "encode": (middle - start) / seconds,
        "decode": (end - middle) / seconds,
    }


def wrong_codes(model: AudioVQModel, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> int:
    """How many of the first codes that differ at a place are no near-ties; those after it at the place saw other remainders.

    Codes a and b of r are a near-tie for latents that differ by d if | |r - a|^2 - |r - b|^2 | <= 2 |a - b| (|d| + rounding).
    """
    (z, a_codes), (other_z, b_codes) = one, other
    tables = [layer.codebook.table.double() for layer in model.quantizer.levels[0].layers]
    wrong = 0
    for place in (a_codes[0] != b_codes[0]).any(0).nonzero()[:, 0].tolist():
        turn = int((a_codes[0, :, place] != b_codes[0, :, place]).nonzero()[0])
        rest = z[0, place].double()
        room = (rest - other_z[0, place].double()).norm() + 1e-6 * rest.norm()
        for table, code in zip(tables[:turn], a_codes[0, :turn, place].tolist(), strict=True):
            rest = rest - table[code]
        a, b = tables[turn][a_codes[0, turn, place]], tables[turn][b_codes[0, turn, place]]
        gap = ((rest - a).square().sum() - (rest - b).square().sum()).abs()
        wrong += bool(gap > 2 * (a - b).norm() * room)
    return wrong


# -- report


def goals(speed: dict[str, Any], streams: dict[str, dict[str, float]], memories: list[dict[str, float]]) -> list[Goal]:
    """What was asked, of what was measured."""
    own, peer = speed[f"audio/{SPEECH}"][1], speed[ENCODEC][1]
    found = [
        Goal(f"{what}coding, audio/{SPEECH}: time, of EnCodec's", 1.0, own[f"{what}code"] / peer[f"{what}code"])
        for what in ("en", "de")
    ]
    if len(memories) > 1:
        first, last = memories[0], memories[-1]
        grown = (last["peak"] - first["peak"]) / MIB
        found.append(Goal(f"MiB more for {last['minutes']} minutes than for {first['minutes']}", 50, grown))
    for name, row in streams.items():
        found += [
            Goal(f"stream, {name}: latents away from those of the whole, of their spread", 1e-5, row["latents"]),
            Goal(f"stream, {name}: codes that differ and are no near-ties", 0, row["wrong_codes"]),
            Goal(f"stream, {name}: sound of equal codes away from the whole, of its spread", 1e-5, row["sound"]),
        ]
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def speed_rows(speed: dict[str, Any]) -> list[list[str]]:
    peer, rows = speed[ENCODEC][1], []
    for name, (each, factors) in speed.items():
        ratios = [f"{factors[what] / peer[what]:.2f}" for what in ("encode", "decode")]
        floors = [f"{factors[key]:.4f}" if key in factors else "" for key in ("encode floor", "decode floor")]
        rows.append(
            [name, f"{each.parameters / 1e6:.1f} M", f"{factors['encode']:.4f}", ratios[0], floors[0], f"{factors['decode']:.4f}"]
            + [ratios[1], floors[1]]
        )  # fmt: skip
    return rows


def report(speed: dict[str, Any], streams: dict[str, dict[str, float]], memories: list[dict[str, float]]) -> str:
    """The tables, goals first."""
    head = ["what", "parameters", "encode", "of EnCodec's", "floor", "decode", "of EnCodec's", "floor"]
    stream_head = ["causal model", "latents", "equal codes", "sound", "encode", "decode"]
    stream_rows = [
        [f"audio/{name}", f"{row['latents']:.1e}", f"{100 * row['equal_codes']:.3f} %", f"{row['sound']:.1e}"]
        + [f"{row['encode']:.4f}", f"{row['decode']:.4f}"]
        for name, row in streams.items()
    ]
    memory_head = [
        "minutes of sound",
        "peak MiB, encoding",
        "and decoding",
        "its codes",
        "its samples",
        "encode s",
        "decode s",
    ]
    memory_rows = [
        [f"{row['minutes']}", f"{row['encode_peak'] / MIB:.0f}", f"{row['peak'] / MIB:.0f}", f"{row['codes'] / MIB:.1f}"]
        + [f"{row['minutes'] * 60 * 16_000 * 4 / MIB:.0f}", f"{row['encode_seconds']:.1f}", f"{row['decode_seconds']:.1f}"]
        for row in memories
    ]  # fmt: skip
    reached = table(["what", "goal", "reached", "met"], [goal.row() for goal in goals(speed, streams, memories)])
    return (
        f"{reached}\n\n## Speed\n\nReal-time factors, medians.\n\n{table(head, speed_rows(speed))}\n\n"
        f"## Streams\n\nChunks of {1000 * CHUNK_SECONDS:.0f} ms beside the whole: largest differences as shares of the spread, and "
        f"real-time factors of the stream.\n\n{table(stream_head, stream_rows)}\n\n"
        f"## Memory\n\nPeak of a process with `audio/{SPEECH}`, the libraries included; codes and samples in memory would take what the "
        f"columns say.\n\n{table(memory_head, memory_rows)}\n"
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the clip that is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=int, nargs="*", default=[2, 10, 60], help="lengths of the files for memory")
    parser.add_argument("--only_memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.only_memory:
        print(json.dumps(memory(args.only_memory)))
        return
    threads = ["--threads", str(args.threads)]
    memories = [in_new_process(__file__, ["--only_memory", str(minutes), *threads]) for minutes in args.minutes]
    print(f"memory: {memories}", file=sys.stderr)
    streams = {name: stream(name, 10.0) for name in STREAMS}
    text = report(speeds(args.seconds, args.rounds), streams, memories)
    print(text)
    if args.report:
        where = f"{machine_line(torch.device('cpu'), 'transformers')}, {args.threads} threads"
        summary, rest = (__doc__ or "").split("\n", 1)
        head = f"# Audio codecs: speed, memory, streams\n\n{summary}\n{rest}\nWritten on {datetime.date.today()} ({where}).\n\n"
        args.report.write_text(head + text, encoding="utf-8")


if __name__ == "__main__":
    main()
