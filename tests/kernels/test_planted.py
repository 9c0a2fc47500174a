"""The tests of ops are tests: each op's fail when a fault is planted in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_engine.kernels.registry import IMPLEMENTATIONS

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("fault", ["tile", "row"])
def test_a_planted_fault_makes_every_ops_tests_fail(tmp_path, fault):
    report = tmp_path / "failed.txt"
    root = str(FOLDER.parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": root,
        "PLANTED_FAULT": fault,
        "PLANTED_REPORT": str(report),
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.kernels.planted", "-q", "--tb=no"]
    only = ["-k", "torch-cpu and not float16 and not float64", "-p", "no:cacheprovider"]
    ignored = [f"--ignore={FOLDER / name}.py" for name in ("test_planted", "test_compile")]
    done = subprocess.run(
        [*command, *only, *ignored, str(FOLDER)], env=environment, cwd=root, capture_output=True
    )
    assert done.returncode == 1, done.stdout.decode()[-2000:]
    assert set(report.read_text().split()) == set(IMPLEMENTATIONS)
