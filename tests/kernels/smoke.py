"""Every Triton kernel once or twice at small sizes: for compute-sanitizer.

compute-sanitizer --tool memcheck python tests/kernels/smoke.py --bare     (and --tool racecheck,
from 2026.4 on: docs/kernels.md)

Compares with the twins; with --bare only the kernels run, since under compute-sanitizer the twins,
of which nobody asks anything, would take minutes.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.experts import moe_experts_cases
from ernie_engine.bench.kernels.measure import find_problem, make_arguments
from ernie_engine.bench.kernels.shapes import SHAPES
from ernie_engine.bench.kernels.table import CASES, ops_with
from ernie_engine.kernels.registry import IMPLEMENTATIONS

# One token, a few, and so many that experts are sorted and prompts are cut, yet no more than what
# kernels of our own take: what cuBLAS does is not looked at here.
SIZES = [("0.3B", 1), ("0.3B", 5), ("21B tp4", 1), ("21B tp4", 17), ("21B tp4", 64)]
MAX_BYTES = 1 << 28
# On Hopper many tokens' experts are a kernel of their own; here its programs have several units.
FEW_EXPERTS = replace(SHAPES["21B tp4"], hidden=512, num_experts=8, local_experts=8)
MANY_TOKENS = 1500


def small_cases() -> Iterator[KernelCase]:
    yield from moe_experts_cases(FEW_EXPERTS, MANY_TOKENS, torch.bfloat16)
    for op in ops_with("triton", "cuda"):
        for shape, num_tokens in SIZES:
            for case in CASES[op](SHAPES[shape], num_tokens, torch.bfloat16):
                if case.work.num_bytes <= MAX_BYTES:
                    yield case


def main(bare: bool) -> int:
    device, problems = torch.device("cuda"), []
    for case in small_cases():
        kernel, twin = (IMPLEMENTATIONS[case.op][name] for name in ("triton", "torch"))
        arguments = make_arguments(case, device)
        if bare:
            kernel(*arguments)
            torch.cuda.synchronize()  # so that a fault is told of the kernel that has it
            problem = None
        else:
            problem = find_problem(case, kernel, twin, arguments)
        problems += [f"{case.op} {case.label}: {problem}"] if problem else []
    print(*problems or ["all right"], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main("--bare" in sys.argv[1:]))
