"""ImageVQModel: the promises of every room, and what only pictures have."""

import pytest
import torch
from torch import nn

from tests.common import TokenizerTests
from tests.tiny import vectors
from vqtok.image.configuration_image_vq import ImageVQConfig
from vqtok.image.losses import pixel_loss
from vqtok.image.modeling_image_vq import ImageVQModel

TINY = {"hidden_size": 16, "residual_size": 8, "latent_size": 6, "num_residual_layers": 1}
FIELDS = {"num_channels", "strides", "quantizer", "latent_size", "hidden_size", "residual_size"}
FIELDS |= {"num_residual_layers", "level_dropout", "reconstruction_loss"}


class ImageTests(TokenizerTests):
    model_class = ImageVQModel
    config_fields = FIELDS
    options: dict = {}
    sizes = [(32, 32), (24, 40), (8, 56)]
    quantizer_terms = {"commitment_loss": 0.25}

    def make_config(self, **changes):
        return ImageVQConfig(**{**TINY, **self.options, **changes})

    def make_media(self, batch, size, seed=0):
        """Noise on blotches, so that neighbouring codes differ and coarse levels have something to say."""
        generator = torch.Generator().manual_seed(seed)
        channels = self.make_config().num_channels
        blotches = torch.randn(batch, channels, 4, 4, generator=generator)
        picture = nn.functional.interpolate(blotches, size, mode="bilinear", align_corners=False)
        return (picture + 0.3 * torch.randn(batch, channels, *size, generator=generator)).clamp(-1, 1)


class TestOneLevel(ImageTests):
    options = {"strides": [4], "quantizer": {"type": "vector", "codebook_size": 32}}


class TestTwoLevels(ImageTests):
    options = {"strides": [8, 4], "quantizer": vectors(24, 32)}


class TestThreeLevels(ImageTests):
    """With a gap between strides, and codebooks learned by gradient."""

    options = {"strides": [8, 4, 1 << 1], "quantizer": vectors(16, 24, 32, update="gradient")}
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0}


class TestGrey(ImageTests):
    """Grey, strides that are far apart, no dropout of levels."""

    options = {"num_channels": 1, "strides": [8, 2], "quantizer": vectors(16, 32), "level_dropout": 0.0}


class TestCosine(ImageTests):
    """On the unit sphere by moving averages, with a push towards even use."""

    options = {"strides": [4], "quantizer": vectors(32, metric="cosine", entropy_weight=0.1)}
    quantizer_terms = {"commitment_loss": 0.25, "entropy_loss": 0.1}


class TestInnerProduct(ImageTests):
    """As in IBQ: a gradient for every code, and a push towards even use."""

    quantizer = vectors(24, 32, metric="inner_product", update="gradient", entropy_weight=0.05)
    options = {"strides": [8, 4], "quantizer": quantizer}
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0, "entropy_loss": 0.05}


class TestResidual(ImageTests):
    """As in DAC: each codebook with projections of its own, on the unit sphere, by gradient."""

    layer = {"type": "vector", "codebook_size": 16, "codebook_dim": 4, "metric": "cosine", "update": "gradient"}
    options = {"strides": [4], "quantizer": {"type": "residual", "num_codebooks": 3, "layer": layer}}
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0}


class TestMultiScale(ImageTests):
    """As in VAR: one grid, one table, three levels."""

    layer = {"type": "vector", "codebook_size": 24}
    options = {"strides": [2], "quantizer": {"type": "multi_scale", "scales": [1, 2, 4], "layer": layer}}


class TestScalesWithTablesOfTheirOwn(ImageTests):
    """Without smoothing, and of tables that move as one."""

    layer = {"type": "sim", "codebook_size": 24, "codebook_dim": 4, "gradient": "rotation"}
    quantizer = {"type": "multi_scale", "scales": [1, 2], "layer": layer, "shared": False, "smoothing": 0}
    options = {"strides": [4], "quantizer": quantizer}
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0}


class TestFSQ(ImageTests):
    """Nothing is stored, not even projections."""

    options = {"strides": [4], "latent_size": 4, "quantizer": {"type": "fsq", "scalar_levels": [8, 5, 5, 5]}}
    quantizer_terms = {}


class TestLFQ(ImageTests):
    """Two grids, projections to the bits, the entropy of the bits in two groups."""

    quantizer = {"type": "lfq", "bits": 8, "entropy_weight": 0.2, "entropy_group_bits": 5}
    options = {"strides": [8, 4], "quantizer": quantizer}
    quantizer_terms = {"commitment_loss": 0.25, "entropy_loss": 0.2}


class TestBSQ(ImageTests):
    """As many bits as latents, on the unit sphere."""

    options = {"strides": [4], "latent_size": 8, "quantizer": {"type": "bsq", "bits": 8}}
    quantizer_terms = {"commitment_loss": 0.25, "entropy_loss": 0.1}


class TestSim(ImageTests):
    options = {"strides": [4], "quantizer": {"type": "sim", "codebook_size": 32}}
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0}


class TestGumbel(ImageTests):
    options = {"strides": [4], "quantizer": {"type": "gumbel", "codebook_size": 32}}
    quantizer_terms = {"kl_loss": 5e-4}


class TestProduct(ImageTests):
    layer = {"type": "vector", "codebook_size": 16}
    options = {"strides": [8, 4], "quantizer": {"type": "product", "num_codebooks": 2, "layer": layer}}


def build(**changes) -> ImageVQModel:
    torch.manual_seed(0)
    options = {"strides": [8, 4], "quantizer": {"type": "vector", "codebook_size": 16}}
    return ImageVQModel(ImageVQConfig(**{**TINY, **options, **changes}))


@pytest.mark.parametrize("stride", [2, 8, 32])
def test_any_stride_gives_its_grid(stride):
    model = build(strides=[stride]).eval()
    codes = model.encode(torch.randn(1, 3, stride, 3 * stride)).codes
    assert codes[0].shape == (1, 1, 1, 3)
    assert model.decode(codes).reconstruction.shape == (1, 3, stride, 3 * stride)


def test_no_residual_layers_and_one_code():
    model = build(num_residual_layers=0, quantizer=vectors(1, 1)).train()
    out = model(torch.randn(2, 3, 16, 16))
    out.loss.backward()
    model.update_codebooks()
    assert out.loss.isfinite() and all(level.unique().tolist() == [0] for level in out.codes)


@pytest.mark.parametrize(
    ("media", "named"),
    [
        (torch.zeros(1, 1, 16, 16), r"\(B, 3, H, W\), got \(1, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"got \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "torch.uint8: use the processor"),
        (torch.zeros(1, 3, 20, 16), "20x16 pixels do not fit the largest stride 8"),
        (torch.zeros(1, 3, 4, 8), "4x8 pixels"),
        (torch.zeros(1, 3, 0, 8), "0x8 pixels"),
        ([[0.0]], "got list"),
        (None, "got NoneType"),
    ],
)
def test_pictures_that_do_not_fit_are_named(media, named):
    for call in (build().eval(), build().train(), build().encode):
        with pytest.raises(ValueError, match=named):
            call(media)


def test_a_picture_of_nan_is_refused():
    media = torch.zeros(1, 3, 16, 16)
    media[0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        build().encode(media)


def test_a_level_that_is_not_given_is_the_learned_null_vector():
    """Decoding a prefix equals decoding all levels after every row of the last table was replaced by the null vector."""
    model = build(strides=[8, 4, 2]).eval()
    with torch.no_grad():
        model.decoder.null.normal_()
    codes = model.encode(torch.randn(2, 3, 16, 24)).codes
    for given in (1, 2):
        prefix = model.decode(codes[:given]).reconstruction
        rows = list(model.embed_codes(codes))
        for level in range(given, 3):
            rows[level] = model.decoder.null[level - 1].expand_as(rows[level])
        assert prefix.equal(model.synthesise(rows).detach()) and not prefix.equal(model.decode(codes).reconstruction)


@pytest.mark.parametrize("grids", ["one", "three"])
def test_level_dropout_decodes_prefixes_sample_by_sample(grids):
    scales = {"type": "multi_scale", "scales": [1, 2, 4], "layer": {"type": "vector", "codebook_size": 16}}
    model = (build(strides=[8, 4, 2]) if grids == "three" else build(strides=[2], quantizer=scales)).eval()
    with torch.no_grad():
        for null in () if model.decoder.null is None else [model.decoder.null]:
            null.normal_()
    codes = model.encode(torch.randn(3, 3, 16, 16)).codes
    mixed = model.synthesise(model.embed_codes(codes), torch.tensor([1, 2, 3]))
    for i in range(3):
        alone = model.decode([level[i : i + 1] for level in codes[: i + 1]]).reconstruction
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0, 0.25, 1.0])
def test_level_dropout_keeps_at_least_the_coarsest(dropout):
    model = build(strides=[8, 4, 2], level_dropout=dropout)
    kept = model._kept_levels(torch.zeros(20_000, 1))
    shares = torch.bincount(kept, minlength=4) / 20_000
    expected = torch.tensor([0, dropout / 2, dropout / 2, 1 - dropout])
    assert (shares - expected).abs().max() < 0.015, "five standard deviations"


def test_null_vectors_learn_from_dropout():
    model = build(level_dropout=1.0).train()
    model(torch.randn(2, 3, 16, 16)).loss.backward()
    assert model.decoder.null.grad.abs().sum() > 0
    assert build(strides=[8]).decoder.null is None


def test_dropout_happens_in_training_only():
    model = build(level_dropout=1.0).eval()
    media = torch.randn(2, 3, 16, 16)
    assert model(media).reconstruction.equal(model.decode(model.encode(media).codes).reconstruction)
    assert not model.train()(media).reconstruction.allclose(model.decode(model.encode(media).codes).reconstruction)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    media = torch.randn(2, 3, 16, 16)
    quantizer = vectors(16, 16, update="gradient", commitment_weight=3, codebook_loss_weight=0.5)
    model = build(quantizer=quantizer, level_dropout=0).train()
    out = model(media)
    assert set(out.losses) == {"reconstruction_loss", "commitment_loss", "codebook_loss"}
    terms = out.losses
    expected = terms["reconstruction_loss"] + 3 * terms["commitment_loss"] + 0.5 * terms["codebook_loss"]
    torch.testing.assert_close(out.loss, expected)
    distances = [(z - model.embed_codes(out.codes)[i]).square().mean() for i, z in enumerate(out.latents)]
    torch.testing.assert_close(terms["commitment_loss"], sum(distances) / 2)
    torch.testing.assert_close(terms["reconstruction_loss"], (out.reconstruction - media).square().mean())


def test_codebooks_follow_their_latents_in_training():
    """Some steps on one batch bring the rows to the latents: commitment falls far below the spread of the latents."""
    model = build(strides=[4], quantizer=vectors(32, decay=0.5))
    media = torch.randn(4, 3, 16, 16)
    model.init_codebooks([media])
    model.train()
    for _ in range(5):
        out = model(media)
        model.update_codebooks()
    assert out.losses["commitment_loss"] < 0.25 * out.latents[0].var()
    assert out.codes[0].unique().numel() > 24


def test_init_codebooks_level_by_level():
    """The finer latents hang on the coarser codes, so the finer table has to be made last, from the final coarser one."""
    model = build().eval()
    batches = [torch.randn(2, 3, 16, 16) for _ in range(3)]
    model.init_codebooks(iter(batches))
    for level, codebook in enumerate(model.quantizer.codebooks):
        rows = torch.cat([model.encode(media).latents[level].flatten(0, 2) for media in batches])
        expected = type(codebook)(*codebook.embedding.shape)
        expected.initialise(rows)
        assert codebook.embedding.equal(expected.embedding) and codebook.initialised
    with pytest.raises(ValueError, match="at least one batch"):
        model.init_codebooks([])


def test_init_codebooks_may_be_limited_and_then_looks_at_every_batch():
    model = build().eval()
    batches = [torch.randn(2, 3, 16, 16) for _ in range(3)]
    latents = [model.encode(media).latents[0].flatten(0, -2) for media in batches]  # 8 of the coarse level each
    with pytest.warns(UserWarning, match="only 6 distinct"):
        model.init_codebooks(batches, max_latents=6)
    expected = type(model.quantizer.levels[0].codebook)(*model.quantizer.levels[0].codebook.embedding.shape)
    with pytest.warns(UserWarning, match="only 6 distinct"):
        expected.initialise(torch.cat([rows[::4] for rows in latents]))
    assert model.quantizer.levels[0].codebook.embedding.equal(expected.embedding)


@pytest.mark.parametrize(("kind", "expected"), [("l2", 2.5), ("l1", 1.5), ("l1+l2", 2.0)])
def test_pixel_losses_by_hand(kind, expected):
    x, y = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    assert pixel_loss(x, y, kind).item() == expected
    assert pixel_loss(x.bfloat16(), y.bfloat16(), kind).dtype == torch.float32
