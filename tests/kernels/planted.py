"""A pytest plugin for test_planted.py: plants a fault in every twin, notes which ops' tests fail.

Skips what would tell nothing new: other tests of an op that has failed, and tests of no single op.
PLANTED_FAULT is "tile" (16 values of a result 1% off, or one integer by one) or "row" (the last row
as if it had not been written). The ops of failing tests go to the file PLANTED_REPORT, a line each.
"""

import os
from pathlib import Path

import pytest
import torch

from ernie_engine.kernels.registry import IMPLEMENTATIONS


def plant(tensor, fault):
    """In place."""
    if tensor.numel() == 0:
        return
    if fault == "row":
        missing = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        tensor[-1] = missing
    elif tensor.is_floating_point():
        first_row = tensor if tensor.dim() == 1 else tensor.flatten(0, -2)[0]
        first_row[:16] *= 1.01
    else:
        tensor.view(-1)[0] += 1


def faulty(function, fault):
    def planted(*args, **kwargs):
        results = function(*args, **kwargs)
        for tensor in results if isinstance(results, tuple) else (results,):
            plant(tensor, fault)
        return results

    return planted


for implementations in IMPLEMENTATIONS.values():
    implementations["torch"] = faulty(implementations["torch"], os.environ["PLANTED_FAULT"])


found: set[str] = set()


def ops_of(item):
    return {op for op in IMPLEMENTATIONS if op in item.fixturenames}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if ops_of(item) <= found:
        pytest.skip("tells nothing new")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        found.update(ops_of(item))
        Path(os.environ["PLANTED_REPORT"]).write_text("".join(f"{op}\n" for op in found))
    return report
