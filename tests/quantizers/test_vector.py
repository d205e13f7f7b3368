"""One quantizer and a hierarchy of them: which gradient goes where, which branch returns what."""

import copy

import pytest
import torch

from vqtok.quantizers import HierarchicalQuantizer, VectorQuantizer, k_means, nearest_code

BRANCHES = [(rule, codebook_dim) for rule in ("ema", "gradient") for codebook_dim in (None, 8, 3, 12)]


def build(rule: str = "ema", codebook_dim: int | None = None, **options) -> VectorQuantizer:
    return VectorQuantizer(8, codebook_size=32, codebook_dim=codebook_dim, update=rule, **options)


@pytest.mark.parametrize(("rule", "codebook_dim"), BRANCHES)
@pytest.mark.parametrize("grid", [(), (5,), (3, 4), (2, 1, 3)])
def test_every_branch_on_every_grid(rule, codebook_dim, grid):
    quantizer = build(rule, codebook_dim)
    z = torch.randn(2, *grid, 8)
    width = codebook_dim or 8
    for training in (True, False):
        out = quantizer.train(training)(z)
        assert out.quantized.shape == z.shape and out.latents.equal(z)
        assert out.codes.shape == (2, 1, *grid) and out.codes.dtype == torch.int64
        searched = quantizer.prepare(z)
        assert searched.shape == (2, *grid, width) and (width != 8 or searched.equal(z))
        assert out.codes[:, 0].flatten().equal(nearest_code(searched.reshape(-1, width), quantizer.codebook.embedding))
        assert quantizer.encode(z).codes.equal(out.codes), "encode and forward say the same"
        expected = {"commitment_loss", "codebook_loss"} if rule == "gradient" else {"commitment_loss"}
        assert set(out.losses) == (expected if training else set())
        assert (out.loss is not None) == training
        losses = [*out.losses.values(), *([out.loss] if training else [])]
        assert all(loss.dtype == torch.float32 and loss.ndim == 0 and loss.isfinite() for loss in losses)


def test_the_loss_is_the_sum_with_the_weights_of_the_configuration():
    quantizer = build("gradient", commitment_weight=3, codebook_loss_weight=0.5).train()
    out = quantizer(torch.randn(2, 5, 8))
    assert out.loss.equal(3 * out.losses["commitment_loss"] + 0.5 * out.losses["codebook_loss"])
    out = build("ema").train()(torch.randn(2, 5, 8))
    assert out.loss.equal(0.25 * out.losses["commitment_loss"]), "an EMA table has no loss of its own"


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
    with pytest.raises(ValueError, match="codebook_dim must be from 1 to 65536, got 0"):
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
    """After use, and with latents of its new dtype; all of it keeps fp32, table and projections, and computes in it."""
    quantizer = build("ema", codebook_dim)
    z = torch.randn(2, 5, 8)
    quantizer(z)
    before, expected = copy.deepcopy(quantizer.state_dict()), quantizer.encode(z.to(dtype).float())
    quantizer.to(dtype)
    for training in (True, False):
        out = quantizer.train(training)(z.to(dtype))
        assert out.quantized.isfinite().all() and out.codes.equal(expected.codes)
        assert {out.quantized.dtype, out.latents.dtype} == {torch.float32}
    assert out.quantized.equal(expected.quantized)
    after = quantizer.state_dict()
    assert all(value.dtype == after[name].dtype and value.equal(after[name]) for name, value in before.items())


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
        each.update()
    assert not unchanged()
    assert all(value.equal(control.state_dict()[name]) for name, value in quantizer.state_dict().items())


def test_eval_training_steps_leave_the_table():
    """A validation pass between two updates moves nothing, nor does an update after it."""
    quantizer = build("ema", decay=0.5).eval()
    table = quantizer.codebook.embedding.clone()
    quantizer(torch.randn(3, 10, 8))
    quantizer.update()
    assert quantizer.codebook.embedding.equal(table)


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 4, 4, 7), (2, 9)])
def test_latents_that_are_not_channel_last_are_refused(shape):
    for call in (build(), build().encode):
        with pytest.raises(ValueError, match=r"channel-last \(B, \*grid, 8\), got torch.float32"):
            call(torch.zeros(shape))


# -- the hierarchy: levels that know the coarser ones


def hierarchy(num_levels: int) -> HierarchicalQuantizer:
    return HierarchicalQuantizer([VectorQuantizer(4, codebook_size=16) for _ in range(num_levels)])


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


def test_a_tensor_is_the_latents_of_a_single_level():
    z = torch.randn(3, 5, 4)
    quantizer = hierarchy(1)
    (one,), (other,) = quantizer(z), quantizer(lambda level, quantized: z)
    assert one.codes.equal(other.codes) and quantizer.encode(z)[0].codes.equal(one.codes)
    for call in (hierarchy(2), hierarchy(2).encode):
        with pytest.raises(
            ValueError, match="2 levels need a function that proposes the latents of each, got a tensor"
        ):
            call(z)


def test_freezing_a_hierarchy():
    levels = [VectorQuantizer(4, codebook_size=16, codebook_dim=2, update=rule) for rule in ("ema", "gradient")]
    quantizer = HierarchicalQuantizer(levels).train()
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


def test_initialising_goes_from_coarse_to_fine():
    """A level sees the rows of the coarser ones as they have become."""
    asked = []

    def proposal(seed: int):
        def propose(level: int, quantized: list[torch.Tensor]) -> torch.Tensor:
            asked.append(level)
            assert len(quantized) == level
            z = torch.randn(40, 2 << level, 4, generator=torch.Generator().manual_seed(seed))
            return z + sum(10 * rows.mean(1, keepdim=True) for rows in quantized)

        return propose

    quantizer = hierarchy(3)
    batches = [proposal(seed) for seed in (1, 2)]
    quantizer.initialise(lambda: iter(batches), max_latents=10_000)
    assert max(asked) == 2
    for level, module in enumerate(quantizer.levels):
        latents = torch.cat([quantizer.encode(propose)[level].latents.flatten(0, 1) for propose in batches])
        assert module.codebook.initialised and module.codebook.embedding.equal(k_means(latents, 16))
