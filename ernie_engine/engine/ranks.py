"""All ranks of an engine, as rank 0 has them: alone, or a fleet that runs every step together.

Owns the order in which ranks meet, agree and part. Plans go down and results come up as bytes;
what is decided, the scheduler decides.
"""

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable

import torch

from ernie_engine.engine.children import Children
from ernie_engine.engine.loop import EngineDeadError
from ernie_engine.engine.phases import Phases
from ernie_engine.engine.rank import SelfReport, facts_of
from ernie_engine.engine.stage import PendingFrame, Runner, Stage
from ernie_engine.model.compilations import compile_counter
from ernie_engine.model.graphs import NO_GRAPHS
from ernie_engine.model.runner import ModelRunner
from ernie_engine.model.startup import Description, open_model
from ernie_engine.parallel.connect import (
    abort,
    connect,
    disconnect,
    host_store,
    join_store,
    own_store,
)
from ernie_engine.parallel.control import PeerLost
from ernie_engine.parallel.health import State
from ernie_engine.parallel.hub import Hub
from ernie_engine.parallel.mesh import Mesh

logger = logging.getLogger(__name__)
GIB = 1 << 30
FAREWELL_SECONDS = 1.0  # for children to end by themselves once a rank is lost
HELD_SECONDS = 30.0  # that start-up may be held by a collective after that


def gather_ranks(description: Description, phases: Phases) -> tuple["Alone | Fleet", ModelRunner]:
    """Open the model on all ranks; and this rank's part of it. ValueError for what cannot be
    served, EngineDeadError for a rank that does not come or is lost meanwhile."""
    if description.grid.size == 1:
        runner = open_model(description)
        return Alone(runner, description.config.debug, phases), runner
    try:
        fleet = Fleet(description, phases)
    except PeerLost as lost:
        raise EngineDeadError(str(lost)) from lost
    return fleet, fleet.runner


class Alone:
    """This process is all there is."""

    def __init__(self, runner: Runner, debug: bool = False, phases: Phases | None = None):
        self.debug, self.stage = debug, Stage(runner, debug, phases)

    def run(self, frame: bytes) -> PendingFrame:
        pending = self.stage.run(frame)
        assert pending is not None, "there is no other rank to tell the result"
        return pending

    def explain(self, error: Exception) -> Exception:
        return error

    @property
    def num_compilations(self) -> int:
        """Kernels that this process has taken up."""
        return compile_counter().count

    def on_failure(self, fail: Callable[[Exception], None]) -> None:
        """Nothing but a step can fail here."""

    def close(self, is_held: bool = False) -> None:
        """Nobody is to be told."""


class Fleet:
    """Rank 0 of several; the others run engine/worker.py's loop."""

    def __init__(self, description: Description, phases: Phases):
        config, world = description.config, description.world
        self.debug, self._grid = config.debug, description.grid
        self._report, self._activity = SelfReport(), Activity()
        self._is_open = threading.Event()  # or will never be
        seconds = config.distributed_timeout_seconds
        self._children: Children | None = None
        hosted = None if world.is_launched else host_store(world.size, seconds)
        store = own_store(hosted or join_store(world, seconds), world)
        self._hub = Hub(
            *(world, store, config.peer_timeout_seconds, config.control_port),
            self._report.vitals,
            lambda rank: self._children.end_of(rank) if self._children else None,
        )
        self._hub.on_failure = self._leave_if_held
        self._mesh: Mesh | None = None
        self._graphs = NO_GRAPHS
        self._parting = threading.Lock()  # the hub's thread and the caller may both end the groups
        try:
            if hosted is not None:
                self._children = Children(config, world.size, hosted.port)
            self._hub.wait_for_all(facts_of(description), seconds)
            expert_parallel, device = config.enable_expert_parallel, torch.device(config.device)
            self._mesh = connect(store, world, self._grid, device, seconds, expert_parallel)
            runner = open_model(description, self._mesh, self._hub.agree, self._alive)
        except Exception as error:
            failure = self._give_up(error)
            if failure is error:
                raise
            raise failure from error
        except BaseException as end:  # Ctrl-C, or SIGTERM of the server
            traceback.clear_frames(end.__traceback__)
            self._give_up(EngineDeadError("rank 0 was told to end while it started"))
            raise
        self._is_open.set()
        self.runner, self.stage = runner, Stage(runner, config.debug, phases)
        self._graphs = runner.graphs
        self._report.attach(self._mesh, self.stage, runner)

    def _give_up(self, error: Exception) -> Exception:
        """End the others, and what was begun with them; the cause."""
        failure = self._hub.explain(error)
        traceback.clear_frames(error.__traceback__)  # they may hold graphs: see StepGraphs.drop()
        self._is_open.set()
        self.close()
        return failure

    def _alive(self, state: State) -> None:
        self._report.state = state
        self._hub.check()

    def _leave_if_held(self, failure: Exception) -> None:
        """At start-up the main thread may wait in a collective for a rank that never comes."""
        if not self._is_open.wait(HELD_SECONDS):
            logger.error("this process cannot go on without the lost rank: it ends")
            os._exit(1)

    def run(self, frame: bytes) -> "Result":
        self._hub.send_plan(frame)
        self._activity.begin()
        return Result(self.stage.run(frame), self._hub, self._activity)

    def explain(self, error: Exception) -> Exception:
        return self._hub.explain(error)

    @property
    def num_compilations(self) -> int:
        """Kernels that all ranks have taken up; of the others, as far as they have told."""
        return sum(vitals.num_compilations for vitals in self._hub.vitals().values())

    def on_failure(self, fail: Callable[[Exception], None]) -> None:
        """From now on `fail` is called, from another thread, when a rank is lost."""

        def lose(failure: Exception) -> None:
            fail(failure)
            if self._children is not None:
                self._children.wait(FAREWELL_SECONDS)  # a step that waits for one ends with it
            with self._parting:
                self._graphs.drop()
                if self._mesh is not None:
                    abort(self._mesh)

        self._hub.on_failure = lose
        if self._hub.failure is not None:
            lose(self._hub.failure)

    def close(self, is_held: bool = False) -> None:
        """End the other ranks, after the steps they have. Twice does no harm. `is_held`: a thread
        of this process waits in one of the groups for ever, so they cannot be ended."""
        self._graphs.drop()
        self._hub.stop()
        with self._parting:
            if self._mesh is not None and not is_held:
                if self._hub.failure is not None:
                    abort(self._mesh)
                disconnect(self._mesh)
                self._mesh = None
                self._tell_shares()
        if self._children is not None:
            self._children.wait()

    def _tell_shares(self) -> None:
        """How busy each stage was, and what memory each rank took."""
        active, everyone = self._activity.seconds, self._hub.vitals()
        for stage in range(self._grid.pp) if active else ():
            vitals = everyone[stage * self._grid.tp]
            logger.info(
                "stage %d was busy %.0f%% of the %.1f s with steps under way (%d steps)",
                *(stage, 100 * vitals.busy_seconds / active, active, vitals.steps_done),
            )
        peaks = [f"{everyone[rank].peak_memory / GIB:.1f}" for rank in sorted(everyone)]
        if torch.cuda.is_initialized():
            logger.info("peak of GPU memory by rank, GiB: %s", ", ".join(peaks))


class Result:
    """A result frame that this rank makes or another one tells."""

    def __init__(self, own: PendingFrame | None, hub: Hub, activity: "Activity"):
        self._own, self._hub, self._activity = own, hub, activity

    def wait(self) -> bytes:
        frame = self._hub.result() if self._own is None else self._own.wait()
        self._activity.end()
        return frame


class Activity:
    """How long there were steps under way."""

    def __init__(self) -> None:
        self.seconds, self._num_open, self._since = 0.0, 0, 0.0

    def begin(self) -> None:
        if self._num_open == 0:
            self._since = time.monotonic()
        self._num_open += 1

    def end(self) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self.seconds += time.monotonic() - self._since
