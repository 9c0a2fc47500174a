"""How many kernels this process has taken up so far, for a metric that must not grow while serving.

Owns the one place where Triton tells of them. Never compiles anything.
"""

from triton import knobs
from triton.knobs import CompilationListener


class CompileCounter:
    """Counts kernels that were compiled or fetched from Triton's cache on disk; then tells whoever
    listened before."""

    def __init__(self, then: CompilationListener | None):
        self.count, self._then = 0, then

    def __call__(self, **what) -> None:
        self.count += 1
        if self._then is not None:
            self._then(**what)


def compile_counter() -> CompileCounter:
    """This process's: Triton has room for one listener, and a kernel belongs to no engine."""
    listener = knobs.compilation.listener
    if not isinstance(listener, CompileCounter):
        listener = CompileCounter(then=listener)
        knobs.compilation.listener = listener
    return listener
