"""Events of a Chrome trace -> what some steps cost the host and what they left the GPU to do.

Owns the reading of events: which belong to which step, and every figure made of them. Never
records (bench/recorder.py). Times in microseconds. Where there is no GPU its figures are None.

A step, here, is the host's time from planning it to planning the next: it holds each phase once,
though what is waited for, committed and delivered may be an earlier step's. A kernel belongs to the
step whose time its launch lies in, so clocks of host and GPU need not agree to the microsecond.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from ernie_engine.engine.phases import PHASES

Event = dict[str, Any]  # as in the trace event format: ph, cat, name, pid, tid, ts, dur, args
PHASE, STEP = "phase", "step"
CALLS = ("cuda_runtime", "cuda_driver")
COPIES = ("gpu_memcpy", "gpu_memset")
DEVICE = ("kernel", *COPIES)
NO_GPU = "no GPU: the trace has the host's phases only"
NO_KERNELS = "the profiler saw no kernel of these steps"
NUM_TOP = 10


def cut_steps(
    events: Sequence[Event], title: str, first: int, count: int | None = None
) -> list[Event]:
    """The events of `count` steps (None: all there are) from the first-th launch on, and a range
    around each, "`title`: step 7". Empty if there are none."""
    phases = sorted(_of(events, PHASE), key=lambda e: e["ts"])
    launches = [e for e in phases if e["name"] == "launch"][first:]
    if not launches:
        return []
    bounds = [*_beginnings(phases, launches), max(map(_end, phases))]
    bounds = bounds if count is None else bounds[: count + 1]
    steps = [
        {**launch, "cat": STEP, "name": f"{title}: step {launch['args']['step']}"}
        | {"ts": begin, "dur": end - begin}
        for launch, begin, end in zip(launches, bounds, bounds[1:], strict=False)
    ]
    everything = [*phases, *_of(events, *CALLS)]
    inside = [e for e in everything if bounds[0] <= e["ts"] < bounds[-1]]
    known = {_correlation(e) for e in inside} - {None}
    on_device = [e for e in _of(events, *DEVICE) if _correlation(e) in known]
    arrows = [e for e in _of(events, "ac2g") if e["id"] in known]
    names = [e for e in events if e["ph"] == "M"]
    return [*names, *steps, *inside, *on_device, *arrows]


def _beginnings(phases: Sequence[Event], launches: Sequence[Event]) -> list[float]:
    """When each was planned: the last `schedule` before it; the launch itself where recording
    began between the two."""
    planned = [e["ts"] for e in _named(phases, "schedule")]
    at = [bisect_right(planned, launch["ts"]) for launch in launches]
    return [planned[i - 1] if i else launches[0]["ts"] for i in at]


def summarize(events: Sequence[Event], has_gpu: bool) -> dict[str, Any]:
    """Figures of one step, of what cut_steps() gave: medians over its steps.

    phases_us: each phase as it lasted. waited_us: in calls that wait for the GPU, in any phase.
    host_us: the critical path, all phases without that and without `wait`, unless a call in there
    says how much of it was waiting. gpu: see _gpu_figures(); None, and `note` says why, without.
    """
    steps = _of(events, STEP)
    starts = [e["ts"] for e in steps]
    phases, waits = (_by_step(starts, e) for e in (_of(events, PHASE), _waiting_calls(events)))
    figures: dict[str, Any] = {"steps": len(steps)}
    if steps:
        figures |= {
            "step_us": median(e["dur"] for e in steps),
            "host_us": median(map(_host_us, phases, waits)),
            "waited_us": median(_total(step) for step in waits),
            "phases_us": {n: median(_total(_named(s, n)) for s in phases) for n in PHASES},
        }
    if not has_gpu:
        return figures | {"gpu": None, "note": NO_GPU}
    if not _of(events, "kernel"):
        return figures | {"gpu": None, "note": NO_KERNELS}
    return figures | {"gpu": _gpu_figures(events, starts)}


def _host_us(phases: Sequence[Event], waits: Sequence[Event]) -> float:
    host = 0.0
    for phase in phases:
        waited = _total(e for e in waits if phase["ts"] <= e["ts"] < _end(phase))
        if phase["name"] != "wait" or waited > 0:  # else it is for another rank
            host += phase["dur"] - waited
    return host


def _waiting_calls(events: Iterable[Event]) -> list[Event]:
    """cudaEventSynchronize and its like. A copy that waits by itself is not told from others."""
    return [e for e in _of(events, *CALLS) if e["name"].endswith("Synchronize")]


# --- the GPU ---


def _gpu_figures(events: Sequence[Event], starts: Sequence[float]) -> dict[str, Any]:
    """busy_share: kernels running, of the time from the first to the end of the last. idle_us:
    from the last kernel of a step to the first of the next; None for one step. launches, copies:
    calls of the host, medians; a graph of kernels is one launch. top_kernels: by time."""
    launched_at = _call_times(events)
    kernels, copies = (
        _by_step(starts, _of(events, *categories), lambda e: launched_at[_correlation(e)])
        for categories in (("kernel",), COPIES)
    )
    everything = [e for step in kernels for e in step]
    return {
        "busy_share": _busy_share(everything),
        "idle_us": _idle_us([step for step in kernels if step]),
        "launches": median(map(_num_calls, kernels)),
        "copies": median(map(_num_calls, copies)),
        "kernels": median(map(len, kernels)),
        "top_kernels": _top_kernels(everything, len(starts)),
    }


def _call_times(events: Iterable[Event]) -> dict[Any, float]:
    times: dict[Any, float] = {}
    for call in _of(events, *CALLS):
        key = _correlation(call)
        times[key] = min(call["ts"], times.get(key, call["ts"]))
    return times


def _num_calls(launched: Iterable[Event]) -> int:
    return len({_correlation(e) for e in launched})


def _busy_share(kernels: Sequence[Event]) -> float:
    """Kernels that overlap count once."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda e: e["ts"]):
        busy += max(0.0, _end(kernel) - max(until, kernel["ts"]))
        until = max(until, _end(kernel))
    return busy / (until - min(e["ts"] for e in kernels))


def _idle_us(steps: Sequence[Sequence[Event]]) -> dict[str, float] | None:
    ends = [max(map(_end, step)) for step in steps]
    begins = [min(e["ts"] for e in step) for step in steps]
    gaps = [max(0.0, begin - end) for end, begin in zip(ends, begins[1:], strict=False)]
    return {"median": median(gaps), "max": max(gaps)} if gaps else None


def _top_kernels(kernels: Iterable[Event], num_steps: int) -> list[dict[str, Any]]:
    by_name = defaultdict(list)
    for kernel in kernels:
        by_name[kernel["name"]].append(kernel["dur"])
    rows = [
        {"name": name, "count": len(times) / num_steps, "us": sum(times) / num_steps}
        for name, times in by_name.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])[:NUM_TOP]


# --- events ---


def _of(events: Iterable[Event], *categories: str) -> list[Event]:
    return [e for e in events if e.get("cat") in categories]


def _named(events: Iterable[Event], name: str) -> list[Event]:
    return [e for e in events if e["name"] == name]


def _end(event: Event) -> float:
    return event["ts"] + event["dur"]


def _total(events: Iterable[Event]) -> float:
    return sum(e["dur"] for e in events)


def _correlation(event: Event) -> int | None:
    """What a call and the kernel or copy that it started have in common."""
    return event["args"].get("correlation")


def _by_step(starts: Sequence[float], events: Iterable[Event], at=lambda e: e["ts"]):
    """The events of each step: those whose time `at` lies between its start and the next."""
    steps: list[list[Event]] = [[] for _ in starts]
    for event in events:
        steps[bisect_right(starts, at(event)) - 1].append(event)
    return steps
