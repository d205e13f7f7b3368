"""How fast a prior draws codes, beside `generate` of transformers and beside the floor; one run, every goal beside what was reached.

    python benchmarks/generation.py --threads 2 --batches 1 16 --report docs/generation_speed.md

Rows: our prior on its default backbone in float32 and in bfloat16 (`prior.to(torch.bfloat16)`), our masked prior of the same size in 8
and 12 passes, transformers' GPT-2 and Llama of the same
size, the matrix products of the backbone alone, and bytes of weights over measured bandwidth. All draw 256 codes of a codebook of 512,
sampling as trained. The contenders of a size and batch take turns, so that noise of the machine hits all alike; the seconds that the
processor worked (all threads) stand beside those of the clock and suffer less from other work on the machine.

The weights are random and large enough that the prior is far from uniform. Its own draws are scored in float32 without a cache, and once
more one code after another by the decode path: the likelihood each dtype gives them, and how far single codes are from the uncached score.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from measuring import machine_line
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vqtok.prior import CodePriorConfig, CodePriorModel, MaskedCodePriorConfig, MaskedCodePriorModel
from vqtok.prior.fast import decoder_for
from vqtok.prior.products import product

CODES, GRID, K = 256, 16, 512
SIZES = {"1 M": (128, 4, 4), "11 M": (384, 6, 6)}  # width, layers, heads
DTYPES = ("float32", "bfloat16")
PASSES = (8, 12)  # of masked decoding; 12 is its default
Call = Callable[[], object]


class Setting(NamedTuple):
    """What is timed in turn."""

    size: str
    batch: int
    device: torch.device


class Seconds(NamedTuple):
    """Medians of one call: by the clock, and of the processor."""

    clock: float
    processor: float


Times = dict[tuple[str, int, str], Seconds]  # by size, batch and row


class Goal(NamedTuple):
    """A number that was asked for: `value` is at least, or at most, `goal`."""

    what: str
    goal: float
    value: float
    at_least: bool
    processor: float | None = None  # the same by the seconds of the processor

    def row(self) -> list[str]:
        met = self.value >= self.goal if self.at_least else self.value <= self.goal
        sign = "at least" if self.at_least else "at most"
        processor = "" if self.processor is None else f"{self.processor:.3g}"
        return [self.what, f"{sign} {self.goal:g}", f"{self.value:.3g}", "yes" if met else "**no**", processor]


# -- contenders


def ours(size: str, dtype: str, device: torch.device, masked: bool = False) -> CodePriorModel | MaskedCodePriorModel:
    """A prior with classes as conditions, of the same random weights in every dtype."""
    torch.manual_seed(0)
    width, layers, heads = SIZES[size]
    backbone = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": _mlp(width),
        "num_hidden_layers": layers,
    }
    backbone |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 512}
    layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": K}]}
    fields = {"layout": layout, "condition": "class", "text_size": 10, "max_grid": 32, "backbone_config": backbone}
    model = (
        MaskedCodePriorModel(MaskedCodePriorConfig(**fields)) if masked else CodePriorModel(CodePriorConfig(**fields))
    )
    prior = model.eval()
    for name, parameter in prior.named_parameters():  # logits of deviation 3, and layers that do something
        if parameter.dim() == 2:
            scale = 3.0 if name == "lm_head.weight" else 1.0
            nn.init.normal_(parameter, std=0.5 if "embed" in name else scale * parameter.shape[1] ** -0.5)
    return prior.to(device, getattr(torch, dtype))


def peers(setting: Setting) -> dict[str, nn.Module]:
    """Models of transformers of the same width and depth over the same number of ids.

    In float32, which is their faster dtype on the CPUs tried; on a GPU in bfloat16 too.
    """
    width, layers, heads = SIZES[setting.size]
    gpt2 = GPT2Config(vocab_size=K + 64, n_embd=width, n_layer=layers, n_head=heads, n_positions=512)
    llama = LlamaConfig(
        vocab_size=K + 64,
        hidden_size=width,
        intermediate_size=_mlp(width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
    )
    models: dict[str, nn.Module] = {}
    for dtype in DTYPES if setting.device.type == "cuda" else DTYPES[:1]:
        for name, model in (("GPT-2", GPT2LMHeadModel(gpt2)), ("Llama", LlamaForCausalLM(llama))):
            models[f"{name} generate, {dtype}"] = model.eval().to(setting.device, getattr(torch, dtype))
    return models


def _mlp(width: int) -> int:
    return -(-8 * width // 3 // 64) * 64


def draws(prior: CodePriorModel | MaskedCodePriorModel, batch: int, guided: bool, **more: int) -> Call:
    """256 codes by `sample_codes`."""
    settings = dict(condition=[3] * batch, sizes=(GRID * 8, GRID * 8), seed=0, batch_size=batch, **more)
    return lambda: prior.sample_codes(**settings, guidance_scale=1.0 + guided)


def generates(model: nn.Module, setting: Setting, guided: bool) -> Call:
    """256 tokens by transformers' own loop; guidance is its own, a second pass per token."""
    prompt = torch.randint(0, K, (setting.batch, 3), device=setting.device)
    options = {"guidance_scale": 2.0} if guided else {}
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": CODES, "max_new_tokens": CODES, "pad_token_id": 0}
    return lambda: model.generate(
        prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **settings, **options
    )


def _steps(calls: list[tuple[Callable[..., object], tuple[torch.Tensor, ...]]]) -> Call:
    @torch.no_grad()
    def run() -> None:
        for _ in range(CODES):
            for call, inputs in calls:
                call(*inputs)

    return run


def floors(prior: CodePriorModel, batch: int) -> dict[str, Call]:
    """The matrix products of a step alone, 256 times: by torch, as the decode path does them, and with weights in int8."""
    weights = [module.weight.detach() for module in prior.backbone.modules() if isinstance(module, nn.Linear)]
    weights.append(prior.lm_head.weight.detach()[:K])
    inputs = [torch.randn(batch, weight.shape[1], device=weight.device) for weight in weights]
    pairs = list(zip(weights, inputs, strict=True))
    calls = {"products of torch, float32": _steps([(nn.functional.linear, (x, weight)) for weight, x in pairs])}
    if prior.device.type == "cpu":
        for name in DTYPES:
            dtype = getattr(torch, name)
            packed = [(product(weight, None, dtype, batch), (x,)) for weight, x in pairs]
            calls[f"products of the decode path, {name}"] = _steps(packed)
        int8 = []
        for weight, x in pairs:
            scale = weight.abs().amax(1) / 127
            levels = (weight / scale[:, None]).round().to(torch.int8)
            int8.append((torch._weight_int8pack_mm, (x.bfloat16(), levels, scale.bfloat16())))
        calls["products with int8 weights, left out"] = _steps(int8)
    return calls


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over a large tensor reads."""
    big, times = torch.randn(64 << 20, device=device), []
    for _ in range(4):
        start = time.perf_counter()
        big.sum().item()
        times.append(time.perf_counter() - start)
    return big.numel() * 4 / min(times)


# -- measuring


def in_turns(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, Seconds]:
    """Median seconds of each call, all taking turns; one unmeasured round first."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: Seconds(*map(statistics.median, zip(*pairs, strict=True))) for name, pairs in times.items()}


def measure(setting: Setting, dtypes: list[str], rounds: int) -> dict[str, Seconds]:
    """The rows of one size and batch. Batches above 16 run without guidance, which is twice the batch."""
    calls: dict[str, Call] = {}
    models = peers(setting)
    for guided in (False, True) if setting.batch <= 16 else (False,):
        suffix = ", guided" if guided else ""
        for dtype in dtypes:
            calls[f"ours, {dtype}{suffix}"] = draws(ours(setting.size, dtype, setting.device), setting.batch, guided)
        calls |= {f"{name}{suffix}": generates(model, setting, guided) for name, model in models.items()}
    for dtype in dtypes:
        masked = ours(setting.size, dtype, setting.device, masked=True)
        for passes in PASSES:
            calls[f"ours masked, {passes} passes, {dtype}"] = draws(masked, setting.batch, False, num_passes=passes)
    prior = ours(setting.size, "float32", setting.device)
    seconds = in_turns(
        calls | floors(prior, setting.batch), rounds if setting.batch == 1 else -(-rounds // 2), setting.device
    )
    floor = sum(p.numel() * 4 for p in prior.backbone.parameters()) * CODES / bandwidth(setting.device)
    return seconds | {"weights / bandwidth, float32": Seconds(floor, floor)}


@contextlib.contextmanager
def stepwise(prior: CodePriorModel) -> Iterator[None]:
    """Inside, whatever asks the backbone for many tokens at once gets them from the decode path, one after another."""
    backbone = prior.backbone

    def forward(inputs_embeds, attention_mask=None, position_ids=None, **_):  # type: ignore[no-untyped-def]
        assert attention_mask is None
        decoder = decoder_for(backbone, *inputs_embeds.shape[:2], int(position_ids[0, 0]))
        return SimpleNamespace(last_hidden_state=torch.cat([decoder(x, None) for x in inputs_embeds.split(1, 1)], 1))

    backbone.forward = forward
    try:
        yield
    finally:
        del backbone.forward


def likelihoods(size: str, dtypes: list[str], device: torch.device) -> tuple[float, dict[str, tuple[float, float]]]:
    """Nats per code of 4 draws; for each dtype how far the decode path moves them on average, and any code at most."""
    prior = ours(size, "float32", device)
    codes = prior.sample_codes([3] * 4, (GRID * 8, GRID * 8), seed=1)
    right = prior.score(codes, [3] * 4).maps[0]
    moved = {}
    for dtype in dtypes:
        other = ours(size, dtype, device)
        with stepwise(other):
            away = other.score(codes, [3] * 4).maps[0] - right
        moved[dtype] = float(away.mean()), float(away.abs().max())
    return float(right.mean()), moved


def better_peer(times: Times, size: str, batch: int, guided: bool) -> Seconds:
    """The faster `generate`, by the clock."""
    rows = [
        value
        for (a_size, a_batch, name), value in times.items()
        if (a_size, a_batch, name.endswith("guided")) == (size, batch, guided) and "generate" in name
    ]
    return min(rows)


def goals(times: Times, moved: dict[str, dict[str, tuple[float, float]]]) -> list[Goal]:
    """What was asked of what was measured."""
    found = []
    for size, batch, dtype, goal in (
        ("11 M", 1, "bfloat16", 1.5),
        ("11 M", 1, "float32", 1.1),
        ("11 M", 16, "float32", 1.3),
        ("1 M", 1, "float32", 1.5),
        ("1 M", 16, "float32", 1.3),
    ):
        if (own := times.get((size, batch, f"ours, {dtype}"))) is not None:
            peer = better_peer(times, size, batch, False)
            what, processor = f"{size}, batch {batch}, {dtype}: times the better peer", peer.processor / own.processor
            found.append(Goal(what, goal, peer.clock / own.clock, True, processor))
    for size, goal in (("1 M", 3.0), ("11 M", 1.8)):
        for dtype in DTYPES:
            for passes in PASSES:
                own = times.get((size, 1, f"ours masked, {passes} passes, {dtype}"))
                if own is not None:
                    flat, what = (
                        times[size, 1, f"ours, {dtype}"],
                        f"{size}, batch 1, {dtype}: masked in {passes} passes",
                    )
                    processor = flat.processor / own.processor
                    found.append(Goal(f"{what}, times our flat order", goal, flat.clock / own.clock, True, processor))
    if times:
        found.append(Goal("sequential passes, flat over masked in 12", 16, CODES / 12, True))
    for (size, batch, name), guided in times.items():
        if batch == 1 and name.startswith("ours") and name.endswith(", guided"):
            own = times[size, 1, name.removesuffix(", guided")]
            what = f"{size}, batch 1, {name.split(', ')[1]}: time with guidance, of the time without"
            found.append(Goal(what, 1.4, guided.clock / own.clock, False, guided.processor / own.processor))
    for size, by_dtype in moved.items():
        for dtype, (mean, most) in by_dtype.items():
            if dtype == "float32":
                found.append(
                    Goal(
                        f"{size}, float32: nats of any code away from uncached scoring",
                        1e-5,
                        most,
                        False,
                    )
                )
            else:
                found.append(Goal(f"{size}, {dtype}: nats per code moved", 0.01, abs(mean), False))
    return found


# -- report


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def rows_of(times: Times) -> list[list[str]]:
    """Codes per second, and the ratio to the better peer by the clock and by the processor's seconds."""
    rows = []
    for (size, batch, name), value in times.items():
        peer = better_peer(times, size, batch, name.endswith("guided"))
        ratios = [f"{peer.clock / value.clock:.2f}", f"{peer.processor / value.processor:.2f}"]
        rows.append([size, str(batch), name, f"{batch * CODES / value.clock:,.0f}", *ratios])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="at batch 1; half as many for larger batches")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--report", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    times: Times = {}
    moved, notes = {}, []
    for size in args.sizes:
        nats, moved[size] = likelihoods(size, args.dtypes, args.device)
        notes.append(
            f"The prior of {size} finds its draws {nats:.3f} nats per code likely (uniform: {math.log(K):.3f})."
        )
        for batch in args.batches:
            for name, value in measure(Setting(size, batch, args.device), args.dtypes, args.rounds).items():
                times[size, batch, name] = value
    reached = table(
        ["what", "goal", "reached", "met", "reached, processor"], [goal.row() for goal in goals(times, moved)]
    )
    all_rows = table(
        ["parameters", "batch", "what", "codes/s", "x the better peer", "the same, processor"], rows_of(times)
    )
    where = f"{machine_line(args.device, 'transformers')}, {args.threads} threads"
    text = f"{reached}\n\n{' '.join(notes)}\n\n{all_rows}\n"
    print(text)
    if args.report:
        head = f"# Drawing codes: speed\n\n{__doc__}\nWritten on {datetime.date.today()} ({where}).\n\n"
        args.report.write_text(head + text, encoding="utf-8")


if __name__ == "__main__":
    main()
