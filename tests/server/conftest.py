import pytest

from tests.server.process import Served


@pytest.fixture(scope="session")
def served(tiny, tmp_path_factory):
    """The tiny checkpoint, served to all tests that change nothing about it."""
    with Served(tiny, tmp_path_factory.mktemp("served") / "log") as served:
        yield served


@pytest.fixture
def client(served):
    with served.client() as client:
        yield client
