"""What the engine's loop is doing: stretches of its thread's work, by name, for a watcher.

Owns nothing but who watches. Free while nobody does, so it is never left out. Knows no profiler.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ernie_engine.engine.plan import StepPlan

# In the order of a turn that replays a step of single tokens; else what was committed is delivered
# at once, or before a launch that may take long. launch comes with its plan. A plan is encoded to
# bytes and read again; what is waited for and committed is the oldest step's result.
PHASES = ("schedule", "encode", "read", "launch", "sample", "deliver", "wait", "commit")

Watcher = Callable[[str, StepPlan | None], AbstractContextManager[None]]
_UNWATCHED = nullcontext()


class Phases:
    """`with phases("schedule"): ...`; set `watcher` at any time, from any thread."""

    def __init__(self) -> None:
        self.watcher: Watcher | None = None

    def __call__(self, name: str, plan: StepPlan | None = None) -> AbstractContextManager[None]:
        watcher = self.watcher
        return _UNWATCHED if watcher is None else watcher(name, plan)
