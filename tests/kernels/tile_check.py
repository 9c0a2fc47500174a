"""The comparison that a wrong tile cannot hide from: tile by tile, against the twin's own error.

A relative RMS error over a whole tensor, or over a row, forgives 1% in one tile of many. Here
every tile must be as near to fp64 as the twin is in the same dtype, but for a margin.
"""

import pytest
import torch
import torch.nn.functional as F

MARGIN = 1.5
ROWS, COLUMNS = 16, 32  # no larger than a tile of any kernel
NUM_ELEMENTS = 256  # a tile of few rows is wider: the error of a few numbers says little
# What a kernel may be off by where the twin happens to be exact: half a unit in the half types;
# some in fp32, whose sums are not wider than itself.
FLOOR = {torch.float32: 2**-22, torch.bfloat16: 2**-9, torch.float16: 2**-12}

half_and_single = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter rounds it wrongly
    ],
    ids=lambda dtype: str(dtype)[6:],
)


def where_kernels_run():
    """The GPU if there is one, else the CPU, under Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _norms(x):
    """x [R, C] -> the norm of each tile."""
    rows = min(ROWS, len(x))
    columns = max(COLUMNS, NUM_ELEMENTS // rows)
    x = F.pad(x, (0, -x.shape[1] % columns, 0, -len(x) % rows))
    return x.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).norm(dim=(1, 3))


def assert_as_near_as_twin(out, twin, exact):
    """out, twin in one dtype, exact in fp64, equal shapes; all but the last dim are rows."""
    assert out.dtype == twin.dtype and exact.dtype == torch.float64
    assert out.shape == twin.shape == exact.shape
    floor = FLOOR[out.dtype]
    out, twin, exact = (
        t.to(exact.device, torch.float64).reshape(-1, t.shape[-1]) for t in (out, twin, exact)
    )
    size, theirs = _norms(exact), _norms(twin - exact)
    usual = theirs.square().sum().sqrt() / size.square().sum().sqrt()  # over all tiles
    limit = MARGIN * torch.maximum(theirs, size * usual.clamp(min=floor))
    error = _norms(out - exact)
    assert (error <= limit).all(), f"worst tile: {(error / limit).max():.2f} x the limit"
