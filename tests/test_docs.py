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


def test_the_python_of_the_quantizers_page_runs_and_says_what_it_shows():
    blocks = re.findall(r"```python\n(.*?)```", QUANTIZERS_PAGE, re.S)
    assert len(blocks) == 4
    torch.manual_seed(0)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for block in blocks:
            exec(compile(block, "docs/quantizers.md", "exec"), names)
    shown = re.findall(r"```text\n(.*?)```", QUANTIZERS_PAGE, re.S)
    assert output.getvalue() == "".join(shown)


def test_the_python_of_the_spoken_numbers_page_runs_and_says_what_it_shows():
    pytest.importorskip("soundfile")
    page = (DOCS / "spoken_numbers.md").read_text(encoding="utf-8")
    (block,), (shown,) = re.findall(r"```python\n(.*?)```", page, re.S), re.findall(r"```text\n(.*?)```", page, re.S)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(block, "docs/spoken_numbers.md", "exec"), {})
    assert output.getvalue() == shown


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
