"""What every quantizer promises, shown for every kind and every branch of its constructor."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantizers.cases import (
    BATCH,
    CASES,
    build,
    codes_of,
    embed,
    latents,
    levels,
    objective,
    same,
    same_state,
    state,
    train_step,
)
from vqtok.quantizers import Hierarchy, quantizer_config
from vqtok.quantizers import collective as collective_module

WEIGHT_OF = {
    "commitment_loss": "commitment_weight",
    "codebook_loss": "codebook_loss_weight",
    "entropy_loss": "entropy_weight",
    "kl_loss": "kl_weight",
}
all_cases = pytest.mark.parametrize("name", CASES)


# -- one truth: forward, encode, embed_codes


@pytest.mark.parametrize(("name", "grid"), [(name, grid) for name, case in CASES.items() for grid in case.grids])
def test_eval_forward_is_the_embedding_of_the_codes_and_encode_bit_for_bit(name, grid):
    quantizer, z = build(name).eval(), latents(name, grid) * 2
    out = levels(quantizer(z))
    encoded = levels(quantizer.encode(z))
    assert same(codes_of(out), codes_of(encoded))
    quantized = [level.quantized for level in out]
    assert same(quantized, [level.quantized for level in encoded])
    assert same(quantized, embed(quantizer, codes_of(out)))
    configs = quantizer.level_configs if isinstance(quantizer, Hierarchy) else [quantizer.config]
    assert len(out) == len(configs)
    for level, config in zip(out, configs, strict=True):
        assert level.quantized.shape == z.shape and level.quantized.dtype == torch.float32
        assert level.codes.dtype == torch.int64 and level.codes.shape[:2] == (BATCH, config.depth)
        assert level.codes.ndim == z.ndim and level.codes.min() >= 0 and level.codes.max() < config.size
        assert level.latents.dtype == torch.float32 and level.latents.shape[0] == BATCH
        assert level.losses == {} and level.loss is None
    if not isinstance(quantizer, Hierarchy):
        assert out[0].codes.shape[2:] == grid and out[0].latents.equal(z)
        assert quantizer.config.size == 1 or out[0].codes.unique().numel() > 1 or z.numel() < 9


@all_cases
def test_training_finds_the_same_codes_and_values_up_to_rounding(name):
    quantizer, z = build(name).train(), latents(name, seed=2)
    evaluated = levels(quantizer.encode(z))
    out = levels(quantizer(z))
    assert same(codes_of(out), codes_of(evaluated))
    if "gumbel" not in name and "dropout" not in name:  # which train on other values on purpose
        for level, expected in zip(out, evaluated, strict=True):
            torch.testing.assert_close(level.quantized, expected.quantized, rtol=1e-5, atol=1e-5)


@all_cases
def test_each_sample_and_any_memory_layout_has_the_same_codes(name):
    quantizer, z = build(name).eval(), latents(name)
    together = codes_of(quantizer.encode(z))
    alone = [codes_of(quantizer.encode(sample[None])) for sample in z]
    assert same(together, [torch.cat(parts) for parts in zip(*alone, strict=True)])
    turned = z.movedim(-1, 1).contiguous().movedim(1, -1)  # as it comes out of a convolution
    assert same(together, codes_of(quantizer.encode(turned)))
    assert same(together, codes_of(quantizer(turned)))


@all_cases
def test_no_samples(name):
    quantizer, z = build(name).eval(), latents(name)[:0]
    for out in (quantizer(z), quantizer.encode(z)):
        assert all(level.quantized.shape == z.shape and len(level.codes) == 0 for level in levels(out))
    assert all(part.shape == z.shape for part in embed(quantizer, codes_of(quantizer(z))))


# -- what changes state, and what does not


@all_cases
def test_encode_and_embed_codes_change_nothing_in_train_mode(name):
    """Neither the state, nor what waits for the next update, nor the random numbers of the pass after."""
    runs = []
    for with_encode in (False, True):
        quantizer = build(name).train()
        torch.manual_seed(3)
        for step in range(3):
            z = latents(name, seed=step) + 1
            if with_encode:
                before = state(quantizer)
                embed(quantizer, codes_of(quantizer.encode(5 - z)))
                assert same_state(state(quantizer), before)
                assert all(not level.quantized.requires_grad for level in levels(quantizer.encode(z)))
            train_step(quantizer, z)
        runs.append(state(quantizer))
    assert same_state(*runs)


@all_cases
def test_training_changes_what_is_stored_and_eval_does_not(name):
    quantizer, z = build(name).eval(), latents(name)
    before = state(quantizer)
    quantizer(z)
    assert same_state(state(quantizer), before)
    # Nothing waits for the update either: after a step of training it is as if there had been no passes in eval.
    other = build(name)
    for one in (quantizer, other):
        torch.manual_seed(5)
        train_step(one, z + 1)
    assert same_state(state(quantizer), state(other))
    assert not CASES[name].stored or not same_state(state(quantizer), before)


@all_cases
def test_a_pass_alone_changes_nothing_before_the_update(name):
    quantizer = build(name).train()
    before = state(quantizer)
    quantizer(latents(name))
    assert same_state(state(quantizer), before)


@all_cases
def test_frozen_never_changes(name):
    quantizer = build(name).train()
    quantizer(latents(name, seed=7))  # what was accumulated before is forgotten
    quantizer.freeze()
    before = state(quantizer)
    for step in range(2):
        z = latents(name, seed=step).requires_grad_()
        objective(quantizer.train()(z)).backward()
        assert z.grad.isfinite().all()
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in quantizer.parameters())
        quantizer.update()
    assert same_state(state(quantizer), before)
    quantizer.freeze(False)
    quantizer.update()  # of nothing: what a frozen pass saw is not waiting
    fresh = build(name).train()
    fresh.update()
    assert same_state(state(quantizer), state(fresh))
    train_step(quantizer, latents(name))
    assert not before or not same_state(state(quantizer), before)


@all_cases
def test_micro_batches_add_up_to_the_large_batch(name):
    whole, parts = build(name).train(), build(name).train()
    for step in range(2):
        z = latents(name, seed=step, batch=4)
        whole(z)
        for part in z.split([1, 3]):
            parts(part)
        whole.update()
        parts.update()
    for key, value in state(whole).items():
        torch.testing.assert_close(state(parts)[key], value, rtol=1e-5, atol=1e-5, msg=key)


# -- storing and moving


@all_cases
def test_saved_and_loaded_is_bit_equal(name, tmp_path):
    quantizer = build(name)
    train_step(quantizer, latents(name))
    save_file({key: value.contiguous() for key, value in quantizer.state_dict().items()}, tmp_path / "q.safetensors")
    other = build(name, seed=9)
    other.load_state_dict(load_file(tmp_path / "q.safetensors"))
    assert same_state(state(other), state(quantizer))
    z = latents(name, seed=4)
    assert same(codes_of(other.eval()(z)), codes_of(quantizer.eval()(z)))
    assert same([level.quantized for level in levels(other(z))], [level.quantized for level in levels(quantizer(z))])
    # And it goes on training as the one that was never saved.
    for one in (quantizer, other):
        torch.manual_seed(5)
        train_step(one, z)
    assert same_state(state(other), state(quantizer))


@all_cases
def test_built_without_memory_and_loaded(name):
    """As `from_pretrained` does it: what is not in the file must not be needed."""
    quantizer = build(name)
    with torch.device("meta"):
        empty = build(name)
    assert all(value.is_meta for value in empty.state_dict().values())
    empty.load_state_dict(state(quantizer), assign=True)
    z = latents(name)
    assert same(codes_of(empty.eval()(z)), codes_of(quantizer.eval()(z)))
    for one in (quantizer, empty):
        torch.manual_seed(5)
        for parameter in one.parameters():
            parameter.requires_grad_()
        train_step(one, z)
    assert same_state(state(empty), state(quantizer))
    to_empty = build(name).to("meta").to_empty(device="cpu")
    to_empty.load_state_dict(state(quantizer))
    assert same(codes_of(to_empty.eval()(z)), codes_of(quantizer.eval()(z)))


@all_cases
def test_moved_to_another_dtype_it_stays_fp32(name):
    quantizer, z = build(name).eval(), latents(name)
    expected, before = levels(quantizer(z)), state(quantizer)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), quantizer)
    for move in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        move()
        assert model[0].weight.dtype != torch.float32
        assert same_state(state(quantizer), before)
        out = levels(quantizer(z))
        assert same(codes_of(out), codes_of(expected))
        assert same([level.quantized for level in out], [level.quantized for level in expected])
    train_step(quantizer, z)
    assert all(value.dtype == before[key].dtype for key, value in state(quantizer).items())


@all_cases
def test_nothing_is_remembered_beside_the_weights(name):
    """A table kept in an attribute answers with old values after new ones were loaded (transformers' mimi)."""
    quantizer, other, z = build(name).eval(), build(name, seed=5).eval(), latents(name)
    quantizer(z)
    embed(quantizer, codes_of(quantizer.encode(z)))
    quantizer.load_state_dict(other.state_dict())
    expected = levels(other(z))
    assert same(codes_of(quantizer(z)), codes_of(expected))
    assert same(embed(quantizer, codes_of(expected)), [level.quantized for level in expected])
    copied = copy.deepcopy(quantizer)
    with torch.no_grad():
        for value in (*quantizer.parameters(), *quantizer.buffers()):
            value.zero_()
    assert same(codes_of(copied(z)), codes_of(expected)), "a copy has weights of its own"


@all_cases
def test_the_shape_shows_in_the_text_of_a_model(name):
    text = repr(build(name))
    assert CASES[name].config["type"] in ("multi_scale", "multi_rate") or f"{CASES[name].dim}, " in text


# -- precision


@all_cases
def test_autocast_and_low_precision_latents_choose_the_codes_of_fp32(name):
    quantizer, z = build(name).eval(), latents(name, batch=20).bfloat16()
    expected = levels(quantizer(z.float()))
    for latents_too, autocast in ((True, False), (False, True), (True, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = z if latents_too else z.float()
            for out in (levels(quantizer(given)), levels(quantizer.encode(given))):
                assert same(codes_of(out), codes_of(expected))
                assert same([level.quantized for level in out], [level.quantized for level in expected])
            assert same(embed(quantizer, codes_of(out)), [level.quantized for level in expected])
    assert same(codes_of(quantizer(z.double())), codes_of(expected))


@all_cases
def test_autocast_does_not_change_training(name):
    z, results = latents(name, batch=4), []
    for enabled in (False, True):
        quantizer = build(name).train()
        torch.manual_seed(6)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = levels(quantizer(z))
        assert all(level.loss.dtype == torch.float32 for level in out)
        quantizer.update()
        results.append([*codes_of(out), *(level.loss for level in out), *state(quantizer).values()])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "vector, entropy, gradient",
        "vector, a width of its own",
        "sim",
        "gumbel",
        "fsq",
        "lfq",
        "product",
        "residual, DAC",
        "multi-scale",
        "multi-rate",
    ],
)
def test_the_default_dtype_of_torch_changes_nothing(name, dtype):
    """Scientists set it to float64, and transformers to that of the model while it builds one."""
    z = latents(name)
    quantizer = build(name).train()
    torch.manual_seed(6)
    expected, before = levels(quantizer(z)), torch.get_default_dtype()
    other = copy.deepcopy(quantizer)
    try:
        torch.set_default_dtype(dtype)
        built = build(name)
        torch.manual_seed(6)
        out = levels(other(z))
        embed(other, codes_of(out))
    finally:
        torch.set_default_dtype(before)
    assert same(codes_of(out), codes_of(expected))
    assert all(level.loss.dtype == level.quantized.dtype == torch.float32 for level in out)
    assert {key: value.dtype for key, value in built.state_dict().items()} == {
        key: value.dtype for key, value in quantizer.state_dict().items()
    }


# -- what is refused


@all_cases
def test_latents_that_are_not_finite_are_refused(name):
    quantizer, z = build(name), latents(name)
    before = state(quantizer)
    for bad in (math.nan, math.inf, -math.inf):
        z.view(-1)[-1] = bad
        for training in (True, False):
            for call in (quantizer.train(training), quantizer.encode):
                with pytest.raises(ValueError, match="NaN or infinite"):
                    call(z)
    assert same_state(state(quantizer), before)


@all_cases
def test_latents_of_another_form_are_refused(name):
    quantizer, z = build(name), latents(name)
    wrong = z.new_zeros(*z.shape[:-1], z.shape[-1] + 1)
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=rf"{z.shape[-1]}\).*{wrong.shape[-1]}\)"):
            call(wrong)
        with pytest.raises(ValueError, match="torch.int64"):
            call(z.long())
        with pytest.raises(ValueError, match=r"shape \(\d+,\)"):
            call(torch.zeros(z.shape[-1]))


@all_cases
def test_codes_that_cannot_be_are_refused(name):
    quantizer, z = build(name).eval(), latents(name)
    codes = codes_of(quantizer(z))
    last = codes[-1]
    config = quantizer.level_configs[-1] if isinstance(quantizer, Hierarchy) else quantizer.config

    def refused(bad: Tensor, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            embed(quantizer, [*codes[:-1], bad])

    for value in (-1, config.size, 2**62):
        bad = last.clone()
        bad.view(-1)[-1] = value
        refused(bad, rf"code {value} is outside \[0, {config.size}\)")
    refused(last.int(), "int64.*torch.int32")
    refused(last.float(), "int64.*torch.float32")
    more = config.depth + 1
    refused(last[:, :1].repeat_interleave(more, 1), rf"\({BATCH}, {more}")
    refused(last[:, :0], rf"\({BATCH}, 0")
    refused(last.reshape(-1), r"shape \(\d+,\)")
    if config.depth > 1 and config.type != "residual":
        refused(last[:, :1], rf"\({BATCH}, 1")


@pytest.mark.parametrize("wrong", ["too many", "none", "a grid of its own", "a batch of its own"])
@pytest.mark.parametrize("name", ["multi-scale", "multi-rate"])
def test_levels_that_do_not_go_together_are_refused(name, wrong):
    """`zip` would drop what is too many, and resampling makes a picture of any grid."""
    quantizer, z = build(name).eval(), latents(name)
    first, second, third = codes_of(quantizer(z))
    given, named = {
        "too many": ([first, second, third, third], "4"),
        "none": ([], "0"),
        "a grid of its own": ([first, second, torch.cat([third, third], 2)], r"level \d"),
        "a batch of its own": ([first, second[:1], third], "level 1"),
    }[wrong]
    with pytest.raises(ValueError, match=named):
        quantizer.embed_codes(given)


# -- losses and gradients


@all_cases
def test_losses_have_their_names_and_add_up_with_their_weights(name):
    quantizer, z = build(name).train(), latents(name)
    case = CASES[name]
    weights = quantizer_config(case.config.get("layer", case.config)).to_dict()
    for _ in range(2):
        for level in levels(quantizer(z)):
            assert set(level.losses) == {f"{loss}_loss" for loss in case.losses.split()}
            for loss in (*level.losses.values(), level.loss):
                assert loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite()
            expected = sum(value.double() * weights[WEIGHT_OF[key]] for key, value in level.losses.items())
            assert level.loss.item() == pytest.approx(torch.as_tensor(expected).item(), rel=1e-5, abs=1e-7)
        quantizer.update()


@all_cases
def test_every_parameter_and_the_latents_get_gradients(name):
    """A parameter without one stops distributed training."""
    quantizer, z = build(name).train(), latents(name).requires_grad_()
    objective(quantizer(z)).backward()
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        alone = quantizer.config.to_dict().get("codebook_size") == 1 and "logit" in key
        assert alone or parameter.grad.abs().sum() > 0, key
    assert z.grad.isfinite().all() and (z.grad.abs().sum() > 0 or name == "gumbel, one code")


@all_cases
def test_gradients_are_finite_at_any_scale(name):
    for scale in (0.0, 1e-20, 1e15):
        quantizer, z = build(name).train(), (latents(name) * scale).requires_grad_()
        out = levels(quantizer(z))
        sum(level.quantized.sum() + level.loss for level in out).backward()
        assert z.grad.isfinite().all(), scale
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in quantizer.parameters())


# -- initialisation and warnings


# Hierarchies take proposals, see their own tests.
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("multi")])
def test_initialised_from_data_it_is_deterministic_and_uses_its_codes(name):
    z = latents(name, (40,), batch=9) * 3 + 5
    first, second = build(name), build(name)
    for quantizer in (first, second):
        torch.manual_seed(1)
        quantizer.initialise(z.reshape(-1, z.shape[-1]) if quantizer is first else z)
    assert same_state(state(first), state(second)), "the grid must not matter"
    assert "lfq" in name or "bsq" in name or not CASES[name].stored or not same_state(state(first), state(build(name)))
    codes = first.eval()(z).codes
    if (
        quantizer_config(CASES[name].config).size == 11 and "shared" not in name and "one number" not in name
    ):  # whose table stands for all turns
        assert all(codes[:, q].unique().numel() > 5 for q in range(codes.shape[1]))


@pytest.mark.parametrize("name", ["residual, shared", "residual", "multi-scale", "product", "vector, entropy"])
def test_passes_are_counted_not_turns(name, monkeypatch):
    """A table that is shared by several turns sees them all in one pass: that is one, not several, without an update."""
    monkeypatch.setattr(collective_module, "_PASSES_BEFORE_WARNING", 3)
    quantizer, z = build(name).train(), latents(name)
    with pytest.warns(UserWarning, match="3 training passes without an update") as told:
        quantizer(z)
        quantizer(z)
        assert not told.list, "told after two passes"
        quantizer(z)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "cosine" in str(case.config)])
def test_rows_of_the_cosine_metric_have_unit_length(name):
    """Those that codes stand for always; the stored ones too, where only the quantizer itself moves them."""
    quantizer = build(name)
    for step in range(3):
        train_step(quantizer, latents(name, seed=step) * 5 + 1)
    for book in quantizer.codebooks:
        ones = torch.ones(len(book.embedding))
        torch.testing.assert_close(book.table.norm(dim=1), ones)
        torch.testing.assert_close(book(torch.arange(len(ones))).norm(dim=1), ones)
        if book.update_rule == "ema":
            book.initialise(torch.randn(50, book.embedding.shape[1]))
            torch.testing.assert_close(book.embedding.norm(dim=1), ones)
