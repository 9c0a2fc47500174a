"""Kernels are Triton alone: what only one maker's cards understand stands behind `if PDL`, which is
off under the interpreter and on cards without it. It may say when something is done and what to
bring closer, never what comes out: the kernel without it is its twin."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ernie_engine
from ernie_engine.kernels.launch import overlap

SOURCES = sorted(Path(ernie_engine.__file__).parent.rglob("*.py"))
EXTRA = re.compile(r"(tl|triton\.language)\.extra\b")  # of a maker: most of it is inline assembly
GUARDED = re.compile(r"triton\.language\.extra\.cuda\.gdc_\w+")  # under its own name
SPECIAL = re.compile(r"inline_asm|extern_elementwise|^gdc_")


def faults(source: str) -> list[str]:
    """The lines with what no other card understands, unless they stand behind `if PDL`."""
    tree = ast.parse(source)
    guarded = {id(name) for name in _guarded(tree)}
    found = [*_special_names(tree), *_special_imports(tree)]
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in found if id(node) not in guarded]


def _special_names(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if SPECIAL.search(name) or EXTRA.match(ast.unparse(node)):
                yield node


def _special_imports(tree: ast.AST) -> Iterator[ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for path in (module + ast.unparse(alias) for alias in node.names):
                is_special = EXTRA.match(path) or "inline_asm" in path
                if is_special and not GUARDED.fullmatch(path):
                    yield node


def _guarded(tree: ast.AST) -> Iterator[ast.expr]:
    """What is called by the lines of an `if PDL`, where PDL is a constant of the kernel."""
    for kernel in ast.walk(tree):
        if isinstance(kernel, ast.FunctionDef) and "PDL: tl.constexpr" in ast.unparse(kernel.args):
            for node in ast.walk(kernel):
                if isinstance(node, ast.If) and ast.unparse(node.test) == "PDL":
                    lines = [line.value for line in node.body if isinstance(line, ast.Expr)]
                    yield from (line.func for line in lines if isinstance(line, ast.Call))


def test_no_kernel_has_what_other_cards_do_not_understand():
    found = {path.name: faults(path.read_text("utf-8")) for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}
    texts = [path.read_text("utf-8") for path in SOURCES]
    assert any("gdc_wait()" in text for text in texts)
    assert sum(text.count("inline_asm_elementwise(") for text in texts) == 1  # ask_for_rows()


@pytest.mark.parametrize(
    "source",
    [
        "import triton.language.extra.cuda as cuda",
        "from triton.language import extra",
        "from triton.language.extra.cuda import gdc_wait, globaltimer",
        "from triton.language.extra.cuda import gdc_wait as wait",
        "from triton.language import inline_asm_elementwise as asm",
        "def f(x):\n  return tl.inline_asm_elementwise('', '', [x], tl.int32, True, 1)",
        "def f(x, PDL: tl.constexpr):\n  if PDL:\n    tl.extra.cuda.smid()",
        "def f(PDL: tl.constexpr):\n  gdc_wait()",
        "def f(PDL: tl.constexpr):\n  if PDL:\n    pass\n  else:\n    gdc_wait()",
        "def f(PDL):\n  if PDL:\n    gdc_wait()",
        "def f(PDL: tl.constexpr, x):\n  if PDL or x:\n    gdc_wait()",
        "def f(PDL: tl.constexpr):\n  if PDL:\n    wait = gdc_wait",
    ],
)
def test_such_things_are_found(source):
    assert faults(source)


def test_behind_the_constant_is_their_place():
    assert not faults(
        "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"
        "def f(x, PDL: tl.constexpr):\n"
        "  for i in x:\n    if PDL:\n      gdc_wait()\n      gdc_launch_dependents()"
    )


def test_the_constant_is_off_where_there_is_no_such_card(monkeypatch):
    architectures = {"default": False, "sm_80": False, "sm_90": True, "sm_100": True}
    for name, can in architectures.items():
        monkeypatch.setattr("ernie_engine.kernels.launch.architecture", lambda _, name=name: name)
        assert overlap(torch.device("cpu")) == {"PDL": can, "launch_pdl": can}
