"""A rank above 0: runs every plan that rank 0 sends, until rank 0 says that it is over.

Decides nothing. main() is such a rank as a child process of a plain Python program; under
torchrun Engine() and the server call serve_rank().
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ernie_engine.engine.loop import EngineDeadError
from ernie_engine.engine.rank import SelfReport, facts_of
from ernie_engine.engine.stage import PendingFrame, Stage
from ernie_engine.engine_config import EngineConfig
from ernie_engine.model.startup import Description, describe, open_model
from ernie_engine.parallel.connect import connect, disconnect, join_store, own_store
from ernie_engine.parallel.control import PeerLost, refuse
from ernie_engine.parallel.spoke import Spoke
from ernie_engine.parallel.world import World, host_name

logger = logging.getLogger(__name__)


def describe_rank(config: EngineConfig) -> Description:
    """As describe(); a rank above 0 tells rank 0 why it will not come, or that would wait. All
    ranks count this try, so that those of a later one meet each other."""
    try:
        return describe(config)
    except ValueError as error:
        world = World.from_env(os.environ)
        if world.size > 1:
            try:
                store = own_store(join_store(world, config.peer_timeout_seconds), world)
                if world.rank > 0:
                    refuse(store, world.rank, f"{host_name()}: {error}")
            except RuntimeError as unreachable:
                logger.warning("the other ranks could not be told: %s", unreachable)
        raise


def serve_rank(description: Description) -> None:
    """Returns once rank 0 closes. If rank 0 or another rank is lost the process ends, status 1;
    EngineDeadError if rank 0 cannot be reached in the first place."""
    config, world, report = description.config, description.world, SelfReport()
    seconds = config.distributed_timeout_seconds
    store = own_store(join_store(world, seconds), world)
    facts = facts_of(description)
    try:
        spoke = Spoke(world, store, config.peer_timeout_seconds, facts, report.vitals)
    except PeerLost as lost:
        raise EngineDeadError(str(lost)) from lost
    with _signals_are_for_rank_0(world.rank):
        try:
            expert_parallel, device = config.enable_expert_parallel, torch.device(config.device)
            mesh = connect(store, world, description.grid, device, seconds, expert_parallel)
            runner = open_model(
                description, mesh, spoke.agree, lambda state: setattr(report, "state", state)
            )
            stage = Stage(runner, config.debug)
            report.attach(mesh, stage, runner)
            _run_steps(stage, spoke)
        except Exception as error:
            logger.debug("rank %d failed", world.rank, exc_info=error)
            spoke.fail(error)
        spoke.leave()
        runner.graphs.drop()
        disconnect(mesh)
        spoke.close()


def _run_steps(stage: Stage, spoke: Spoke) -> None:
    """Results are waited for in a thread of their own: the next plan may be launched before."""
    results: queue.SimpleQueue[PendingFrame | None] = queue.SimpleQueue()

    def tell() -> None:
        try:
            while (pending := results.get()) is not None:
                spoke.send_result(pending.wait())
        except Exception as error:
            spoke.fail(error)

    teller = threading.Thread(target=tell, name="results", daemon=True)
    teller.start()
    while (frame := spoke.next_plan()) is not None:
        if (pending := stage.run(frame)) is not None:
            results.put(pending)
    results.put(None)
    teller.join()


@contextmanager
def _signals_are_for_rank_0(rank: int) -> Iterator[None]:
    """It drains and then tells the others to end; SIGKILL ends a rank alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def tell(number: int, frame: object) -> None:
        logger.info("rank %d waits for rank 0 to end it", rank)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Of a child process: its EngineConfig comes through standard input, as JSON."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    fields = json.load(sys.stdin)
    serve_rank(describe(EngineConfig(**fields)))
