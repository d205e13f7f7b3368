"""One quantizer and a hierarchy of them: which gradient goes where, which branch returns what."""

import copy

import pytest
import torch

from vqtok.quantizers import HierarchicalQuantizer, VectorQuantizer, nearest_code

BRANCHES = [(rule, codebook_dim) for rule in ("ema", "gradient") for codebook_dim in (None, 8, 3, 12)]


def build(rule: str = "ema", codebook_dim: int | None = None, **options) -> VectorQuantizer:
    return VectorQuantizer(8, 32, codebook_dim, update=rule, **options)


@pytest.mark.parametrize(("rule", "codebook_dim"), BRANCHES)
@pytest.mark.parametrize("grid", [(), (5,), (3, 4), (2, 1, 3)])
def test_every_branch_on_every_grid(rule, codebook_dim, grid):
    quantizer = build(rule, codebook_dim)
    z = torch.randn(2, *grid, 8)
    width = codebook_dim or 8
    for training in (True, False):
        out = quantizer.train(training)(z)
        assert out.quantized.shape == z.shape and out.latents.shape == (2, *grid, width)
        assert out.codes.shape == (2, 1, *grid) and out.codes.dtype == torch.int64
        assert (
            out.codes[:, 0].flatten().equal(nearest_code(out.latents.reshape(-1, width), quantizer.codebook.embedding))
        )
        assert quantizer.encode(z).codes.equal(out.codes), "encode and forward say the same"
        expected = {"commitment_loss", "codebook_loss"} if rule == "gradient" else {"commitment_loss"}
        assert set(out.losses) == (expected if training else set())
        assert all(loss.dtype == torch.float32 and loss.ndim == 0 and loss.isfinite() for loss in out.losses.values())


@pytest.mark.parametrize(("rule", "codebook_dim"), BRANCHES)
def test_eval_returns_the_rows_themselves(rule, codebook_dim):
    quantizer = build(rule, codebook_dim).eval()
    out = quantizer(torch.randn(2, 3, 3, 8) * 100)
    assert out.quantized.equal(quantizer.embed_codes(out.codes))
    if codebook_dim in (None, 8):
        assert out.quantized.equal(quantizer.codebook.embedding[out.codes[:, 0]])
    else:
        assert out.quantized.equal(quantizer.project_out(quantizer.codebook.embedding[out.codes[:, 0]]))


def test_no_projection_where_none_is_needed():
    assert [name for name, _ in build("gradient", 8).named_parameters()] == ["codebook.embedding"]
    assert len(list(build("ema", 3).parameters())) == 4
    with pytest.raises(ValueError, match="D=0"):
        build("ema", 0)


def test_the_gradient_of_the_sum_is_one_everywhere():
    for rule in ("ema", "gradient"):
        quantizer = build(rule).train()
        z = torch.randn(4, 6, 8, requires_grad=True)
        quantizer(z).quantized.sum().backward()
        assert z.grad.equal(torch.ones_like(z))
        assert all(parameter.grad is None for parameter in quantizer.parameters()), (
            "not through the straight-through path"
        )


@pytest.mark.parametrize("loss", ["codebook_loss", "commitment_loss"])
def test_each_loss_moves_only_its_own_side(loss):
    """Equation 3: sg is on the other side, and the estimator comes after the losses, not before."""
    quantizer = build("gradient").train()
    z = torch.randn(5, 7, 8, requires_grad=True)
    out = quantizer(z)
    out.losses[loss].backward()
    rows = quantizer.codebook.embedding[out.codes[:, 0]].detach()
    if loss == "commitment_loss":
        assert quantizer.codebook.embedding.grad is None
        torch.testing.assert_close(z.grad, 2 * (z.detach() - rows) / z.numel())
    else:
        assert z.grad is None
        expected = torch.zeros(32, 8).index_add_(
            0, out.codes.flatten(), (2 * (rows - z.detach()) / z.numel()).view(-1, 8)
        )
        torch.testing.assert_close(quantizer.codebook.embedding.grad, expected)
    torch.testing.assert_close(out.losses[loss], (z - rows).square().mean())


def test_projections_get_gradients():
    quantizer = build("gradient", 3).train()
    z = torch.randn(2, 4, 8, requires_grad=True)
    out = quantizer(z)
    (out.quantized.square().sum() + sum(out.losses.values())).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize(("rule", "codebook_dim"), BRANCHES)
def test_autocast_and_dtypes_choose_the_codes_of_fp32(rule, codebook_dim):
    quantizer = build(rule, codebook_dim).eval()
    z = torch.randn(16, 40, 8)
    expected = quantizer.encode(z).codes
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer.encode(z).codes.equal(expected) and quantizer(z).codes.equal(expected)
        out = quantizer.train()(z)
        assert out.codes.equal(expected) and all(loss.dtype == torch.float32 for loss in out.losses.values())
    z = z.bfloat16()
    expected = quantizer.eval().encode(z.float()).codes
    assert quantizer.encode(z).codes.equal(expected)


@pytest.mark.parametrize("codebook_dim", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_moved_quantizer_still_runs(codebook_dim, dtype):
    """After use, and with latents of its new dtype; the table keeps fp32."""
    quantizer = build("ema", codebook_dim)
    z = torch.randn(2, 5, 8)
    quantizer(z)
    quantizer.to(dtype)
    for training in (True, False):
        out = quantizer.train(training)(z.to(dtype))
        assert out.quantized.isfinite().all() and quantizer.codebook.embedding.dtype == torch.float32


def test_training_only_accumulates_and_eval_not_even_that():
    quantizer = build("ema", decay=0.5)
    z = torch.randn(3, 10, 8)
    start = {name: value.clone() for name, value in quantizer.state_dict().items()}

    def unchanged() -> bool:
        return all(value.equal(start[name]) for name, value in quantizer.state_dict().items())

    quantizer.eval()(z)
    quantizer.train().encode(z)
    control = copy.deepcopy(quantizer)
    control(z)
    quantizer(z)
    assert unchanged()
    quantizer.encode(z * 5)
    quantizer.eval()(z * 5)
    for each in (quantizer, control):
        HierarchicalQuantizer([each]).update()
    assert not unchanged()
    assert all(value.equal(control.state_dict()[name]) for name, value in quantizer.state_dict().items())


def test_eval_training_steps_leave_the_table():
    """A validation pass between two updates moves nothing, nor does an update after it."""
    quantizer = build("ema", decay=0.5).eval()
    table = quantizer.codebook.embedding.clone()
    quantizer(torch.randn(3, 10, 8))
    HierarchicalQuantizer([quantizer]).update()
    assert quantizer.codebook.embedding.equal(table)


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 4, 4, 7), (2, 9)])
def test_latents_that_are_not_channel_last_are_refused(shape):
    for call in (build(), build().encode):
        with pytest.raises(ValueError, match="channel-last with 8 channels"):
            call(torch.zeros(shape))


# -- the hierarchy: levels that know the coarser ones


def hierarchy(num_levels: int) -> HierarchicalQuantizer:
    return HierarchicalQuantizer([VectorQuantizer(4, 16) for _ in range(num_levels)])


def propose(level: int, quantized: list[torch.Tensor]) -> torch.Tensor:
    """Latents of a grid that doubles with the level, each from all the coarser rows and their order."""
    assert len(quantized) == level
    generator = torch.Generator().manual_seed(level)
    z = torch.randn(3, 2 << level, 4, generator=generator)
    return z + sum((index + 1) * rows.mean(1, keepdim=True) for index, rows in enumerate(quantized))


@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_a_hierarchy_of_any_depth(num_levels):
    quantizer = hierarchy(num_levels)
    outputs = {mode: quantizer.train(mode)(propose) for mode in (True, False)}
    encoded = quantizer.encode(propose)
    codes = [out.codes for out in encoded]
    assert [tuple(c.shape) for c in codes] == [(3, 1, 2 << level) for level in range(num_levels)]
    assert all(out.codes.equal(c) for out, c in zip(outputs[False], codes, strict=True))
    assert outputs[True][0].codes.equal(codes[0])
    for prefix in range(1, num_levels + 1):
        rows = quantizer.embed_codes(codes[:prefix])
        assert len(rows) == prefix and all(r.equal(out.quantized) for r, out in zip(rows, outputs[False], strict=False))


def test_freezing_a_hierarchy():
    quantizer = HierarchicalQuantizer([VectorQuantizer(4, 16, 2, update=rule) for rule in ("ema", "gradient")]).train()
    quantizer.freeze()
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(propose)
    quantizer.update()
    assert all(value.equal(before[name]) for name, value in quantizer.state_dict().items())
    quantizer.freeze(False)
    assert all(parameter.requires_grad for parameter in quantizer.parameters())
    quantizer(propose)
    quantizer.update()
    assert not quantizer.levels[0].codebook.embedding.equal(before["levels.0.codebook.embedding"])


def test_initialising_one_level_leaves_the_others():
    quantizer = hierarchy(2)
    before = [level.codebook.embedding.clone() for level in quantizer.levels]
    quantizer.initialise(1, torch.randn(5, 40, 4))
    assert quantizer.levels[0].codebook.embedding.equal(before[0]) and not quantizer.levels[0].codebook.initialised
    assert not quantizer.levels[1].codebook.embedding.equal(before[1]) and quantizer.levels[1].codebook.initialised
