"""MODEL_CARD.md: the card of the demo's pipeline, rendered from results that are stored beside the other measurements.

make demo && python benchmarks/model_card.py demo     results of a demo to docs/model_card.json, and the card
python benchmarks/model_card.py                       the card again from docs/model_card.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqtok import VQPipeline
from vqtok.files import write_json, write_text
from vqtok.hub.card import render
from vqtok.hub.checks import without_paths

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red three top left"
STORED, CARD = ROOT / "docs" / "model_card.json", ROOT / "MODEL_CARD.md"


def main(argv: Sequence[str] | None = None, stored: Path = STORED, card: Path = CARD) -> None:
    """Write the card, with a folder of a demo its results before."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments:
        write_json(stored, results(Path(arguments[0])))
    write_text(card, render(**json.loads(stored.read_text(encoding="utf-8"))))
    print(f"wrote {card}")


def results(demo: Path) -> dict[str, Any]:
    """What `render` is given for the pipeline of a finished demo."""
    whole = json.loads((demo / "metrics.json").read_text(encoding="utf-8"))
    metrics, training = (
        json.loads((demo / "pipeline" / f"{name}.json").read_text()) for name in ("metrics", "training")
    )
    health = {name: whole[name] for name in ("usage", "perplexity")}
    facts = {**VQPipeline.from_pretrained(demo / "pipeline").card_facts(), "prompt": PROMPT}
    return {
        "name": "demo/pipeline",
        "facts": facts,
        "metrics": {**metrics, **health},
        "training": {"arguments": without_paths(training["arguments"])},
        "samples": ["docs/prompts.png"],
    }


if __name__ == "__main__":
    main()
