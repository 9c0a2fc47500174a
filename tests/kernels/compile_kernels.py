"""Compiles every Triton kernel for sm_80 and sm_90 on a machine that has neither.

    python tests/kernels/compile_kernels.py [some | all] [OP ...]

Run without TRITON_INTERPRET; prints a line of JSON for each compiled kernel, and one for each row
of a launch table: whether a case asked for it. `all` is every layout, some is what CI has time for.
"""

import json
import os
import sys
from collections.abc import Iterator

import torch

from ernie_engine.bench.kernels.compiling import compile_case, compiling_for, in_processes
from ernie_engine.bench.kernels.shapes import SHAPES
from ernie_engine.bench.kernels.table import CASES
from ernie_engine.kernels.launch import DEFAULT
from ernie_engine.kernels.registry import IMPLEMENTATIONS

ARCHITECTURES = (80, 90)
# Such that every bucket of every table is asked for, in the dtype that serves and in the one whose
# tiles take most room.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 8192, 16384)
COMPILED = {
    "some": [
        *((torch.bfloat16, "21B tp1", n) for n in SIZES),
        *((torch.bfloat16, name, n) for name in ("0.3B", "300B tp8") for n in (1, 2, 256)),
        *((torch.float32, "21B tp1", n) for n in (1, 32, 128, 8192)),
    ],
    "all": [
        (d, name, n) for d in (torch.bfloat16, torch.float32) for name in SHAPES for n in SIZES
    ],
}


class Asked(dict):
    """A launch table that knows which of its rows were asked for."""

    def __init__(self, rows: dict):
        super().__init__(rows)
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def of(self, arch: str) -> list[tuple[str, int]]:
        """The rows of `arch`, or the default ones if it has none."""
        own = arch if any(name == arch for name, _ in self) else DEFAULT
        return [key for key in self if key[0] == own]


def launch_tables() -> dict[str, Asked]:
    """All tables of all modules with kernels, from now on such that they know."""
    tables = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("ernie_engine.kernels."):
            for attribute, value in vars(module).items():
                if isinstance(value, dict) and value and all(_is_key(key) for key in value):
                    tables[f"{name.rpartition('.')[2]}.{attribute}"] = Asked(value)
                    setattr(module, attribute, tables[f"{name.rpartition('.')[2]}.{attribute}"])
    return tables


def _is_key(key: object) -> bool:
    return isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str)


def compile_all(arch: int, which: str, ops: list[str]) -> Iterator[dict]:
    tables = launch_tables()
    for op in ops:
        with compiling_for(arch) as compiled:
            for dtype, shape, num_tokens in COMPILED[which]:
                for case in CASES[op](SHAPES[shape], num_tokens, dtype):
                    compile_case(case)
        for kernel in compiled.values():
            facts = {"op": op, "arch": arch, "kernel": kernel.name}
            ptx, overlaps = kernel.asm["ptx"], kernel.metadata.launch_pdl
            ahead, waits = (ptx.count(word) for word in ("prefetch.global.L2", "depcontrol.wait"))
            facts |= {"overlaps": overlaps, "ahead": ahead, "waits": waits}
            yield {**facts, "shared": kernel.metadata.shared}
    if len(ops) == len(with_kernels()):
        for name, table in tables.items():
            for row in table.of(f"sm_{arch}"):
                yield {"table": name, "row": row, "asked": row in table.asked}


def with_kernels() -> list[str]:
    return [op for op in CASES if "triton" in IMPLEMENTATIONS[op]]


def lines_of(task: tuple[int, str, list[str]]) -> list[str]:
    return [json.dumps(facts) for facts in compile_all(*task)]


if __name__ == "__main__":
    which, *ops = sys.argv[1:] or ["some"]
    tasks = [(arch, which, ops or with_kernels()) for arch in ARCHITECTURES]
    for lines in in_processes(lines_of, tasks, min(len(tasks), os.cpu_count() or 1)):
        print(*lines, sep="\n", flush=True)
