"""Ranks as child processes of this one: lost ones end the engine, not the program."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ernie_engine import EngineDeadError, SamplingParams
from ernie_engine.engine import ranks
from ernie_engine.model import startup
from tests.processes import is_alive
from tests.tiny import open_engine, token_ids

LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
LAYOUTS = [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]


def child_of(engine) -> int:
    return engine._core.ranks._children._processes[1].pid


def lose(engine, number: int) -> tuple[str, float]:
    """What a caller hears, and after how long, when rank 1 gets a signal in mid-answer."""
    pid = child_of(engine)
    with engine.stream([5, 6, 7], LONG) as stream:
        next(stream)
        began = time.monotonic()
        os.kill(pid, number)
        with pytest.raises(EngineDeadError) as caught:
            for _ in stream:
                pass
    assert "rank 1 (" in str(caught.value) and f"pid {pid})" in str(caught.value)
    return str(caught.value), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_killed_rank_is_named_and_the_program_goes_on(tiny, layout):
    with open_engine(tiny, **layout, peer_timeout_seconds=60) as engine:  # not by silence
        told, seconds = lose(engine, signal.SIGKILL)
        assert "was killed by signal 9" in told and seconds < 5
        with pytest.raises(EngineDeadError, match="rank 1"):
            engine.generate([[5]])
    with open_engine(tiny, **layout) as engine:
        again = token_ids(engine.generate([[5, 6]], LONG, use_tqdm=False))
    with open_engine(tiny) as engine:
        assert token_ids(engine.generate([[5, 6]], LONG, use_tqdm=False)) == again


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_program_goes_on_after_a_rank_was_killed_on_a_gpu(tiny, monkeypatch, layout):
    """NCCL does not notice by itself."""
    monkeypatch.setenv("ERNIE_TEST_DEVICE", "cuda")
    test_a_killed_rank_is_named_and_the_program_goes_on(tiny, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_stopped_rank_is_named_in_time_and_ended(tiny, layout):
    with open_engine(tiny, **layout, peer_timeout_seconds=4) as engine:
        pid = child_of(engine)
        told, seconds = lose(engine, signal.SIGSTOP)
        assert "has not been heard of" in told and seconds < 4.5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_idle_engine_notices_too(tiny, number):
    with open_engine(tiny, tensor_parallel_size=2, peer_timeout_seconds=3) as engine:
        time.sleep(1)
        os.kill(child_of(engine), number)
        deadline = time.monotonic() + 4
        while not engine._loop.is_dead:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(EngineDeadError, match="it was idle"):
            engine.generate([[5]])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_while_weights_are_loaded_is_named_in_time(tiny, monkeypatch, number):
    """The other one has loaded its own long before, and waits."""
    began, children = [], []
    start = ranks.Children

    def slow_load(parts, parameters, checkpoint, expected, progress, on_part):
        time.sleep(2)
        began.append(time.monotonic())
        os.kill(children[0]._processes[1].pid, number)
        while time.monotonic() < began[0] + 20:
            on_part()
            time.sleep(0.01)

    monkeypatch.setattr(startup, "load_weights", slow_load)
    monkeypatch.setattr(ranks, "Children", lambda *a: children.append(start(*a)) or children[0])
    with pytest.raises(EngineDeadError, match=r"rank 1 \(.*it was (loading|compiling)"):
        open_engine(tiny, tensor_parallel_size=2, peer_timeout_seconds=4)
    assert time.monotonic() - began[0] < 8
    assert children[0].end_of(1) is not None


@pytest.mark.slow
def test_children_end_with_a_program_that_is_killed(tiny):
    """They hear that the connection closes."""
    script = (
        "import sys, time\nfrom tests.tiny import open_engine\n"
        f"engine = open_engine({str(tiny)!r}, tensor_parallel_size=2, peer_timeout_seconds=60)\n"
        "print(*[p.pid for p in engine._core.ranks._children._processes.values()], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as program:
        child = int(program.stdout.readline())
        program.kill()
        deadline = time.monotonic() + 10
        while is_alive(child):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def children() -> list[int]:
    """The ranks that this process has started; an ended one that nobody has asked for counts."""
    found = []
    for file in Path("/proc/self/task").glob("*/children"):
        for pid in file.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            found += [int(pid)] if b"engine.worker" in command else []
    return found


def test_a_control_port_that_is_taken_leaves_no_process_behind(tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"control_port={port}"):
            open_engine(tiny, tensor_parallel_size=2, control_port=port)
    assert children() == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ernie_engine.engine.ranks.open_model",
                                   "ernie_engine.parallel.connect._try_all"])  # fmt: skip
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_start_up_leaves_no_process_behind_and_the_program_goes_on(
    tiny, monkeypatch, where, error
):
    def interrupt(*args):
        raise error("in mid-start")

    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        with pytest.raises((error, EngineDeadError), match="in mid-start"):
            open_engine(tiny, tensor_parallel_size=2)
    assert children() == []
    with open_engine(tiny, tensor_parallel_size=2) as engine:
        assert engine.generate([[5]], use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.slow
def test_a_step_that_hangs_is_told_with_the_rank_that_is_behind(tiny):
    """Rank 0 itself, in the midst of a step: the other one waits for it."""
    with open_engine(tiny, tensor_parallel_size=2, peer_timeout_seconds=2) as engine:
        runner, let_go = engine._core.ranks.stage.runner, threading.Event()
        launch = runner.launch

        def hang(plan):
            if plan.step_id == 5:
                let_go.wait(30)
            launch(plan)

        runner.launch = hang
        with pytest.raises(EngineDeadError, match=r"rank 0 \(.*, this process\) hangs"):
            engine.generate([[5, 6, 7]], LONG, use_tqdm=False)
        let_go.set()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_program_that_forgets_to_close_ends(tiny):
    """The threads of an open engine are daemons; the children hear that it has ended."""
    script = (
        "from tests.tiny import open_engine\n"
        f"engine = open_engine({str(tiny)!r}, pipeline_parallel_size=2, peer_timeout_seconds=60)\n"
        "engine.generate([[5, 6]], use_tqdm=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=50, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
