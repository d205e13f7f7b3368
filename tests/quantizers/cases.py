"""Every kind of quantizer and every branch of its constructor, for the tests that go through all of them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqtok.quantizers import Hierarchy, build_quantizer

ANY_GRID = ((), (5,), (3, 4), (2, 1, 3))
BATCH = 3  # no case has three codebooks or levels with three codes: mixed-up axes show


class Case(NamedTuple):
    config: dict[str, Any]
    losses: str = "commitment"  # the names in training, without `_loss`
    dim: int = 8
    grids: tuple[tuple[int, ...], ...] = ANY_GRID
    stored: bool = True  # whether it has anything that training changes


def vector(losses: str = "commitment", **options: Any) -> Case:
    return Case({"type": "vector", "codebook_size": 11, **options}, losses)


def sim(**options: Any) -> Case:
    return Case({"type": "sim", "codebook_size": 11, **options}, "codebook commitment")


def layered(kind: str, losses: str = "commitment", layer: dict[str, Any] | None = None, **options: Any) -> Case:
    layer = {"type": "vector", "codebook_size": 11, **(layer or {})}
    return Case({"type": kind, "layer": layer, **options}, losses)


def scales(losses: str = "commitment", grids: Any = ((4, 4), (8, 4), (5, 7), (3, 2)), **options: Any) -> Case:
    return layered("multi_scale", losses, **options)._replace(grids=grids)


def rates(losses: str = "commitment", grids: Any = ((4,), (8,), (20,)), **options: Any) -> Case:
    return layered("multi_rate", losses, **options)._replace(grids=grids)


BOTH = "codebook commitment"
CASES = {
    "vector": vector(),
    "vector, a width of its own": vector(codebook_dim=3, commitment_weight=0.7),
    "vector, the width of the latents": vector(codebook_dim=8, revival_threshold=0, decay=0.5),
    "vector, wider": vector(codebook_dim=12),
    "vector, gradient": vector(BOTH, update="gradient", codebook_loss_weight=0.5),
    "vector, gradient, a width of its own": vector(BOTH, update="gradient", codebook_dim=3, revival_threshold=0),
    "vector, rotation": vector(gradient="rotation"),
    "vector, rotation, gradient": vector(BOTH, gradient="rotation", update="gradient", codebook_dim=4),
    "vector, entropy": vector("commitment entropy", entropy_weight=0.2, entropy_temperature=2),
    "vector, entropy, gradient": vector("codebook commitment entropy", update="gradient", entropy_weight=0.2),
    "vector, cosine": vector(metric="cosine"),
    "vector, cosine, gradient": vector(BOTH, metric="cosine", update="gradient", codebook_dim=4),
    "vector, cosine, entropy": vector("commitment entropy", metric="cosine", entropy_weight=0.2),
    "vector, cosine, rotation": vector(metric="cosine", gradient="rotation", codebook_dim=3),
    "vector, inner product": vector(BOTH, metric="inner_product", update="gradient"),
    "vector, inner product, entropy": vector(
        "codebook commitment entropy", metric="inner_product", update="gradient", entropy_weight=0.1, codebook_dim=4
    ),
    "vector, one code": vector(codebook_size=1),
    "vector, one code, gradient": vector(
        "codebook commitment entropy", codebook_size=1, update="gradient", entropy_weight=0.3
    ),
    "vector, one number": vector(BOTH, codebook_dim=1, update="gradient"),
    "sim": sim(),
    "sim, a width of its own": sim(codebook_dim=3, commitment_weight=0.1),
    "sim, rotation": sim(gradient="rotation"),
    "sim, one code": sim(codebook_size=1),
    "gumbel": Case({"type": "gumbel", "codebook_size": 11, "kl_weight": 0.1}, "kl"),
    "gumbel, one code": Case({"type": "gumbel", "codebook_size": 1}, "kl"),
    "fsq": Case({"type": "fsq", "scalar_levels": [8, 5, 5, 2]}, "", dim=4, stored=False),
    "fsq, the paper's rule": Case(
        {"type": "fsq", "scalar_levels": [8, 5, 6, 3], "symmetric": False}, "", dim=4, stored=False
    ),
    "fsq, a width of its own": Case({"type": "fsq", "scalar_levels": [7, 5]}, "", stored=False),
    "fsq, one number": Case({"type": "fsq", "scalar_levels": [2]}, "", dim=1, stored=False),
    "lfq": Case({"type": "lfq", "bits": 8}, "commitment entropy", stored=False),
    "lfq, several groups": Case(
        {"type": "lfq", "bits": 8, "entropy_group_bits": 3}, "commitment entropy", stored=False
    ),
    "lfq, a width of its own": Case({"type": "lfq", "bits": 5, "entropy_weight": 0.5}, "commitment entropy"),
    "lfq, no entropy": Case({"type": "lfq", "bits": 8, "entropy_weight": 0}, "commitment", stored=False),
    "lfq, one bit": Case({"type": "lfq", "bits": 1}, "commitment entropy", dim=1, stored=False),
    "bsq": Case({"type": "bsq", "bits": 8, "entropy_temperature": 0.5}, "commitment entropy", stored=False),
    "bsq, a width of its own": Case({"type": "bsq", "bits": 18, "entropy_group_bits": 7}, "commitment entropy"),
    "product": layered("product", num_codebooks=2),
    "product, a width of its own": layered("product", BOTH, {"codebook_dim": 3, "update": "gradient"}, num_codebooks=4),
    "product, one codebook": layered("product", num_codebooks=1),
    "product, sim": layered("product", BOTH, {"type": "sim"}, num_codebooks=2),
    "residual": layered("residual", num_codebooks=4),
    "residual, gradient": layered("residual", BOTH, {"update": "gradient"}, num_codebooks=2),
    "residual, shared": layered("residual", shared=True, num_codebooks=4),
    "residual, shared, gradient": layered("residual", BOTH, {"update": "gradient"}, shared=True, num_codebooks=2),
    "residual, one codebook": layered("residual", num_codebooks=1),
    "residual, depth dropout": layered(
        "residual", BOTH, {"update": "gradient", "codebook_dim": 3}, num_codebooks=4, depth_dropout=1.0
    ),
    "residual, DAC": layered("residual", layer={"codebook_dim": 3, "metric": "cosine"}, num_codebooks=4),
    "residual, rotation": layered("residual", layer={"gradient": "rotation"}, num_codebooks=2),
    "residual, entropy": layered("residual", "commitment entropy", {"entropy_weight": 0.1}, num_codebooks=2),
    "residual, sim": layered("residual", BOTH, {"type": "sim"}, num_codebooks=2),
    "residual, sim, shared": layered("residual", BOTH, {"type": "sim", "codebook_dim": 3}, shared=True),
    "multi-scale": scales(scales=[1, 2, 4]),
    "multi-scale, a table each": scales(
        BOTH, layer={"update": "gradient"}, scales=[1, 2, 4], shared=False, num_smoothings=2
    ),
    "multi-scale, no smoothing": scales(scales=[1, 2, 4], smoothing=0),
    "multi-scale, all smoothing": scales(scales=[2, 4], smoothing=1),
    "multi-scale, one scale": scales(scales=[4]),
    "multi-scale, scales that do not nest": scales(scales=[1, 2, 3], grids=((6, 3), (4, 5))),
    "multi-scale, cosine": scales(layer={"metric": "cosine", "codebook_dim": 4}, scales=[1, 2]),
    "multi-scale, sim": scales(BOTH, layer={"type": "sim"}, scales=[1, 4], shared=False),
    "multi-scale, a sequence": scales(scales=[1, 2, 4], grids=((5,), (8,), (1,))),
    "multi-rate": rates(strides=[4, 2, 1]),
    "multi-rate, SNAC": rates(layer={"codebook_dim": 3, "metric": "cosine"}, strides=[4, 1]),
    "multi-rate, gradient": rates(BOTH, layer={"update": "gradient"}, strides=[4, 2, 1]),
    "multi-rate, one rate": rates(strides=[1]),
    "multi-rate, sim": rates(BOTH, layer={"type": "sim"}, strides=[2, 1]),
}


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    case = CASES[name]
    return build_quantizer(case.config, case.dim, ndim=len(case.grids[0]))


def latents(name: str, grid: tuple[int, ...] | None = None, seed: int = 1, batch: int = BATCH) -> Tensor:
    case = CASES[name]
    grid = case.grids[-1] if grid is None else grid
    return torch.randn(batch, *grid, case.dim, generator=torch.Generator().manual_seed(seed))


def levels(out: Any) -> list[Any]:
    """A list of outputs, one for a quantizer of a single level."""
    return out if isinstance(out, list) else [out]


def codes_of(out: Any) -> list[Tensor]:
    return [level.codes for level in levels(out)]


def embed(quantizer: Any, codes: list[Tensor]) -> list[Tensor]:
    return list(quantizer.embed_codes(codes)) if isinstance(quantizer, Hierarchy) else [quantizer.embed_codes(codes[0])]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Equal in number, dtypes, shapes and bits."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.equal(b) for a, b in zip(first, second, strict=True)
    )


def state(quantizer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in quantizer.state_dict().items()}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and same(list(first.values()), list(second.values()))


def train_step(quantizer: Any, z: Tensor, rate: float = 0.1) -> None:
    """A pass, a step of gradient descent on all parameters, the update."""
    objective(quantizer.train()(z.requires_grad_())).backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= rate * parameter.grad
            parameter.grad = None
    quantizer.update()


def objective(out: Any) -> Tensor:
    """A reconstruction of some target, and the quantizer's own loss."""
    total = sum(level.quantized for level in levels(out))
    return (total - 0.3).square().mean() + sum(level.loss for level in levels(out))
