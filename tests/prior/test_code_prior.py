"""The network: what a logit may depend on, what the loss is, what is refused."""

import itertools
import math

import pytest
import torch

from vqtok.codes import Codes
from vqtok.prior import CodePriorModel, pad_conditions
from vqtok.prior.sequence import pad_features
from vqtok.vocabulary import CodeVocabulary

ONE = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 13}]}
TWO = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 1, "codebook_size": k} for s, k in ((8, 11), (4, 7))]}
THREE = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 1, "codebook_size": 5} for s in (16, 8, 4)]}
RESIDUAL = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 2, "codebook_size": 6} for s in (8, 4)]}
AUDIO = {"ndim": 1, "levels": [{"stride": s, "num_codebooks": q, "codebook_size": 9} for s, q in ((640, 1), (320, 3))]}
LARGE = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 1 << 17}]}
LAYOUTS = {"one": ONE, "two": TWO, "three": THREE, "residual": RESIDUAL, "audio": AUDIO, "large": LARGE}
GRIDS = {"audio": (3,), "large": (2, 2), "three": (1, 2)}


def all_ids(prior, codes, condition):
    """The whole sequence as ids of the vocabulary, one row per sample, from nothing but the vocabulary's arithmetic."""
    vocabulary, rows = prior.vocabulary, []
    for b in range(len(codes[0])):
        row = [*condition, vocabulary.special_id("begin")]
        row += [vocabulary.size_offset + n - 1 for n in codes[0].shape[2:]]
        for level in vocabulary.to_ids([values[b : b + 1] for values in codes]):
            row += level[0].movedim(0, -1).flatten().tolist()
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "qwen3", "mistral"])
def test_loss_of_codes_is_the_loss_of_the_id_path(make_prior, random_codes, name, backbone):
    """Two ways to the same numbers: slices of the training pass, and full-vocabulary logits with -inf elsewhere."""
    prior = make_prior(LAYOUTS[name], backbone)
    codes, condition = random_codes(LAYOUTS[name], 2, GRIDS.get(name, (2, 3))), [3, 1, 4]
    output = prior(codes=codes, condition_ids=torch.tensor([condition] * 2))
    ids = all_ids(prior, codes, condition)
    logits = prior(input_ids=ids).logits
    nats = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][:, len(condition) :]
    assert torch.allclose(output.loss, nats.mean(), atol=1e-5)
    per_level, at, axes = [], prior.vocabulary.layout.ndim, prior.vocabulary.layout.ndim
    for values, split in zip(codes, prior.vocabulary.split(codes), strict=True):
        count = split[0].numel()
        per_level.append(nats[:, at : at + count].sum() / values.numel())
        at += count
    assert at == nats.shape[1] and axes == at - sum(s[0].numel() for s in prior.vocabulary.split(codes))
    assert torch.allclose(output.nats_per_code, torch.stack(per_level), atol=1e-5)
    assert output.loss.dtype == torch.float32 and output.loss.ndim == 0


@pytest.mark.parametrize("backbone", ["llama", "gpt2", "qwen3", "mistral"])
def test_cached_logits_are_the_uncached_ones(make_prior, random_codes, backbone):
    prior = make_prior(TWO, backbone)
    ids = all_ids(prior, random_codes(TWO, 2, (2, 2)), [3, 1])
    with torch.no_grad():
        full = prior(input_ids=ids).logits
        step = prior(input_ids=ids[:, :4], use_cache=True)
        rows = [step.logits]
        for t in range(4, ids.shape[1]):
            step = prior(input_ids=ids[:, t : t + 1], past_key_values=step.past_key_values, history_ids=ids[:, : t + 1])
            rows.append(step.logits)
    cached = torch.cat(rows, 1)
    assert torch.equal(torch.isinf(cached), torch.isinf(full))
    known = ~torch.isinf(full)
    assert (cached[known] - full[known]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["two", "residual", "audio"])
def test_a_later_code_never_changes_an_earlier_logit(make_prior, random_codes, name):
    prior = make_prior(LAYOUTS[name])
    codes = random_codes(LAYOUTS[name], 1, GRIDS.get(name, (2, 2)))
    ids = all_ids(prior, codes, [3, 1])
    logits = prior(input_ids=ids).logits
    first = 3 + prior.vocabulary.layout.ndim
    for at in range(first, ids.shape[1]):
        changed = ids.clone()
        _, level, codebook, code = prior.vocabulary.locate(int(ids[0, at]))
        size = prior._streams[level, codebook][1]
        changed[0, at] += 1 if code + 1 < size else -1
        other = prior(input_ids=changed).logits
        assert torch.equal(other[:, :at], logits[:, :at])
        if at + 1 < ids.shape[1]:
            assert not torch.equal(other[:, at:], logits[:, at:]), "and it does change a later one"


def test_wrong_coarse_codes_change_the_fine_loss(make_prior, random_codes):
    prior = make_prior(TWO)
    codes = random_codes(TWO, 4, (2, 2))
    right = prior(codes=codes).nats_per_code
    wrong = prior(codes=((codes[0] + 1) % 11, codes[1])).nats_per_code
    assert abs(float(right[1] - wrong[1])) > 1e-3


def test_nothing_illegal_has_mass(make_prior, random_codes):
    prior = make_prior(RESIDUAL)
    ids = all_ids(prior, random_codes(RESIDUAL, 1, (1, 2)), [3])
    probabilities = prior(input_ids=ids).logits.softmax(-1)[0]
    vocabulary = prior.vocabulary
    for t in range(ids.shape[1]):
        kinds = {vocabulary.locate(i)[:3] for i in probabilities[t].nonzero()[:, 0].tolist()}
        kinds = {kind if kind[0] == "code" else kind[:1] for kind in kinds}
        after = vocabulary.locate(int(ids[0, t + 1]))[:3] if t + 1 < ids.shape[1] else ("null",)
        assert kinds == {after if after[0] == "code" else after[:1]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_maps_say_the_nats_of_each_code(make_prior, random_codes, name):
    """Against the id path, place by place in plain loops."""
    prior, layout = make_prior(LAYOUTS[name]), LAYOUTS[name]
    codes = random_codes(layout, 1, GRIDS.get(name, (2, 3)))
    stride, axes = layout["levels"][0]["stride"], layout["ndim"]
    batch = Codes(codes, [[n * stride for n in codes[0].shape[2:]]], prior.vocabulary.layout)
    maps = prior.score(batch, [[3, 1]]).maps
    ids = all_ids(prior, codes, [3, 1])
    nats = -prior(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[2 + axes :, 0]
    at = 0
    for level, found in zip(prior.vocabulary.split(codes), maps, strict=True):
        streams = level.shape[1] // found.shape[1]  # factors of each codebook
        for place in itertools.product(*map(range, level.shape[2:])):
            for q in range(found.shape[1]):
                assert torch.isclose(found[(0, q, *place)], nats[at : at + streams].sum(), atol=1e-4)
                at += streams
    assert at == len(nats)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prior_that_knows_nothing_scores_ln_k(make_prior, random_codes, name):
    prior, layout = make_prior(LAYOUTS[name]), LAYOUTS[name]
    torch.nn.init.zeros_(prior.lm_head.weight)
    codes = random_codes(layout, 2, GRIDS.get(name, (2, 3)))
    sizes = [[n * layout["levels"][0]["stride"] - 1 for n in codes[0].shape[2:]]] * 2
    batch = Codes(codes, torch.tensor(sizes), prior.vocabulary.layout)
    scores = prior.score(batch, [[1], [2]])
    wanted = torch.tensor([math.log(level["codebook_size"]) for level in layout["levels"]])
    assert torch.allclose(scores.nats_per_code, wanted.expand(2, -1), rtol=1e-6)
    assert all(m.shape == c.shape for m, c in zip(scores.maps, codes, strict=True))
    bits = prior.vocabulary.layout.bits(sizes[0])
    assert torch.allclose(scores.bits_per_unit, torch.full((2,), bits / math.prod(sizes[0])), rtol=1e-6)
    assert torch.allclose(prior(codes=codes).nats_per_code, wanted, rtol=1e-6)


def test_padding_does_not_change_what_a_sample_sees(make_prior, random_codes):
    prior = make_prior(TWO)
    codes, conditions = random_codes(TWO, 3, (2, 2)), [[3], [1, 4, 1, 5], [9, 2]]
    batch = Codes(codes, torch.tensor([[16, 16]] * 3), prior.vocabulary.layout)
    together = prior.score(batch, conditions)
    alone = [prior.score(batch[i], conditions[i : i + 1]) for i in range(3)]
    assert torch.allclose(together.nats, torch.cat([score.nats for score in alone]), atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_back_ends_agree_with_padding(make_prior, random_codes, attention):
    prior = make_prior(TWO)
    ids, mask = pad_conditions([[3], [1, 4, 1, 5]])
    codes = random_codes(TWO, 2, (2, 2))
    reference = prior(codes=codes, condition_ids=ids, condition_mask=mask).loss
    prior.set_attn_implementation(attention)
    assert prior.backbone.config._attn_implementation == attention
    assert torch.allclose(prior(codes=codes, condition_ids=ids, condition_mask=mask).loss, reference, atol=1e-5)


def test_mixed_sizes_score_as_alone(make_prior, random_codes):
    prior = make_prior(TWO)
    layout = prior.vocabulary.layout
    parts = [
        Codes(random_codes(TWO, 1, grid, seed), torch.tensor([size]), layout)
        for seed, (grid, size) in enumerate([((1, 2), (8, 15)), ((2, 1), (16, 8)), ((1, 2), (7, 16))])
    ]
    scores = prior.score(Codes.cat(parts), [[1], [2], [3]])
    for i, part in enumerate(parts):
        alone = prior.score(part, [[i + 1]])
        assert torch.allclose(scores.nats[i], alone.nats[0], atol=1e-5)
        assert torch.allclose(scores.nats_per_code[i], alone.nats_per_code[0], atol=1e-5)
        assert torch.allclose(scores.bits_per_unit[i], alone.bits_per_unit[0], atol=1e-5)
        for level, alone_level in zip(scores.maps, alone.maps, strict=True):
            grid = alone_level.shape[2:]
            assert torch.allclose(level[i, :, : grid[0], : grid[1]], alone_level[0], atol=1e-5)
            assert torch.isclose(level[i].sum(), alone_level.sum(), atol=1e-4), "padding is 0"


def test_condition_dropout_replaces_whole_conditions(make_prior, random_codes):
    prior = make_prior(TWO, condition_dropout=0.5)
    codes = random_codes(TWO, 1, (2, 2))
    ids = torch.tensor([[3, 1]])
    told, untold = (prior(codes=codes, condition_ids=given).loss.item() for given in (ids, None))
    assert abs(told - untold) > 1e-3
    prior.train()
    seen = [round(prior(codes=codes, condition_ids=ids).loss.item(), 4) for _ in range(40)]
    assert set(seen) == {round(told, 4), round(untold, 4)}
    assert 8 < seen.count(round(untold, 4)) < 32
    prior.eval()
    assert prior(codes=codes, condition_ids=ids).loss.item() == told


@pytest.mark.parametrize("kind", ["text", "features"])
def test_places_of_a_condition_count_from_its_first_token(make_prior, random_codes, kind):
    """The vector of number n is added to token n of a text, however long the text; in training, scoring and sampling alike."""
    fields = {"condition": kind} if kind == "text" else {"condition": kind, "feature_size": 5, "text_size": 0}
    plain, prior = make_prior(TWO, **fields), make_prior(TWO, condition_places=True, **fields)
    prior.load_state_dict(plain.state_dict(), strict=False)
    texts = [[3, 1, 2], [5]] if kind == "text" else [torch.randn(n, 5) for n in (3, 1)]
    rows = [*texts, [prior.null_id]]
    found, mask = prior._condition_vectors(rows)
    bare, _ = plain._condition_vectors(rows)
    for row, (length, added) in enumerate(zip(mask.sum(1).tolist(), found - bare, strict=True)):
        assert torch.allclose(added[-length:], prior.condition_places.weight[:length], atol=1e-5), row
    codes = random_codes(TWO, 2, (2, 2))
    ids, told = pad_conditions(texts) if kind == "text" else pad_features(texts, 5)
    given = {"condition_ids" if kind == "text" else "condition_features": ids, "condition_mask": told}
    loss = prior(codes=codes, **given).loss
    assert not torch.allclose(loss, plain(codes=codes, **given).loss, atol=1e-4)
    drawn = prior.sample_codes(texts, sizes=(16, 16), seed=0)
    scores = prior.score(drawn, texts)
    alone = [prior.score(drawn[[i]], [texts[i]]).nats[0] for i in range(2)]
    assert torch.allclose(scores.nats, torch.stack(alone), atol=1e-4)
    with pytest.raises(ValueError, match="sample_codes"):
        prior.generate(torch.zeros(1, 1, dtype=torch.int64))


def test_a_row_of_padding_is_the_null_condition(make_prior, random_codes):
    prior, codes = make_prior(TWO), random_codes(TWO, 2, (2, 2))
    ids, mask = pad_conditions([[3, 1], []])
    mixed = prior(codes=codes, condition_ids=ids, condition_mask=mask).loss
    one = prior(codes=tuple(c[:1] for c in codes), condition_ids=torch.tensor([[3, 1]])).loss
    two = prior(codes=tuple(c[1:] for c in codes)).loss
    assert torch.allclose(mixed, (one + two) / 2, atol=1e-5)


def test_class_and_no_condition(make_prior, random_codes):
    codes = random_codes(TWO, 2, (2, 2))
    by_class = make_prior(TWO, condition="class", text_size=10)
    flat, column = torch.tensor([3, 7]), torch.tensor([[3], [7]])
    assert torch.equal(by_class(codes=codes, condition_ids=flat).loss, by_class(codes=codes, condition_ids=column).loss)
    assert not torch.equal(by_class(codes=codes, condition_ids=flat).loss, by_class(codes=codes).loss)
    without = make_prior(TWO, condition="none", text_size=0)
    assert torch.isfinite(without(codes=codes).loss)
    with pytest.raises(ValueError, match="without conditions"):
        without(codes=codes, condition_ids=flat)


def test_it_learns_a_tiny_set(make_prior, random_codes):
    prior = make_prior(TWO, scale=1.0).train()
    codes = random_codes(TWO, 6, (2, 2))
    ids, mask = pad_conditions([[i, i + 1][: 1 + i % 2] for i in range(6)])
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2, weight_decay=0.0)
    first = None
    for _ in range(80):
        loss = prior(codes=codes, condition_ids=ids, condition_mask=mask).loss
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval()
    assert prior(codes=codes, condition_ids=ids, condition_mask=mask).loss < 0.05 < first
    drawn = prior.sample_codes([[i, i + 1][: 1 + i % 2] for i in range(6)], sizes=(16, 16), temperature=0)
    assert all(torch.equal(a, b) for a, b in zip(drawn.levels, codes, strict=True))


def test_every_parameter_gets_a_gradient(make_prior, random_codes):
    prior = make_prior(RESIDUAL).train()
    prior(codes=random_codes(RESIDUAL, 2, (4, 4)), condition_ids=torch.tensor([[1], [2]])).loss.backward()
    assert [name for name, value in prior.named_parameters() if value.grad is None] == []


def test_bf16_autocast_and_gradient_checkpointing(make_prior, random_codes):
    prior = make_prior(TWO, scale=1.0).train()
    codes = random_codes(TWO, 2, (2, 2))
    plain = prior(codes=codes).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed = prior(codes=codes).loss
    assert mixed.dtype == torch.float32 and abs((plain - mixed).item()) < 0.05
    plain.backward()
    wanted = prior.place_embed.level.weight.grad.clone()
    prior.zero_grad()
    getattr(prior, "activation_checkpointing_enable", prior.gradient_checkpointing_enable)()
    assert prior.backbone.gradient_checkpointing
    prior(codes=codes).loss.backward()
    assert torch.allclose(prior.place_embed.level.weight.grad, wanted, atol=1e-6)


def test_save_and_load_keeps_everything(make_prior, random_codes, tmp_path):
    prior = make_prior(TWO)
    prior.config.fingerprint = "ab" * 32
    prior.generation_config.guidance_scale, prior.generation_config.top_k = 2.5, 5
    prior.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "generation_config.json"} == {path.name for path in tmp_path.iterdir()}
    again = CodePriorModel.from_pretrained(tmp_path)
    assert not again.training and again.config.fingerprint == "ab" * 32
    assert again.config.vocabulary == prior.vocabulary == CodeVocabulary.from_dict(prior.vocabulary.to_dict())
    assert (again.generation_config.guidance_scale, again.generation_config.top_k) == (2.5, 5)
    for (name, a), (_, b) in zip(prior.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    condition = [[3, 1], [2]]
    one, two = (model.sample_codes(condition, sizes=(16, 16), seed=5) for model in (prior, again))
    assert all(torch.equal(a, b) for a, b in zip(one.levels, two.levels, strict=True))
    assert two.fingerprint == "ab" * 32


def test_missing_weights_and_pickles_are_refused(make_prior, tmp_path):
    from safetensors.torch import load_file, save_file

    prior = make_prior(TWO)
    prior.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        CodePriorModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        CodePriorModel.from_pretrained(tmp_path)


def test_fresh_weights_are_small_and_loading_on_meta_keeps_the_backbones_own(make_prior, random_codes):
    prior = make_prior(TWO, scale=1.0)
    for table in (prior.place_embed.level, prior.next_place_embed.coords[0], prior.lm_head):
        assert 0.01 < table.weight.std() < 0.03
    loss = prior(codes=random_codes(TWO, 8, (4, 4))).nats_per_code
    assert torch.allclose(loss, torch.tensor([math.log(11), math.log(7)]), atol=0.2)


BAD_CODES = [
    (lambda c: (c[0],), None, "tuple of 2 levels"),
    (lambda c: c[0], None, "tuple of 2 levels"),
    (lambda c: (c[0].int(), c[1]), None, r"level 0: codes must be int64 \(2, 1, 2, 2\)"),
    (lambda c: (c[0], c[1][..., :3]), None, r"level 1: codes must be int64 \(2, 1, 4, 4\)"),
    (lambda c: (c[0] + 11, c[1]), None, r"outside \[0, 11\)"),
    (lambda c: (c[0].repeat(1, 1, 1, 3), c[1].repeat(1, 1, 1, 3)), None, "max_grid 4"),
    (lambda c: c, [[16, 16], [16, 8]], "group samples"),
    (lambda c: c, [[24, 16], [24, 16]], "group samples"),
]


@pytest.mark.parametrize(("change", "sizes", "message"), BAD_CODES)
def test_bad_codes_are_named(make_prior, random_codes, change, sizes, message):
    prior = make_prior(TWO)
    with pytest.raises(ValueError, match=message):
        prior(codes=change(random_codes(TWO, 2, (2, 2))), sizes=None if sizes is None else torch.tensor(sizes))


def test_sizes_of_one_grid_pass(make_prior, random_codes):
    prior, codes = make_prior(TWO), random_codes(TWO, 2, (2, 2))
    assert torch.equal(prior(codes=codes, sizes=torch.tensor([[16, 15], [9, 16]])).loss, prior(codes=codes).loss)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1] * 9, [1] * 9], None, "takes 1 to 8 tokens"),
        ([[1, 20], [1, 2]], None, r"condition id 20 is outside \[0, 20\)"),
        ([[1, 2], [1, 0]], [[1, 1], [1, 0]], "padded on the left"),
        ([[1, 2]], None, r"\(B=2, L\)"),
    ],
)
def test_bad_conditions_are_named(make_prior, random_codes, ids, mask, message):
    prior = make_prior(TWO)
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=message):
        prior(codes=random_codes(TWO, 2, (2, 2)), condition_ids=torch.tensor(ids), condition_mask=mask)


def test_codes_of_another_tokenizer_are_refused_with_both_names(make_prior, random_codes):
    prior = make_prior(TWO)
    prior.config.fingerprint = "a" * 64
    codes = Codes(random_codes(TWO, 1, (1, 1)), [[8, 8]], prior.vocabulary.layout, "b" * 64)
    with pytest.raises(ValueError, match=f"{'b' * 64}.*{'a' * 64}"):
        prior.score(codes)
    other = make_prior(ONE)
    with pytest.raises(ValueError, match="codebook_size=11.*codebook_size=13"):
        other.score(codes)


def test_a_sequence_longer_than_the_backbone_is_refused(make_prior, random_codes):
    prior = make_prior(TWO, "gpt2", max_grid=32)
    with pytest.raises(ValueError, match="max_position_embeddings 512"):
        prior(codes=random_codes(TWO, 1, (16, 16)))


def test_scoring_leaves_the_mode_alone(make_prior, random_codes):
    prior = make_prior(TWO).train()
    prior.backbone.layers[0].eval()
    codes = Codes(random_codes(TWO, 2, (1, 1)), [[8, 8]] * 2, prior.vocabulary.layout)
    scores = [prior.score(codes, [[1], [2]]).nats for _ in range(4)]
    assert all(torch.equal(scores[0], other) for other in scores), "no condition dropout while scoring"
    assert prior.training and prior.backbone.layers[1].training and not prior.backbone.layers[0].training
