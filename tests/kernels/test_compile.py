"""Every Triton kernel compiles for an A800 and an H200 and fits their shared memory."""

import json
from pathlib import Path

import pytest

from ernie_engine.bench.kernels.table import CASES
from ernie_engine.kernels.registry import IMPLEMENTATIONS
from tests.processes import without_interpreter

SCRIPT = Path(__file__).with_name("compile_kernels.py")
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # what a block may have


def compile_kernels(*ops):
    return [json.loads(line) for line in without_interpreter(SCRIPT, *ops)]


def test_every_op_has_cases():
    assert list(CASES) == list(IMPLEMENTATIONS)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layouts", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_every_kernel_compiles_and_fits_and_every_row_of_a_table_is_tried(layouts):
    facts = compile_kernels(layouts)
    kernels = [fact for fact in facts if "kernel" in fact]
    found = {(kernel["op"], kernel["arch"]) for kernel in kernels}
    with_kernels = [op for op, names in IMPLEMENTATIONS.items() if "triton" in names]
    assert found >= {(op, arch) for op in with_kernels for arch in SHARED_BYTES}
    too_large = [k for k in kernels if k["shared"] > SHARED_BYTES[k["arch"]]]
    assert not too_large
    # A launch that may begin early waits, in Gluon each group of warps for itself.
    hopper = [k for k in kernels if k["kernel"] == "_grouped_hopper_kernel"]
    assert all(k["waits"] for k in kernels if k["overlaps"])
    assert hopper and all(k["overlaps"] and k["waits"] == 3 for k in hopper)
    ahead = {k["ahead"] > 0 for k in kernels if (k["op"], k["arch"]) == ("decode_attention", 90)}
    assert ahead == {True, False}  # keys are asked for ahead where rows are few
    assert not any(k["ahead"] for k in kernels if k["arch"] < 90)
    rows = [fact for fact in facts if "table" in fact]
    asked, known = (
        {(fact["table"], *fact["row"]) for fact in facts}
        for facts in ([fact for fact in rows if fact["asked"]], rows)
    )
    assert known and not known - asked  # a default row by one of the architectures
