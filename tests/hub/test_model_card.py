"""MODEL_CARD.md is what the stored results give, and the stored results are complete."""

import json
from pathlib import Path

import yaml

from benchmarks import model_card
from vqtok.hub.card import render

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads((ROOT / "docs" / "model_card.json").read_text(encoding="utf-8"))
CARD = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_it_is_rendered_from_the_stored_results(tmp_path):
    assert render(**STORED) == CARD
    model_card.main([], card=tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == CARD


def test_every_stored_figure_is_in_it():
    figures = [*STORED["metrics"]["nats_per_code"], STORED["metrics"]["prior_bits_per_pixel"]]
    figures += [value for value in STORED["metrics"]["judged"].values() if isinstance(value, float)]
    assert len(figures) > 8 and [value for value in figures if f"{value:.4g}" not in CARD] == []
    assert STORED["metrics"]["judged"]["date"] in CARD and STORED["metrics"]["judged"]["machine"] in CARD


def test_the_hub_can_read_its_header_and_the_pictures_are_there():
    fields = yaml.safe_load(CARD.split("---\n")[1])
    assert fields["library_name"] == "vqtok" and fields["pipeline_tag"] == "text-to-image"
    assert all(each["args"]["protocol"] for each in fields["model-index"][0]["results"][0]["metrics"])
    assert [path for path in STORED["samples"] if not (ROOT / path).is_file()] == []
