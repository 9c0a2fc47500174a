import tomllib
from pathlib import Path

from ernie_engine.version import VERSION


def test_it_is_pyprojects():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["project"]["version"] == VERSION
