"""What is read out of a trace: made-up events of a GPU, then real ones of the tiny engine."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ernie_engine import SamplingParams
from ernie_engine.bench.recorder import Excerpt, Recorder, Tracer, kineto_events
from ernie_engine.bench.report import trace_lines
from ernie_engine.bench.trace import cut_steps, summarize
from ernie_engine.engine.phases import PHASES, Phases
from tests.tiny import open_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def event(cat: str, name: str, ts: float, dur: float, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": dur} | {
        "args": args
    }


def made_up_step(step: int, at: float, launches: int = 2):
    """100 us of the host: 10 to plan, 30 to launch, 8 of 20 waited, 5 to commit. The GPU starts
    50 us later and runs kernels of 20 us, 5 apart; the last launch is a graph of two."""
    events = [
        event("phase", "schedule", at, 10),
        event("phase", "launch", at + 10, 30, step=step, rows=1, tokens=1),
        event("phase", "wait", at + 40, 20),
        event("cuda_runtime", "cudaEventSynchronize", at + 41, 8),
        event("phase", "commit", at + 60, 5),
        event("cuda_runtime", "cudaMemcpyAsync", at + 11, 1, correlation=1000 * step),
        event("gpu_memcpy", "Memcpy HtoD", at + 55, 1, correlation=1000 * step),
    ]
    for i in range(launches):
        key = 1000 * step + i + 1
        events.append(event("cuda_runtime", "cudaLaunchKernel", at + 12 + i, 1, correlation=key))
        events.append(event("kernel", "gemm", at + 60 + 25 * i, 20, correlation=key))
        events.append({"ph": "s", "cat": "ac2g", "name": "ac2g", "id": key, "ts": at})
    last = 1000 * step + launches
    events.append(event("kernel", "norm", at + 60 + 25 * launches, 4, correlation=last))
    return events


@pytest.fixture
def recorded():
    steps = [made_up_step(i, 100.0 * i) for i in range(5)]
    lost = event("kernel", "launched before the recording", 2.0, 50, correlation=7)
    name = {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "loop"}}
    return [name, lost, *(e for step in steps for e in step)]


def test_steps_are_cut_from_plan_to_plan_with_what_they_launched(recorded):
    cut = cut_steps(recorded, "b=1", first=1, count=2)
    steps = [e for e in cut if e.get("cat") == "step"]
    assert [(e["name"], e["ts"], e["dur"]) for e in steps] == [
        ("b=1: step 1", 100.0, 100.0),
        ("b=1: step 2", 200.0, 100.0),
    ]
    kernels = [e for e in cut if e.get("cat") == "kernel"]
    assert {e["args"]["correlation"] // 1000 for e in kernels} == {1, 2} and len(kernels) == 6
    assert {e["id"] // 1000 for e in cut if e.get("cat") == "ac2g"} == {1, 2}
    assert cut[0]["ph"] == "M"


def test_all_steps_are_kept_if_no_number_is_given_and_none_if_none_came(recorded):
    kept = cut_steps(recorded, "1x1", 0)
    assert sum(e.get("cat") == "step" for e in kept) == 5
    assert cut_steps(recorded, "1x1", 5) == [] == cut_steps([], "1x1", 0)
    assert summarize([], has_gpu=True)["steps"] == 0


def test_the_hosts_figures(recorded):
    figures = summarize(cut_steps(recorded, "b=1", 1, 3), has_gpu=True)
    assert figures["steps"] == 3 and figures["step_us"] == 100.0
    assert figures["phases_us"]["launch"] == 30 and figures["phases_us"]["deliver"] == 0
    assert figures["waited_us"] == 8
    assert figures["host_us"] == 10 + 30 + (20 - 8) + 5


def test_a_wait_for_another_rank_is_not_the_hosts(recorded):
    cut = cut_steps([e for e in recorded if "Synchronize" not in e["name"]], "b=1", 1, 3)
    assert summarize(cut, has_gpu=True)["host_us"] == 10 + 30 + 5


def test_the_gpus_figures(recorded):
    gpu = summarize(cut_steps(recorded, "b=1", 1, 3), has_gpu=True)["gpu"]
    # a step's kernels: 60 to 80, 85 to 105, 110 to 114; the next step's begin at 160
    assert gpu["idle_us"] == {"median": 46.0, "max": 46.0}
    assert gpu["busy_share"] == pytest.approx(3 * 44 / (2 * 100 + 54))
    assert (gpu["launches"], gpu["copies"], gpu["kernels"]) == (2, 1, 3)
    assert gpu["top_kernels"] == [
        {"name": "gemm", "count": 2.0, "us": 40.0},
        {"name": "norm", "count": 1.0, "us": 4.0},
    ]


def test_kernels_that_overlap_are_busy_once():
    step = [*made_up_step(0, 0.0, 0), event("kernel", "a", 50, 40, correlation=0)]
    step.append(event("kernel", "b", 60, 10, correlation=0))
    gpu = summarize(cut_steps(step, "b=1", 0), has_gpu=True)["gpu"]
    assert gpu["busy_share"] == 1.0 and gpu["idle_us"] is None


def test_without_kernels_there_are_no_figures_and_a_note_says_why():
    cut = cut_steps([e for e in made_up_step(0, 0.0) if e["cat"] == "phase"], "b=1", 0)
    blind, none = summarize(cut, has_gpu=True), summarize(cut, has_gpu=False)
    assert blind["gpu"] is None is none["gpu"] and blind["host_us"] == none["host_us"]
    assert "saw no kernel" in trace_lines(blind) and "no GPU" in trace_lines(none)


def test_what_people_read(recorded):
    figures = summarize(cut_steps(recorded, "b=1", 1, 3), has_gpu=True)
    text = trace_lines(figures)
    assert "3 steps of 100 us" in text and "host 57 us, waiting 8 us" in text
    assert "idle between steps 46.00 us" in text and "2 x gemm" in text
    assert "more new tokens" in trace_lines(summarize([], has_gpu=True))
    one_step = summarize(cut_steps(recorded, "1x1", 4), has_gpu=True)
    assert "idle between steps - us" in trace_lines(one_step)


# --- recording ---


def test_kineto_and_the_phases_have_one_clock():
    origin = time.time_ns()
    with profile(activities=[ProfilerActivity.CPU]) as done:
        began = (time.time_ns() - origin) / 1e3
        with record_function("inner"):
            time.sleep(0.001)
        ended = (time.time_ns() - origin) / 1e3
    (inner,) = [e for e in kineto_events(done, origin) if e["name"] == "inner"]
    slack = 20.0  # us
    assert began - slack <= inner["ts"] <= inner["ts"] + inner["dur"] <= ended + slack


def run_steps(phases: Phases, sizes) -> None:
    """Steps of rows with as many tokens as `sizes` says."""
    for i, rows in enumerate(sizes):
        plan = SimpleNamespace(step_id=i, slots=list(rows), num_tokens=list(rows))
        for name in ("schedule", "launch", "commit"):
            with phases(name, plan if name == "launch" else None):
                pass


@pytest.mark.parametrize(
    ("excerpt", "recorded"),
    [
        (Excerpt(), range(8)),
        (Excerpt(first=1, num_steps=2, batch=2), range(2, 6)),  # one to settle, one after
        (Excerpt(first=0, num_steps=1, batch=2), range(2, 4)),
        (Excerpt(first=9, num_steps=1, batch=2), (7,)),  # it ends too soon
        (Excerpt(first=20, num_steps=1, batch=2), ()),
    ],
)
def test_only_an_excerpt_is_recorded(excerpt, recorded):
    """Two steps are of another kind; the rest are decode steps of both sequences."""
    phases = Phases()
    recorder = Recorder(excerpt, None, time.time_ns(), depth=1)
    phases.watcher = recorder
    run_steps(phases, [[5, 5], [1], *[[1, 1]] * 6])
    launches = [e["args"]["step"] for e in recorder.events if e["name"] == "launch"]
    assert launches == list(recorded)


def test_the_gpus_profile_lasts_as_long_as_the_recording():
    calls: list[str] = []
    gpu = SimpleNamespace(start=lambda: calls.append("start"), stop=lambda: calls.append("stop"))
    recorder = Recorder(Excerpt(1, 2, 2), gpu, time.time_ns(), depth=2)  # pyright: ignore[reportArgumentType]
    phases = Phases()
    phases.watcher = recorder
    run_steps(phases, [[1, 1]] * 4)
    assert calls == ["start"]
    run_steps(phases, [[1, 1]] * 4)
    recorder.stop()
    assert calls == ["start", "stop"]


def test_the_tiny_engines_steps(tiny, tmp_path):
    with open_engine(tiny, device="cpu", enable_prefix_caching=False) as engine:
        path, depth = tmp_path / "trace.json", engine.config.max_steps_in_flight
        tracer = Tracer(path, engine.phases, False, depth)

        def run():
            engine.generate([[5, 6, 7], [8, 9, 10]], GREEDY, use_tqdm=False)

        decode = tracer.trace("b=2", Excerpt(4, 5, 2), run)
        prefill = tracer.trace("2x3", Excerpt(), run)
        assert engine.phases.watcher is None
    tracer.write()
    assert decode["steps"] == 5 and decode["gpu"] is None and prefill["steps"] == 12
    assert all(decode["phases_us"][name] > 0 for name in PHASES)
    assert 0 < decode["host_us"] <= decode["step_us"] and decode["waited_us"] == 0
    events = json.loads(path.read_text())["traceEvents"]
    steps = [e for e in events if e["cat"] == "step"]
    assert [e["name"].split(":")[0] for e in steps] == ["b=2"] * 5 + ["2x3"] * 12
    assert steps[5]["args"] == {"step": steps[5]["args"]["step"], "rows": 2, "tokens": 6}
    phases = [name for name in PHASES if name != "deliver"]
    for step in steps:  # each holds every phase, in order; what came is delivered at once
        inside = [e for e in events if e["cat"] == "phase"]
        inside = [e for e in inside if step["ts"] <= e["ts"] < step["ts"] + step["dur"]]
        assert [e["name"] for e in inside] == [*phases, "deliver"]


def test_the_phase_that_delivers_the_last_tokens_is_kept(tmp_path):
    """Whoever waits for them goes on before the loop's thread has left it."""
    phases, delivered = Phases(), threading.Event()
    plan = SimpleNamespace(slots=[0], num_tokens=[1], step_id=0)

    def loop():
        with phases("launch", plan):
            pass
        with phases("deliver"):
            delivered.set()
            time.sleep(0.05)

    def run():
        threading.Thread(target=loop, daemon=True).start()
        assert delivered.wait(10)

    found = Tracer(tmp_path / "trace.json", phases, False, 1).trace("b=1", Excerpt(), run)
    assert found["phases_us"]["deliver"] >= 50_000


class NoKernels:
    """Takes the place of a GPU's profile, and notes when it is on."""

    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")

    def take_events(self, origin_ns):
        return []


def test_the_host_is_measured_without_the_profiler_too(tmp_path):
    profile_, phases, runs = NoKernels(), Phases(), []
    tracer = Tracer(tmp_path / "trace.json", phases, False, 1)
    tracer._gpu = profile_

    def run():
        runs.append(list(profile_.calls))
        for step in range(9):
            plan = SimpleNamespace(slots=[0], num_tokens=[1], step_id=step)
            with phases("schedule"):
                time.sleep(0.004 if len(runs) == 1 else 0.001)
            with phases("launch", plan):
                pass

    found = tracer.trace("b=1", Excerpt(2, 4, 1), run)
    assert runs == [[], []] and profile_.calls == ["start", "stop"]
    assert found["host_alone_us"] > 3500 > found["host_us"] > 900
    assert found["phases_alone_us"]["schedule"] > 3500 > found["phases_us"]["schedule"]
    assert "without the profiler: host" in trace_lines(found)


@pytest.mark.gpu
def test_a_gpus_steps(tiny, tmp_path):
    with open_engine(tiny, device="cuda", enable_prefix_caching=False) as engine:
        depth = engine.config.max_steps_in_flight
        tracer = Tracer(tmp_path / "trace.json", engine.phases, True, depth)

        def run():
            engine.generate([[5, 6, 7]], GREEDY, use_tqdm=False)

        found = tracer.trace("b=1", Excerpt(4, 4, 1), run)
    gpu = found["gpu"]
    # A graph is one launch; what is drawn from it are some more.
    assert found["steps"] == 4 and gpu["launches"] > 2 and gpu["kernels"] > 10 and gpu["copies"] > 0
    assert 0 < gpu["busy_share"] <= 1 and gpu["top_kernels"][0]["us"] > 0
    assert found["host_us"] < found["step_us"] and torch.cuda.is_available()
