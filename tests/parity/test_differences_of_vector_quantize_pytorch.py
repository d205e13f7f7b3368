"""What vector-quantize-pytorch 1.32 does and what ours does, executed side by side: the proofs of docs/differences.md."""

import inspect

import pytest
import torch
import vector_quantize_pytorch as peer
from torch.profiler import ProfilerActivity, profile

from vqtok.quantizers import (
    FSQ,
    LFQ,
    MultiScaleQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
    nearest_code,
)

pytestmark = pytest.mark.parity

DIM, SIZE = 8, 32


def pair(dim=DIM, size=SIZE, their_options=(), **options):
    """One table on both sides."""
    theirs = peer.VectorQuantize(dim, codebook_size=size, **{"rotation_trick": False, **dict(their_options)})
    ours = VectorQuantizer(dim, codebook_size=size, **options)
    with torch.no_grad():
        ours.codebook.embedding.copy_(theirs._codebook.embed[0])
    return ours, theirs


def nearest_in_float64(z, table):
    return (z[:, None].double() - table.double()).square().sum(-1).argmin(1)


# -- gradients


def test_the_gradient_of_a_residual_sum_is_multiplied_by_the_number_of_codebooks():
    theirs = peer.ResidualVQ(dim=DIM, num_quantizers=4, codebook_size=SIZE, rotation_trick=False)
    ours = ResidualQuantizer(DIM, num_codebooks=4, layer={"type": "vector", "codebook_size": SIZE})
    a, b = (torch.randn(2, 5, DIM).requires_grad_() for _ in range(2))
    theirs.train()(b)[0].sum().backward()
    ours.train()(a).quantized.sum().backward()
    assert torch.equal(b.grad, torch.full_like(b, 4))
    assert torch.equal(a.grad, torch.full_like(a, 1))


def test_with_rotation_a_zero_latent_gives_zeros_instead_of_its_row():
    ours, theirs = pair(their_options={"rotation_trick": True}, gradient="rotation")
    a, b = torch.zeros(1, 1, DIM, requires_grad=True), torch.zeros(1, 1, DIM, requires_grad=True)
    quantized, codes, _ = theirs.train()(b, freeze_codebook=True)
    row = theirs.get_output_from_indices(codes)
    assert row.abs().max() > 0.01
    assert not quantized.any()
    out = ours.train()(a)
    assert torch.equal(out.codes[:, 0], codes)
    torch.testing.assert_close(out.quantized, row)
    out.quantized.sum().backward()
    assert torch.equal(a.grad, torch.ones_like(a))  # straight through where no rotation is defined


def test_beta_of_a_learnable_codebook_also_scales_the_codebook_loss():
    z, tables = torch.randn(2, 50, DIM), {}
    for beta in (1.0, 0.25):
        torch.manual_seed(1)
        ours, theirs = pair(
            their_options={"learnable_codebook": True, "ema_update": False, "commitment_weight": beta},
            update="gradient",
            commitment_weight=beta,
        )
        ours.train()(z).loss.backward()
        theirs.train()(z)[2].backward()
        tables[beta] = ours.codebook.embedding.grad, theirs._codebook.embed.grad[0]
    torch.testing.assert_close(tables[0.25][1], 0.25 * tables[1.0][1])
    torch.testing.assert_close(tables[0.25][0], tables[1.0][0])
    assert tables[1.0][0].abs().max() > 1e-3


def test_a_learnable_cosine_codebook_is_refused():
    with pytest.raises(AssertionError, match="cosine"):
        peer.VectorQuantize(DIM, codebook_size=SIZE, learnable_codebook=True, ema_update=False, use_cosine_sim=True)
    ours = VectorQuantizer(DIM, codebook_size=SIZE, update="gradient", metric="cosine")
    ours.train()(torch.randn(2, 50, DIM)).loss.backward()
    assert ours.codebook.embedding.grad.abs().max() > 0


# -- the life of a table


def test_k_means_starts_in_eval():
    theirs = peer.VectorQuantize(DIM, codebook_size=SIZE, kmeans_init=True).eval()
    ours = VectorQuantizer(DIM, codebook_size=SIZE).eval()
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in (theirs, ours)]
    for module in (theirs, ours):
        module(torch.randn(1, 100, DIM))
    changed = [
        [name for name, value in module.state_dict().items() if not torch.equal(value, state[name])]
        for module, state in zip((theirs, ours), before, strict=True)
    ]
    assert "_codebook.embed" in changed[0] and "_codebook.initted" in changed[0]
    assert changed[1] == []


def test_k_means_sends_empty_clusters_to_zero():
    """Their rows are multiplied by the clusters' sizes and divided again, and an empty one has a size of 0."""
    theirs = peer.VectorQuantize(DIM, codebook_size=64, kmeans_init=True)
    ours = VectorQuantizer(DIM, codebook_size=64)
    z = torch.randn(1, 16, DIM)
    theirs.train()(z, freeze_codebook=True)
    with pytest.warns(UserWarning, match="only 16 distinct latents for 64 codes"):
        ours.initialise(z)
    assert int((theirs.codebook == 0).all(1).sum()) >= 64 - 16
    assert not (ours.codebook.table == 0).all(1).any()
    assert len(ours.codebook.table.unique(dim=0)) == 64


def test_unused_codes_shrink_to_zero():
    """Counts that have decayed to their eps of 1e-5 are divided by more than they hold; with their defaults, in 100 steps."""
    ours, theirs = pair(revival_threshold=0.0)
    before = ours.codebook.embedding.clone()
    z = torch.randn(1, 4, DIM)
    used = torch.zeros(SIZE, dtype=torch.bool)
    for _ in range(100):
        used[theirs.train()(z)[1]] = True
        used[ours.train()(z).codes] = True
        ours.update()
    assert 20 < int((~used).sum()) < SIZE
    shrunk = theirs.codebook.norm(dim=1) / before.norm(dim=1)
    assert shrunk[~used].max() < 1e-3
    assert torch.equal(ours.codebook.embedding[~used], before[~used])


def test_the_dead_code_threshold_is_absolute():
    """Each of 32 codes hit once, exactly even use: below an EMA count of 2, the threshold of EnCodec, all are replaced."""
    ours, theirs = pair(their_options={"threshold_ema_dead_code": 2})
    z = ours.codebook.embedding[None].clone()
    with torch.no_grad():
        before = theirs.eval()(z)[1]
        assert torch.equal(before, torch.arange(SIZE)[None])
        theirs.train()(z)
        ours.train()(z)
        ours.update()
        assert (theirs.eval()(z)[1] != before).float().mean() > 0.5  # a permutation: codes mean something else now
        assert torch.equal(ours.eval()(z).codes[:, 0], before)
    assert ours.codebook.num_revived == 0


def test_micro_batches_are_steps_of_their_own():
    """Theirs has `accum_ema_update` for it; without, the tables are those of two steps."""
    halves = torch.randn(2, 1, 32, DIM)
    tables = {}
    for micro in (False, True):
        torch.manual_seed(1)
        ours, theirs = pair()
        for z in halves if micro else halves.flatten(0, 1)[None]:
            ours.train()(z)
            theirs.train()(z)
        ours.update()
        tables[micro] = ours.codebook.embedding, theirs.codebook
    torch.testing.assert_close(tables[True][0], tables[False][0])
    assert (tables[True][1] - tables[False][1]).abs().max() > 1e-3


def test_a_shared_residual_codebook_decays_once_per_turn():
    theirs = peer.ResidualVQ(
        dim=DIM, num_quantizers=4, codebook_size=64, shared_codebook=True, decay=0.9, rotation_trick=False
    )
    layer = {"type": "vector", "codebook_size": 64, "decay": 0.9, "revival_threshold": 0.0}
    ours = ResidualQuantizer(DIM, num_codebooks=4, shared=True, layer=layer)
    z = torch.randn(1, 4, DIM)
    theirs.train()(z)
    ours.train()(z)
    ours.update()
    assert float(theirs.layers[0]._codebook.cluster_size.min()) == pytest.approx(0.9**4)  # of a code without a hit
    assert float(ours.layers[0].codebook.counts.min()) == pytest.approx(0.9)


def test_the_cosine_ema_starts_each_step_from_unit_rows():
    """One code, so that nothing but the averages differs."""
    ours, theirs = pair(
        size=1, their_options={"use_cosine_sim": True, "decay": 0.9, "eps": 1e-12}, metric="cosine", decay=0.9
    )
    row = ours.codebook.embedding[0].double().clone()
    average, own, counts = row.clone(), row.clone(), 1.0
    for _ in range(5):
        z = torch.randn(1, 20, DIM) + 1
        theirs.train()(z)
        ours.train()(z)
        ours.update()
        total = torch.nn.functional.normalize(z[0].double(), dim=-1).sum(0)
        average = 0.9 * average + 0.1 * total  # never normalised: latents that spread give the past less weight
        own = torch.nn.functional.normalize(0.9 * counts * own + 0.1 * total, dim=0)
        counts = 0.9 * counts + 0.1 * 20
    average = torch.nn.functional.normalize(average, dim=0)
    torch.testing.assert_close(theirs.codebook[0].double(), average, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.codebook.embedding[0].double(), own, rtol=0, atol=1e-5)
    assert (average - own).abs().max() > 1e-3


def test_a_model_in_bfloat16_has_counts_that_stand_still():
    """20 steps with a decay of 0.999: an unused code has 0.98 of its count left; 0.999 of 1 is 1 in bfloat16."""
    ours, theirs = pair(their_options={"decay": 0.999}, decay=0.999, revival_threshold=0.0)
    ours, theirs = ours.to(torch.bfloat16).train(), theirs.to(torch.bfloat16).train()
    z = torch.randn(1, 4, DIM, dtype=torch.bfloat16)
    for _ in range(20):
        theirs(z)
        ours(z)
        ours.update()
    assert theirs.codebook.dtype == torch.bfloat16 and ours.codebook.embedding.dtype == torch.float32
    assert float(theirs._codebook.cluster_size.min()) == 1.0
    assert float(ours.codebook.counts.min()) == pytest.approx(0.999**20)


# -- which code


@pytest.mark.parametrize(("offset", "share"), [(100, 0.0), (1000, 0.2)])
def test_codes_of_latents_with_a_large_mean(offset, share):
    """The spread is 1. The expanded square in fp32 loses it; float64 tells which code is nearest."""
    ours, theirs = pair(16, 64)
    sim = peer.SimVQ(16, codebook_size=64).eval()
    table, z = offset + torch.randn(64, 16), offset + torch.randn(5000, 16)
    with torch.no_grad():
        ours.codebook.embedding.copy_(table)
        theirs._codebook.embed.copy_(table)
        sim.frozen_codebook.copy_(table)
        sim.code_transform.weight.copy_(torch.eye(16))
        codes = [theirs.eval()(z[None])[1][0], sim(z[None])[1][0], ours.eval()(z[None]).codes[0, 0]]
    wrong = [float((each != nearest_in_float64(z, table)).float().mean()) for each in codes]
    assert wrong[0] > share and wrong[1] > share
    assert wrong[2] == 0


def test_codes_under_autocast_of_a_processor():
    """Their guard names CUDA only."""
    ours, theirs = pair(8, 1024)
    z = torch.randn(1000, 8) * theirs.codebook.std()
    best = nearest_in_float64(z, theirs.codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        wrong = theirs.eval()(z[None])[1][0] != best
        assert torch.equal(ours.eval()(z[None]).codes[0, 0], best)
    assert wrong.float().mean() > 0.01


def test_latents_that_are_not_numbers():
    ours, theirs = pair()
    z = torch.full((1, 2, DIM), torch.nan)
    assert theirs.eval()(z)[1].tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="NaN"):
        ours.eval()(z)


def test_a_row_in_eval_is_off_by_rounding_in_sim_vq():
    theirs, ours = peer.SimVQ(DIM, codebook_size=SIZE).eval(), SimVQ(DIM, codebook_size=SIZE).eval()
    z = torch.randn(1, 100, DIM) * 100
    quantized, codes, _ = theirs(z)
    rows = theirs.indices_to_codes(codes)
    torch.testing.assert_close(quantized, rows, rtol=0, atol=1e-4)  # z + (q - z), where z is about 100
    assert not torch.equal(quantized, rows)
    out = ours(z)
    assert torch.equal(out.quantized, ours.embed_codes(out.codes))


# -- the diversity loss, from codes, depth, shapes


def test_the_diversity_loss_depends_on_how_latents_are_laid_out():
    """It averages over the batch alone, not over positions: with one sample it asks every latent to be unsure."""
    ours, theirs = pair(
        their_options={"codebook_diversity_loss_weight": 1.0, "commitment_weight": 0.0}, entropy_weight=1.0
    )
    z = torch.randn(64, DIM)
    layouts = [z.view(1, 64, DIM), z.view(8, 8, DIM), z.view(64, 1, DIM)]
    theirs_found = [float(theirs.train()(each, freeze_codebook=True)[2].detach()) for each in layouts]
    ours_found = [float(ours.train()(each).losses["entropy_loss"].detach()) for each in layouts]
    assert max(theirs_found) - min(theirs_found) > 1
    assert max(ours_found) - min(ours_found) < 1e-5


def test_hierarchical_vq_decodes_to_the_last_scale():
    """Without `full_shape`; what comes out has another size than what went in. Our scales are shares of the grid."""
    theirs = peer.HierarchicalVQ(
        dim=DIM, codebook_size=SIZE, scales=(1, 2, 4), accept_image_fmap=True, kmeans_init=False
    ).eval()
    quantized, codes, _ = theirs(torch.randn(2, DIM, 8, 8))
    assert tuple(quantized.shape) == (2, DIM, 8, 8)
    assert tuple(theirs.get_output_from_indices(codes).shape) == (2, DIM, 4, 4)
    torch.testing.assert_close(theirs.get_output_from_indices(codes, full_shape=8), quantized)

    ours = MultiScaleQuantizer(DIM, scales=[1, 2, 4], layer={"type": "vector", "codebook_size": SIZE}).eval()
    levels = ours(torch.randn(2, 8, 8, DIM))
    parts = ours.embed_codes([level.codes for level in levels])
    assert all(torch.equal(part, level.quantized) for part, level in zip(parts, levels, strict=True))
    assert {tuple(part.shape) for part in parts} == {(2, 8, 8, DIM)}


def test_a_prefix_of_residual_codes():
    theirs = peer.ResidualVQ(dim=DIM, num_quantizers=4, codebook_size=SIZE)
    with pytest.raises(AssertionError, match="quantize dropout"):
        theirs.get_output_from_indices(torch.zeros(2, 5, 2, dtype=torch.int64))
    ours = ResidualQuantizer(DIM, num_codebooks=4, layer={"type": "vector", "codebook_size": SIZE})
    assert tuple(ours.embed_codes(torch.zeros(2, 2, 5, dtype=torch.int64)).shape) == (2, 5, DIM)


def test_quantizer_dropout_is_drawn_per_batch():
    theirs = peer.ResidualVQ(dim=DIM, num_quantizers=4, codebook_size=SIZE, quantize_dropout=True).train()
    ours = ResidualQuantizer(
        DIM, num_codebooks=4, depth_dropout=1.0, layer={"type": "vector", "codebook_size": SIZE}
    ).train()
    z = torch.randn(32, 5, DIM)
    dropped = torch.stack([(theirs(z, freeze_codebook=True)[1] == -1).flatten(0, 1) for _ in range(10)])
    assert dropped.any() and torch.equal(dropped.any(1), dropped.all(1))  # all samples or none
    out = ours(z)
    prefixes = torch.stack([ours.embed_codes(out.codes[:, :depth]) for depth in range(1, 5)])
    distances, depths = (prefixes - out.quantized).abs().amax((2, 3)).min(0)
    assert distances.max() < 1e-5
    assert set(depths.tolist()) == {0, 1, 2, 3}


def test_masks_and_projections():
    """Their masked loss compares projected rows with unprojected latents. Ours has no masks: give it the rows that count."""
    theirs = peer.VectorQuantize(16, codebook_size=SIZE, codebook_dim=4).train()
    ours = VectorQuantizer(16, codebook_size=SIZE, codebook_dim=4).train()
    z, mask = torch.randn(2, 5, 16), torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="size of tensor"):
        theirs(z, mask=mask)
    assert tuple(ours(z[mask]).codes.shape) == (6, 1)


# -- memory, defaults


def largest_allocation(call):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call()
    return max(event.self_cpu_memory_usage for event in seen.events())


def test_memory_of_a_training_pass():
    """Theirs makes a one-hot row of integers per latent. Ours never makes a tensor of all latents times all codes."""
    positions, size = 2048, 8192
    ours, theirs = pair(DIM, size)
    z = torch.randn(1, positions, DIM)
    every_pair = positions * size

    def ours_twice():
        ours.train()(z)
        ours.update()

    assert largest_allocation(lambda: theirs.train()(z)) >= 8 * every_pair
    assert largest_allocation(ours_twice) <= 9 * 2**20 < every_pair
    assert torch.equal(nearest_code(z[0], ours.codebook.table), ours.encode(z).codes[0, 0])


def test_defaults():
    """Those that change results for who moves from one to the other."""
    vector = {name: each.default for name, each in inspect.signature(peer.VectorQuantize).parameters.items()}
    theirs = {name: vector[name] for name in ("decay", "commitment_weight", "threshold_ema_dead_code")}
    assert theirs == {"decay": 0.8, "commitment_weight": 1.0, "threshold_ema_dead_code": 0}
    assert peer.VectorQuantize(DIM, codebook_size=SIZE).rotation_trick
    config = VectorQuantizer(DIM).config
    assert (config.decay, config.commitment_weight, config.revival_threshold) == (0.99, 0.25, 0.05)
    assert config.gradient == "straight_through"
    assert not peer.FSQ([8, 5]).preserve_symmetry and FSQ(2, scalar_levels=[8, 5]).config.symmetric
    assert peer.LFQ(dim=4).commitment_loss_weight == 0 and LFQ(4, bits=4).config.commitment_weight == 0.25
    assert inspect.signature(peer.LFQ.forward).parameters["inv_temperature"].default == 100
    assert LFQ(4, bits=4).config.entropy_temperature == 1
