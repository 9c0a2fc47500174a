"""--steps: the definition, on an engine whose time is made up; then once on the tiny one."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ernie_engine.bench.floors import Ceilings, decode_work
from ernie_engine.bench.recorder import Excerpt
from ernie_engine.bench.report import step_line
from ernie_engine.bench.steps import CASES, Case, StepBench, choose_cases, step_row
from ernie_engine.config import ModelConfig
from tests.tiny import open_engine

MOE = Path(__file__).parents[2] / "configs" / "ernie-4.5-21b-a3b"
H200 = Ceilings(4.47e12, 804e12)


@dataclass
class MadeUpEngine:
    """A prompt token takes 1 ms, by `slower` more with each call, by half more if it gets
    `hot` and read others less than half a second ago; a step takes `step_s`. Keeps all calls."""

    step_s: float = 0.010
    slower: float = 0.0
    hot: bool = False
    max_model_len: int = 33000
    num_kv_blocks: int = 10**6
    max_num_seqs: int = 256
    now: float = 0.0
    read_at: float = -1.0
    calls: list = field(default_factory=list)
    tokenizer: None = None
    enable_prefix_caching: bool = False
    cached: set = field(default_factory=set)  # prompts that were read: whole ones
    device: str = "cpu"

    def __post_init__(self):
        self.model_config = ModelConfig.from_folder(MOE)
        self.config = SimpleNamespace(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=8192,
            block_size=16,
            dtype="bfloat16",
            device=self.device,
            enable_prefix_caching=self.enable_prefix_caching,
        )

    def generate(self, prompts, params, *, use_tqdm):
        assert use_tqdm is False
        self.calls.append((prompts, params))
        count = params[0].max_tokens
        hits = [self.find(tuple(prompt)) for prompt in prompts]
        heat = 0.5 * (self.hot and self.now < self.read_at + 0.5)
        prompt_s = 0.001 * (1 + heat + self.slower * len(self.calls))
        self.now += prompt_s * (sum(map(len, prompts)) - sum(hits))
        self.read_at = self.now
        self.now += (count - 1) * self.step_s
        answer = [SimpleNamespace(token_ids=[0] * count)]
        return [SimpleNamespace(outputs=answer, num_cached_tokens=hit) for hit in hits]

    def rest(self, seconds):
        self.now += seconds

    def find(self, prompt):
        """How many of its first tokens are cached; all of them from now on."""
        if not self.enable_prefix_caching:
            return 0
        hit = max((len(c) for c in self.cached if c == prompt[: len(c)]), default=0)
        self.cached.add(prompt)
        return hit


def measure(engine: MadeUpEngine, case: Case, **options):
    bench = StepBench(engine, clock=lambda: engine.now, rest=engine.rest, **options)  # pyright: ignore[reportArgumentType]
    (result,) = bench.run([case])
    return result


def case(name: str) -> Case:
    (found,) = choose_cases(name, None)
    return found


def test_the_cases_are_those_of_the_definition():
    table = {c.name: (c.batch, c.prompt_len, c.num_tokens) for c in CASES}
    assert table == {
        "b=1": (1, 128, 256),
        "b=8": (8, 128, 256),
        "b=32": (32, 128, 256),
        "b=128": (128, 128, 256),
        "b=256": (256, 128, 256),
        "b=1@32k": (1, 32000, 64),
        "b=32@8k": (32, 8000, 64),
        "1x128": (1, 128, 1),
        "1x1024": (1, 1024, 1),
        "16x1024": (16, 1024, 1),
        "4x8192": (4, 8192, 1),
        "1x32768": (1, 32768, 1),
        "1x1024@31k": (1, 1024, 1),
        "1x131071": (1, 131071, 1),
    }


def test_a_decode_step_is_the_difference_of_two_times():
    engine = MadeUpEngine(step_s=0.010)
    result = measure(engine, case("b=8"))
    assert result.times == pytest.approx([0.010] * 3)
    row = step_row(result, H200)
    assert row["ms_per_step"] == pytest.approx(10.0)
    floor = decode_work(engine.model_config, 8, 256, 2).seconds(H200)
    assert row["floor_ms"] == pytest.approx(1e3 * floor)
    assert row["share_of_floor"] == pytest.approx(floor / 0.010)
    assert (row["bound"], "note" in row) == ("memory", False)


def test_prompts_that_take_longer_each_time_do_not_show():
    result = measure(MadeUpEngine(step_s=0.010, slower=0.01), case("b=1@32k"))
    assert result.times == pytest.approx([0.010] * 3)


def test_prompts_that_take_longer_after_another_do_not_show():
    result = measure(MadeUpEngine(step_s=0.010, hot=True), case("b=1@32k"))
    assert result.times == pytest.approx([0.010] * 3)


def test_all_prompts_at_once_greedy_and_without_an_end():
    engine = MadeUpEngine()
    measure(engine, case("b=8"))
    measured = engine.calls[2:]  # after the warm-up
    assert [params[0].max_tokens for _, params in measured] == [1] + [256, 1] * 3
    for prompts, params in measured:
        assert [len(prompt) for prompt in prompts] == [128] * 8
        assert len({tuple(prompt) for prompt in prompts}) == 8
        assert all(p.temperature == 0 and p.ignore_eos for p in params)


def test_sampled_rows_draw_apart():
    engine = MadeUpEngine()
    measure(engine, case("b=8"), sampled=True)
    params = engine.calls[-1][1]
    assert {(p.temperature, p.top_p) for p in params} == {(0.8, 0.8)}
    assert len({p.seed for p in params}) == 8


def test_the_figure_is_the_median_of_decode_and_the_best_of_prefill():
    decode = measure(MadeUpEngine(), case("b=1"))
    object.__setattr__(decode, "times", [3.0, 1.0, 2.5])
    assert decode.seconds == 2.5
    prefill = measure(MadeUpEngine(), case("16x1024"))
    object.__setattr__(prefill, "times", [3.0, 1.0, 2.5])
    assert prefill.seconds == 1.0


def test_prefill_is_told_as_time_and_as_rate():
    row = step_row(measure(MadeUpEngine(), case("4x8192")), H200)
    assert row["ms"] == pytest.approx(4 * 8192)
    assert row["prompt_tokens_per_s"] == pytest.approx(1000)
    assert row["bound"] == "compute"


def test_what_is_cached_is_read_once_and_what_is_new_each_time():
    engine = MadeUpEngine(enable_prefix_caching=True)
    result = measure(engine, case("1x1024@31k"))
    assert [len(prompts[0]) for prompts, _ in engine.calls] == [31744] + 3 * [32768]
    assert result.times == pytest.approx([1.024] * 3)
    assert step_row(result, H200)["prompt_tokens_per_s"] == pytest.approx(1000)
    alone = measure(MadeUpEngine(), case("1x1024")).work
    pairs = 1024 * 31744  # each costs every layer and head two products of 128 numbers
    assert result.work.flops - alone.flops == 28 * 20 * 4 * 128 * pairs
    assert result.work.num_bytes - alone.num_bytes == 28 * 2 * 4 * 128 * 2 * 31744


@pytest.mark.parametrize(
    ("limits", "name", "why"),
    [
        ({"max_model_len": 32063}, "b=1@32k", "max_model_len=32063"),
        ({"max_num_seqs": 255}, "b=256", "max_num_seqs=255"),
        ({"num_kv_blocks": 191}, "b=8", "192 K/V blocks"),
        ({}, "1x1024@31k", "needs enable_prefix_caching"),
        ({"enable_prefix_caching": True}, "1x1024", "would be cached"),
    ],
)
def test_what_does_not_fit_is_skipped_with_a_note(limits, name, why):
    engine = MadeUpEngine(**limits)
    row = step_row(measure(engine, case(name)), H200)
    assert why in str(row["note"]) and "ms_per_step" not in row
    assert engine.calls == []


def test_what_just_fits_is_measured():
    limits = {"max_model_len": 32064, "num_kv_blocks": 2004}
    assert measure(MadeUpEngine(**limits), case("b=1@32k")).times


def test_a_budget_leaves_out_repetitions_and_says_so():
    # a step of 1 s: the warm-up takes 8 s and a bit, a repetition 255 s and a bit
    engine = MadeUpEngine(step_s=1.0)
    result = measure(engine, case("b=1"), budget_s=600)
    assert len(result.times) == 2
    assert "2 of 3 repetitions" in result.note
    assert engine.now < 600


def test_a_budget_leaves_out_what_would_not_fit_at_all():
    engine = MadeUpEngine(step_s=1.0)
    result = measure(engine, case("b=1"), budget_s=200)
    assert not result.times and "about 258 s a repetition" in result.note
    assert engine.now < 10  # the warm-up alone
    spent = MadeUpEngine()
    assert "spent" in measure(spent, case("1x128"), budget_s=0).note and not spent.calls


@dataclass
class MadeUpTracer:
    excerpts: dict = field(default_factory=dict)

    def trace(self, name, excerpt, run):
        self.excerpts[name] = excerpt
        run()
        return {"steps": 1}


@pytest.mark.parametrize(
    ("name", "excerpt"),
    [
        ("b=1", Excerpt(117, 20, 1)),  # 255 steps come after that which reads the prompt
        ("b=256", Excerpt(116, 20, 256)),  # prompts take 4 steps
        ("b=32@8k", Excerpt(8, 16, 32)),  # prompts take 32, and there are 64 tokens
        ("16x1024", Excerpt()),
    ],
)
def test_some_steps_in_the_middle_are_traced_after_the_times(name, excerpt):
    engine, tracer = MadeUpEngine(), MadeUpTracer()
    result = measure(engine, case(name), tracer=tracer)
    assert tracer.excerpts == {name: excerpt}
    assert step_row(result, H200)["trace"] == {"steps": 1}
    untraced = MadeUpEngine()
    assert measure(untraced, case(name)).times == pytest.approx(result.times)
    assert len(engine.calls) == len(untraced.calls) + 1
    assert engine.calls[-1][1][0].max_tokens == case(name).num_tokens


def test_the_longest_prompt_wants_a_context_that_holds_it():
    assert measure(MadeUpEngine(), case("1x131071")).note == (
        "skipped: 131072 tokens, max_model_len=33000"
    )
    result = measure(MadeUpEngine(max_model_len=131072), case("1x131071"))
    assert result.times == pytest.approx([131.071] * 3)
    assert result.peak is None and "peak_gib" not in step_row(result, H200)


def test_the_peak_of_memory_is_told_on_a_gpu(monkeypatch):
    """What start-up took at most is no part of it: the peak is begun anew."""
    taken = {"now": 3 << 30, "most": 9 << 30}
    answers = {
        "memory_allocated": lambda _: taken["now"],
        "max_memory_allocated": lambda _: taken["most"],
        "reset_peak_memory_stats": lambda _: taken.update(most=5 << 30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    row = step_row(measure(MadeUpEngine(device="cuda:0"), case("1x128")), H200)
    assert (row["peak_gib"], row["peak_above_held_gib"]) == (5.0, 2.0)
    assert step_line(row).endswith("memory  peak 5.0 GiB, 2.00 above what was held")


def test_a_budget_leaves_out_the_trace_and_says_so():
    engine, tracer = MadeUpEngine(step_s=1.0), MadeUpTracer()
    result = measure(engine, case("b=1"), budget_s=600, tracer=tracer)
    assert not tracer.excerpts and "no trace: budget_s" in result.note
    assert "trace" not in step_row(result, H200) and engine.now < 600


def test_cases_are_chosen_by_name_and_by_group():
    assert [c.name for c in choose_cases("prefill,b=8,b=1", None)] == [
        *("b=1", "b=8", "1x128", "1x1024", "16x1024", "4x8192", "1x32768", "1x1024@31k"),
        "1x131071",
    ]
    assert len(choose_cases(None, None)) == len(CASES) == 14
    assert all(not c.is_prefill for c in choose_cases("decode", None))
    with pytest.raises(ValueError, match="b=2"):
        choose_cases("b=1,b=2", None)


def test_another_number_of_tokens_is_noted():
    (short,) = choose_cases("b=1", 17)
    assert "17 new tokens instead of 256" in measure(MadeUpEngine(), short).note
    assert choose_cases("1x128", 17) == choose_cases("1x128", None)
    with pytest.raises(ValueError, match="num_tokens=1"):
        choose_cases("b=1", 1)


def test_the_tiny_engine(tiny):
    cases = choose_cases("b=1,b=8,b=32,1x128", 5)
    with open_engine(tiny, enable_prefix_caching=False) as engine:
        bench = StepBench(engine, rest=lambda _: None)
        rows = [step_row(result, H200) for result in bench.run(cases)]
    measured, skipped = rows[:2] + rows[3:], rows[2]
    assert "max_num_seqs=8" in str(skipped["note"])
    for row in measured:
        share = row["share_of_floor"]
        assert isinstance(share, float) and 0 < share < 1


def test_the_tiny_engine_has_what_was_cached(tiny):
    short = replace(case("1x1024@31k"), prompt_len=20, cached_len=48)
    with open_engine(tiny) as engine:
        (result,) = StepBench(engine).run([short])
    assert len(result.times) == 3
