"""The kernels that do a layer's work at the sizes of real models' ranks, on a GPU."""

import pytest
import torch

from ernie_engine.bench.kernels.shapes import SHAPES
from ernie_engine.bench.kernels.table import CASES
from ernie_engine.kernels.registry import IMPLEMENTATIONS
from tests.kernels.tile_check import assert_as_near_as_twin

OPS = ["linear", "prefill_attention", "decode_attention", "moe_experts"]
# In every bucket of the launch tables, and on both sides of where another kernel takes over.
NUM_TOKENS = [1, 4, 5, 16, 33, 64, 65, 200, 500, 1500]
MAX_CACHE_BYTES = 1.2e9


def widened(arguments):
    return [
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in arguments
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_real_shapes(op, shape, num_tokens):
    kernel, twin = IMPLEMENTATIONS[op]["triton"], IMPLEMENTATIONS[op]["torch"]
    for case in CASES[op](SHAPES[shape], num_tokens, torch.bfloat16):
        if op == "decode_attention" and case.work.num_bytes > MAX_CACHE_BYTES:
            continue  # its copy in fp64 is too large: test_real_shapes.py takes some queries
        arguments = case.make(torch.device("cuda"))
        exact = twin(*widened(arguments))
        assert_as_near_as_twin(kernel(*arguments), twin(*arguments), exact)
