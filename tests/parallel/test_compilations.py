"""Kernels that other ranks take up are counted, too."""

import time

from ernie_engine.model.compilations import compile_counter
from tests.parallel.layouts import small_engine

# For every process that is started meanwhile.
COUNTED = "from ernie_engine.model.compilations import compile_counter; compile_counter().count = 5"


def test_kernels_of_all_ranks_are_counted(tiny, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(COUNTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with small_engine(tiny, tp=2) as engine:
        deadline = time.monotonic() + 10
        while engine._core.num_compilations != compile_counter().count + 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
