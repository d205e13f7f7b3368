"""docs/differences.md names tests that exist, and names all that show a difference."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "differences.md").read_text(encoding="utf-8")


def names_of_tests(pattern):
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in HERE.glob(pattern)]
    return {
        node.name
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_tests_that_the_page_names_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 30
    assert sorted(named - names_of_tests("test_*.py")) == []


def test_the_page_names_every_difference_that_is_shown():
    shown = names_of_tests("test_differences_*.py")
    assert len(shown) > 30
    assert sorted(name for name in shown if f"`{name}`" not in PAGE and name != "test_defaults") == []
