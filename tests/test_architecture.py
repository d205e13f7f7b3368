"""Guards the floors of docs/design.md: imports of vqtok point down only, in plain sight, and files stay small."""

import ast
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A unit is a module or a folder directly under vqtok/ (a folder is a room), or all of examples/.
FLOORS = {
    1: {"codes", "container", "outputs", "configuration", "vocabulary", "fingerprint", "files", "hub", "sources"},
    2: {"quantizers", "layers"},
    3: {"modeling", "chunks", "code_vectors"},
    4: {"image", "audio", "text", "prior"},
    5: {"auto", "bulk", "encoding", "pipeline", "multimodal"},
    6: {"training", "evaluation"},
    7: {"vqtok", "cli", "__main__", "examples"},  # "vqtok" is the package's own __init__.py
}
RANK = {unit: floor for floor, units in FLOORS.items() for unit in units}

# The only imports between units of one floor. A row is added only with a reason, and never closes a circle.
SIDEWAYS = {
    ("outputs", "codes"),
    ("vocabulary", "codes"),
    ("fingerprint", "codes"),
    ("fingerprint", "files"),
    ("codes", "container"),
    ("codes", "files"),
    ("hub", "files"),
    ("pipeline", "auto"),
    ("multimodal", "auto"),
    ("encoding", "auto"),
    ("bulk", "auto"),
    ("cli", "vqtok"),
    ("__main__", "cli"),
    ("examples", "vqtok"),
}
MAY_HIDE_IMPORTS = {"cli"}  # so that `vqtok --help` answers at once

MAX_LINES = 600
AIM_LINES = 400


class Import(NamedTuple):
    line: int
    target: str  # dotted, absolute
    level: int  # dots in front, 0 for an absolute import
    hidden: bool  # inside a function


def modules() -> dict[str, Path]:
    """Returns every module under guard, dotted name to file."""
    found = {}
    for top in ("vqtok", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def unit_of(name: str) -> str:
    """Returns the unit a dotted name belongs to: vqtok.image.losses -> image."""
    parts = name.split(".")
    return parts[0] if parts[0] == "examples" or len(parts) == 1 else parts[1]


def imports_of(name: str, source: str, known: set[str], is_package: bool = False) -> list[Import]:
    """Returns the imports of vqtok in a module's source; `known` tells `from vqtok import codes` from a mere name."""
    package = name if is_package else name.rpartition(".")[0]
    found = []

    def add(node: ast.AST, target: str, level: int, hidden: bool) -> None:
        if target.split(".")[0] == "vqtok":
            found.append(Import(node.lineno, target, level, hidden))

    def visit(node: ast.AST, hidden: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(node, alias.name, 0, hidden)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                is_version = submodule == "vqtok.__version__"  # a plain string that any floor may read
                if not is_version:
                    add(node, submodule if submodule in known else base, node.level, hidden)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and str(argument.value).split(".")[0] in ("vqtok", ""):
                target = str(argument.value)
                add(node, f"{package}{target}" if target.startswith(".") else target, 0, True)
        inner = hidden or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(source), False)
    return found


def violations(name: str, source: str, known: set[str], is_package: bool = False) -> list[str]:
    """Returns one sentence for every import of a module that breaks a law of the floors."""
    here = unit_of(name)
    if here not in RANK:
        return [f"{name}: the unit {here!r} has no floor; give it one in FLOORS and in docs/design.md"]
    wrong = []
    for found in imports_of(name, source, known, is_package):
        there = unit_of(found.target)
        where = f"{name}:{found.line} imports {found.target}"
        if there not in RANK:
            wrong.append(f"{where}, which has no floor")
        elif here == there:
            if found.level != 1 and here != "examples":
                wrong.append(f"{where}: inside a folder imports are relative, with one dot")
        else:
            if RANK[there] > RANK[here]:
                wrong.append(f"{where}: up, from floor {RANK[here]} to floor {RANK[there]}")
            elif RANK[there] == RANK[here] and (here, there) not in SIDEWAYS:
                wrong.append(f"{where}: sideways on floor {RANK[here]}")
            if found.level:
                wrong.append(f"{where}: across folders imports are absolute")
        if found.hidden and here not in MAY_HIDE_IMPORTS:
            wrong.append(f"{where}: hidden inside a function")
    return wrong


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """Returns the names along one circle of a graph, or an empty list."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges.get(name, ())):
            if circle := walk(target, [*trail, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(edges) if (circle := walk(name, []))), [])


def test_imports_point_down():
    files = modules()
    wrong = []
    for name, path in files.items():
        wrong += violations(name, path.read_text(encoding="utf-8"), set(files), path.name == "__init__.py")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_two_modules_import_each_other():
    files = modules()
    edges = {
        name: {
            found.target
            for found in imports_of(name, path.read_text(encoding="utf-8"), set(files), path.name == "__init__.py")
            if not found.hidden
        }
        for name, path in files.items()
    }
    assert sum(map(len, edges.values())) > 0, "no import was seen at all"
    assert not (circle := find_cycle(edges)), " -> ".join(circle)
    sideways: dict[str, set[str]] = {}
    for here, there in SIDEWAYS:
        sideways.setdefault(here, set()).add(there)
    assert not (circle := find_cycle(sideways)), " -> ".join(circle)


def test_every_floor_is_examined():
    examined: dict[int, list[str]] = {}
    for name in modules():
        examined.setdefault(RANK.get(unit_of(name), 0), []).append(name)
    assert sorted(examined) == sorted(FLOORS), f"floors without a file, or files without a floor: {examined}"


def test_every_folder_of_code_is_a_package():
    """A folder without __init__.py would be missing from the wheel."""
    folders = {path.parent for path in (ROOT / "vqtok").rglob("*.py")}
    assert len(folders) > 1, folders
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_files_stay_small():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for top in ("vqtok", "examples", "tests", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
    }
    assert lengths
    too_long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not too_long, f"longer than {MAX_LINES} lines, split them: {too_long}"
    if long := {name: length for name, length in lengths.items() if length > AIM_LINES}:
        warnings.warn(f"longer than the {AIM_LINES} lines we aim at: {long}", stacklevel=1)


KNOWN = {"vqtok", "vqtok.codes", "vqtok.files", "vqtok.image", "vqtok.image.losses", "vqtok.modeling", "vqtok.auto"}


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("vqtok.codes", "from vqtok.modeling import VQModel", "up, from floor 1 to floor 3"),
        ("vqtok.codes", "from vqtok import modeling", "up, from floor 1 to floor 3"),
        ("vqtok.codes", "from vqtok import VQTokenizer", "up, from floor 1 to floor 7"),
        ("vqtok.image.data", "import vqtok.prior.sequence as s", "sideways on floor 4"),
        ("vqtok.training.loop", "from vqtok.evaluation import report", "sideways on floor 6"),
        ("vqtok.files", "from vqtok.codes import Codes", "sideways on floor 1"),
        ("vqtok.image.data", "from vqtok.image.losses import l1", "relative"),
        ("vqtok.image.data", "from ..codes import Codes", "absolute"),
        ("vqtok.image.parts.data", "from ..losses import l1", "one dot"),
        ("vqtok.auto", "def f():\n    from vqtok.codes import Codes", "hidden inside a function"),
        ("vqtok.auto", "class A:\n    def f(self):\n        from . import image", "hidden inside a function"),
        ("vqtok.auto", "import importlib\nimportlib.import_module('vqtok.codes')", "hidden inside a function"),
        ("vqtok.auto", "if True:\n    from vqtok.training import loop", "up, from floor 5 to floor 6"),
        ("vqtok.attic", "", "has no floor"),
        ("vqtok.auto", "import vqtok.attic", "has no floor"),
    ],
)
def test_the_guard_sees_a_bad_module(name, source, complaint):
    assert any(complaint in sentence for sentence in violations(name, source, KNOWN))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("vqtok.codes", "import torch\nfrom vqtok.files import write_bytes\nfrom vqtok import __version__"),
        ("vqtok.image.data", "from .losses import l1\nfrom . import losses\nfrom vqtok.codes import Codes"),
        ("vqtok.pipeline", "from vqtok.auto import VQTokenizer"),
        ("vqtok.auto", "def f():\n    import soundfile"),
        ("vqtok.cli", "def f():\n    from vqtok import VQTokenizer\n    from vqtok.training import loop"),
        ("examples.generate", "from vqtok import VQPipeline\nfrom vqtok.training.loop import fit"),
    ],
)
def test_the_guard_lets_a_good_module_pass(name, source):
    assert violations(name, source, KNOWN) == []


def test_the_guard_sees_a_circle():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
