"""The demo, tiny: every stage, every file, every key; the figures themselves are measured by `make demo`."""

import json

import pytest
from PIL import Image

from benchmarks import model_card
from examples import demo
from vqtok import VQPipeline, VQTokenizer

KEYS = {
    "psnr_db", "usage", "perplexity", "bits_per_pixel", "place_accuracy", "colour_accuracy", "digit_accuracy", "unseen_pair_accuracy",
    "judge_accuracy_on_real", "nats_per_code", "samples_per_second", "minutes", "machine",
}  # fmt: skip


@pytest.mark.slow
def test_the_demo_makes_everything_it_promises_and_continues(tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path), "--tokenizer_steps", "4", "--prior_steps", "4", "--num_scenes", "64"]
    flags += ["--num_judged", "12", "--num_threads", "1"]
    metrics = demo.main(flags)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert set(metrics) >= KEYS
    assert len(metrics["usage"]) == len(metrics["perplexity"]) == len(metrics["nats_per_code"]) == 2
    assert metrics["judge_accuracy_on_real"]["place_accuracy"] == 1.0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 40 and "http" not in page
    for name in ("prompts", "reconstructions", "code_maps", "usage", "tokenizer_loss", "prior_loss"):
        assert min(Image.open(tmp_path / "pictures" / f"{name}.png").size) > 50
    tokenizer = VQTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert VQPipeline.from_pretrained(tmp_path / "pipeline").vq_tokenizer.fingerprint == tokenizer.fingerprint
    model_card.main([str(tmp_path)], tmp_path / "card.json", tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text()
    assert tokenizer.fingerprint in card and f"{metrics['digit_accuracy']:.4g}" in card and str(tmp_path) not in card
    said = capsys.readouterr().out.strip().splitlines()
    assert said.pop() == f"wrote {tmp_path / 'card.md'}"
    assert [line.split()[1] for line in said[-3:]] == ["generate", "info", "evaluate"]
    before = (tmp_path / "tokenizer" / "model.safetensors").stat().st_mtime
    again = demo.main(flags)
    assert (tmp_path / "tokenizer" / "model.safetensors").stat().st_mtime == before
    assert again["minutes"] >= metrics["minutes"] * 0.5 and again["digit_accuracy"] == metrics["digit_accuracy"]
