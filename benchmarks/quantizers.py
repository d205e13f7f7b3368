"""Time and memory of the quantizers, beside the bare matrix product and vector-quantize-pytorch, in one run.

    python benchmarks/quantizers.py --threads 2 --report docs/quantizers_speed.md
    python benchmarks/quantizers.py --device cuda --report docs/quantizers_speed_cuda.md

The contestants of a row's group run in turn in one process; ratios are of medians over the same rounds. On a CPU the memory of
each is measured in a process of its own.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import (
    MIB,
    Asked,
    Case,
    Row,
    in_fork,
    in_new_process,
    machine_line,
    peak_extra_bytes,
    plain,
    speed_table,
    time_in_turn,
)
from torch import Tensor

from vqtok.files import write_json, write_text
from vqtok.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
    assignment_entropy,
    nearest_code,
)
from vqtok.training import parse_arguments
from vqtok.training.setup import run_script

try:
    import vector_quantize_pytorch as peer
except ImportError:  # its rows are left out then
    peer = None

PEER = "vector-quantize-pytorch"
LIMIT = "bare product into a given output"
COPY = "copy of the latents"
OURS = "vqtok"
ONE = f"{OURS}, one codebook"
_TRAINING = {"decay": 0.99, "commitment_weight": 0.25}
_REVIVAL = 0.05  # share of uniform use below which a code is dead, on both sides
_DEPTH = 8
_OFFSET = 100.0
SHORT = {PEER: "theirs", LIMIT: "product", COPY: "copy", ONE: "one"}


@dataclass
class SpeedArguments:
    """What to measure, and where to write it."""

    num: int = field(default=32_768, metadata={"help": "Latents."})
    dim: int = field(default=64, metadata={"help": "Their width."})
    codebook_size: int = field(default=8192, metadata={"help": "Codes."})
    large_codebook_size: int = field(default=262_144, metadata={"help": "Codes of the large search."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    rounds: int = field(default=7, metadata={"help": "Runs of each row."})
    slow_runs: int = field(default=3, metadata={"help": "Runs of what takes seconds: the other library's rows."})
    memory: bool = field(default=True, metadata={"help": "Also measure memory."})
    report: str | None = field(default=None, metadata={"help": "Markdown file to write; JSON goes beside it."})
    rows: list[str] = field(
        default_factory=list,
        metadata={"help": "Print the extra bytes of these rows alone, as JSON (this is the process of its own)."},
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print the table, write the report; returns its rows."""
    (args,) = parse_arguments([SpeedArguments], argv, description=__doc__)
    device = torch.device(args.device)
    all_cases = [case for case in cases(args) if case.who != PEER or peer is not None]
    if args.rows:  # before anything is computed
        wanted = {case.name: case for case in all_cases}
        print(json.dumps({name: in_fork(partial(_extra_bytes, wanted[name], args)) for name in args.rows}))
        return []
    extra_bytes = _all_extra_bytes(all_cases, args) if args.memory else {}
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for group in dict.fromkeys(case.group for case in all_cases):
        print(f"timing: {group}", file=sys.stderr, flush=True)
        rows += _measure([case for case in all_cases if case.group == group], args, extra_bytes)
    table = speed_table(rows, SHORT)
    print(table)
    if args.report:
        write_text(args.report, _page(args, table, device))
        write_json(Path(args.report).with_suffix(".json"), [plain(row) for row in rows])
    return rows


# -- what is measured


def cases(args: SpeedArguments) -> list[Case]:
    """All rows, in the order of the table."""
    return [*_searches(args), *_training_steps(args), *_residuals(args), *_scalars(args), *_entropies(args)]


def _searches(args: SpeedArguments) -> list[Case]:
    whole: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
        "bare product, output allocated": _product_with,
        "torch.cdist, argmin": _by_cdist,
        "expanded formula (taming), argmin": _by_expansion,
        PEER: _by_peer,
        f"{OURS} nearest_code": _by_ours,
        f"{OURS} VectorQuantizer in eval": _by_quantizer,
    }
    small = {who: whole[who] for who in ("torch.cdist, argmin", PEER, f"{OURS} nearest_code")}
    large = {who: whole[who] for who in (f"{OURS} nearest_code",)}
    speed = Asked("time", 1.15, LIMIT)
    asked = (speed, Asked("bytes", 32 * MIB)) if args.device == "cpu" else (speed,)
    found = []
    for num, dim, size, searches in [
        (args.num, args.dim, args.codebook_size, whole),
        (args.num, args.dim, 512, small),
        (args.num, 8, 1024, small),
        (max(64, args.num // 32), args.dim, args.large_codebook_size, large),
    ]:
        group = f"search, N={num}, K={size}, D={dim}"
        found.append(Case(group, LIMIT, partial(_product_into, dim, size, args.device), num, memory=False))
        for who, search in searches.items():
            found.append(
                Case(
                    group,
                    who,
                    partial(_search, search, dim, size, args.device),
                    num,
                    against=LIMIT,
                    slow=who == PEER and size > 1024,
                    search=search if searches is whole and search is not _product_with else None,
                    shape=(size, dim),
                    asked=asked if searches is whole and search is _by_ours else (),
                )
            )
    return found


def _training_steps(args: SpeedArguments) -> list[Case]:
    found = []
    theirs_of: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "EMA": ({}, {}),
        "EMA, cosine, codebook_dim 8": (
            {"metric": "cosine", "codebook_dim": 8},
            {"use_cosine_sim": True, "codebook_dim": 8},
        ),
        "codebook by gradient": ({"update": "gradient"}, {"learnable_codebook": True, "ema_update": False}),
    }
    for name, (ours, theirs) in theirs_of.items():
        group = f"training step, {name}, N={args.num}, K={args.codebook_size}, D={args.dim}"
        make = partial(_peer_step, _peer_vq, args, theirs)
        found.append(Case(group, PEER, make, args.num, slow=True))
        asked = (Asked("time", 1 / 10, PEER), Asked("memory", 1 / 10, PEER)) if args.device == "cpu" else ()
        make = partial(_step, _vq, args, ours)
        found.append(Case(group, OURS, make, args.num, against=PEER, asked=asked))
    return found


def _residuals(args: SpeedArguments) -> list[Case]:
    found = []
    one, eight = ONE, f"{OURS}, residual, Q={_DEPTH}"
    asked = (Asked("time", 8.5, one),)
    shape = f"K={args.codebook_size}, D={args.dim}"
    for what, call in (("encode", _encode), ("training step", _step)):
        group = f"residual, {what}, N={args.num}, {shape}"
        found.append(Case(group, one, partial(call, _vq, args, {}), args.num))
        found.append(Case(group, eight, partial(call, _rvq, args, {}), args.num, against=one, asked=asked))
    few = max(64, args.num // 8)  # the other library's takes eight times the memory of its one codebook
    for what, theirs, call in (("encode", _peer_encode, _encode), ("training step", _peer_step, _step)):
        group = f"residual, {what}, N={few}, {shape}"
        found.append(Case(group, PEER, partial(theirs, _peer_rvq, args, {}), few, f"Q={_DEPTH}", slow=True))
        found.append(Case(group, eight, partial(call, _rvq, args, {}), few, against=PEER))
    return found


def _scalars(args: SpeedArguments) -> list[Case]:
    """FSQ, LFQ, BSQ: time per latent against the number of latents, the number of codes, and the width."""
    found = []
    base = 8 * args.num  # they are quick

    def group(text: str, dim: int, num: int, build: Callable[[int], Any] | None, theirs: Any, size: str) -> list[Case]:
        limit = Case(text, COPY, partial(_copy, dim, args.device), num, size, dim, memory=False)
        here = [limit]
        if theirs is not None:
            make = partial(_peer_scalar, theirs, dim, args.device)
            here.append(replace(limit, who=PEER, make=make, against=COPY, memory=True))
        here.append(replace(limit, who=OURS, make=partial(_scalar, build, dim, args.device), against=COPY, memory=True))
        return here

    paper = [8, 5, 5, 5]
    for factor in (1, 2, 4):
        theirs = (lambda: peer.FSQ(paper)) if factor == 1 else None
        found += group("FSQ", 4, factor * base, lambda dim: FSQ(dim, scalar_levels=paper), theirs, "D=4, K=1000")
    for levels in ([4, 4, 2, 2, 2, 2], [4] * 6, [8, 8, 8, 4, 4, 4], [8] * 6):
        text = f"D=6, K=2^{int(math.log2(math.prod(levels)))}"
        found += group("FSQ", 6, base, lambda dim, levels=levels: FSQ(dim, scalar_levels=levels), None, text)
    for title, kind, spherical in (("LFQ", LFQ, False), ("BSQ", BSQ, True)):
        for factor in (1, 2, 4):
            theirs = (lambda s=spherical: peer.LFQ(dim=10, codebook_size=1024, spherical=s)) if factor == 1 else None
            num = factor * base
            found += group(title, 10, num, lambda dim, kind=kind: kind(dim, bits=dim), theirs, "D=10, K=2^10")
        for bits in (8, 12, 18):  # as many numbers each time
            num = base * 4 // bits
            found += group(title, bits, num, lambda dim, kind=kind: kind(dim, bits=dim), None, f"D={bits}, K=2^{bits}")
    return found


def _entropies(args: SpeedArguments) -> list[Case]:
    num = max(64, args.num // 4)
    group = f"entropy of soft assignments, forward and backward, N={num}, K={args.codebook_size}, D={args.dim}"
    naive = "softmax of N x K"
    make = partial(_entropy, args.dim, args.codebook_size, args.device)
    return [
        Case(group, naive, partial(make, _naive_entropy), num),
        Case(group, f"{OURS} assignment_entropy", partial(make, assignment_entropy), num, against=naive),
    ]


# -- calls


def _latents(num: int, dim: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)).to(device)


def _rows(size: int, dim: int, device: str, turn: int = 0) -> Tensor:
    """A random code for normal latents: what is left after each codebook of rate log2(K) / D has the variance K^(-2 / D)."""
    left = size ** (-2 / dim)
    return _latents(size, dim, device, seed=1 + turn) * math.sqrt((1 - left) * left**turn)


def _product_into(dim: int, size: int, device: str, num: int) -> Callable[[], Any]:
    z_ND, table_DK = _latents(num, dim, device), _rows(size, dim, device).T
    out_NK = torch.zeros(num, size, device=device)
    return lambda: torch.mm(z_ND, table_DK, out=out_NK)


def _search(search: Callable[[Tensor], Any], dim: int, size: int, device: str, num: int) -> Callable[[], Any]:
    z_ND, in_table = _latents(num, dim, device), search(_rows(size, dim, device))
    return torch.no_grad()(lambda: in_table(z_ND))


def _product_with(table_KD: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z_ND: z_ND @ table_KD.T


def _by_cdist(table_KD: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z_ND: torch.cdist(z_ND, table_KD).argmin(1)


def _by_expansion(table_KD: Tensor) -> Callable[[Tensor], Tensor]:
    def search(z_ND: Tensor) -> Tensor:
        norms_N1, norms_K = z_ND.square().sum(1, keepdim=True), table_KD.square().sum(1)
        return (norms_N1 + norms_K - 2 * (z_ND @ table_KD.T)).argmin(1)

    return search


def _by_peer(table_KD: Tensor) -> Callable[[Tensor], Tensor]:
    module = peer.VectorQuantize(table_KD.shape[1], codebook_size=len(table_KD)).to(table_KD.device).eval()
    module.codebook = table_KD
    return lambda z_ND: module(z_ND[None])[1][0]


def _by_ours(table_KD: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z_ND: nearest_code(z_ND, table_KD)


def _by_quantizer(table_KD: Tensor) -> Callable[[Tensor], Tensor]:
    module = VectorQuantizer(table_KD.shape[1], codebook_size=len(table_KD)).to(table_KD.device).eval()
    module.codebook.embedding.copy_(table_KD)
    return lambda z_ND: module(z_ND[None]).codes[0, 0]


def _vq(args: SpeedArguments, options: dict[str, Any], turn: int = 0) -> Quantizer:
    options = {**_TRAINING, "codebook_size": args.codebook_size, "revival_threshold": _REVIVAL, **options}
    module = VectorQuantizer(args.dim, **options)
    _set_rows(module, args, turn)
    return module.to(args.device)


def _rvq(args: SpeedArguments, options: dict[str, Any]) -> Quantizer:
    layer = {"type": "vector", "codebook_size": args.codebook_size, "revival_threshold": _REVIVAL, **_TRAINING}
    module = ResidualQuantizer(args.dim, num_codebooks=_DEPTH, layer=layer)
    for turn, layer_module in enumerate(module.layers):
        _set_rows(layer_module, args, turn)
    return module.to(args.device)


@torch.no_grad()
def _set_rows(module: Any, args: SpeedArguments, turn: int) -> None:
    rows = _rows(args.codebook_size, module.codebook.embedding.shape[1], "cpu", turn)
    module.codebook.embedding.copy_(module.codebook.prepare(rows))


def _peer_vq(args: SpeedArguments, num: int, options: dict[str, Any]) -> Any:
    module = peer.VectorQuantize(
        args.dim, codebook_size=args.codebook_size, rotation_trick=False, **_peer_options(args, num), **options
    )
    _set_peer_rows(module, 0)
    return module.to(args.device)


def _peer_rvq(args: SpeedArguments, num: int, options: dict[str, Any]) -> Any:
    options = {**_peer_options(args, num), **options, "rotation_trick": False}
    module = peer.ResidualVQ(dim=args.dim, num_quantizers=_DEPTH, codebook_size=args.codebook_size, **options)
    for turn, layer in enumerate(module.layers):
        _set_peer_rows(layer, turn)
    return module.to(args.device)


def _peer_options(args: SpeedArguments, num: int) -> dict[str, Any]:
    """Theirs counts dead codes in hits, ours in shares of uniform use."""
    return {**_TRAINING, "threshold_ema_dead_code": _REVIVAL * num / args.codebook_size, "kmeans_init": False}


@torch.no_grad()
def _set_peer_rows(module: Any, turn: int) -> None:
    codebook = module._codebook
    rows = codebook.transform_input(_rows(codebook.embed.shape[1], codebook.embed.shape[2], "cpu", turn))
    codebook.embed.copy_(rows)
    codebook.embed_avg.copy_(rows)


def _encode(build: Callable[..., Quantizer], args: SpeedArguments, options: dict[str, Any], num: int) -> Any:
    module, z = build(args, options).eval(), _latents(num, args.dim, args.device)[None]
    return lambda: module.encode(z)


def _peer_encode(build: Callable[..., Any], args: SpeedArguments, options: dict[str, Any], num: int) -> Any:
    module, z = build(args, num, options).eval(), _latents(num, args.dim, args.device)[None]
    return torch.no_grad()(lambda: module(z))


def _step(build: Callable[..., Quantizer], args: SpeedArguments, options: dict[str, Any], num: int) -> Any:
    """Search, statistics, gradient estimator, losses, backward, update."""
    module, z = build(args, options).train(), _latents(num, args.dim, args.device)[None].requires_grad_()
    by_quantized = _latents(num, args.dim, args.device, seed=99)[None] / num

    def call() -> None:
        z.grad = None
        module.zero_grad(set_to_none=True)
        out = module(z)
        torch.autograd.backward([out.quantized, out.loss], [by_quantized, None])
        module.update()

    return call


def _peer_step(build: Callable[..., Any], args: SpeedArguments, options: dict[str, Any], num: int) -> Any:
    module, z = build(args, num, options).train(), _latents(num, args.dim, args.device)[None].requires_grad_()
    by_quantized = _latents(num, args.dim, args.device, seed=99)[None] / num

    def call() -> None:  # the update is part of their forward
        z.grad = None
        module.zero_grad(set_to_none=True)
        quantized, _, loss = module(z)
        torch.autograd.backward([quantized, loss.sum()], [by_quantized, None])

    return call


def _copy(dim: int, device: str, num: int) -> Callable[[], Any]:
    z = _latents(num, dim, device)
    return lambda: z.clone()


def _scalar(build: Callable[[int], Quantizer], dim: int, device: str, num: int) -> Callable[[], Any]:
    module, z = build(dim).to(device).eval(), _latents(num, dim, device)[None]
    return torch.no_grad()(lambda: module(z))


def _peer_scalar(build: Callable[[], Any], dim: int, device: str, num: int) -> Callable[[], Any]:
    module, z = build().to(device).eval(), _latents(num, dim, device)[None]
    return torch.no_grad()(lambda: module(z))


def _entropy(dim: int, size: int, device: str, terms: Callable[..., Any], num: int) -> Callable[[], Any]:
    z, table = _latents(num, dim, device).requires_grad_(), _rows(size, dim, device).requires_grad_()
    bias = torch.zeros(size, device=device)

    def call() -> None:
        z.grad = table.grad = None
        entropy, use_K = terms(z, table, bias)
        (entropy + (use_K * use_K.clamp_min(1e-12).log()).sum()).backward()

    return call


def _naive_entropy(z_ND: Tensor, table_KD: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    log_p_NK = torch.addmm(bias_K, z_ND, table_KD.T).log_softmax(1)
    p_NK = log_p_NK.exp()
    return -(p_NK * log_p_NK).sum(1).mean(), p_NK.mean(0)


# -- measuring


def _all_extra_bytes(all_cases: list[Case], args: SpeedArguments) -> dict[str, int | None]:
    print("measuring memory", file=sys.stderr, flush=True)
    with_memory = [case for case in all_cases if case.memory]
    if args.device == "cuda":
        return {case.name: _extra_bytes(case, args) for case in with_memory}
    flags = ("num", "dim", "codebook_size", "large_codebook_size", "device", "threads")
    arguments = [part for name in flags for part in (f"--{name}", str(getattr(args, name)))]
    return in_new_process(__file__, [*arguments, "--rows", *(case.name for case in with_memory)])


def _extra_bytes(case: Case, args: SpeedArguments) -> int:
    torch.set_num_threads(args.threads)
    case.make(_tiny(case))()  # libraries, threads and kernels are there before the call that counts
    return peak_extra_bytes(case.make(case.num), torch.device(args.device))


def _measure(group: list[Case], args: SpeedArguments, extra_bytes: dict[str, int | None]) -> list[Row]:
    rows = []
    same: dict[Any, list[Case]] = {}  # in pieces, so that not all sizes are in memory together
    for case in group:
        same.setdefault((case.num, case.size if case.numbers else ""), []).append(case)
    for some in same.values():
        for case in some:
            case.make(_tiny(case))()
        calls = {case.name: case.make(case.num) for case in some}
        slow = {case.name: args.slow_runs for case in some if case.slow}
        timings = time_in_turn(calls, args.rounds, slow, torch.device(args.device))
        calls.clear()
        gc.collect()
        here = [Row(case, timings[case.name], extra_bytes=extra_bytes.get(case.name)) for case in some]
        _compare(here)
        rows += here
    if searches := [row for row in rows if row.case.search]:
        _count_wrong(searches, args)
    return rows


def _compare(rows: list[Row]) -> None:
    by_who = {row.case.who: row for row in rows}
    for row in rows:
        against = by_who.get(row.case.against)
        if against is not None:
            row.relative = row.timing.ratio(against.timing)
            if row.extra_bytes is not None and against.extra_bytes:
                row.relative_memory = row.extra_bytes / against.extra_bytes
        for asked in row.case.asked:
            measured = {"time": row.relative, "memory": row.relative_memory, "bytes": row.extra_bytes}[asked.what]
            if measured is not None:
                row.asked.append((asked, measured <= asked.most))


def _tiny(case: Case) -> int:
    return max(8, case.num // 64)


@torch.no_grad()
def _count_wrong(rows: list[Row], args: SpeedArguments) -> None:
    """Shares of rows whose code is not that of float64, for latents and codes around a mean far larger than their spread."""
    case = rows[0].case
    z_ND = _latents(case.num, case.shape[1], args.device) + _OFFSET
    table_KD = _rows(*case.shape, args.device) + _OFFSET
    exact_N = torch.cat([_brute_force(part, table_KD) for part in z_ND.split(max(1, (1 << 23) // len(table_KD)))])
    for row in rows:
        assert row.case.search is not None
        row.wrong = float((row.case.search(table_KD)(z_ND) != exact_N).double().mean())


def _brute_force(z_nD: Tensor, table_KD: Tensor) -> Tensor:
    exactly = "donot_use_mm_for_euclid_dist"
    return torch.cdist(z_nD.double(), table_KD.double(), compute_mode=exactly).argmin(1)


def _page(args: SpeedArguments, table: str, device: torch.device) -> str:
    peer_words = (
        f"`{PEER}` has the same table, decay {_TRAINING['decay']}, commitment {_TRAINING['commitment_weight']}, straight-through "
        f"gradients, no k-means, and its replacement of dead codes on, at the same share of uniform use ({_REVIVAL:g}) as ours. "
        if peer is not None
        else f"`{PEER}` was not installed, so its rows are absent. "
    )
    memory = (
        "as torch's allocator counts it"
        if device.type == "cuda"
        else "the growth of the resident memory of a process of its own around the first call of that size (a small call came "
        "before it), with a malloc that gives every tensor back to the system when it is freed"
    )
    return (
        f"# Quantizers: time and memory\n\n"
        f"fp32. Written by `benchmarks/quantizers.py` on {date.today().isoformat()} "
        f"({machine_line(device, *([PEER] if peer is not None else []))}).\n\n"
        f"The rows of a group run in turn in one process, {args.rounds} times each ({PEER} {args.slow_runs} times where it takes "
        f"seconds); *time, of* compares medians over the same rounds. The limit of a search is the matrix product in it, into an "
        f"output that was allocated before: the faster of its two rows. {peer_words}Latents are normal; tables are random codes for "
        f"them. A training step is search, statistics, gradient estimator, losses, backward and update of the codebook, without an "
        f"optimizer.\n\n"
        f"*extra MiB* is the most memory that a call held beyond its input and its module, results included: {memory}. *wrong codes "
        f"at +100*: the share of rows whose code differs from that of a float64 search by brute force when latents and codes are "
        f"both shifted by {_OFFSET:g}, a hundred times the spread of the latents.\n\n{table}\n"
    )


if __name__ == "__main__":
    run_script(main)
