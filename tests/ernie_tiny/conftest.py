"""One run of the whole pipeline, small, shared by the tests that look at what it wrote."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # as `python scripts/train_tiny.py` has it

from tiny.run import make  # noqa: E402
from tiny.settings import Settings, parse  # noqa: E402
from tiny.tokenizer import ChatEncoder, train  # noqa: E402


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a finished smoke run; its files lie under .out and .docs."""
    folder = tmp_path_factory.mktemp("smoke")
    options = ["--smoke", "--device", "cpu"]
    settings = parse([*options, "--out", f"{folder}/m/ernie-tiny", "--docs", f"{folder}/docs"])
    assert make(settings) == 0
    return settings


@pytest.fixture(scope="session")
def pieces() -> bytes:
    """A tokenizer.model of full size."""
    return train(2048, seed=0)


@pytest.fixture(scope="session")
def encoder(pieces: bytes) -> ChatEncoder:
    return ChatEncoder(pieces)
