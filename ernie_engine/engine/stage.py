"""One rank's part of the contract: plan frames in, result frames out, steps in order.

Owns the checks that every rank makes of every plan. The same code on rank 0 and on all others;
knows no scheduler and no socket.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

from ernie_engine.engine.phases import Phases
from ernie_engine.engine.plan import (
    SamplingPart,
    StepPlan,
    StepResult,
    decode_plan,
    encode_plan,
    encode_result,
)

DIGEST_BYTES = 16


class Pending(Protocol):
    def wait(self) -> StepResult: ...


class Runner(Protocol):
    """The body, as far as a stage knows it: model/runner.py, or a fake one in tests."""

    def launch(self, plan: StepPlan) -> None: ...

    def sample(self, part: SamplingPart) -> Pending | None: ...


@dataclass(frozen=True)
class PendingFrame:
    """A result frame on its way; wait() blocks until it is there."""

    step_id: int
    result: Pending

    def wait(self) -> bytes:
        return encode_result(self.result.wait())


class Stage:
    """Runs plan frames one after the other. With `debug` each ends in its plan's digest."""

    def __init__(self, runner: Runner, debug: bool = False, phases: Phases | None = None):
        self.runner, self._debug, self._phase = runner, debug, phases or Phases()
        self.num_steps = 0  # launched so far: the next plan's id

    def run(self, frame: bytes) -> PendingFrame | None:
        """Launch a step and what it draws; None if another rank tells the result. RuntimeError,
        with the plan, if it is not the next one or not what rank 0 sent."""
        with self._phase("read"):
            plan = self._read(frame)
        if plan.step_id != self.num_steps:
            raise RuntimeError(f"step {self.num_steps} was due, and this plan came: {plan}")
        self.num_steps += 1
        with self._phase("launch", plan):
            self.runner.launch(plan)
        with self._phase("sample"):
            result = self.runner.sample(plan.sampling)
        return None if result is None else PendingFrame(plan.step_id, result)

    def _read(self, frame: bytes) -> StepPlan:
        if not self._debug:
            return decode_plan(frame)
        plan, digest = decode_plan(frame[:-DIGEST_BYTES]), frame[-DIGEST_BYTES:]
        if plan_digest(encode_plan(plan)) != digest:
            raise RuntimeError(f"a plan was read as something else than what was sent: {plan}")
        return plan


def plan_digest(frame: bytes) -> bytes:
    return hashlib.blake2b(frame, digest_size=DIGEST_BYTES).digest()


def plan_frame(plan: StepPlan, debug: bool = False) -> bytes:
    """What Stage.run() takes."""
    frame = encode_plan(plan)
    return frame + plan_digest(frame) if debug else frame
