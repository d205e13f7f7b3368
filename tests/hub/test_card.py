"""Cards say what was measured, and their header is YAML that the Hub reads."""

import ast
import re

import pytest
import yaml

from vqtok.hub.card import pipeline_card, render, tokenizer_card

METRICS = {
    "psnr_db": 31.25, "ssim": 0.95, "bits_per_pixel": 0.609375, "usage": [1.0, 0.5], "perplexity": [100.5, 60.25],
    "protocol": "vqtok-eval v1", "date": "2026-01-02T03:04:05", "machine": {"cores": 2}, "data": {"num_images": 512},
    "tokenizer": {"parameters": 588883, "fingerprint": "f" * 64, "layout": {"levels": [
        {"stride": 8, "num_codebooks": 1, "codebook_size": 128}, {"stride": 4, "num_codebooks": 1, "codebook_size": 256},
    ]}},
}  # fmt: skip
TRAINING = {"arguments": {"config": "image/x", "max_steps": 7, "batch_size": 32, "seed": 0, "learning_rate": None}}


def header(card):
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_a_tokenizers_card():
    card = tokenizer_card("me/vq", METRICS, TRAINING)
    fields = header(card)
    (model,) = fields.pop("model-index")
    assert fields == {
        "library_name": "vqtok",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vqtok", "vq-vae", "image-tokenization"],
    }
    (result,) = model["results"]
    figures = [(each["type"], each["value"], each["args"]) for each in result["metrics"]]
    how = {"protocol": "vqtok-eval v1", "num_samples": 512}
    assert figures == [("psnr", 31.25, how), ("ssim", 0.95, how)]
    for words in (
        "31.25 dB",
        "0.6094 bits per pixel",
        "588,883",
        "| level | stride | codes | usage | perplexity |",
        "| 1 | 4 | 256 | 50.0% | 60.2 |",
        "f" * 64,
        "| max_steps | 7 |",
        "512 held-out",
    ):
        assert words in card
    assert "learning_rate" not in card  # nothing to say


def test_a_card_of_a_tokenizer_of_sound():
    layout = {"levels": [{"stride": 320, "num_codebooks": 2, "codebook_size": 1024}]}
    metrics = {
        "pesq_wb": None, "not_measured": {"pesq_wb": "pesq is not installed"}, "stoi": 0.9125, "failures": {"stoi": {"short": 2}},
        "si_sdr_db": None, "si_sdr_perfect": 0, "mel_distance": 0.75, "kbps": {"nominal": 1.0, "payload": 1.1, "file": 1.2},
        "usage": [[1.0, 0.5]], "perplexity": [[100.0, 50.0]], "protocol": "vqtok-audio-eval v1", "date": "2026-01-02T03:04:05",
        "machine": {"cores": 2}, "data": {"num_recordings": 64, "seconds": 128.4},
        "tokenizer": {"parameters": 123456, "fingerprint": "f" * 64, "sampling_rate": 16_000, "nominal_kbps": 0.5, "layout": layout},
    }  # fmt: skip
    card = tokenizer_card("me/voice", metrics, TRAINING, "audio")
    fields = header(card)
    assert fields["pipeline_tag"] == "feature-extraction" and "audio-tokenization" in fields["tags"]
    (result,) = fields["model-index"][0]["results"]
    figures = [(each["type"], each["value"], each["args"]["num_samples"]) for each in result["metrics"]]
    assert figures == [("stoi", 0.9125, 64), ("mel_distance", 0.75, 64)]
    for words in (
        "0.5 kbps at 16,000 Hz. 123,456 parameters",
        "STOI 0.912 (2 recordings left out), mel distance 0.750 at 1 kbps on 64 held-out recordings of 128 s",
        "PESQ-WB was not measured: pesq is not installed.",
        "| level | stride | codebooks | codes | usage | perplexity |",
        "| 0 | 320 | 2 | 1024 | 75.0% | 75.0 |",
        '<audio controls src="samples/reconstructions.wav"></audio>',
        'tok.encode(["voice.wav"])',
    ):
        assert words in card, words
    assert "PSNR" not in card and "SI-SDR" not in card and "None" not in card
    assert "SI-SDR perfect" in tokenizer_card("me/voice", {**metrics, "si_sdr_perfect": 64}, TRAINING, "audio")


def test_a_pipelines_card():
    metrics = {
        "nats_per_code": [1.5, 2.25],
        "ln_codebook_size": [4.852, 5.545],
        "prior_bits_per_pixel": 0.25,
        "held_out_samples": 512,
    }
    card = pipeline_card("me/dalle", metrics, TRAINING, "text")
    assert header(card)["pipeline_tag"] == "text-to-image"
    (result,) = header(card)["model-index"][0]["results"]
    assert [each["value"] for each in result["metrics"]] == [1.5, 2.25]
    assert "| 1 | 2.250 | 5.545 |" in card and 'pipe(["..."]' in card
    judged = {**metrics, "judged": {"place_accuracy": 0.99514}}
    assert "| place accuracy | 0.9951 |" in pipeline_card("x", judged, TRAINING, "text")
    assert "pipe([0]," in pipeline_card("me/x", metrics, TRAINING, "class")


def test_what_was_not_measured_is_not_said():
    facts = {"kind": "tokenizer", "modality": "image", "levels": METRICS["tokenizer"]["layout"]["levels"]}
    card = render("me/vq", facts)
    assert "model-index" not in header(card) and "Measured" not in card and "Training" not in card
    assert "| level | stride | codes |\n" in card and "None" not in card
    deep = [{"stride": 8, "num_codebooks": 4, "codebook_size": 128}]
    assert "| 0 | 8 | 4 | 128 |" in render("me/vq", {**facts, "levels": deep})


@pytest.mark.parametrize(
    ("kind", "modality", "condition", "tag"),
    [
        ("tokenizer", "image", None, "image-feature-extraction"),
        ("tokenizer", "audio", None, "feature-extraction"),
        ("pipeline", "image", "text", "text-to-image"),
        ("pipeline", "image", "none", "unconditional-image-generation"),
        ("pipeline", "image", "class", None),
        ("pipeline", "image", "codes", None),
        ("pipeline", "audio", "text", "text-to-audio"),
        ("pipeline", "audio", "none", None),
        ("model", "prior", None, None),
    ],
)
def test_tags_are_honest(kind, modality, condition, tag):
    card = render("me/x", {"kind": kind, "modality": modality, "condition": condition})
    assert header(card).get("pipeline_tag") == tag
    assert ("image-tokenization" in header(card)["tags"]) == ((kind, modality) == ("tokenizer", "image"))


def test_sounds_and_pictures_are_shown():
    card = render("me/x", {"kind": "tokenizer", "modality": "audio"}, samples=["samples/a.png", "samples/b.wav"])
    assert "![a](samples/a.png)" in card and '<audio controls src="samples/b.wav"></audio>' in card


@pytest.mark.parametrize("prompt", ["a child's drawing", 'a "red" three', 'it\'s "so" \\n', "über", None])
@pytest.mark.parametrize("condition", ["text", "features", "class", "codes", "none"])
def test_the_snippet_is_python_and_knows_its_names(condition, prompt):
    card = render("me/x", {"kind": "pipeline", "modality": "image", "condition": condition, "prompt": prompt})
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    tree = ast.parse(code)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    made |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {node.id for node in names if isinstance(node.ctx, ast.Load)} <= made
    if condition in ("text", "features"):
        assert [prompt or "..."] in [ast.literal_eval(node) for node in ast.walk(tree) if isinstance(node, ast.List)]


def test_a_pipelines_card_names_its_parts():
    facts = {"kind": "pipeline", "modality": "image", "condition": "features"}
    place = {"repo": "google/t5", "revision": "a" * 40}
    card = render("me/x", {**facts, "stages": 2, "text_encoder": place})
    assert "A cascade of 2 priors, coarse to fine, over the codes" in card
    assert (
        f"the text encoder [google/t5](https://huggingface.co/google/t5/tree/{'a' * 40})" in card and "licence" in card
    )
    assert "a text encoder made elsewhere" in render("me/x", facts)
    assert "A masked prior over" in render("me/x", {**facts, "condition": "none", "stages": 1, "masked": True})
