"""`VQTokenizer` with a tokenizer of text: any text, exact lengths, files, folders, caches, and the command line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from tests.tiny import TEXT_CONFIG, assert_same_codes, make_text_tokenizer, make_tokenizer, words
from vqtok import Codes, VQTokenizer
from vqtok.cli import main
from vqtok.encoding import encode_dataset
from vqtok.evaluation import text_report
from vqtok.prior.data import CodeDataset
from vqtok.text import TextVQConfig, TextVQModel, TextVQProcessor

TEXTS = ["a", "Grüße, 世界", "line one\r\nline two\x00\x1b[0m", "x" * 37, "👩‍👩‍👧 and more"]


@pytest.fixture(scope="module")
def tok():
    return make_text_tokenizer()


def test_texts_of_any_length_come_back_as_texts_of_their_length(tok):
    codes = tok.encode(TEXTS)
    assert codes.sizes.flatten().tolist() == [len(text.encode()) for text in TEXTS]
    back = tok.decode(codes)
    assert all(type(text) is str for text in back)
    assert [len(text.encode()) for text in back] == codes.sizes.flatten().tolist()
    for i, text in enumerate(TEXTS):
        assert_same_codes(tok.encode(text), codes[i])
    assert tok.reconstruct(TEXTS) == back
    assert tok.encode([]).sizes.shape == (0, 1) and tok.decode(tok.encode([])) == []


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_any_text_comes_back_valid(text):
    tok = _tiny()
    (back,) = tok.decode(Codes.from_bytes(tok.encode(text).to_bytes()))
    assert len(back.encode("utf-8")) == len(text.encode("utf-8"))


_made = []


def _tiny():
    if not _made:
        _made.append(make_text_tokenizer())
    return _made[0]


def test_what_does_not_fit_is_named(tok):
    for media, named in (
        ("", "the text is empty"),
        (["a", "\udc00"], "item 1: the text holds a lone surrogate"),
        ([b"a"], "item 0: "),
    ):
        with pytest.raises((ValueError, TypeError), match=named):
            tok.encode(media)
    with pytest.raises(ValueError, match="sampling_rate=8000 is for audio, this tokenizer is for texts"):
        tok.encode("a", sampling_rate=8000)
    with pytest.raises(ValueError, match="vocab_size 256, the model takes 40"):
        VQTokenizer(TextVQModel(type(tok.model.config)(vocab_size=40)), TextVQProcessor(8))
    with pytest.raises(ValueError, match="do not fit this tokenizer"):
        tok.decode(make_text_tokenizer(strides=[4], quantizer={"type": "fsq", "scalar_levels": [4, 4]}).encode("abc"))


def test_saved_and_loaded_it_is_the_same(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    back = VQTokenizer.from_pretrained(tmp_path)
    assert back.verify() == tok.fingerprint and back.modality == "text"
    assert_same_codes(back.encode(TEXTS), tok.encode(TEXTS))
    assert type(AutoModel.from_pretrained(tmp_path)) is TextVQModel
    assert AutoConfig.from_pretrained(tmp_path).model_type == "vqtok_text"
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is TextVQProcessor
    assert repr(back).splitlines()[1:3] == [
        "  level 0: 1 code of 16 per 4 units, 4 bits",
        "  level 1: 1 code of 8 per 2 units, 3 bits",
    ]
    batch = back.processor(TEXTS)
    together = back.model.encode(batch["input_ids"], batch["sizes"]).codes
    own = back.encode(TEXTS[1]).levels
    assert all(a[1:2, :, : b.shape[2]].equal(b) for a, b in zip(together, own, strict=True))


def test_a_long_text_needs_little_more_memory_than_itself(tok):
    """The logits of 400 kB would take 400 MB; in chunks they never exist together."""
    text = "All work and no play. " * 20_000
    seen = []
    decode = tok.model.decode
    tok.model.decode = lambda codes, sizes=None: (seen.append(codes[0].shape[2]), decode(codes, sizes))[1]
    try:
        (back,) = tok.decode(tok.encode(text))
    finally:
        del tok.model.decode
    assert len(back.encode()) == len(text) and len(seen) > 10
    assert max(seen) * 4 <= tok.model.chunk_units + 4 * tok.model.decoder.context[0]


def test_a_data_set_of_text_becomes_a_code_cache(tok, tmp_path):
    tok.save_pretrained(tmp_path / "tok")
    items = [{"text": "text " * (i + 1), "label": i % 2} for i in range(5)]
    encode_dataset(tok, items, tmp_path / "codes", batch_size=2)
    codes = CodeDataset(tmp_path / "codes")
    assert len(codes) == 5 and codes.fingerprint == tok.fingerprint and codes[3]["label"] == 1


def test_the_report_counts_what_is_right(tok):
    texts = [{"text": text} for text in TEXTS]
    result = text_report.evaluate(tok, texts, name="tiny")
    total = sum(len(text.encode()) for text in TEXTS)
    right = 0
    assert result["data"] == {**result["data"], "num_texts": 5, "bytes": total, "units": total, "num_skipped": 0}
    for text in TEXTS:
        ids, (size,) = tok.processor.prepare(text)
        made = tok.model.decode(tok.encode(text).levels).reconstruction.argmax(-1)[0, :size]
        right += int((made == ids[:size]).sum())
    assert result["unit_accuracy"] == result["byte_accuracy"] == right / total
    padded = sum(-(-len(text.encode()) // 4) * 4 for text in TEXTS)
    assert result["bits_per_byte"]["nominal"] == pytest.approx(padded * 2.5 / total)
    assert "tiny" in text_report.to_markdown([result])


def test_from_a_file_to_codes_and_back(tok, tmp_path, capsys):
    tok.save_pretrained(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("Grüße\r\n", encoding="utf-8", newline="")
    arguments = ["-t", str(tmp_path / "tok")]
    assert main(["encode", str(tmp_path / "a.txt"), str(tmp_path / "a.vq"), *arguments]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["decode", str(tmp_path / "a.vq"), str(tmp_path / "b.txt"), *arguments]) == 0
    written = (tmp_path / "b.txt").read_bytes()
    assert len(written) == len("Grüße\r\n".encode()) and written.decode() == tok.reconstruct("Grüße\r\n")[0]
    assert main(["decode", str(tmp_path / "a.vq"), str(tmp_path / "b.png"), *arguments]) == 2
    assert "no suffix of a text file" in capsys.readouterr().err
    assert main(["encode", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), *arguments]) == 2
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("start", ["P3 is a protein", "#define a_width 3\n#define a_height x", "\ufeffbegin\r\n"])
def test_a_text_that_begins_like_something_else_is_a_text(tok, tmp_path, start):
    tok.save_pretrained(tmp_path / "tok")
    (tmp_path / "a.txt").write_bytes(start.encode())
    assert main(["encode", str(tmp_path / "a.txt"), str(tmp_path / "a.vq"), "-t", str(tmp_path / "tok")]) == 0
    assert_same_codes(Codes.load(tmp_path / "a.vq"), VQTokenizer.from_pretrained(tmp_path / "tok").encode(start))


def test_rates_of_tokens_are_said_to_be_of_tokens(tmp_path, capsys):
    processor = TextVQProcessor.from_tokenizer(words(), stride=4)
    model = TextVQModel(TextVQConfig(**TEXT_CONFIG, vocab_size=4)).eval()
    VQTokenizer(model, processor).save_pretrained(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("the cat sat", encoding="utf-8")
    assert main(["encode", str(tmp_path / "a.txt"), str(tmp_path / "a.vq"), "-t", str(tmp_path / "tok")]) == 0
    assert "bits per token" in capsys.readouterr().out


def test_a_tokenizer_of_pictures_takes_no_text():
    with pytest.raises((ValueError, OSError)):
        make_tokenizer().encode("no picture")
