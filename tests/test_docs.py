"""The pages under docs/: their Python runs, their JSON builds, their links lead somewhere."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

from vqtok.quantizers import QUANTIZERS, build_quantizer

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
QUANTIZERS_PAGE = (DOCS / "quantizers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("page", "count"), [("quantizers.md", 4), ("priors.md", 5), ("multimodal.md", 4), ("text.md", 2)]
)
def test_the_python_of_a_page_runs_and_says_what_it_shows(page, count):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == count
    torch.manual_seed(0)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for block in blocks:
            exec(compile(block, f"docs/{page}", "exec"), names)
    shown = re.findall(r"```text\n(.*?)```", text, re.S)
    assert output.getvalue() == "".join(shown)


def test_the_presets_build():
    presets = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", QUANTIZERS_PAGE, re.S)]
    assert len(presets) == 5
    for preset in presets:
        quantizer = build_quantizer(preset, dim=16).eval()
        out = quantizer(torch.randn(1, 4, 4, 16))
        assert out.quantized.equal(quantizer.embed_codes(out.codes))


def test_every_type_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", QUANTIZERS_PAGE, re.M)
    assert dict(rows) == {name: kind.__name__ for name, (_, kind) in QUANTIZERS.items()}
