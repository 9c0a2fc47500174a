"""The engine with recorded steps says what it says without; with Triton kernels on a GPU.

Without a GPU the recordings are run again (tests/recorder.py): sizes, padding and buffers are those
of CUDA graphs, over kernels in torch.
"""

import importlib
import pkgutil
import random
import re
import threading
from contextlib import contextmanager

import pytest
from triton import knobs
from triton.runtime.jit import JITFunction

from ernie_engine import EngineDeadError, SamplingParams, kernels
from ernie_engine.engine.loop import EngineLoop
from ernie_engine.model import recording
from ernie_engine.model.compilations import compile_counter
from ernie_engine.model.graphs import StepGraph
from tests.recorder import record_by_rerunning
from tests.tiny import open_engine, token_ids

ON_GPU = not knobs.runtime.interpret
DEVICE, KERNELS = ("cuda", "triton") if ON_GPU else ("cpu", "torch")
BLOCK_BYTES = 16 * 2 * 4 * 2 * 16 * 4  # of the tiny checkpoint: 4 layers, 2 heads of 16, fp32

# On a GPU each engine compiles, and asks for, all of its kernels.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)] if ON_GPU else []


@pytest.fixture(autouse=True)
def replays(monkeypatch) -> list:
    """The shapes of all replays, in order."""
    shapes, replay = [], StepGraph.replay

    def noted(graph, *step):
        shapes.append(graph.shape)
        return replay(graph, *step)

    monkeypatch.setattr(StepGraph, "replay", noted)
    if not ON_GPU:
        record_by_rerunning(monkeypatch.setattr)
    return shapes


def opened(folder, **fields):
    return open_engine(folder, **{"device": DEVICE, "kernels": KERNELS, **fields})


def prompts(count: int = 10) -> list[list[int]]:
    rng = random.Random(5)
    shared = [rng.randrange(700) for _ in range(40)]
    heads = [shared[: rng.choice([0, 16, 40])] for _ in range(count)]
    return [head + [rng.randrange(700) for _ in range(rng.randint(1, 50))] for head in heads]


def params(count: int = 10, **fields) -> list[SamplingParams]:
    greedy = {"temperature": 0.0, "logprobs": 2}
    drawn = {"temperature": 0.9, "top_p": 0.95, "top_k": 60, "presence_penalty": 0.3, "seed": 11}
    base = {"ignore_eos": True, **fields}
    kinds = [drawn if i % 2 else greedy for i in range(count)]
    return [SamplingParams(**base, **kind, max_tokens=14 + i % 9) for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def alone(tiny):
    """Each prompt answered by itself and eagerly: what all others must equal."""
    with opened(tiny, enforce_eager=True, enable_prefix_caching=False) as engine:
        assert engine._core.num_graphs == 0
        pairs = zip(prompts(), params(), strict=True)
        return [token_ids(engine.generate(*pair, use_tqdm=False))[0] for pair in pairs]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [7, 33, 400])
def test_replayed_equals_eager(tiny, alone, replays, depth, budget):
    """Whole prompts and chunks, single tokens of 1 to 8 requests; then all prompts cached."""
    fields = {"max_num_batched_tokens": budget, "max_steps_in_flight": depth}
    with opened(tiny, **fields) as engine:
        assert len(replays) == engine._core.num_graphs >= 8  # the checks of start-up
        first = engine.generate(prompts(), params(), use_tqdm=False)
        again = engine.generate(prompts(), params(), use_tqdm=False)
    assert token_ids(first) == token_ids(again) == alone
    assert all(output.num_cached_tokens % 16 == 0 for output in again)
    used = replays[engine._core.num_graphs :]
    assert {shape.num_decodes > 0 for shape in used} == {True, False}


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_are_answered_while_graphs_are_recorded(tiny, alone, replays, monkeypatch, depth):
    """As a server does: some steps run eagerly, some recordings wait for slots or blocks."""
    settle = EngineLoop.settle
    monkeypatch.setattr(EngineLoop, "settle", lambda loop: None)
    fields = {"max_num_seqs": 8, "kv_cache_memory_bytes": 34 * BLOCK_BYTES}
    with opened(tiny, **fields, max_steps_in_flight=depth) as engine:
        first = token_ids(engine.generate(prompts(), params(), use_tqdm=False))
        settle(engine._loop)
        assert engine._core.num_graphs == len(engine._core.scheduler._recordings) > 8
        again = token_ids(engine.generate(prompts(), params(), use_tqdm=False))
    assert first == again == alone


def test_a_wrong_recording_ends_the_start(tiny, monkeypatch):
    def wrong(*pair):
        raise RuntimeError("the CUDA graph is wrong")

    monkeypatch.setattr(recording, "compare", wrong)
    with pytest.raises(EngineDeadError, match="the CUDA graph is wrong"):
        opened(tiny)


@pytest.mark.parametrize("eager", [True, False])
def test_tokens_are_delivered_behind_the_launch_of_a_step_that_is_replayed(tiny, eager):
    seen = []

    @contextmanager
    def watch(name, plan):
        seen.append(name)
        yield

    with opened(tiny, enforce_eager=eager, max_steps_in_flight=1) as engine:
        engine.phases.watcher = watch
        engine.generate([5, 6], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
    before = {seen[i - 1] for i, name in enumerate(seen[:-1]) if name == "deliver"}
    assert before == {"commit" if eager else "sample"}


@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_equals_not(tiny, alone, depth):
    fields = {"max_model_len": 128, "kv_cache_memory_bytes": 12 * BLOCK_BYTES}
    with opened(tiny, **fields, max_steps_in_flight=depth) as engine:
        assert token_ids(engine.generate(prompts(), params(), use_tqdm=False)) == alone
        assert engine._core.scheduler.counters.num_preemptions > 0


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 16, 17, 24])
def test_batches_about_the_borders_of_sizes(tiny, replays, count):
    """As many requests at once as a size holds, one less and one more."""
    asked = [[7 * i + 3, 5, i + 1] for i in range(count)]
    found = []
    for eager in (True, False):
        with opened(tiny, enforce_eager=eager, max_num_seqs=24) as engine:
            found.append(token_ids(engine.generate(asked, params(count), use_tqdm=False)))
    assert found[0] == found[1]
    assert any(shape.num_decodes >= count for shape in replays)


def test_aborted_company_does_not_show(tiny, alone):
    long = SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.0)
    with opened(tiny, max_num_seqs=16) as engine:
        for _ in range(3):
            streams = [engine.stream([9, 8, i], long) for i in range(6)]
            for stream in streams:
                next(stream)
            ending = threading.Thread(target=lambda them=streams: [s.close() for s in them])
            ending.start()
            found = engine.generate(prompts(), params(), use_tqdm=False)
            ending.join()
            assert token_ids(found) == alone


def test_prompts_are_scored_alike(tiny, replays):
    found = []
    for eager in (True, False):
        fields = {"max_num_batched_tokens": 40, "enforce_eager": eager}
        with opened(tiny, **fields) as engine:
            scored = params(prompt_logprobs=2)
            outputs = engine.generate(prompts(), scored, use_tqdm=False)
        places = [place for output in outputs for place in output.prompt_logprobs if place]
        found.append([sorted((t, x.logprob) for t, x in place.items()) for place in places])
    assert replays and len(found[0]) == sum(len(prompt) - 1 for prompt in prompts())
    for one, other in zip(*found, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [p for _, p in one] == pytest.approx([p for _, p in other], abs=1e-4)


def test_eager_steps_are_told(tiny, caplog, replays):
    with caplog.at_level("INFO", "ernie_engine"), opened(tiny, enforce_eager=True) as engine:
        engine.generate([5, 6], params(1)[0], use_tqdm=False)
        assert engine._core.num_graphs == 0
    assert not replays and "no CUDA graphs: enforce_eager" in caplog.text


# --- what only a GPU shows ---

gpu = pytest.mark.gpu


@pytest.fixture
def forgotten():
    """No kernel has been asked for in this process yet."""
    for info in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()


@gpu
@pytest.mark.parametrize("eager", [False, True])
def test_nothing_is_compiled_once_it_serves(tiny, forgotten, eager):
    rng, start = random.Random(2), compile_counter().count
    fields = {"max_num_seqs": 40, "max_num_batched_tokens": 700, "enforce_eager": eager}
    with opened(tiny, **fields) as engine:
        before = engine._core.num_compilations
        assert before > start + 20 and (engine._core.num_graphs == 0) == eager
        for count in (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 40):
            asked = [[rng.randrange(700) for _ in range(rng.randint(1, 60))] for _ in range(count)]
            engine.generate(asked, _variety(rng, count), use_tqdm=False)
        for length in (1, 2, 3, 4, 5, 8, 15, 16, 17, 63, 64, 65, 100, 127, 129, 255, 257, 400, 500):
            prompt = [rng.randrange(700) for _ in range(length)]
            engine.generate([prompt], _variety(rng, 1), use_tqdm=False)
            engine.generate([[*prompt, 5, 6, 7]], _variety(rng, 1), use_tqdm=False)
        assert engine._core.num_compilations == before


@gpu
def test_recordings_ask_for_no_kernel_that_was_not_there_when_the_model_was_ready(
    tiny, forgotten, caplog
):
    fields = {"max_num_seqs": 140, "max_num_batched_tokens": 700}
    with caplog.at_level("INFO", "ernie_engine"), opened(tiny, **fields) as engine:
        ready = re.search(r"the model is ready after .* with (\d+) kernels", caplog.text)
        assert ready is not None and engine._core.num_compilations == int(ready[1]) > 20


def _variety(rng: random.Random, count: int) -> list[SamplingParams]:
    return [
        SamplingParams(
            max_tokens=rng.randint(1, 9),
            min_tokens=rng.choice([0, 1]),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([0, 5, 100]),
            min_p=rng.choice([0.0, 0.1]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            logit_bias=rng.choice([{}, {7: 2.0}]),
            logprobs=rng.choice([None, 0, 1, 16, 20]),
            prompt_logprobs=rng.choice([None, None, 0, 3]),
        )
        for _ in range(count)
    ]


@gpu
def test_all_that_serves_was_compiled_by_other_processes(tiny, forgotten, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    hits = []

    def note(**what):
        hits.append(what["cache_hit"] or what["src"].name)

    monkeypatch.setattr(compile_counter(), "_then", note)
    with opened(tiny, max_num_seqs=40) as engine:
        engine.generate([[5, 6, 7]], params(1)[0], use_tqdm=False)
    assert len(hits) > 20 and [hit for hit in hits if hit is not True] == []


@gpu
def test_no_graphs_with_twins_that_wait(tiny, caplog):
    fields = {"kernels": "triton,-moe_experts"}
    with caplog.at_level("INFO", "ernie_engine"), opened(tiny, **fields) as engine:
        assert engine._core.num_graphs == 0
    assert "no CUDA graphs: moe_experts=torch waits for the device" in caplog.text


@gpu
def test_memory_for_graphs_is_set_aside(tiny, caplog):
    fields = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.3}
    with caplog.at_level("INFO", "ernie_engine"), opened(tiny, **fields):
        pass
    assert "for CUDA graphs" in caplog.text and "took more than" not in caplog.text
