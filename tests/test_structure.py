"""What may import what: no circle, neither when modules are imported nor inside functions, and nothing upwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = ("functional", "varlen", "loss", "nn", "testing", "viz", "info", "demo")


def modules(package: Path) -> dict[str, Path]:
    """Every module by its dotted name; a package by its own, for its ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ``known`` that a module imports, anywhere in it."""
    names = set()
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            inner = {f"{module}.{alias.name}" for alias in node.names}
            names |= inner if inner <= known.keys() else inner | {module}  # the package itself, or modules of it alone
    return (names & known.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Of modules that import each other, by way of others or not."""
    reached: dict[str, set[str]] = {}
    for name in graph:
        seen, todo = set(), [name]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        reached[name] = seen
    found = {tuple(sorted(other for other in seen if name in reached[other])) for name, seen in reached.items()}
    return sorted(list(circle) for circle in found if circle)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules(ROOT / "otfuse")
    return {name: imports(name, path, known) for name, path in known.items()}


def test_no_module_imports_itself_by_way_of_others(graph):
    assert len(graph) > 50 and circles(graph) == []


def test_backends_and_kernels_import_nothing_of_the_public_modules(graph):
    upwards = tuple(f"otfuse.{name}" for name in PUBLIC)
    inner = {name: of for name, of in graph.items() if name.startswith(("otfuse._", "otfuse.kernels"))}
    del inner["otfuse.__main__"]
    assert {name: found for name, of in inner.items() if (found := {o for o in of if o.startswith(upwards)})} == {}


def test_a_backend_imports_no_other_but_plain_pytorch(graph):
    for backend in ("cpu", "triton", "tpc"):
        own = {name: of for name, of in graph.items() if name.startswith(f"otfuse._backends.{backend}")}
        others = tuple(f"otfuse._backends.{other}" for other in {"cpu", "triton", "tpc"} - {backend})
        assert own and not {name for name, of in own.items() if any(o.startswith(others) for o in of)}


def test_kernels_import_nothing_of_their_launchers(graph):
    kernels = {name: of for name, of in graph.items() if name.startswith("otfuse.kernels")}
    assert kernels and not {name for name, of in kernels.items() if any(not o.startswith("otfuse.kernels") for o in of)}


def test_that_a_circle_is_found(tmp_path):
    """At the top of a file and inside a function; relative and absolute."""
    for name, text in {
        "__init__": "",
        "a": "from p import b",
        "b": "def f():\n    from . import c",
        "c": "import p.a",
    }.items():
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / f"{name}.py").write_text(text)
    known = modules(tmp_path / "p")
    assert circles({name: imports(name, path, known) for name, path in known.items()}) == [["p.a", "p.b", "p.c"]]
