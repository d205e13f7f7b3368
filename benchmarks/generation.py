"""How fast a prior draws codes, beside `generate` of transformers and beside the floor; one run, one table.

    python benchmarks/generation.py --threads 2 --report docs/generation_speed.md

Rows: our prior on its default backbone, transformers' GPT-2 and Llama of the same size, the linear layers of the backbone alone (what
no implementation of this network in eager torch can beat), and bytes of weights over measured bandwidth. All draw 256 codes of a
codebook of 512, sampling as trained. The contenders of a setting take turns, so that noise of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine_line
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vqtok.prior import CodePriorConfig, CodePriorModel

CODES, GRID, K = 256, 16, 512
SIZES = {"1 M": (128, 4, 4), "11 M": (384, 6, 6)}  # width, layers, heads


def ours(width: int, layers: int, heads: int) -> CodePriorModel:
    """A prior with classes as conditions."""
    backbone = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": _mlp(width),
        "num_hidden_layers": layers,
    }
    backbone |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 512}
    layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": K}]}
    config = CodePriorConfig(layout=layout, condition="class", text_size=10, max_grid=32, backbone_config=backbone)
    return CodePriorModel(config).eval()


def peers(width: int, layers: int, heads: int) -> dict[str, nn.Module]:
    """Models of transformers of the same width and depth over the same number of ids."""
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
    return {"GPT-2 generate": GPT2LMHeadModel(gpt2).eval(), "Llama generate": LlamaForCausalLM(llama).eval()}


def _mlp(width: int) -> int:
    return -(-8 * width // 3 // 64) * 64


def generate(model: nn.Module, batch: int, guided: bool) -> Callable[[], object]:
    """256 tokens by transformers' own loop; guidance is its own, a second pass per token."""
    prompt = torch.randint(0, K, (batch, 3))
    options = {"guidance_scale": 2.0} if guided else {}
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": CODES, "max_new_tokens": CODES, "pad_token_id": 0}
    return lambda: model.generate(
        prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **settings, **options
    )


def linear_layers(model: CodePriorModel, batch: int) -> Callable[[], object]:
    """Only the matrix products of the backbone and the head's slice, 256 times."""
    layers = [module for module in model.backbone.modules() if isinstance(module, nn.Linear)]
    inputs = {module.in_features: torch.randn(batch, module.in_features, dtype=model.dtype) for module in layers}
    head = model.lm_head.weight[:K]

    @torch.no_grad()
    def run() -> None:
        for _ in range(CODES):
            for module in layers:
                module(inputs[module.in_features])
            nn.functional.linear(inputs[head.shape[1]], head)

    return run


def bandwidth() -> float:
    """Bytes per second that a sum over a large tensor reads."""
    big = torch.randn(64 << 20)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        big.sum()
        times.append(time.perf_counter() - start)
    return big.numel() * 4 / min(times)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all taking turns; one unmeasured round first."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(size: str, dtype: torch.dtype, batch: int, rounds: int) -> list[list[str]]:
    """The rows of one size, dtype and batch: codes per second, and the ratio to the better peer."""
    torch.manual_seed(0)
    prior = ours(*SIZES[size]).to(dtype)
    draw = dict(condition=[3] * batch, sizes=(GRID * 8, GRID * 8), seed=0, batch_size=batch)
    rows = []
    for guided in (False, True):
        calls: dict[str, Callable[[], object]] = {"ours": lambda: prior.sample_codes(**draw, guidance_scale=1 + guided)}  # noqa: B023
        # The peers in the dtype that suits them best, which is fp32 here: bf16 made them slower on the CPU it was tried on.
        calls |= {name: generate(model, batch, guided) for name, model in peers(*SIZES[size]).items()}
        calls["linear layers alone"] = linear_layers(prior, batch * (1 + guided))
        seconds = in_turns(calls, rounds)
        best = min(seconds[name] for name in seconds if name.endswith("generate"))
        floor = sum(p.numel() * p.element_size() for p in prior.backbone.parameters()) * CODES / bandwidth()
        for name, value in [*seconds.items(), ("weights / bandwidth", floor)]:
            setting = [size, str(dtype).removeprefix("torch."), str(batch), "yes" if guided else "no", name]
            rows.append([*setting, f"{batch * CODES / value:,.0f}", f"{best / value:.2f}"])
            print("  ".join(rows[-1]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--report", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for size in args.sizes:
        for dtype in args.dtypes:
            for batch in args.batches:
                rows += measure(size, getattr(torch, dtype), batch, args.rounds)
    if args.report:
        head = ["parameters", "dtype", "batch", "guidance", "what", "codes/s", "x the better peer"]
        lines = [" | ".join(["", *row, ""]).strip() for row in [head, ["---"] * len(head), *rows]]
        where = machine_line(torch.device("cpu"), "transformers")
        text = f"# Drawing codes: speed\n\n{__doc__}\nWritten on {datetime.date.today()} ({where}).\n\n"
        args.report.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
