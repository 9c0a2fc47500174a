"""The import table of the design: rooms see only what lies downhill of them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "ernie_engine"
MIND = {"columns", "plan", "request", "block_pool", "scheduler"}

# room -> rooms it may import from (itself always)
MAY_SEE = {
    "config": set(),
    "framing": set(),
    "kernels": set(),
    "parallel": {"config", "framing"},
    "text": {"config"},
    "mind": {"config"},
    "model": {"config", "kernels", "parallel", "mind"},  # of the mind: the contract, plan.py
    "engine": {"config", "mind", "model", "parallel", "text"},
    "evals": {"engine", "text"},
    "cli": {"config"},
    # It measures kernels and a model's steps, too.
    "bench": {"config", "engine", "kernels", "mind", "model", "text"},
    "server": {"cli", "config", "engine", "framing", "mind", "text"},
    "testing": {"config", "text"},
    "scripts": {
        "bench",
        "cli",
        "config",
        "engine",
        "framing",
        "mind",
        "evals",
        "server",
        "testing",
        "text",
    },
}
FORBIDDEN = {
    "config": {"torch", "transformers"},
    "mind": {"torch", "numpy", "random", "time", "transformers"},
    **{room: {"transformers"} for room in ("kernels", "parallel", "text", "model", "engine")},
}


def room_of(module: str) -> str:
    """'ernie_engine.engine.plan' -> 'mind'; the package itself counts as engine."""
    parts = module.split(".")[1:]
    if not parts or parts[0][0].isupper():  # a public name
        return "engine"
    if parts[0] in ("config", "engine_config", "options", "version"):
        return "config"
    if parts[0] == "engine" and len(parts) > 1 and parts[1] in MIND:
        return "mind"
    return parts[0]


def python_files() -> list[Path]:
    return [p for top in (PACKAGE, "scripts") for p in sorted((ROOT / top).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_of(path.parent).split(".")[: 1 - node.level or None]
            base = ".".join([*(package if node.level else ()), *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_sees_only_what_lies_downhill(path):
    module = module_of(path)
    room = "scripts" if path.is_relative_to(ROOT / "scripts") else room_of(module)
    for imported in imports_of(path):
        top = imported.split(".")[0]
        assert top not in FORBIDDEN.get(room, set()), f"{module} imports {imported}"
        if top == PACKAGE:
            seen = room_of(imported)
            assert seen in MAY_SEE[room] | {room}, f"{module} ({room}) imports {imported} ({seen})"


def test_the_model_sees_only_the_contract_of_the_mind():
    for path in (ROOT / PACKAGE / "model").glob("*.py"):
        mind = {i for i in imports_of(path) if i.startswith(PACKAGE) and room_of(i) == "mind"}
        assert all(i.startswith(f"{PACKAGE}.engine.plan") for i in mind), path


def test_scheduler_and_runner_cannot_see_each_other():
    scheduler = imports_of(ROOT / PACKAGE / "engine" / "scheduler.py")
    assert not [i for i in scheduler if i.startswith(f"{PACKAGE}.model")]


WIRES = re.compile(
    r"\b(c?pickle|cloudpickle|marshal|shelve|torch\.load|(recv|send)_pyobj"
    r"|(all_gather|broadcast|gather|scatter|send|recv)_object(_list)?)\b"
)


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_pickled_or_evaluated(path):
    tree = ast.parse(path.read_text())
    names = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Name | ast.Attribute)]
    names += [i for i in imports_of(path)]
    assert not [name for name in names if WIRES.search(name)]
    calls = [
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    assert not {"eval", "exec", "__import__"} & set(calls)
