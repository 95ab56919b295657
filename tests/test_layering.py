"""Imports point downward only, and every room holds what CONTRIBUTING.md says it holds.

Nothing is imported here: the sources are parsed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room is a module or a package right under `momkd`; "momkd" is the package itself. What each may import besides
# itself, from the ground up. A new module needs a line here.
GROUND = {"errors", "names", "graph", "bags", "_lazy"}
SIDE = {"data", "metrics", "bootstrap", "plots", "predictions", "patients", "ties", "config"}
BACKENDS = {"reference", "kernels", "native", "cuda", "gpu", "_C", "_cuda"}
ASSEMBLED = {"models", "compat"}
USERS = {
    *("train", "evaluate", "predict", "explain", "simulate", "demo", "report", "page", "study"),
    *("convert", "experiment", "inference", "progress", "runs", "state", "doctor", "distributed", "terminal", "device"),
    "precision",
}
LIBRARY = GROUND | BACKENDS | {"env", "budget", "dispatch", "ops", "functional", "nn"} | ASSEMBLED

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_lazy": set(),
    "_version": set(),
    "env": {"errors"},
    "budget": {"env"},
    "names": {"errors"},
    "graph": {"errors"},
    "bags": {"errors", "graph"},
    **dict.fromkeys(SIDE, GROUND | SIDE),
    "reference": GROUND,
    "kernels": GROUND | {"reference"},  # definitions: parameter tuples, the levels of dropout
    "native": GROUND | {"env", "_C", "reference"},  # definitions, as the kernels
    "cuda": GROUND | {"env", "_cuda"},
    "gpu": GROUND | {"env", "kernels"},
    "dispatch": GROUND | BACKENDS - {"reference"} | {"env"},
    "ops": GROUND | BACKENDS | {"dispatch", "budget"},
    "functional": GROUND | {"ops", "dispatch", "reference", "budget"},
    "nn": GROUND | {"functional", "reference"},  # definitions: softmax over bags, to look at
    **dict.fromkeys(ASSEMBLED, GROUND | ASSEMBLED | {"nn", "functional", "reference", "config"}),
    "compat": GROUND | ASSEMBLED | {"nn", "functional", "reference", "config", "dispatch"},
    **dict.fromkeys(USERS, LIBRARY | SIDE | USERS | {"momkd"}),
    "cli": LIBRARY | SIDE | USERS | {"momkd"},
    "momkd": {"_lazy", "doctor"},  # and by name, when asked: see __getattr__
    "__main__": {"cli"},
}

# Work on the host that is no op: a public function checks its arguments and calls the definition itself.
HOST_FUNCTIONS = {"reseed_", "spherical_kmeans"}


@cache
def sources() -> dict[str, ast.Module]:
    """The modules of momkd by name, those of kernels/ under the name that they are installed by."""
    found = {}
    for folder, package in (("momkd", "momkd"), ("kernels", "momkd.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "momkd"


def in_room(name: str) -> Iterator[tuple[str, ast.Module]]:
    return ((module, tree) for module, tree in sources().items() if room(module) == name)


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Every module of momkd that this one names in an import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "momkd")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: line {node.lineno}: imports are written in full"
            if node.module == "momkd":
                yield from (f"momkd.{a.name}" if a.name != "__version__" else "momkd" for a in node.names)
            elif node.module and node.module.startswith("momkd."):
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in sources() else node.module for name in inner)
        elif isinstance(node, ast.Call) and called(node) == "import_module":
            first = node.args[0]
            if isinstance(first, ast.Constant) and str(first.value).startswith("momkd."):
                yield str(first.value)


def called(node: ast.Call) -> str:
    """The last word of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def without_type_checking(tree: ast.Module) -> ast.Module:
    def checks_types(node: ast.stmt) -> bool:
        return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"

    return ast.Module([node for node in tree.body if not checks_types(node)], [])


def words(tree: ast.AST) -> Iterator[str]:
    """Dotted names as they are written, such as os.environ."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", sources())
def test_imports_point_downward(module: str) -> None:
    own = room(module)
    assert own in MAY_IMPORT, f"{module}: which layer is it? Add {own!r} to the table in tests/test_layering.py"
    tree = sources()[module]
    for name in imported(module, without_type_checking(tree) if module == "momkd" else tree):
        target = room(name)
        assert target in MAY_IMPORT or target in BACKENDS, f"{module} imports {name}, which no layer knows"
        assert target == own or target in MAY_IMPORT[own], (
            f"{module} imports {name}: {own} may import {', '.join(sorted(MAY_IMPORT[own])) or 'nothing of momkd'}"
        )


def test_the_table_has_no_way_up() -> None:
    """Follow the table itself: the library never reaches its users or the side branch, the side branch only bags."""

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for name in MAY_IMPORT.get(waiting.pop(), set()) - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    order = ["errors", "bags", "native", "dispatch", "ops", "functional", "nn", "models", "train", "cli"]
    for low, high in pairwise(order):
        assert low in reach(high)
        assert high not in reach(low)
    for name in LIBRARY - ASSEMBLED:
        assert not reach(name) & (SIDE | USERS | {"cli", "momkd"}), name
    for name in SIDE:
        assert reach(name) <= SIDE | GROUND


def test_no_module_waits_for_itself() -> None:
    """No circles of imports that are run when a module is loaded."""
    names = {name: set(imported(name, without_type_checking(tree))) - {"momkd"} for name, tree in sources().items()}
    del names["momkd"]
    while ready := [name for name, needs in names.items() if not needs & names.keys() - {name}]:
        for name in ready:
            del names[name]
    assert not names, f"these import one another in a circle: {', '.join(names)}"


def test_functional_calls_the_reference_for_host_work_only() -> None:
    used = set()
    for module, tree in in_room("functional"):
        if any(name.startswith("momkd.reference") for name in imported(module, tree)):
            used |= {word.rpartition(".")[2] for word in words(tree) if re.match(r"(momkd\.)?reference\.", word)}
    assert used == HOST_FUNCTIONS


def test_ops_are_registered_in_one_place() -> None:
    for module, tree in sources().items():
        registering = [w for w in words(tree) if w.startswith(("torch.library", "torch.autograd.Function"))]
        assert not registering or room(module) == "ops", f"{module}: {registering[0]}"


def test_heavy_libraries_stay_in_their_rooms() -> None:
    allowed = {
        "triton": {"kernels"},
        "cupy": {"cuda"},
        **dict.fromkeys(("h5py", "pandas", "matplotlib", "sklearn"), SIDE | USERS | {"cli"}),
        "scipy": SIDE | USERS | {"cli", "graph"},
        **dict.fromkeys(("rich", "typer"), USERS | {"cli"}),
        "openslide": {"explain"},
        "torchmil": set[str](),  # other projects are told by the layout of their models, and never imported
        "eva": set[str](),
        "trident": set[str](),
        "transformers": set[str](),
    }
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for name in names:
                    rooms = allowed.get(name.split(".")[0])
                    assert rooms is None or room(module) in rooms, f"{module} imports {name}"


def test_the_environment_is_read_in_one_file() -> None:
    for module, tree in sources().items():
        if module != "momkd.env":
            reading = [w for w in words(tree) if w in ("os.environ", "os.getenv", "os.environb", "os.putenv")]
            assert not reading, f"{module}: {reading[0]}; read it in momkd/env.py"
    assert "os.environ" in list(words(sources()["momkd.env"]))


def test_text_is_printed_in_one_file() -> None:
    """Where rich reads markup in names and messages of others, `[/b]` in a path ends a finished command."""
    for module, tree in sources().items():
        if module == "momkd.terminal":
            continue
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            asked = ast.unparse(node.func)
            where = f"{module}: line {node.lineno}: {asked}"
            assert not asked.endswith(".print"), f"{where}; print by say, note and show of momkd.terminal"
            assert asked not in ("Console", "escape", "Text.from_markup"), f"{where}; see momkd.terminal"
            if asked == "TextColumn":
                assert "markup=False" in ast.unparse(node), f"{where} without markup=False"


def test_kernels_do_not_wait_for_the_device() -> None:
    for module, tree in in_room("kernels"):
        waiting = {called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not waiting & {"item", "tolist", "cpu", "synchronize"}, module
        assert not [w for w in words(tree) if w.startswith("torch.autograd")], module


def test_csrc_sees_no_torch_and_its_kernels_no_python() -> None:
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 5
    for path in files:
        headers = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)
        torch = [h for h in headers if re.match(r"torch/|ATen/|c10/|caffe2/", h)]
        assert not torch, f"{path}: {torch[0]}"
        if not path.name.startswith("bindings_"):
            python = [h for h in headers if h.startswith("pybind11") or h == "Python.h"]
            assert not python, f"{path}: {python[0]}"


def test_the_rules_can_be_broken() -> None:
    """Each way of writing an import is seen."""
    text = """
import momkd.train as t
from momkd import cli, __version__
from momkd.data import slides, Slide
def later():
    from momkd.nn.memory import MemoryBank
    importlib.import_module("momkd._C")
    os.environ["X"]
"""
    tree = ast.parse(text)
    assert list(imported("x", tree)) == [
        *("momkd.train", "momkd.cli", "momkd", "momkd.data.slides", "momkd.data"),
        *("momkd.nn.memory", "momkd._C"),
    ]
    assert "os.environ" in words(tree)
