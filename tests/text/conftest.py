from pathlib import Path

import pytest

from ernie_engine.testing.tokenizers import write_tokenizer
from ernie_engine.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def pt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pt")
    write_tokenizer(folder, 2048, thinking=False)
    return folder


@pytest.fixture(scope="session")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thinking")
    write_tokenizer(folder, 2048, thinking=True)
    return folder


@pytest.fixture(scope="session")
def pt(pt_folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(pt_folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def thinking(thinking_folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(thinking_folder)
    assert tokenizer is not None
    return tokenizer
