"""TextVQModel: the promises of every room, and what only text has."""

import pytest
import torch

from tests.common import TokenizerTests
from vqtok.quantizers import quantizer_config
from vqtok.text import TextVQConfig, TextVQModel, modeling_text_vq

TINY = {"downsampling_ratios": [2, 2], "strides": [4], "embedding_size": 6, "hidden_sizes": [8, 12], "latent_size": 6}
TINY |= {"kernel_size": 3, "num_blocks": 1, "decoder_num_blocks": 1}
FIELDS = {"vocab_size", "downsampling_ratios", "strides", "quantizer", "embedding_size", "hidden_sizes", "latent_size"}
FIELDS |= {"kernel_size", "num_blocks", "decoder_num_blocks", "compress", "latent_bound", "level_dropout"}
FIELDS |= {"continuous_steps", "continuous_share", "reconstruction_weight"}


def residual(num_codebooks=3, size=16, **layer):
    layer = {"type": "vector", "codebook_size": size, **layer}
    return {"type": "residual", "num_codebooks": num_codebooks, "layer": layer}


class TextTests(TokenizerTests):
    model_class = TextVQModel
    config_fields = FIELDS
    options: dict = {}
    sizes = [(64,), (88,), (8,)]
    quantizer_terms = {"commitment_loss": 0.25}

    def make_config(self, **changes):
        return TextVQConfig(**{**TINY, **self.options, **changes})

    def make_model(self, **changes):
        """With residual blocks that do something, and strided convolutions that see their neighbours: they start without."""
        model = super().make_model(**changes)
        with torch.no_grad():
            waking = [module for module in model.modules() if getattr(module, "starts_at_zero", False)]
            for module in waking:
                module.weight.normal_(0, 0.3 / module.in_channels**0.5)
                module.bias.normal_(0, 0.05)
            for down, _ in model.encoder.stages:
                down.weight.normal_(0, (down.in_channels * down.kernel_size[0]) ** -0.5)
        assert waking and not any(module.weight.eq(0).all() for module in waking)
        model.init_codebooks([self.make_media(8, self.sizes[0], seed=100)])
        return model

    def make_media(self, batch, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.make_config().vocab_size, (batch, *size), generator=generator)

    def output_shape(self, media):
        return (*media.shape, self.make_config().vocab_size)


class TestResidual(TextTests):
    options = {"quantizer": residual()}


class TestLevels(TextTests):
    """Long and short spans, of tokens; each codebook with projections of its own on the unit sphere, by gradient."""

    options = {"strides": [4, 2], "vocab_size": 40}
    options |= {"quantizer": [residual(2, codebook_dim=4, metric="cosine", update="gradient")] * 2}
    quantizer_terms = {"commitment_loss": 0.25, "codebook_loss": 1.0}


class TestSigns(TextTests):
    """Three levels of binary codes that need no table, of bounded latents."""

    options = {"downsampling_ratios": [2, 2, 2], "strides": [8, 4, 2], "hidden_sizes": [8, 12, 12]}
    options |= {"quantizer": {"type": "lfq", "bits": 6}, "latent_bound": "tanh"}
    sizes = [
        (64,),
        (88,),
        (16,),
    ]  # of a single step BLAS sums in an order that depends on where the weights lie in memory
    quantizer_terms = {"commitment_loss": 0.25, "entropy_loss": 0.1}


KINDS = [TestResidual, TestLevels, TestSigns]


@pytest.fixture(params=KINDS)
def kind(request):
    case = request.param()
    return case.make_model(), case


def close(a, b):
    assert (a - b).abs().max() <= 1e-5 * max(float(b.std()), 1e-6) * 10


def test_texts_padded_to_each_other_have_the_codes_they_have_alone(kind):
    model, case = kind
    stride, sizes = model.layout.stride, [37, 5, 64]
    ids = case.make_media(3, (64,))
    together = model.encode(ids, torch.tensor([[size] for size in sizes]))
    logits = model.decode(together.codes, torch.tensor([[size] for size in sizes])).reconstruction
    for i, size in enumerate(sizes):
        padded = -(-size // stride) * stride
        own = ids[i : i + 1, :padded].clone()
        own[:, size:] = model.config.vocab_size
        alone = model.encode(own)
        for level, layout in enumerate(model.layout.levels):
            steps = padded // layout.stride
            close(together.latents[level][i : i + 1, :steps], alone.latents[level])
            assert together.codes[level][i : i + 1, :, :steps].equal(alone.codes[level])
        part = [level[i : i + 1, :, : padded // layout.stride]
                for level, layout in zip(together.codes, model.layout.levels, strict=True)]  # fmt: skip
        close(logits[i : i + 1, :padded], model.decode(part).reconstruction)
        assert not logits[i, padded:].any()


def test_padding_counts_for_nothing_in_the_loss():
    model = TestResidual().make_model()
    ids = TestResidual().make_media(1, (16,))
    ids[:, 10:] = 256
    out = model(ids)
    expected = torch.nn.functional.cross_entropy(out.reconstruction[0, :10], ids[0, :10])
    torch.testing.assert_close(out.losses["reconstruction_loss"], expected)


def test_chunks_have_the_codes_and_the_text_of_the_whole(kind):
    model, case = kind
    ids = case.make_media(1, (model.layout.stride * 120,))
    model.chunk_units = 40
    whole = model.encode(ids).codes
    assert all(a.equal(b) for a, b in zip(model.encode_long(ids), whole, strict=True))
    assert model.decode_long(whole).equal(model.decode(whole).reconstruction.argmax(-1))


def test_all_logits_of_a_batch_never_exist_together(monkeypatch):
    """Of a vocabulary of tokens they would fill the memory."""
    model = TestResidual().make_model()
    codes = model.encode(TestResidual().make_media(5, (32,))).codes
    whole = model.decode(codes).reconstruction.argmax(-1)
    decode, seen, around = model.decode, [], 2 * (model.decoder.context[0] + model.layout.stride)
    monkeypatch.setattr(
        model, "decode", lambda part: (seen.append((len(part[0]), part[0].shape[2] * 4)), decode(part))[1]
    )
    for most, shapes in ((64, {(2, 32), (1, 32)}), (8, None)):
        seen.clear()
        monkeypatch.setattr(modeling_text_vq, "MOST_LOGITS", most * model.config.vocab_size)
        assert model.decode_long(codes).equal(whole)
        assert set(seen) == shapes if shapes else all(rows == 1 and units <= most + around for rows, units in seen)


def test_a_step_sees_no_further_than_the_context(kind):
    """Units beyond it change nothing, so chunks are computed with enough around them."""
    model, case = kind
    stride, (before, after) = model.layout.stride, model.encoder.context
    steps = 2 * (before // stride + 2) + 1
    middle = steps // 2
    ids = case.make_media(1, (steps * stride,))
    other = case.make_media(1, (steps * stride,), seed=1)
    low, high = middle * stride - before, (middle + 1) * stride + after
    other[:, low:high] = ids[:, low:high]
    coarse = [model.encode(each).latents[0][:, middle] for each in (ids, other)]
    close(*coarse)
    assert not torch.equal(ids, other)


def test_a_fresh_encoder_knows_the_own_span_alone_and_common_spans_have_codes_of_their_own():
    quantizer = {"type": "vector", "codebook_size": 8, "start": "commonest"}
    model = TextVQModel(TextVQConfig(**{**TINY, "downsampling_ratios": [4], "hidden_sizes": [8]}, quantizer=quantizer))
    spans = torch.randint(97, 122, (12, 4), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([i for i in range(12) for _ in range(20 - i)])[torch.randperm(174)]
    media = spans[order].view(2, -1)
    latents = model.eval().encode(media).latents[0].flatten(0, 1)
    assert (latents * 1000).round().unique(dim=0).shape[0] == 12
    model.init_codebooks([media[:1], media[1:]])
    distances = (latents[:, None] - model.quantizer.codebooks[0].table).norm(dim=-1).amin(1)
    assert (distances[order < 8] < 1e-5).all() and (distances[order >= 8] > 1e-2).all()


def test_the_commonest_spans_are_counted_in_four_times_as_many_latents_as_centroids_take():
    """Of 100,000 steps every second one is the same span: who skips every second one never sees it."""
    config = {**TINY, "downsampling_ratios": [4], "hidden_sizes": [8]}
    media = torch.randint(97, 122, (100_000, 4), generator=torch.Generator().manual_seed(0))
    media[1::2] = torch.tensor([0, 1, 2, 3])
    for start, found in (("commonest", True), ("kmeans", False)):
        quantizer = {"type": "vector", "codebook_size": 2, "start": start}
        model = TextVQModel(TextVQConfig(**config, quantizer=quantizer)).eval()
        latent = model.encode(media[1][None]).latents[0][0, 0]
        model.init_codebooks([media.view(1, -1)])
        assert ((model.quantizer.codebooks[0].table - latent).norm(dim=1).min() < 1e-5) == found
    assert quantizer_config({"type": "residual", "layer": {**quantizer, "start": "commonest"}}).start_latents == 1 << 18


def test_a_young_model_decodes_its_latents():
    """From all samples to none over the steps; then training and evaluation see the same."""
    case = TestResidual()
    model = case.make_model(continuous_steps=4).train()
    ids = case.make_media(6, (64,))
    start, shares = model.quantizer.start, []
    for _ in range(5):
        shares.append(start.current_share)
        out = model(ids)
        mixed = start.mix(out.latents, out.quantized)
        skipped = [bool(a.equal(b)) for a, b in zip(mixed[0], out.latents[0], strict=True)]
        model.quantizer.freeze()
        assert start.current_share == 0, "a decoder that learns alone learns from codes"
        model.quantizer.freeze(False)
        assert all(skipped) if shares[-1] == 1 else not any(skipped) if shares[-1] == 0 else True
        model.update_codebooks()
    assert shares == [1, 0.75, 0.5, 0.25, 0] and int(start.updates) == 5
    before = model.code_fingerprint({})
    start.updates += 1
    assert model.code_fingerprint({}) == before, "the count decides no codes"


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (torch.zeros(1, 10, dtype=torch.long), "10 units do not fit the largest stride 4"),
        (torch.zeros(1, 8), "must be integers, got torch.float32"),
        (torch.full((1, 8), 257), "from 0 to 256"),
        (torch.full((1, 8), -1), "from 0 to 256"),
        (torch.zeros(8, dtype=torch.long), r"\(B, T\), got \(8,\)"),
    ],
)
def test_ids_of_another_kind_are_refused(ids, named):
    with pytest.raises(ValueError, match=named):
        TextVQModel(TextVQConfig(**TINY)).encode(ids)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strides": [8]}, "strides must be chosen from"),
        ({"latent_bound": "tan"}, "latent_bound must be"),
        ({"vocab_size": 1}, "vocab_size must be"),
        ({"hidden_sizes": [8]}, "hidden_sizes must be 2 numbers"),
        ({"downsampling_ratios": [64] * 3, "strides": [64**3], "hidden_sizes": [8] * 3}, "strides of at most 65536"),
        ({"quantizer": {"type": "multi_scale"}}, "'multi_scale' is for pictures: of sequences use 'multi_rate'"),
        ({"continuous_share": 2}, "continuous_share must be a probability"),
        ({"continuous_steps": 9, "quantizer": {"type": "multi_rate", "strides": [2, 1]}}, "continuous_steps must be 0"),
    ],
)
def test_impossible_configs_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        TextVQConfig(**{**TINY, **changes})
