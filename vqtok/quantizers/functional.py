"""The maths around codes, once, pure: gradients through a quantizer, usage, precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Run fp32 as fp32: without autocast and without TF32 or bf16 shortcuts, so that codes do not depend on the caller's settings.

    In a graph made by torch.compile or torch.export it only turns autocast off: these settings belong to whoever runs the graph.
    (The search is an operator of its own, which sets them when it runs.)
    """
    known: Any = torch.backends  # its settings are attributes that a type checker does not see
    backends = (
        []
        if torch.compiler.is_compiling()
        else [known.cuda.matmul, known.cudnn.conv, known.mkldnn.matmul, known.mkldnn.conv]
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """Return the values of `quantized` with the gradient of the identity to `z` (van den Oord et al. 2017, section 3.2).

    The codebook gets no gradient through it. For use in training only: in eval the table row itself is passed on, because
    z + (q - z) differs from q by rounding.
    """
    return z + (quantized - z).detach()


def rotate(z: Tensor, quantized: Tensor) -> Tensor:
    """Return the values of `quantized` with the gradient of the rotation and rescaling that takes `z` there.

        R = |q| / |z| (I - 2 r r^T + 2 q^ z^^T),   r = (z^ + q^) / |z^ + q^|            (Fifty et al. 2024, section 4.2)

    R is a constant for the gradient. Where it is not defined (a zero vector, or opposite directions), the straight-through
    gradient takes its place. All in fp32; not for codes that were drawn at random.

    Args:
        z: `(*, D)`, the latents.
        quantized: `(*, D)`, their codes' rows.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, q = z.float(), quantized.detach().float()
        norm_z, norm_q = z.detach().norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
        unit_z, unit_q = z.detach() / norm_z.clamp_min(1e-12), q / norm_q.clamp_min(1e-12)
        middle = unit_z + unit_q
        length = middle.norm(dim=-1, keepdim=True)
        defined = (norm_z > 1e-12) & (norm_q > 1e-12) & (length > 1e-4)
        r = middle / length.clamp_min(1e-4)
        turned = z - 2 * r * (r * z).sum(-1, keepdim=True) + 2 * unit_q * (unit_z * z).sum(-1, keepdim=True)
        path = torch.where(defined, norm_q / norm_z.clamp_min(1e-12) * turned, z)
        return path + (q - path).detach()


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs: int64 `(K,)`."""
    return torch.bincount(codes.reshape(-1), minlength=codebook_size)


def usage(counts_K: Tensor) -> float:
    """The share of the codebook that was hit at least once, in [0, 1]."""
    return float((counts_K > 0).double().mean())


def entropy_bits(counts_K: Tensor) -> float:
    """Entropy of the histogram in bits, in [0, log2 K]; 0 for an empty one."""
    total = counts_K.sum()
    if not total:
        return 0.0
    p_K = counts_K.double() / total
    return float(-(p_K * torch.where(p_K > 0, p_K, 1).log2()).sum())


def perplexity(counts_K: Tensor) -> float:
    """exp of the entropy in nats, in [1, K]: the size of a codebook in uniform use that carries as much."""
    return 2 ** entropy_bits(counts_K)
