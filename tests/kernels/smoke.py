"""Every Triton kernel once or twice at small sizes, compared with its twin: for compute-sanitizer.

compute-sanitizer --tool memcheck python tests/kernels/smoke.py      (and --tool racecheck)
"""

import sys

import torch

from ernie_engine.bench.kernels.measure import find_problem, make_arguments
from ernie_engine.bench.kernels.shapes import SHAPES
from ernie_engine.bench.kernels.table import CASES, ops_with
from ernie_engine.kernels.registry import IMPLEMENTATIONS

SIZES = [("0.3B", 1), ("0.3B", 5), ("21B tp4", 1), ("21B tp4", 17)]


def main() -> int:
    device, problems = torch.device("cuda"), []
    for op in ops_with("triton", "cuda"):
        for shape, num_tokens in SIZES:
            for case in CASES[op](SHAPES[shape], num_tokens, torch.bfloat16):
                functions = (IMPLEMENTATIONS[op][name] for name in ("triton", "torch"))
                problem = find_problem(case, *functions, make_arguments(case, device))
                problems += [f"{op} {case.label}: {problem}"] if problem else []
    print(*problems or ["all right"], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
