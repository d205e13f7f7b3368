"""SimVQ: one map that moves all codes."""

import pytest
import torch
from torch import Tensor

from tests import reference
from vqtok.quantizers import SimVQ


def build(dim: int = 6, **options) -> SimVQ:
    quantizer = SimVQ(dim, **{"codebook_size": 20, **options})
    with torch.no_grad():  # a map that is no identity
        quantizer.code_map += 0.5 * torch.randn_like(quantizer.code_map)
        quantizer.code_bias += torch.randn_like(quantizer.code_bias)
    return quantizer


def exact_table(quantizer: SimVQ) -> Tensor:
    rows = [
        quantizer.code_map.double() @ code.double() + quantizer.code_bias.double() for code in quantizer.frozen_codes
    ]
    return torch.stack(rows).detach()


@pytest.mark.parametrize("codebook_dim", [None, 3])
def test_rows_are_the_map_of_the_frozen_codes_everywhere(codebook_dim):
    """The author's package forgets the map where it makes latents of codes, and answers with the random rows."""
    quantizer, z = build(codebook_dim=codebook_dim).eval(), torch.randn(3, 5, 6)
    table = exact_table(quantizer)
    torch.testing.assert_close(quantizer.table.double(), table, rtol=1e-5, atol=1e-6)
    out = quantizer(z)
    inner = quantizer.project_in(z).detach()
    assert out.codes.flatten().equal(reference.nearest_code(inner.flatten(0, 1), table))
    assert not out.codes.flatten().equal(reference.nearest_code(inner.flatten(0, 1), quantizer.frozen_codes))
    rows = quantizer.project_out(table.float())[out.codes[:, 0]].detach()
    torch.testing.assert_close(quantizer.embed_codes(out.codes).detach(), rows, rtol=1e-5, atol=1e-5)


def test_the_table_is_never_stale():
    quantizer, codes = build(), torch.arange(20)[None, None]
    before = quantizer.embed_codes(codes).detach()
    with torch.no_grad():
        quantizer.code_map *= 2
    after = quantizer.embed_codes(codes).detach()
    torch.testing.assert_close(after - quantizer.code_bias.detach(), 2 * (before - quantizer.code_bias.detach()))


def test_frozen_codes_are_no_parameter_and_never_move():
    quantizer = build().train()
    frozen = quantizer.frozen_codes.clone()
    assert sorted(name for name, _ in quantizer.named_parameters()) == ["code_bias", "code_map"]
    optimizer = torch.optim.AdamW(quantizer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        quantizer(torch.randn(4, 5, 6)).loss.backward()
        assert quantizer.frozen_codes.grad is None
        optimizer.step()
        quantizer.update()
    assert quantizer.frozen_codes.equal(frozen)
    assert "frozen_codes" in quantizer.state_dict(), "drawn at random, so they have to be saved"


def test_a_gradient_for_one_code_moves_all():
    """What it is for: no code is left behind."""
    quantizer = build().train()
    before = quantizer.table.detach()
    quantizer(torch.randn(1, 6) * 3).losses["codebook_loss"].backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 0.1 * parameter.grad
    assert ((quantizer.table.detach() - before).abs().amax(1) > 1e-4).all()


def test_the_codebook_loss_has_the_gradient_of_the_map():
    quantizer, z = build().train(), torch.randn(8, 6)
    out = quantizer(z)
    out.losses["codebook_loss"].backward()
    weight, bias = (value.detach().double().requires_grad_() for value in (quantizer.code_map, quantizer.code_bias))
    rows = quantizer.frozen_codes.double()[out.codes[:, 0]] @ weight.T + bias
    (rows - z.double()).square().mean().backward()
    torch.testing.assert_close(quantizer.code_map.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.code_bias.grad.double(), bias.grad, rtol=1e-4, atol=1e-6)


def test_initialised_the_codes_have_the_mean_and_the_spread_of_the_latents():
    mix = torch.randn(6, 6)
    z = torch.randn(5000, 6) @ mix.T + torch.tensor([5.0, -3.0, 0.0, 10.0, 1.0, 100.0])
    mean = z.double().mean(0)
    covariance = (z.double() - mean).T @ (z.double() - mean) / len(z)
    quantizer = SimVQ(6, codebook_size=20_000)
    quantizer.initialise(z.view(10, 500, 6))
    assert quantizer.is_initialised
    # Frozen codes are drawn from N(0, 1 / D), so that the map's own square is the covariance.
    found = quantizer.code_map.detach().double()
    torch.testing.assert_close(found @ found.T / 6, covariance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(quantizer.code_bias.detach().double(), mean, rtol=1e-5, atol=1e-4)
    table = quantizer.table.detach().double()
    torch.testing.assert_close(table.mean(0), mean, rtol=0, atol=0.2)
    spread = (table - table.mean(0)).T @ (table - table.mean(0)) / len(table)
    torch.testing.assert_close(spread, covariance, rtol=0, atol=0.05 * float(covariance.diag().max()))


@pytest.mark.parametrize("num_rows", [1, 2, 50])
def test_initialised_from_few_or_flat_latents_it_is_finite(num_rows):
    """A covariance without full rank has no root of Cholesky's without help."""
    for z in (torch.randn(num_rows, 6), torch.ones(num_rows, 6) * 7, torch.randn(num_rows, 1) * torch.ones(6) * 1e4):
        quantizer = SimVQ(6, codebook_size=20)
        quantizer.initialise(z)
        assert quantizer.table.isfinite().all()
        torch.testing.assert_close(quantizer.code_bias.detach(), z.mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="NaN"):
        SimVQ(6).initialise(torch.full((3, 6), torch.nan))
    with pytest.raises(ValueError, match="at least one"):
        SimVQ(6).initialise(torch.zeros(0, 6))


def test_initialised_behind_a_projection():
    quantizer, z = SimVQ(6, codebook_size=2000, codebook_dim=2), torch.randn(4000, 6) * 3 + 1
    quantizer.initialise(z)
    inner = quantizer.project_in(z).detach()
    torch.testing.assert_close(quantizer.table.detach().mean(0), inner.mean(0), rtol=0, atol=0.3)
    torch.testing.assert_close(quantizer.table.detach().std(0), inner.std(0), rtol=0.1, atol=0)
    assert quantizer.eval()(z).codes.unique().numel() > 500
