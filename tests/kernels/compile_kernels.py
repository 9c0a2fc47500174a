"""Compiles every Triton kernel for sm_80 and sm_90 on a machine that has neither.

Calls the launchers themselves, with the kernel cases of the bench on torch's "meta" device, and
lets Triton compile where it would launch. So what is compiled is what will run: the table's rows,
the types, the alignment. A launcher that waits for a number from the device fails here too.
Run without TRITON_INTERPRET; prints a line of JSON for each compiled kernel.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ernie_engine.bench.kernels.shapes import SHAPES
from ernie_engine.bench.kernels.table import CASES
from ernie_engine.kernels import launch
from ernie_engine.kernels.registry import IMPLEMENTATIONS

ARCHITECTURES = (80, 90)
# Every layout, a size in each bucket of the tables; the dtype that serves, and the one whose tiles
# take most room.
COMPILED = [
    *((torch.bfloat16, name, n) for name in SHAPES for n in (1, 16, 256, 8192)),
    *((torch.float32, "21B tp1", n) for n in (1, 16, 256, 8192)),
]


class NoDevice:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device: each architecture has its own

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(arch: int, ops: list[str]) -> None:
    driver.set_active(NoDevice(arch))
    launch.architecture = lambda device: f"sm_{arch}"
    compiled, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
    try:
        for op in ops:
            for dtype, shape, num_tokens in COMPILED:
                for case in CASES[op](SHAPES[shape], num_tokens, dtype):
                    IMPLEMENTATIONS[op]["triton"](*case.make(torch.device("meta")))
            for kernel in compiled.values():
                facts = {"op": op, "arch": arch, "kernel": kernel.name}
                print(json.dumps({**facts, "shared": kernel.metadata.shared}), flush=True)
            compiled.clear()
    finally:
        JITFunction.run = run


if __name__ == "__main__":
    for arch in ARCHITECTURES:
        compile_all(arch, sys.argv[1:] or [op for op in CASES if "triton" in IMPLEMENTATIONS[op]])
