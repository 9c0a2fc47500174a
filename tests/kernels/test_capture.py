"""Kernels of a layer inside a CUDA graph: nothing is waited for, nothing is baked in but shapes."""

from itertools import product

import pytest
import torch

from ernie_engine.bench.kernels.shapes import SHAPES
from ernie_engine.bench.kernels.table import CASES
from ernie_engine.kernels.registry import IMPLEMENTATIONS


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "num_tokens"),
    [
        *product(["linear", "prefill_attention", "decode_attention", "moe_experts"], [1, 5, 100]),
        *(("moe_experts", num_tokens) for num_tokens in (300, 3000)),
    ],
)
def test_replay_is_eager(op, num_tokens):
    kernel = IMPLEMENTATIONS[op]["triton"]
    for case in CASES[op](SHAPES["21B tp4"], num_tokens, torch.bfloat16):
        captured, others = (case.make(torch.device("cuda")) for _ in range(2))
        kernel(*captured)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel(*captured)
        for place, value in zip(captured, others, strict=True):
            if isinstance(place, torch.Tensor):
                place.copy_(value)
        for _ in range(2):
            out.zero_()
            graph.replay()
            assert torch.equal(out, kernel(*others)), case.label
