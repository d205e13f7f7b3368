"""Codebook health: what is counted, when a window closes, what is said about a codebook that collapses."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference
from vqtok.quantizers import CodebookHealth, build_hierarchy, build_quantizer, quantizer_config, update_all
from vqtok.quantizers.health import advice


def vector(size: int = 8, **options):
    return build_quantizer({"type": "vector", "codebook_size": size, **options}, 4)


def see(health: CodebookHealth, *passes: torch.Tensor) -> None:
    for codes in passes:
        health.observe(codes)
    update_all([health])


def test_numbers_of_a_known_histogram():
    health = CodebookHealth(vector(), window=8)
    see(health, torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]).view(2, 1, 4))
    (report,) = health.report()
    assert (report.level, report.codebook, report.codebook_size, report.whole) == (0, 0, 8, True)
    assert report.usage == report.usage_epoch == 0.5
    assert report.entropy_bits == pytest.approx(reference.entropy_bits([4, 2, 1, 1])) == 1.75
    assert report.perplexity == pytest.approx(2**1.75)
    assert report.expected_usage == pytest.approx(1 - (7 / 8) ** 8)
    assert health.summary() == {"usage_0": 0.5, "perplexity_0": pytest.approx(2**1.75), "revived": 0.0}


def test_windows_and_epochs_close_when_they_are_full():
    health = CodebookHealth(vector(), window=6, epoch_size=5)
    see(health, torch.zeros(2, 1, 2, dtype=torch.int64))
    assert health.report()[0].usage == 1 / 8 and not health.report()[0].whole, "before a whole window: since the start"
    see(health, torch.ones(2, 1, 2, dtype=torch.int64))
    assert health.report()[0].usage == 2 / 8 and health.report()[0].whole
    see(health, torch.full((1, 1, 2), 7))  # the fifth sample; the window is open again
    report = health.report()[0]
    assert report.usage == 2 / 8 and report.usage_epoch == 3 / 8
    see(health, torch.full((1, 1, 4), 5))
    report = health.report()[0]
    assert report.usage == 2 / 8 and report.perplexity == pytest.approx(2 ** reference.entropy_bits([2, 4]))
    assert report.usage_epoch == 3 / 8, "the last whole epoch, while the next one runs"


def test_accumulation_is_one_update_and_eval_counts_nothing():
    large, small = CodebookHealth(vector(), window=10), CodebookHealth(vector(), window=10)
    codes = torch.randint(0, 8, (6, 1, 3))
    see(large, codes)
    see(small, *codes.split(2))
    assert all(value.equal(small.state_dict()[name]) for name, value in large.state_dict().items())
    small.observe(codes)
    small.drop_pending()
    update_all([small])
    assert small.report() == large.report()


@pytest.mark.parametrize(
    "configs",
    [
        [{"type": "residual", "num_codebooks": 2, "layer": {"type": "vector", "codebook_size": 6}}],
        [{"type": "vector", "codebook_size": 5}, {"type": "fsq", "scalar_levels": [3, 2]}],
        [{"type": "multi_scale", "scales": [1, 2], "layer": {"type": "sim", "codebook_size": 7}}],
        [{"type": "lfq", "bits": 30}],
    ],
)
def test_every_level_and_codebook_has_a_row(configs):
    hierarchy = build_hierarchy([quantizer_config(each) for each in configs], 4, 2)
    health = CodebookHealth(hierarchy, window=4)
    outs = hierarchy(lambda level, quantized: torch.randn(3, 4, 4, 4))
    health.observe([out.codes for out in outs])
    update_all([health])
    reports = health.report()
    sizes = [config.size for config in hierarchy.level_configs]
    rows = [(i, q) for i, config in enumerate(hierarchy.level_configs) for q in range(config.depth) if sizes[i] < 1e6]
    assert [(each.level, each.codebook) for each in reports] == rows
    for each in reports:
        counts = torch.bincount(outs[each.level].codes[:, each.codebook].flatten(), minlength=sizes[each.level])
        assert each.usage == pytest.approx(float((counts > 0).float().mean()))
        assert each.perplexity == pytest.approx(2 ** reference.entropy_bits(counts.tolist()))


def test_its_state_continues_a_run(tmp_path):
    codes = [torch.randint(0, 8, (2, 1, 3)) for _ in range(6)]
    whole, first = CodebookHealth(vector(), 10, 5), CodebookHealth(vector(), 10, 5)
    for each in codes:
        see(whole, each)
    for each in codes[:3]:
        see(first, each)
    save_file(first.state_dict(), tmp_path / "health.safetensors")
    second = CodebookHealth(vector(), 10, 5)
    second.load_state_dict(load_file(tmp_path / "health.safetensors"))
    for each in codes[3:]:
        see(second, each)
    assert second.report() == whole.report()


def test_revived_codes_are_counted():
    quantizer = build_quantizer({"type": "vector", "codebook_size": 8, "revival_threshold": 0.5}, 4).train()
    quantizer.codebook.counts[5:] = 0
    quantizer.codebook.embedding[5:] = 100
    health = CodebookHealth(quantizer)
    health.observe(quantizer(torch.randn(4, 50, 4)).codes)
    update_all([*quantizer.accumulators, health])
    assert health.summary()["revived"] >= 3
    before = health.summary()["revived"]
    update_all([*quantizer.accumulators, health])
    assert health.summary()["revived"] == before, "nothing was seen since"


@pytest.mark.parametrize(("used", "word"), [(1, "collapses"), (30, "collapses"), (150, "idle"), (300, None)])
def test_a_sentence_about_a_codebook_that_is_little_used(used, word):
    health = CodebookHealth(vector(512), window=4096)
    codes = torch.arange(4096) % used
    see(health, codes[:4000].view(1, 1, -1))
    assert health.warnings() == [], "not before a whole window"
    see(health, codes[4000:].view(1, 1, -1))
    sentences = health.warnings()
    if word is None:
        assert sentences == []
    else:
        assert len(sentences) == 1 and word in sentences[0]
        assert sentences[0].startswith("level 0: ") and f"{used} of 512 codes" in sentences[0]
        assert "Next to try: start the table from data" in sentences[0]


def test_of_frozen_codes_only_a_collapse_is_said():
    for used, said in ((150, False), (30, True)):
        quantizer = vector(512)
        quantizer.freeze()
        health = CodebookHealth(quantizer, window=4096)
        see(health, (torch.arange(4096) % used).view(1, 1, -1))
        sentences = health.warnings()
        assert len(sentences) == said and all("collapses. Next to try: training the codes too" in s for s in sentences)


def test_few_codes_are_no_collapse():
    """1000 codes of 2^18 cannot hit more than 0.4 %: what uniform use would have hit is the measure."""
    health = CodebookHealth(build_quantizer({"type": "lfq", "bits": 18}, 18), window=1000)
    see(health, torch.randint(0, 1 << 18, (1, 1, 1000)))
    assert health.report()[0].usage < 0.005 and health.warnings() == []


@pytest.mark.parametrize(
    ("config", "fresh", "word"),
    [
        ({"type": "vector"}, True, "initialise"),
        ({"type": "vector", "revival_threshold": 0}, False, "revival_threshold"),
        ({"type": "vector", "update": "gradient"}, False, "update='ema'"),
        ({"type": "vector"}, False, "metric='cosine'"),
        ({"type": "vector", "metric": "cosine", "codebook_dim": 8}, False, "entropy_weight"),
        ({"type": "vector", "metric": "cosine", "codebook_dim": 8, "entropy_weight": 0.1}, False, "codebook_size"),
        ({"type": "lfq"}, False, "entropy_weight"),
        ({"type": "gumbel"}, False, "kl_weight"),
        ({"type": "sim"}, False, "initialise"),
        ({"type": "fsq"}, False, "learning rate"),
    ],
)
def test_the_remedy_is_one_that_is_not_in_use_yet(config, fresh, word):
    assert word in advice(quantizer_config(config), fresh)


def test_bad_arguments():
    with pytest.raises(ValueError, match="window.*got 0"):
        CodebookHealth(vector(), window=0)
    with pytest.raises(ValueError, match="epoch_size.*0"):
        CodebookHealth(vector(), epoch_size=0)


def test_entropy_is_in_bits_and_bounded():
    health = CodebookHealth(vector(8), window=8)
    see(health, torch.arange(8).view(8, 1, 1))
    (report,) = health.report()
    assert report.entropy_bits == pytest.approx(math.log2(8)) and report.perplexity == pytest.approx(8)
    assert report.usage == 1
