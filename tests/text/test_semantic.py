"""Codes of whole sentences: levels that refine each other, a report that says when they collapse, files."""

import numpy as np
import pytest

from tests.tiny import make_text_tokenizer
from vqtok.text.semantic import SentenceCodes, pooled_vectors, prefix_neighbours, sentence_code_report


def clusters(number=300, dim=6, seed=0):
    """Four far clusters, each of three nearer ones."""
    rng = np.random.default_rng(seed)
    far, near = rng.integers(0, 4, number), rng.integers(0, 3, number)
    centres = np.random.default_rng(9).normal(size=(4, dim)) * 10
    inner = np.random.default_rng(8).normal(size=(3, dim))
    return (centres[far] + inner[near] + 0.01 * rng.normal(size=(number, dim))).astype(np.float32), far, near


def test_the_first_level_is_the_cluster_and_the_next_refines_it():
    vectors, far, near = clusters()
    made = SentenceCodes(6, num_levels=2, codebook_size=4).fit(vectors)
    codes = made.encode(vectors)
    assert all(len(set(codes[far == group, 0])) == 1 for group in range(4)) and len(set(codes[:, 0])) == 4
    assert len({(a, b) for a, b in codes}) == 12
    errors = [np.square(made.decode(codes[:, :depth]) - vectors).mean() for depth in (1, 2)]
    assert errors[1] < 0.1 * errors[0]
    assert np.array_equal(made.encode(vectors[:7]), codes[:7])


def test_the_report_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 0]])
    report = sentence_code_report(codes, 2)
    assert report["unique_ratio"] == 0.75 and report["largest_group"] == 2
    assert report["entropy_bits"][0] == pytest.approx(1) and report["entropy_bits"][1] == pytest.approx(
        0.8113, abs=1e-4
    )
    assert report["collapsed"] == []


def test_collapse_is_said_loudly():
    report = sentence_code_report(np.zeros((50, 3), np.int64), 16)
    assert len(report["collapsed"]) == 4 and "level 0 has 0.00 bits of 4.00" in report["collapsed"][0]
    assert "only 2.0% of the sentences" in report["collapsed"][-1] and "shared by 50" in report["collapsed"][-1]
    vectors = np.zeros((64, 4), np.float32)
    vectors[0], vectors[1, 0] = 1.0, -3.0
    with pytest.warns(UserWarning, match="these sentence codes collapse"):
        SentenceCodes(4, 2, 8).fit(vectors)


@pytest.mark.parametrize(
    ("vectors", "named"),
    [
        (np.ones((40, 4), np.float32), "all alike"),
        (np.ones((3, 4), np.float32), "3 vectors are too few for 8 codes"),
        (np.ones((40, 5), np.float32), r"floats \(N, 4\)"),
        (np.full((40, 4), np.nan, np.float32), "NaN or infinite"),
    ],
)
def test_bad_vectors_are_named(vectors, named):
    with pytest.raises(ValueError, match=named):
        SentenceCodes(4, 2, 8).fit(vectors)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    vectors = clusters()[0]
    made = SentenceCodes(6, 3, 8).fit(vectors + np.random.default_rng(1).normal(size=vectors.shape).astype(np.float32))
    made.save_pretrained(tmp_path)
    back = SentenceCodes.from_pretrained(tmp_path)
    assert np.array_equal(back.encode(vectors), made.encode(vectors))
    (tmp_path / "sentence_codes.json").write_text('{"dim": 5, "num_levels": 3, "codebook_size": 8}')
    with pytest.raises(ValueError, match="do not fit together"):
        SentenceCodes.from_pretrained(tmp_path)
    (tmp_path / "sentence_codes.json").write_text('{"dim": 4096, "num_levels": 1024, "codebook_size": 16777216}')
    with pytest.raises(ValueError, match="do not fit together .* instead of"):  # before the tables are asked for
        SentenceCodes.from_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    (tmp_path / "sentence_codes.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="do not fit together"):
        SentenceCodes.from_pretrained(tmp_path)


def test_pooled_vectors_belong_to_the_text():
    tok = make_text_tokenizer()
    texts = ["one", "a much longer text than that", "x" * 30]
    together = pooled_vectors(tok.model, tok.processor, texts)
    alone = np.concatenate([pooled_vectors(tok.model, tok.processor, [text]) for text in texts])
    assert together.shape == (3, 16) and np.abs(together - alone).max() <= 1e-5 * together.std()


def test_neighbours_share_the_longest_prefix():
    codes = np.array([[1, 2], [1, 3], [0, 2]])
    assert prefix_neighbours(codes, [1, 9]) == [0, 1] and prefix_neighbours(codes, [5, 2]) == []
    assert prefix_neighbours(codes, [5, 2], at_least=0) == [0, 1, 2]
