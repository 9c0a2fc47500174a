"""Settings that all tests share. HYPOTHESIS_PROFILE=thorough (make test-all) draws more cases."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Without a GPU the kernels run under Triton's interpreter. Triton looks when a kernel is defined,
# so this stands before anything that imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.tiny import write_tiny

torch.set_num_threads(1)  # tensors are tiny here; more threads only wait for each other

settings.register_profile("quick", max_examples=200, deadline=None)
settings.register_profile("thorough", max_examples=4000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# A machine that is there for its GPU may have torch, triton and transformers only.
LACKING = [name for name in ("fastapi", "openai", "pydantic") if find_spec(name) is None]
collect_ignore = ["server"] if LACKING else []


def pytest_configure() -> None:
    """On a machine with a GPU workers of pytest-xdist share the processors: each engine that starts
    has as many processes compile as it sees processors."""
    if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        seen = sorted(os.sched_getaffinity(0))
        mine = seen[number :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, mine or seen)


def pytest_report_header() -> list[str]:
    return [f"tests/server is left out: {LACKING} not installed"] if LACKING else []


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with the tiny MoE checkpoint of tests/tiny.py."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
