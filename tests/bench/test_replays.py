"""Replays of made-up steps, without a GPU by doing them again: tests/recorder.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from ernie_engine import EngineConfig
from ernie_engine.bench import replays
from ernie_engine.bench.replays import Replays, measure_all, parse_batch, parse_change
from ernie_engine.engine.core import describe
from ernie_engine.kernels import decode_attention, launch, vocab_head
from ernie_engine.kernels.launch import DEFAULT, pick
from ernie_engine.model.graphs import StepGraph
from ernie_engine.model.startup import open_model
from tests.recorder import Rerun

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_replays.py"
CPU = torch.device("cpu")


@pytest.fixture
def runner(tiny):
    fields = {"max_num_seqs": 8, "max_model_len": 200, "kv_cache_memory_bytes": 4 << 20}
    return open_model(describe(EngineConfig(model=str(tiny), device="cpu", **fields)))


def test_batches():
    assert parse_batch("3x130").contexts == [130, 130, 130]
    spread = parse_batch("4x128-384").contexts
    assert sorted(spread) == [128, 213, 298, 384] and spread != sorted(spread)


@pytest.mark.parametrize("text", ["", "3", "0x5", "3x", "x5", "3x5-", "3x5-7-9", "3 x 5"])
def test_what_is_no_batch_is_refused(text):
    with pytest.raises(ValueError, match="ROWSxCONTEXT"):
        parse_batch(text)


def test_a_change_is_made_for_a_while():
    before = dict(decode_attention.TABLE)
    row = pick(decode_attention.TABLE, CPU, 128)
    with parse_change("decode_attention.TABLE:128:SPLITS=2,BLOCK_N=32").made(CPU):
        changed = {**row, "SPLITS": 2, "BLOCK_N": 32}
        assert pick(decode_attention.TABLE, CPU, 128) == changed != row
        assert before | {(DEFAULT, 128): changed} == decode_attention.TABLE
    assert before == decode_attention.TABLE


def test_a_new_bucket_is_added_with_what_stood_there():
    with parse_change("vocab_head.TABLE:100:COLUMNS=32").made(CPU):
        assert pick(vocab_head.TABLE, CPU, 99)["COLUMNS"] == 32
        assert pick(vocab_head.TABLE, CPU, 99)["ROWS"] == pick(vocab_head.TABLE, CPU, 101)["ROWS"]
        assert pick(vocab_head.TABLE, CPU, 101)["COLUMNS"] == 128


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("decode_attention.TABLE:128", "FILE.TABLE:BUCKET"),
        ("decode_attention.TABLE:128:SPLITS=two", "FILE.TABLE:BUCKET"),
        ("nowhere.TABLE:128:SPLITS=2", "no TABLE in ernie_engine/kernels/nowhere.py"),
        ("decode_attention.TABEL:128:SPLITS=2", "no TABEL in"),
        ("decode_attention.TABLE:128:SPLIT=2", "have no .'SPLIT'., but .'BLOCK_N'"),
        ("decode_attention.WIDE_ROWS:128:SPLITS=2", "WIDE_ROWS is no launch table"),
        ("moe_hopper.LAUNCH:1:num_warps=8", "LAUNCH is no launch table"),
        ("decode_attention.IMPLEMENTATIONS:1:triton=3", "IMPLEMENTATIONS is no launch table"),
    ],
)
def test_what_cannot_be_changed_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        parse_change(text)


def test_rows_share_nothing(runner):
    plan = Replays(runner, Rerun())._plan(parse_batch("6x40"))
    assert sum(plan.num_new_blocks) == len(set(plan.new_block_ids)) == len(plan.new_block_ids)
    tokens = set()
    for new, (_, computed) in zip(plan.new, plan.starts, strict=True):
        assert len(new.token_ids) == computed + replays.ROOM
        tokens.add(new.token_ids[computed])
    assert len(tokens) == 6


def test_rows_that_need_too_many_blocks_are_refused(runner):
    with pytest.raises(ValueError, match="'8x100' needs 88 K/V blocks of 16 tokens and"):
        runner.kv.num_blocks = 80
        Replays(runner, Rerun()).measure(parse_batch("8x100"))


def test_a_step_is_timed_from_its_context_on(runner, monkeypatch):
    recorder = Rerun()
    timed, batch = Replays(runner, recorder), parse_batch("3x20-50")
    first, streams, replay = [], [], StepGraph.replay

    def noted(graph, slots, *more):
        first.append(runner.state.num_computed[list(slots)].tolist())
        output = replay(graph, slots, *more)
        streams.append(output.hidden.clone())
        return output

    monkeypatch.setattr(StepGraph, "replay", noted)
    seconds, hidden = timed.measure(batch)
    assert seconds > 0 and recorder.num_replays == len(first) == replays.ROOM
    assert first[0] == list(batch.contexts)  # and the last is the last that has room
    assert first[-1] == [context + replays.ROOM - 1 for context in batch.contexts]
    assert torch.equal(hidden, streams[0]) and not torch.equal(hidden, streams[-1])
    assert not runner.state.specs and not runner.state.num_blocks  # all slots are free
    assert len({tuple(row.tolist()) for row in hidden}) == 3


def test_what_nothing_was_changed_in_is_equal(runner):
    batches = [parse_batch("1x50"), parse_batch("3x2-8")]  # these write where that one reads
    reports = measure_all(Replays(runner, Rerun()), batches, {"a": [], "b": []}, 2)
    assert [set(report["equal"].values()) for report in reports] == [{True}] * 4


def test_a_change_is_of_the_card(monkeypatch):
    for module in (replays, launch):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    with parse_change("decode_attention.TABLE:1024:SPLITS=2").made(CPU):
        assert pick(decode_attention.TABLE, CPU, 1000)["SPLITS"] == 2


def test_a_variant_that_does_not_fit_is_told():
    class Full:
        device = CPU

        def measure(self, batch):
            raise OutOfResources(300000, 232448, "shared memory")

    [report] = measure_all(Full(), [parse_batch("1x5")], {"a": []}, 1)
    assert "shared memory" in report["problem"] and not report["us"]


def test_several_ranks_are_refused(tiny):
    with pytest.raises(ValueError, match="replays are of one rank"):
        config = EngineConfig(model=str(tiny), device="cpu", tensor_parallel_size=2)
        replays.open_runner(config)


def test_variants_are_timed_in_turns_and_compared():
    seen = []

    class Fake:
        device = CPU

        def measure(self, batch):
            seen.append((batch.name, pick(vocab_head.TABLE, CPU, 16)["COLUMNS"]))
            return 2e-3, torch.tensor([seen[-1][1] == 64, len(batch.contexts)])

    variants = {"as they are": [], "wide": [parse_change("vocab_head.TABLE:16:COLUMNS=128")]}
    batches = [parse_batch("1x5"), parse_batch("2x5")]
    rows = list(measure_all(Fake(), batches, variants, 2))
    assert seen == [("1x5", 64), ("2x5", 64), ("1x5", 128), ("2x5", 128)] * 2
    assert [(row["variant"], row["turn"]) for row in rows] == [
        *(("as they are", 0), ("wide", 0), ("as they are", 1), ("wide", 1))
    ]
    assert rows[0]["us"] == {"1x5": 2000.0, "2x5": 2000.0}
    assert [row["equal"]["1x5"] for row in rows] == [True, False, True, False]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--batches", "1xfour"), "batch '1xfour'"),
        (("--batches", "1x4", "--change", "a.B:1:c=d"), "change 'a.B:1:c=d'"),
        (("--batches", "1x4", "--turns", "0"), "--turns 0: at least one"),
        (("--batches", "1x4", "--max-num-seqs", "3"), "max_num_seqs=3: it follows from the"),
        (("--batches", "1x4", "--enforce-eager"), "enforce_eager=True: it follows from the"),
    ],
)
def test_the_script_says_what_is_wrong(tiny, flags, why):
    done = run("--model", str(tiny), *flags)
    assert done.returncode == 2 and why in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_script_wants_a_gpu(tiny):
    done = run("--model", str(tiny), "--batches", "1x4")
    assert done.returncode == 2 and "there is no GPU" in done.stderr


@pytest.mark.gpu
def test_the_script_on_a_gpu(tiny):
    same, other = "rms_norm.TABLE:1024:num_warps=2", "decode_attention.TABLE_FP32:512:BLOCK_N=32"
    flags = "--turns", "1", "--kv-cache-memory-bytes", str(64 << 20)
    done = run(
        "--model", str(tiny), "--batches", "1x50", "3x20-80", *flags, "--change", same, other
    )
    assert done.returncode == 0, done.stderr
    head, unchanged, changed, last = done.stdout.splitlines()
    assert head.split() == ["1x50", "3x20-80"] and unchanged.startswith("as they are")
    assert changed.startswith(f"{same} {other} ") and last.startswith('{"bench": "replays"')
