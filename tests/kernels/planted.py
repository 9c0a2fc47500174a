"""A pytest plugin for test_planted.py: plants a fault in every twin, notes which ops' tests fail.

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        with Path(os.environ["PLANTED_REPORT"]).open("a") as file:
            file.writelines(f"{op}\n" for op in IMPLEMENTATIONS if op in item.fixturenames)
    return report
