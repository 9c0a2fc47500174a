"""The kernel bench: its cases, its checks, its measurements with a made-up clock, its tuning."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from ernie_engine.bench.floors import Ceilings, Work
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.checking import near, same_bits
from ernie_engine.bench.kernels.measure import find_problem, make_arguments, measure_one
from ernie_engine.bench.kernels.shapes import NUM_TOKENS, SHAPES, RankShape
from ernie_engine.bench.kernels.table import CASES, ops_with
from ernie_engine.bench.kernels.tune import (
    TUNABLE,
    Tunable,
    _best_of,
    by_bucket,
    table_rows,
    tune,
    use,
)
from ernie_engine.config import ModelConfig
from ernie_engine.kernels.launch import DEFAULT, pick
from ernie_engine.kernels.registry import IMPLEMENTATIONS, knobs

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = RankShape(
    "tiny",
    hidden=72,
    heads=4,
    kv_heads=2,
    dense_width=40,
    vocab=300,
    num_experts=8,
    local_experts=4,
    top_k=3,
    expert_width=24,
    shared_width=48,
    head_dim=16,
)
MODELS = {"0.3B": "0.3b", "21B": "21b-a3b", "300B": "300b-a47b"}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_shapes_are_shares_of_the_real_models(shape):
    model, *layout = shape.name.split()
    config = ModelConfig.from_folder(ROOT / "configs" / f"ernie-4.5-{MODELS[model]}")
    ranks = int(layout[0].removeprefix("tp")) if layout else 1
    assert shape.hidden == config.hidden_size
    assert shape.head_dim == config.head_dim
    assert shape.heads * ranks == config.num_attention_heads
    assert shape.kv_heads * ranks == config.num_key_value_heads
    assert shape.dense_width * ranks == config.intermediate_size
    assert shape.vocab * ranks == config.vocab_size
    assert shape.num_experts == config.moe_num_experts
    if shape.num_experts:
        params = shape.local_experts * shape.expert_width * ranks
        assert params == config.moe_num_experts * config.moe_intermediate_size
        shared = config.moe_num_shared_experts * config.moe_intermediate_size
        assert (shape.top_k, shape.shared_width * ranks) == (config.moe_k, shared)


def cases_of(op, shape=TINY, num_tokens=5, dtype=torch.float32):
    return list(CASES[op](shape, num_tokens, dtype))


ON_LOGITS = ("token_counts", "apply_penalties", "sample", "token_logprobs")  # whole vocabulary


def cases_for_a_cpu(op):
    return cases_of(op, SHAPES["0.3B"], 1) if op in ON_LOGITS else cases_of(op)


@pytest.mark.parametrize("op", [op for op in CASES if op != "decode_attention"])
def test_the_twin_passes_its_own_check_and_a_planted_error_does_not(op):
    cases = cases_for_a_cpu(op)
    assert cases
    for case in cases:
        arguments, twin = make_arguments(case, CPU), IMPLEMENTATIONS[op]["torch"]
        assert find_problem(case, twin, twin, arguments) is None
        assert case.work.num_bytes > 0
        assert all(map(torch.equal, tensors(arguments), tensors(make_arguments(case, CPU))))

        def planted(*args, twin=twin):
            first, *rest = results = as_list(twin(*args))
            if first.is_floating_point():
                first[:1].view(-1)[:16] *= 1.01
            else:
                first.view(-1)[0] += 1
            return results[0] if not rest else results

        assert find_problem(case, planted, twin, arguments) is not None


def as_list(returned):
    return [returned] if isinstance(returned, torch.Tensor) else list(returned)


def tensors(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor)]


def test_attention_is_checked_query_by_query():
    (case,) = cases_of("decode_attention", SHAPES["21B tp4"], 200, torch.float32)[:1]
    case = dataclasses.replace(case, make=lambda device: small_decode())
    twin = IMPLEMENTATIONS["decode_attention"]["torch"]
    assert find_problem(case, twin, twin, small_decode()) is None

    def planted(*args):
        out = twin(*args)
        out[1, 2, :8] *= 1.01
        return out

    assert "error" in (find_problem(case, planted, twin, small_decode()) or "")


def small_decode():
    torch.manual_seed(0)
    q, caches = torch.randn(3, 4, 16), torch.randn(2, 6, 16, 2, 16)
    tables = torch.tensor([[5, 0], [2, 1], [3, 4]], dtype=torch.int32)
    start, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 3], [20, 17, 31]))
    return q, caches[0], caches[1], tables, start, lens, 0.25, 1


@pytest.mark.parametrize("op", CASES)
def test_cases_of_all_sizes_need_no_number_from_the_device(op):
    for num_tokens in NUM_TOKENS:
        for case in cases_of(op, SHAPES["21B tp1"], num_tokens, torch.bfloat16):
            assert len(case.make(torch.device("meta"))) > 0


def test_near_wants_every_block_right():
    exact = torch.randn(4, 4096, dtype=torch.float64)
    twin = [exact.bfloat16()]
    assert near((), twin, lambda: [exact], twin) is None
    for columns in (slice(64, 128), slice(4080, 4096)):
        ours = twin[0].clone()
        ours[2, columns] *= 1.03
        assert near((), [ours], lambda: [exact], twin)
    ours = twin[0].clone()
    ours[3] = torch.nan
    assert near((), [ours], lambda: [exact], twin)
    assert near((), [twin[0].float()], lambda: [exact], twin)  # another dtype
    ids = torch.arange(4)
    assert near((), [ids], lambda: [ids], [ids]) is None
    assert near((), [ids], lambda: [ids], [ids.flip(0)])


def test_same_bits_wants_every_bit():
    one, two = torch.ones(3), torch.ones(3).nextafter(torch.tensor(2.0))
    assert same_bits((), [one], lambda: [], [one]) is None
    assert same_bits((), [one], lambda: [], [two])


class Clock:
    """A timer that measures nothing: it says how long each op takes, and notes who was timed."""

    def __init__(self, *seconds, num_copies=1):
        self.seconds, self.num_copies, self.graphs = list(seconds), num_copies, []

    def copies(self, num_bytes):
        return self.num_copies

    def __call__(self, works, *, graph):
        assert len(works) == self.num_copies
        for work in works:
            work()
        self.graphs.append(graph)
        return self.seconds.pop(0)


def linear_case():
    def make(device):
        return torch.randn(3, 8, device=device), torch.randn(5, 8, device=device)

    return KernelCase("linear", "small", 3, make, Work(4e6, 0))


def test_a_right_kernel_is_timed_beside_its_twin():
    def kernel(x, weight):
        seen.add(x.data_ptr())
        return x @ weight.T

    seen, clock = set(), Clock(2e-6, 8e-6, num_copies=3)
    row = measure_one(linear_case(), kernel, CPU, clock).row(Ceilings(4e12, 1e12))
    assert clock.graphs == [True, False]
    assert len(seen) >= 3  # arguments of their own, and copies of them for the check
    assert row == pytest.approx(
        {
            "op": "linear",
            "case": "small",
            "num_tokens": 3,
            "us": 2.0,
            "twin_us": 8.0,
            "speedup": 4.0,
            "gb_per_s": 2000.0,
            "tflop_per_s": 0.0,
            "bound": "memory",
            "share_of_ceiling": 0.5,
        }
    )


@pytest.mark.parametrize("fault", [lambda y: y * 1.01, lambda y: y * torch.nan, lambda y: y[:2]])
def test_a_wrong_kernel_is_not_timed(fault):
    clock = Clock()
    measured = measure_one(linear_case(), lambda x, weight: fault(x @ weight.T), CPU, clock)
    assert measured.seconds is None
    assert "WRONG, not timed" in measured.row(Ceilings(1e12, 1e12))["problem"]


def test_what_an_op_writes_into_its_arguments_is_checked():
    (case,) = cases_of("rope_and_cache")
    twin = IMPLEMENTATIONS["rope_and_cache"]["torch"]

    def forgets_v(*args):
        out, v_cache = None, args[6].clone()
        out = twin(*args)
        args[6].copy_(v_cache)
        return out

    assert find_problem(case, forgets_v, twin, make_arguments(case, CPU))


# --- tuning ---


@pytest.fixture
def tunable(monkeypatch):
    """An op that is wrong with BLOCK 2; else the twin."""
    table = {(DEFAULT, 64): {"BLOCK": 1}}

    def kernel(x, weight):
        y = x @ weight.T
        return y * 2 if pick(table, x.device, len(x))["BLOCK"] == 2 else y

    twin = IMPLEMENTATIONS["linear"]["torch"]
    monkeypatch.setitem(IMPLEMENTATIONS, "linear", {"triton": kernel, "torch": twin})
    return Tunable("linear.TABLE", table, [{"BLOCK": block} for block in (1, 2, 4)])


def test_the_best_right_candidate_of_each_size_is_found(tunable):
    cases = [linear_case(), dataclasses.replace(linear_case(), num_tokens=64), linear_case()]
    told = []
    # With 3 tokens BLOCK 4 is three times as fast in one case, BLOCK 1 twice in the other.
    best = tune(tunable, cases, CPU, Clock(3.0, 1.0, 3.0, 6.0, 2.5, 2.0), told.append)
    assert best == {3: ({"BLOCK": 4}, 7.0), 64: ({"BLOCK": 4}, 2.0)}
    left_out = [line for line in told if "{'BLOCK': 2} left out: output 0" in line]
    assert len(left_out) == 3 and len(told) == 5
    assert tunable.table == {(DEFAULT, 64): {"BLOCK": 1}}  # as it was
    use(tunable, CPU, best)
    assert tunable.table == {(DEFAULT, 3): {"BLOCK": 4}, (DEFAULT, 64): {"BLOCK": 4}}


def test_a_candidate_that_is_wrong_in_one_case_is_out(tunable):
    assert _best_of([[1.0, 2.0], [float("inf"), 9.0]]) == 1
    assert _best_of([[1.0, float("inf")], [float("inf"), 9.0]]) is None


def test_other_tables_are_pinned_and_cases_without_a_bucket_left_out(tunable):
    switch, seen = {(DEFAULT, 1): {"ON": 0}}, []
    kernel = IMPLEMENTATIONS["linear"]["triton"]

    def switched(x, weight):
        seen.append((len(x), switch[DEFAULT, 1]["ON"], pick(tunable.table, x.device, 1)["BLOCK"]))
        return kernel(x, weight)

    IMPLEMENTATIONS["linear"]["triton"] = switched
    pinned = dataclasses.replace(
        tunable,
        bucket=lambda case: {3: 30}.get(case.size),
        pinned=lambda bucket: [(switch, {"ON": bucket})],
    )
    cases = [linear_case(), dataclasses.replace(linear_case(), num_tokens=64)]
    assert list(tune(pinned, cases, CPU, Clock(1.0, 2.0), lambda told: None)) == [30]
    assert set(seen) == {(3, 30, 1), (3, 30, 2), (3, 30, 4)}
    assert switch == {(DEFAULT, 1): {"ON": 0}}


def test_a_table_that_the_card_does_not_use_is_not_searched():
    told, unused = [], TUNABLE["prefill_attention"][0]
    assert unused.name == "prefill_hopper.SPLIT_TABLE"
    assert tune(unused, [linear_case()], CPU, Clock(), told.append) == {}
    assert told == ["prefill_hopper.SPLIT_TABLE is not used on this card"]


@pytest.mark.parametrize("op", TUNABLE)
def test_every_candidate_has_what_its_table_has(op):
    for tunable in TUNABLE[op]:
        names = {frozenset(params) for params in (*tunable.table.values(), *tunable.candidates)}
        assert len(names) == 1, tunable.name
        sizes = [1, 4, 16, 64, 256, 1024, 4096]
        cases = [case for n in sizes for case in CASES[op](SHAPES["21B tp1"], n, torch.bfloat16)]
        cases += CASES[op](SHAPES["0.3B"], 1, torch.bfloat16)
        assert by_bucket(tunable, cases), tunable.name


def test_rows_to_paste_join_equal_neighbours():
    best = {1: ({"A": 1}, 1.0), 4: ({"A": 1}, 1.0), 16: ({"A": 2, "B": 3}, 1.0)}
    rows = table_rows(CPU, best)
    assert rows == ['    ("default", 4): {"A": 1},', '    ("default", 16): {"A": 2, "B": 3},']


# --- the script ---


@pytest.fixture
def bench(monkeypatch, capsys):
    path = ROOT / "scripts" / "bench_kernels.py"
    spec = importlib.util.spec_from_file_location("bench_kernels_script", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e12))

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--device", "cpu", *map(str, args)])
        code = script.main()
        out, err = capsys.readouterr()
        return code, out if code != 2 else err

    return call


SMALL = ("--shapes", "0.3B", "--num-tokens", 1, 2, "--dtype", "float32", "--repeats", 1)


@pytest.mark.skipif(not knobs.runtime.interpret, reason="on a CPU kernels need the interpreter")
def test_script_measures(bench, tmp_path):
    code, out = bench("--only", "rms_norm", *SMALL, "--plot", tmp_path / "plot.png")
    assert code == 0
    assert "ceilings measured on" in out and "x twin" in out
    report = json.loads(out.splitlines()[-1])
    assert report["bench"] == "kernels"
    assert [row["num_tokens"] for row in report["rows"]] == [1, 2]
    assert report["rows"][0]["us"] > 0 and report["config"]["ops"] == ["rms_norm"]
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.skipif(not knobs.runtime.interpret, reason="on a CPU kernels need the interpreter")
def test_script_tells_a_wrong_kernel(bench, monkeypatch):
    twin = IMPLEMENTATIONS["rms_norm"]["torch"]
    wrong = {"triton": lambda *args: twin(*args) * 1.01, "torch": twin}
    monkeypatch.setitem(IMPLEMENTATIONS, "rms_norm", wrong)
    code, out = bench("--only", "rms_norm", *SMALL)
    assert code == 1
    assert out.count("WRONG, not timed") == 4  # two lines, two in JSON


@pytest.mark.skipif(not knobs.runtime.interpret, reason="on a CPU kernels need the interpreter")
def test_script_tunes(bench):
    code, out = bench("--tune", "--only", "rms_norm", *SMALL)
    assert code == 0
    assert '("default", 1024): {"num_warps": ' in out
    assert json.loads(out.splitlines()[-1])["best"]["rms_norm"]["rms_norm.TABLE"]["1024"]["us"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--implementation", "cuda"), "use one of"),
        (("--tune", "--only", "embedding"), "none of these has a launch table"),
    ],
)
def test_script_names_what_cannot_be(bench, args, message):
    code, err = bench(*args, *SMALL)
    assert code == 2
    assert message in err


def test_kernels_on_a_cpu_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="need a GPU"):
        ops_with("triton", "cpu")
