"""Kernels at the sizes of the real models against their twins in fp64, and captured in a graph."""

import itertools

import pytest
import torch

from ernie_engine.bench.kernels.measure import find_problem, make_arguments
from ernie_engine.bench.kernels.shapes import SHAPES, RankShape
from ernie_engine.bench.kernels.table import CASES
from ernie_engine.kernels.registry import IMPLEMENTATIONS

KERNELS = [op for op, names in IMPLEMENTATIONS.items() if "triton" in names]
ODD = RankShape(  # no size is a power of two or a multiple of one but the heads'
    "odd",
    hidden=70,
    heads=6,
    kv_heads=2,
    dense_width=45,
    vocab=301,
    num_experts=7,
    local_experts=7,
    top_k=3,
    expert_width=27,
    shared_width=51,
    head_dim=16,
)
ON_LOGITS = ("token_counts", "apply_penalties", "sample", "token_logprobs")
# Contexts of decode cases are long: tests/kernels/test_attention.py has the odd ones.
OF_A_LAYER = [op for op in KERNELS if op not in (*ON_LOGITS, "decode_attention")]


def first_case(op, shape, num_tokens):
    """None if a rank of this shape never launches the op for so many tokens."""
    return next(iter(CASES[op](shape, num_tokens, torch.bfloat16)), None)


def launches(ops, shapes, sizes):
    """Of (op, shape, num_tokens) what is ever launched: a test of no launch would pass."""
    found = [one for one in itertools.product(ops, shapes, sizes) if first_case(*one)]
    assert {op for op, _, _ in found} == set(ops)
    return [pytest.param(*one, id=f"{one[0]}-{one[1].name}-{one[2]}") for one in found]


@pytest.mark.parametrize(("op", "shape", "num_tokens"), launches(OF_A_LAYER, [ODD], [1, 19]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_odd_sizes(kernel_device, op, shape, num_tokens, dtype):
    cases = CASES[op](shape, num_tokens, dtype)
    if kernel_device == "cpu":  # long prefixes take long; test_attention.py has short ones
        cases = [case for case in cases if "past" not in case.label]
    check(cases, torch.device(kernel_device))


@pytest.mark.parametrize("op", ON_LOGITS)
def test_the_whole_vocabulary(kernel_device, op):
    cases = list(CASES[op](SHAPES["0.3B"], 1, torch.float32))
    assert cases
    if kernel_device == "cpu":  # test_top_filter.py has each filter alone, at smaller sizes
        cases = [case for case in cases if case.label not in ("temperature", "top_k", "top_p")]
    check(cases, torch.device(kernel_device))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "shape", "num_tokens"), launches(KERNELS, SHAPES.values(), [1, 7, 64, 1000])
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_real_sizes(op, shape, num_tokens, dtype):
    check(CASES[op](shape, num_tokens, dtype), torch.device("cuda"))


def check(cases, device):
    for case in cases:
        functions = (IMPLEMENTATIONS[case.op][name] for name in ("triton", "torch"))
        problem = find_problem(case, *functions, make_arguments(case, device))
        assert problem is None, f"{case.label}: {problem}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "shape", "num_tokens"),
    launches(KERNELS, [SHAPES["0.3B"], SHAPES["21B tp4"]], [1, 3]),
)
def test_a_captured_launch_reads_what_is_there_when_it_is_replayed(op, shape, num_tokens):
    case = first_case(op, shape, num_tokens)
    device, kernel = torch.device("cuda"), IMPLEMENTATIONS[op]["triton"]
    arguments = make_arguments(case, device)
    kernel(*arguments)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel(*arguments)
    torch.manual_seed(99)
    for old, new in zip(arguments, case.make(device), strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(new)
    graph.replay()
    fresh = kernel(*arguments)
    captured, fresh = (x if isinstance(x, tuple) else (x,) for x in (captured, fresh))
    for replayed, expected in zip(captured, fresh, strict=True):
        assert torch.equal(replayed, expected)
