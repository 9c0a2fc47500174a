"""Records some steps of an engine as events of a Chrome trace: the phases of its loop's thread by
their own stamps, kernels and CUDA calls by kineto (torch.profiler).

Owns when recording begins and ends. Reads nothing out of the events (bench/trace.py). torch's own
ops are left out: to record them would cost the host more than what is measured.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ernie_engine.bench.trace import PHASE, Event, cut_steps, summarize
from ernie_engine.engine.phases import Phases
from ernie_engine.engine.plan import StepPlan

SETTLE = 4  # steps after the profiler has started that are not looked at


@dataclass(frozen=True)
class Excerpt:
    """Which steps of a run are wanted: `num_steps` (None: all) from the `first`-th one on, counting
    those that draw one token for each of `batch` sequences and do nothing else (None: any)."""

    first: int = 0
    num_steps: int | None = None
    batch: int | None = None

    @property
    def settle(self) -> int:
        """Steps that are recorded before, for the profiler's start disturbs them."""
        return min(SETTLE, self.first)

    def counts(self, plan: StepPlan) -> bool:
        return self.batch is None or len(plan.slots) == sum(plan.num_tokens) == self.batch


class Recorder:
    """A watcher of Phases: keeps those of an excerpt's steps, with some before and after it."""

    def __init__(self, excerpt: Excerpt, gpu: "GpuProfile | None", origin_ns: int, depth: int):
        self.events: list[Event] = []
        self._excerpt, self._gpu, self._origin_ns = excerpt, gpu, origin_ns
        # Until the last has been waited for: a GPU tells only of what it has done.
        num_steps = excerpt.num_steps
        self._num_left = None if num_steps is None else excerpt.settle + num_steps + depth
        self._num_seen, self._has_begun, self._is_on = 0, False, False
        self._in_phase = threading.RLock()  # the loop's thread has it while a phase lasts
        if excerpt.batch is None and excerpt.first == 0:
            self._start()  # now: a step's plan is made before it can be counted

    def __call__(self, name: str, plan: StepPlan | None) -> AbstractContextManager[None]:
        if plan is not None:
            self._count(plan)
        return self._range(name, plan) if self._is_on else nullcontext()

    def _count(self, plan: StepPlan) -> None:
        if self._has_begun:
            if self._num_left is not None:
                self._num_left -= 1
            if self._num_left == 0:
                self.stop()
            return
        self._num_seen += self._excerpt.counts(plan)
        if self._num_seen > self._excerpt.first - self._excerpt.settle:
            self._start()

    def _start(self) -> None:
        if self._gpu is not None:
            self._gpu.start()
        self._has_begun = self._is_on = True

    def stop(self) -> None:
        """Nothing happens if the recording has ended or never begun."""
        if self._is_on and self._gpu is not None:
            self._gpu.stop()
        self._is_on = False

    def finish_phase(self) -> None:
        """Wait for the end of the phase that runs, if one does: the last tokens may be here before
        their delivery is noted."""
        with self._in_phase:
            pass

    @contextmanager
    def _range(self, name: str, plan: StepPlan | None) -> Iterator[None]:
        with self._in_phase:
            began = time.time_ns()
            yield
            self.events.append(self._event(name, began, time.time_ns(), plan))

    def _event(self, name: str, began: int, ended: int, plan: StepPlan | None) -> Event:
        where = {"pid": os.getpid(), "tid": threading.get_native_id()}  # as kineto's calls
        when = {"ts": (began - self._origin_ns) / 1e3, "dur": (ended - began) / 1e3}
        args = {} if plan is None else about(plan)
        return {"ph": "X", "cat": PHASE, "name": name, **where, **when, "args": args}


def about(plan: StepPlan) -> dict[str, int]:
    return {"step": plan.step_id, "rows": len(plan.slots), "tokens": sum(plan.num_tokens)}


class GpuProfile:
    """Kernels, copies and CUDA calls of this process, whichever thread they come from. kineto
    wants to be stopped by the thread that started it: here it has one of its own."""

    def __init__(self) -> None:
        self._owner = ThreadPoolExecutor(1, thread_name_prefix="profiler")
        self._profile: profile | None = None

    def start(self) -> None:
        self._owner.submit(self._start).result()

    def _start(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()

    def stop(self) -> None:
        assert self._profile is not None, "stop() follows start()"
        self._owner.submit(self._profile.stop).result()

    def take_events(self, origin_ns: int) -> list[Event]:
        """Of the last recording; none if there was none."""
        done, self._profile = self._profile, None
        return [] if done is None else kineto_events(done, origin_ns)


def kineto_events(done: profile, origin_ns: int) -> list[Event]:
    """A finished profile's events, `ts` in microseconds from origin_ns (a time.time_ns())."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        done.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(), strict=False)
    shift = (origin_ns - trace["baseTimeNanoseconds"]) / 1e3
    return [{**e, "ts": e["ts"] - shift} if "ts" in e else e for e in trace["traceEvents"]]


class Tracer:
    """Traces of an engine's runs, one after the other, and the file that they are written to."""

    def __init__(self, path: Path, phases: Phases, has_gpu: bool, max_steps_in_flight: int):
        self.path, self._phases, self._depth = path, phases, max_steps_in_flight
        self._gpu = GpuProfile() if has_gpu else None
        self._origin_ns = time.time_ns()
        self._events: list[Event] = []

    def trace(self, name: str, excerpt: Excerpt, run: Callable[[], object]) -> dict[str, Any]:
        """Call run() and keep the excerpt's steps; their figures, as trace.summarize(). With a GPU
        it is called once more before, without the profiler, which costs the host as much again:
        the host's figures are of that run, as `host_alone_us` and `phases_alone_us`."""
        alone: dict[str, Any] = {}
        if self._gpu is not None:
            figures = summarize(self._steps(name, excerpt, run, None), has_gpu=False)
            kept = "host_us", "phases_us"
            alone = {f"{k.removesuffix('_us')}_alone_us": figures[k] for k in kept if k in figures}
        steps = self._steps(name, excerpt, run, self._gpu)
        self._events += steps
        return summarize(steps, self._gpu is not None) | alone

    def _steps(
        self, name: str, excerpt: Excerpt, run: Callable[[], object], gpu: GpuProfile | None
    ) -> list[Event]:
        recorder = Recorder(excerpt, gpu, self._origin_ns, self._depth)
        self._phases.watcher = recorder
        try:
            run()
            recorder.finish_phase()
        finally:
            self._phases.watcher = None
            recorder.stop()
        events = recorder.events + ([] if gpu is None else gpu.take_events(self._origin_ns))
        return cut_steps(events, name, excerpt.settle, excerpt.num_steps)

    def write(self) -> None:
        trace = {"displayTimeUnit": "ms", "traceEvents": self._events}
        self.path.write_text(json.dumps(trace))
