"""Residual quantization: prefixes, one table or many, dropout of depth, what each turn learns from."""

import pytest
import torch
from torch import Tensor

from tests import reference
from vqtok.quantizers import Codebook, ResidualQuantizer, k_means

DIM, Q = 6, 4
VECTOR = {"type": "vector", "codebook_size": 13, "revival_threshold": 0}
LAYERS = {
    "plain": VECTOR,
    "gradient": {**VECTOR, "update": "gradient"},
    "DAC": {**VECTOR, "codebook_dim": 3, "metric": "cosine"},
    "sim": {"type": "sim", "codebook_size": 13},
}


def build(layer: str = "plain", seed: int = 0, **options) -> ResidualQuantizer:
    torch.manual_seed(seed)
    return ResidualQuantizer(DIM, **{"num_codebooks": Q, "layer": LAYERS[layer], **options})


def residuals(quantizer: ResidualQuantizer, z: Tensor, codes: Tensor) -> list[Tensor]:
    """What each turn of a plain quantizer saw, in float64: `(N, D)`."""
    layers = list(quantizer.layers) * (quantizer.config.num_codebooks // len(quantizer.layers))
    residual, seen = z.reshape(-1, DIM).double(), []
    for turn, layer in enumerate(layers):
        seen.append(residual)
        residual = residual - layer.codebook.embedding.detach().double()[codes[:, turn].flatten()]
    return seen


@pytest.mark.parametrize("shared", [False, True])
def test_codes_are_those_of_nearest_rows_turn_by_turn(shared):
    quantizer, z = build(shared=shared).eval(), torch.randn(3, 5, DIM)
    out = quantizer(z)
    total = torch.zeros(15, DIM, dtype=torch.float64)
    for turn, residual in enumerate(residuals(quantizer, z, out.codes)):
        table = quantizer.layers[0 if shared else turn].codebook.embedding
        assert out.codes[:, turn].flatten().equal(reference.nearest_code(residual, table))
        total += table.double()[out.codes[:, turn].flatten()]
    torch.testing.assert_close(out.quantized.double().flatten(0, 1), total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_first_codes_alone_decode(layer, shared):
    """Bit for bit as a quantizer made of the first codebooks only, and as the sum of the rows."""
    quantizer, z = build(layer, shared=shared).eval(), torch.randn(3, 2, 5, DIM)
    codes = quantizer(z).codes
    assert codes.shape == (3, Q, 2, 5)
    total = 0
    for q in range(1, Q + 1):
        fewer = build(layer, seed=q, shared=shared, num_codebooks=q).eval()
        wanted = {key: value for key, value in quantizer.state_dict().items() if key in fewer.state_dict()}
        fewer.load_state_dict(wanted)
        assert fewer(z).codes.equal(codes[:, :q])
        assert quantizer.embed_codes(codes[:, :q]).equal(fewer(z).quantized)
        total = total + quantizer.layers[0 if shared else q - 1].embed_codes(codes[:, q - 1 : q])
        assert quantizer.embed_codes(codes[:, :q]).equal(total)
    for wrong in (codes[:, :0], torch.cat([codes, codes], 1)):
        with pytest.raises(ValueError, match=rf"\(3, {wrong.shape[1]}"):
            quantizer.embed_codes(wrong)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_shared_table_is_one_table(layer):
    shared, separate = build(layer, shared=True), build(layer)
    assert len(shared.layers) == 1 and len(separate.layers) == Q
    assert {key.split(".")[1] for key in shared.state_dict()} == {"0"}
    assert len(separate.state_dict()) == Q * len(shared.state_dict())
    assert len(shared.codebooks) == (0 if layer == "sim" else 1)


@pytest.mark.parametrize("shared", [False, True])
def test_each_table_follows_the_mean_of_what_it_saw(shared):
    """EMA in float64 on each turn's residuals; a shared table sees those of all turns."""
    quantizer = build(shared=shared, layer="plain").train()
    books = [layer.codebook for layer in quantizer.layers]
    for book in books:
        book.decay = 0.6
    state = [(book.embedding.double(), book.counts.double()) for book in books]
    for step in range(3):
        torch.manual_seed(step)
        z = torch.randn(4, 30, DIM)
        for micro in z.split(2):
            quantizer(micro)
        codes = quantizer.encode(z).codes
        seen = residuals(quantizer, z, codes)
        turns = [(seen[turn], codes[:, turn].flatten()) for turn in range(Q)]
        if shared:
            turns = [(torch.cat([rows for rows, _ in turns]), torch.cat([chosen for _, chosen in turns]))]
        state = [
            reference.ema_step(table, counts, rows, chosen, 0.6)
            for (table, counts), (rows, chosen) in zip(state, turns, strict=True)
        ]
        quantizer.update()
        for book, (table, counts) in zip(books, state, strict=True):
            torch.testing.assert_close(book.embedding.double(), table, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(book.counts.double(), counts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        (None, [0.15, 0.15, 0.15, 0.55]),  # 0.6 / 4 each, the last one also without dropout
        ([1, 3], [0.3, 0.0, 0.3, 0.4]),
    ],
)
def test_training_with_dropped_depth_gives_each_sample_a_prefix(depths, expected):
    """By samples, not by positions or by batches; each depth as often as it should be."""
    quantizer = build(depth_dropout=0.6, dropout_depths=depths).train()
    z = torch.randn(3000, 2, DIM)
    out = quantizer(z)
    prefixes = torch.stack([quantizer.embed_codes(out.codes[:, :q]) for q in range(1, Q + 1)])
    distance = (prefixes - out.quantized).abs().amax((2, 3))  # (Q, B)
    nearest, depth = distance.min(0)
    assert nearest.max() < 1e-4
    share = torch.bincount(depth, minlength=Q) / len(z)
    torch.testing.assert_close(share, torch.tensor(expected), rtol=0, atol=0.035)  # five standard deviations
    assert out.codes.equal(quantizer.encode(z).codes), "all codes are there all the same"
    # In eval nothing is dropped.
    quantizer.eval()
    assert quantizer(z).quantized.equal(quantizer.embed_codes(out.codes))


def test_no_dropout_is_no_dropout():
    quantizer, z = build().train(), torch.randn(200, DIM)
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, quantizer.embed_codes(out.codes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_initialised_each_codebook_reduces_the_error(layer, shared):
    quantizer, z = build(layer, shared=shared), torch.randn(40, 20, DIM) * 4 + 3
    before = (quantizer.eval()(z).quantized - z).square().mean()
    quantizer.initialise(z)
    codes = quantizer(z).codes
    errors = [(quantizer.embed_codes(codes[:, :q]) - z).square().mean().item() for q in range(1, Q + 1)]
    if layer in ("plain", "gradient"):
        # One table for all turns is a compromise, after which a row may be added that does not help; never much.
        slack = 1.02 if shared else 1.0
        assert all(later < slack * earlier for earlier, later in zip(errors, errors[1:], strict=False))
        assert errors[0] < z.var() and errors[-1] < 0.5 * z.var()
        assert shared or errors[-1] < 0.35 * errors[0]
    assert errors[-1] < before


def test_initialisation_is_k_means_of_what_is_left():
    """A table that saw the latents in place of the residuals would be the first one again."""
    quantizer, z = build(), torch.randn(300, DIM)
    quantizer.initialise(z)
    codes = quantizer.eval()(z).codes
    for turn, residual in enumerate(residuals(quantizer, z, codes)):
        found = quantizer.layers[turn].codebook.embedding
        torch.testing.assert_close(found, k_means(residual.float(), 13), rtol=1e-3, atol=1e-4)
    assert quantizer.is_initialised and all(bool(book.initialised) for book in quantizer.codebooks)


def test_a_shared_table_has_rows_for_all_turns():
    quantizer, z = build(shared=True), torch.randn(300, DIM) * 10 + 50
    quantizer.initialise(z)
    lengths = quantizer.layers[0].codebook.embedding.norm(dim=1)
    assert lengths.max() > 50 and lengths.min() < 30, "rows for the latents, and rows for what is left of them"


def test_layers_are_started_and_revived_by_themselves():
    quantizer = build(layer="plain", seed=1)
    assert len({tuple(book.embedding.flatten().tolist()) for book in quantizer.codebooks}) == Q
    assert all(isinstance(book, Codebook) for book in quantizer.codebooks)


def test_a_residual_that_is_nothing_stays_finite():
    """Latents that are rows: after the first turn there is nothing left to code."""
    quantizer = build("DAC").train()
    z = torch.zeros(3, 4, DIM).requires_grad_()
    out = quantizer(z)
    (out.quantized.sum() + out.loss).backward()
    assert z.grad.isfinite().all() and out.loss.isfinite()
