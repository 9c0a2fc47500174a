"""The files in scripts/ as modules, for tests that call what is in them."""

import importlib.util
from types import ModuleType

from tests.processes import ROOT


def load_script(name: str) -> ModuleType:
    """A new module each time: scripts/`name`.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
