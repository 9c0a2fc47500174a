"""What all tests of ops share: the cases, the comparison with fp64, poisoned memory.

A test that takes an argument named as an op runs once for every (implementation, device) of
that op, with `device` beside it, and for every dtype if it takes `dtype` (for those of 16 bits if
it takes `half`); one that takes `ops` gets all ops of one implementation. A new one in the registry
needs a line in DTYPES. `kernel_device` is each device that Triton kernels run on, for what only
they have. Without a GPU that is the CPU, under Triton's interpreter: they want small cases.
"""

import pytest
import torch
from triton import knobs

from ernie_engine.kernels.registry import IMPLEMENTATIONS, select

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETING = knobs.runtime.interpret  # set where there is no GPU: tests/conftest.py
NEEDS_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
# (implementation, device) -> dtypes. Triton's interpreter rounds to bf16 wrongly and gets products
# of bf16 wrong.
DTYPES = {
    ("torch", "cpu"): (torch.float64, *HALF_AND_SINGLE),
    ("torch", "cuda"): (torch.float64, *HALF_AND_SINGLE),
    ("triton", "cpu"): (torch.float32, torch.float16) if INTERPRETING else (),
    ("triton", "cuda"): HALF_AND_SINGLE,
}
DEVICES = {"cpu": (), "cuda": NEEDS_CUDA}

# Relative RMS error of a row against fp64: about one unit in the last place of the half types;
# for the others some units, since their sums are not wider than themselves.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}

MUCH_MEMORY = 2 << 30


def implementations_of(argument):
    """Implementation -> what a test that takes `argument`, an op's name or "ops", is given."""
    if argument != "ops":
        return IMPLEMENTATIONS[argument]
    complete = set.intersection(*(set(names) for names in IMPLEMENTATIONS.values()))
    return {name: select(name, "cuda") for name in sorted(complete)}


def pytest_generate_tests(metafunc):
    if "kernel_device" in metafunc.fixturenames:
        on = [d for d in DEVICES if DTYPES["triton", d]]
        metafunc.parametrize("kernel_device", [pytest.param(d, marks=DEVICES[d]) for d in on])
    wanted = [name for name in (*IMPLEMENTATIONS, "ops") if name in metafunc.fixturenames]
    if not wanted:
        return
    (argument,) = wanted
    types = [name for name in ("dtype", "half") if name in metafunc.fixturenames]
    cases = []
    for name, function in implementations_of(argument).items():
        for device, marks in DEVICES.items():
            for dtype in DTYPES[name, device]:
                if types == ["half"] and dtype.itemsize != 2:
                    continue
                label = "-".join([name, device, *(str(dtype)[6:] for _ in types)])
                values = (function, device, *(dtype for _ in types))
                cases.append(pytest.param(*values, marks=marks, id=label))
                if not types:
                    break
    metafunc.parametrize((argument, "device", *types), cases)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Where there is a GPU, tests that take what there is (tile_check.py) are tests of the GPU."""
    if torch.cuda.is_available():
        for item in items:
            if hasattr(item.module, "where_kernels_run"):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_given_back():
    """Tests of real sizes take up to some 20 GB, and may run side by side."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > MUCH_MEMORY:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory holds NaN (or a huge integer): what is not written shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return (
                tensor
                if tensor.dtype == torch.bool
                else tensor.fill_(torch.iinfo(tensor.dtype).max)
            )

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def randn(device, dtype):
    """Normal numbers in the case's dtype on its device; the same numbers on every device."""
    return lambda *shape: torch.randn(*shape).to(device, dtype)


@pytest.fixture
def few(request):
    """few(n, some): n, but only `some` under the interpreter, where a row of logits takes long."""
    return lambda n, some: some if "triton-cpu" in request.node.name else n


@pytest.fixture
def assert_near():
    """Every row (last dim) of `out` is as near to the fp64 `ref` as `like`, its dtype, allows."""

    def check(out, ref, like=None, factor=1.0):
        assert out.shape == ref.shape
        assert ref.dtype == torch.float64
        error = (out.double().cpu() - ref).norm(dim=-1)
        limit = TOLERANCE[like or out.dtype] * factor * ref.norm(dim=-1)
        assert (error <= limit).all(), f"worst row: {(error / limit).max():.2f} x the tolerance"

    return check
