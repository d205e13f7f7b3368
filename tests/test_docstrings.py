"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import vqtok

NAMES = sorted(
    module.name for module in pkgutil.walk_packages(vqtok.__path__, "vqtok.") if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings(name):
    import numpy
    import torch

    module = importlib.import_module(name)
    public = {name: getattr(vqtok, name) for name in vqtok.__all__}
    torch.manual_seed(0)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"torch": torch, "np": numpy, **public})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    results = [runner.run(test) for test in found]
    assert sum(result.failed for result in results) == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    total = sum(bool(test.examples) for name in NAMES for test in finder.find(importlib.import_module(name)))
    assert total >= 10
