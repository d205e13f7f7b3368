"""Which gradient goes where, against float64 versions written out in full."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from vqtok.quantizers import (
    MultiRateQuantizer,
    MultiScaleQuantizer,
    ProductQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
    rotate,
    straight_through,
)

DIM = 8
VECTOR = {"type": "vector", "codebook_size": 16}
TRAINED = {**VECTOR, "update": "gradient"}
SIM = {"type": "sim", "codebook_size": 16}

STRAIGHT = {
    "vector": lambda: VectorQuantizer(DIM, codebook_size=16),
    "vector, gradient": lambda: VectorQuantizer(DIM, codebook_size=16, update="gradient"),
    "sim": lambda: SimVQ(DIM, codebook_size=16),
    "product": lambda: ProductQuantizer(DIM, num_codebooks=2, layer=TRAINED),
    "residual": lambda: ResidualQuantizer(DIM, num_codebooks=3, layer=VECTOR),
    "residual, gradient": lambda: ResidualQuantizer(DIM, num_codebooks=3, layer=TRAINED),
    "residual, shared": lambda: ResidualQuantizer(DIM, num_codebooks=3, layer=TRAINED, shared=True),
    "residual, sim": lambda: ResidualQuantizer(DIM, num_codebooks=3, layer=SIM),
    "residual, one codebook": lambda: ResidualQuantizer(DIM, num_codebooks=1, layer=TRAINED),
    "residual, depth dropout": lambda: ResidualQuantizer(DIM, num_codebooks=3, layer=TRAINED, depth_dropout=1.0),
    "multi-scale": lambda: MultiScaleQuantizer(DIM, scales=[1, 2, 4], layer=TRAINED),
    "multi-scale, no smoothing": lambda: MultiScaleQuantizer(DIM, scales=[1, 2, 4], layer=VECTOR, smoothing=0),
    "multi-rate": lambda: MultiRateQuantizer(DIM, strides=[4, 2, 1], layer=TRAINED),
}


def latents(name: str = "", seed: int = 1) -> Tensor:
    grid = (8,) if "rate" in name else (4, 6)
    return torch.randn(3, *grid, DIM, generator=torch.Generator().manual_seed(seed))


def levels(out: Any) -> list[Any]:
    return out if isinstance(out, list) else [out]


def tables(quantizer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in quantizer.named_parameters() if "smoothing" not in name}


@pytest.mark.parametrize("name", STRAIGHT)
def test_the_gradient_of_the_sum_is_that_of_the_identity(name):
    """Exactly, whatever comes from above, also through the levels' sum; and none of it reaches the tables."""
    quantizer, z = STRAIGHT[name]().train(), latents(name).requires_grad_()
    above = torch.randn_like(z)
    (sum(level.quantized for level in levels(quantizer(z))) * above).sum().backward()
    assert z.grad.equal(above)
    assert all(parameter.grad is None for parameter in tables(quantizer).values())
    smoothings = [value for key, value in quantizer.named_parameters() if "smoothing" in key]
    assert len(smoothings) == (6 if name == "multi-scale" else 0)
    assert all(parameter.grad.abs().sum() > 0 for parameter in smoothings)


@pytest.mark.parametrize("name", [name for name in STRAIGHT if name != "vector, gradient"])
def test_straight_layers_say_so(name):
    """Otherwise a residual of them trains by other rules."""
    quantizer = STRAIGHT[name]()
    if hasattr(quantizer, "layers"):
        assert all(layer.is_straight for layer in quantizer.layers)


@pytest.mark.parametrize("name", ["vector, gradient", "sim", "vector, projected"])
def test_each_loss_moves_its_own_side_only(name):
    """Half of the published code has the weight beta on the other term, or gradients on both sides."""
    projected = VectorQuantizer(DIM, codebook_size=16, update="gradient", codebook_dim=3)
    quantizer = (projected if name == "vector, projected" else STRAIGHT[name]()).train()
    table_side = {key: value for key, value in quantizer.named_parameters() if "project" not in key}
    inward = {key: value for key, value in quantizer.named_parameters() if "project_in" in key}
    outward = {key: value for key, value in quantizer.named_parameters() if "project_out" in key}
    assert table_side and bool(inward) == bool(outward) == (name == "vector, projected")
    for loss in ("commitment_loss", "codebook_loss"):
        z = latents().requires_grad_()
        quantizer.zero_grad()
        out = quantizer(z)
        out.losses[loss].backward()
        encoder = loss == "commitment_loss"
        assert (z.grad is not None and bool(z.grad.any())) == encoder
        assert all((value.grad is not None and bool(value.grad.any())) == encoder for value in inward.values())
        assert all((value.grad is not None and bool(value.grad.any())) != encoder for value in table_side.values())
        assert all(value.grad is None for value in outward.values())
        # Values and the gradient of the mean square, by hand.
        with torch.no_grad():
            y = quantizer.prepare(z).double()
            table = quantizer.table if name == "sim" else quantizer.codebook.table
            rows = table.double()[out.codes[:, 0]]
        assert out.losses[loss].item() == pytest.approx(float((y - rows).square().mean()), rel=1e-5)
        if encoder and not inward:
            torch.testing.assert_close(z.grad.double(), 2 * (y - rows) / z.numel(), rtol=1e-4, atol=1e-8)


# -- rotation


def test_rotation_is_that_of_the_explicit_matrix():
    z, q = torch.randn(50, 7) * torch.logspace(-3, 3, 50)[:, None], torch.randn(50, 7)
    z, above = z.requires_grad_(), torch.randn(50, 7)
    out = rotate(z, q)
    torch.testing.assert_close(out, q, rtol=1e-5, atol=1e-6)
    (out * above).sum().backward()
    for i in range(50):
        matrix = reference.rotation_matrix(z[i], q[i])
        torch.testing.assert_close(matrix @ z[i].detach().double(), q[i].double(), rtol=1e-9, atol=1e-9)
        expected = matrix.T @ above[i].double()
        torch.testing.assert_close(z.grad[i].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))
        # A turn keeps lengths; the stretch is that of the two lengths.
        assert z.grad[i].norm() / above[i].norm() == pytest.approx(float(q[i].norm() / z[i].detach().norm()), rel=1e-4)


def test_rotation_keeps_the_angle_to_the_code():
    """What the trick is for: a gradient along the code becomes one along the latent."""
    z, q = torch.randn(20, 5).requires_grad_(), torch.randn(20, 5)
    (rotate(z, q) * q).sum().backward()
    cosine = torch.nn.functional.cosine_similarity(z.grad, z.detach(), dim=1)
    torch.testing.assert_close(cosine, torch.ones(20))


def test_where_no_rotation_is_defined_the_gradient_is_straight():
    z = torch.randn(6, 4)
    q = torch.stack([-z[0], -3 * z[1], torch.zeros(4), z[3], z[4] * 2, torch.zeros(4)])
    z[5] = 0  # both
    zero_latent = torch.cat([z, torch.zeros(1, 4)]).requires_grad_()
    rows = torch.cat([q, torch.ones(1, 4)])
    above = torch.randn(7, 4)
    out = rotate(zero_latent, rows)
    torch.testing.assert_close(out, rows, rtol=1e-6, atol=1e-6)
    (out * above).sum().backward()
    grad = zero_latent.grad
    for i in (0, 1, 2, 5, 6):
        assert grad[i].equal(above[i]), i
    torch.testing.assert_close(grad[3], above[3])  # the same vector
    torch.testing.assert_close(grad[4], 2 * above[4])  # one that is twice as long


def test_nearly_opposite_vectors_have_gradients_of_the_right_size():
    z = torch.randn(200, 6)
    q = -z + torch.randn(200, 6) * torch.logspace(-7, 0, 200)[:, None]
    z.requires_grad_()
    above = torch.randn(200, 6)
    (rotate(z, q) * above).sum().backward()
    assert z.grad.isfinite().all()
    ratio = z.grad.norm(dim=1) / above.norm(dim=1) / (q.norm(dim=1) / z.detach().norm(dim=1))
    assert ((ratio - 1).abs() < 1e-2).float().mean() > 0.5 and ratio.max() < 10 and ratio.min() > 0.05


@pytest.mark.parametrize("function", [rotate, straight_through])
def test_rows_get_no_gradient_and_are_not_changed(function):
    z, q = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    function(z, q).sum().backward()
    assert q.grad is None and z.grad is not None


@pytest.mark.parametrize("options", [{"codebook_dim": 3}, {}, {"metric": "cosine"}])
def test_a_quantizer_passes_gradients_by_rotation(options):
    quantizer = VectorQuantizer(DIM, codebook_size=16, gradient="rotation", **options).train()
    z, above = latents().requires_grad_(), torch.randn(latents().shape)
    out = quantizer(z)
    (out.quantized * above).sum().backward()
    copy = z.detach().double().requires_grad_()
    total, _, _ = reference.in_turn(
        copy.flatten(0, -2), [weights_of(quantizer)], out.codes.flatten()[:, None], "metric" in options, rotation=True
    )
    (total * above.double().flatten(0, -2)).sum().backward()
    torch.testing.assert_close(z.grad.double(), copy.grad, rtol=1e-4, atol=1e-5)


# -- residuals


def weights_of(layer: Any) -> dict[str, Tensor]:
    """A layer's weights in float64, that autograd can follow."""
    out = {}
    if layer.config.type == "sim":
        out.update(map=layer.code_map, bias=layer.code_bias)
    else:
        out.update(table=layer.codebook.embedding)
    if isinstance(layer.project_in, torch.nn.Linear):
        out.update(w_in=layer.project_in.weight, b_in=layer.project_in.bias)
        out.update(w_out=layer.project_out.weight, b_out=layer.project_out.bias)
    out = {name: value.detach().double().requires_grad_() for name, value in out.items()}
    if layer.config.type == "sim":
        out["table"] = layer.frozen_codes.double() @ out["map"].T + out["bias"]
    return out


def gradients_of(layer: Any) -> dict[str, Tensor | None]:
    """Those of the same weights by the same names."""
    if layer.config.type == "sim":
        out = {"map": layer.code_map.grad, "bias": layer.code_bias.grad}
    else:
        out = {"table": layer.codebook.embedding.grad}
    if isinstance(layer.project_in, torch.nn.Linear):
        out.update(w_in=layer.project_in.weight.grad, b_in=layer.project_in.bias.grad)
        out.update(w_out=layer.project_out.weight.grad, b_out=layer.project_out.bias.grad)
    return out


@pytest.mark.parametrize(
    "layer",
    [
        {**TRAINED, "codebook_dim": 3},
        {**TRAINED, "codebook_dim": 3, "metric": "cosine"},
        {**TRAINED, "metric": "cosine"},
        {**TRAINED, "codebook_dim": 12, "commitment_weight": 2.0, "codebook_loss_weight": 0.3},
        {**TRAINED, "gradient": "rotation"},
        {**TRAINED, "gradient": "rotation", "codebook_dim": 4},
        {**VECTOR, "codebook_dim": 3},
        {**SIM, "codebook_dim": 3},
        {**SIM, "gradient": "rotation"},
        {**SIM, "gradient": "rotation", "codebook_dim": 4},
    ],
    ids=lambda layer: ", ".join(str(value) for value in layer.values()),
)
@pytest.mark.parametrize("shared", [False, True])
def test_residuals_that_carry_gradients_train_as_written_out(layer, shared):
    quantizer = ResidualQuantizer(DIM, num_codebooks=3, layer=layer, shared=shared).train()
    z, above = latents().requires_grad_(), torch.randn(latents().shape)
    out = quantizer(z)
    ((out.quantized * above).sum() + 50 * out.loss).backward()

    copy = z.detach().double().requires_grad_()
    distinct = [weights_of(each) for each in quantizer.layers]
    total, commitment, codebook_loss = reference.in_turn(
        copy.flatten(0, -2),
        distinct * 3 if shared else distinct,
        out.codes.movedim(1, -1).flatten(0, -2),
        layer.get("metric") == "cosine",
        layer.get("gradient") == "rotation",
    )
    torch.testing.assert_close(out.quantized.double().flatten(0, -2), total, rtol=1e-4, atol=1e-5)
    loss = layer.get("commitment_weight", 0.25) * commitment
    if "update" in layer or layer["type"] == "sim":
        loss = loss + layer.get("codebook_loss_weight", 1.0) * codebook_loss
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    ((total * above.double().flatten(0, -2)).sum() + 50 * loss).backward()
    # A gradient through three turns is compared by its size: at the end of rotations small numbers are differences of large.
    torch.testing.assert_close(z.grad.double(), copy.grad, rtol=1e-3, atol=1e-4 * float(copy.grad.abs().max()))
    for weights, each in zip(distinct, quantizer.layers, strict=True):
        for name, gradient in gradients_of(each).items():
            if gradient is None:
                assert name == "table" and layer["type"] == "vector" and "update" not in layer
            else:
                wanted = weights[name].grad
                torch.testing.assert_close(
                    gradient.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name
                )


@pytest.mark.parametrize("layer", [VECTOR, TRAINED, SIM], ids=["ema", "gradient", "sim"])
def test_the_commitment_of_every_turn_reaches_the_latents(layer):
    """In many codes only that of the first does: the residual of a straight-through output has no gradient left."""
    quantizer = ResidualQuantizer(DIM, num_codebooks=3, layer=layer).train()
    z = latents().requires_grad_()
    out = quantizer(z)
    out.losses["commitment_loss"].backward()
    residual, expected, value = z.detach().double(), torch.zeros_like(z, dtype=torch.float64), 0.0
    for turn, each in enumerate(quantizer.layers):
        rows = each.embed_codes(out.codes[:, turn : turn + 1]).detach().double()
        residual = residual - rows
        expected += 2 * residual / z.numel() / 3
        value += float(residual.square().mean()) / 3
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-4, atol=1e-8)
    assert out.losses["commitment_loss"].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", ["multi-scale", "multi-scale, no smoothing", "multi-rate"])
def test_the_commitment_of_every_level_reaches_the_latents(kind):
    """Its gradient is spread evenly over the cells that the mean was taken of."""
    quantizer, z = STRAIGHT[kind]().train(), latents(kind).requires_grad_()
    out = quantizer(z)
    for level, output in enumerate(out):
        (gradient,) = torch.autograd.grad(output.losses["commitment_loss"], z, retain_graph=True)
        rows = quantizer.layers[0 if len(quantizer.layers) == 1 else level].embed_codes(output.codes)
        difference = 2 * (output.latents - rows) / output.latents.numel()
        for axis in range(1, z.ndim - 1):
            difference = difference.repeat_interleave(z.shape[axis] // difference.shape[axis], axis)
        cells = z.numel() // output.latents.numel()
        # The grid 4 x 6 of scales 1, 2, 4 does not nest in 2 axes, so only the sum over a sample is compared there.
        if "scale" in kind and level == 0:
            torch.testing.assert_close(gradient.sum((1, 2)), difference.sum((1, 2)) / cells, rtol=1e-4, atol=1e-7)
        elif "rate" in kind or level == 2:
            torch.testing.assert_close(gradient, difference / cells, rtol=1e-4, atol=1e-7)
        assert gradient.abs().sum() > 0


def test_entropy_of_every_turn_reaches_latents_and_table():
    layer = {**TRAINED, "entropy_weight": 1.0}
    quantizer = ResidualQuantizer(DIM, num_codebooks=2, layer=layer).train()
    z = latents().requires_grad_()
    quantizer(z).losses["entropy_loss"].backward()
    assert z.grad.abs().sum() > 0
    assert all(each.codebook.embedding.grad.abs().sum() > 0 for each in quantizer.layers)


def test_depth_dropout_cuts_the_gradient_of_what_is_cut():
    """A sample decoded from one codebook trains no later projection by its reconstruction."""
    quantizer = ResidualQuantizer(DIM, num_codebooks=2, layer={**TRAINED, "codebook_dim": 3}, depth_dropout=1.0).train()
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        quantizer.zero_grad()
        z = latents(seed=seed)[:1]
        out = quantizer(z)
        out.quantized.sum().backward()
        cut = bool(quantizer.layers[1].project_out.weight.grad.eq(0).all())
        prefix = quantizer.embed_codes(out.codes[:, :1] if cut else out.codes)
        torch.testing.assert_close(out.quantized, prefix, rtol=1e-5, atol=1e-5)
        seen.add(cut)
    assert seen == {True, False}
