"""No request waits for a kernel: start-up asks for all that steps can ask for, and counts them."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from triton import knobs

from ernie_engine.engine_config import EngineConfig, ResolvedConfig
from ernie_engine.kernels.registry import IMPLEMENTATIONS
from ernie_engine.model import kernel_cache
from ernie_engine.model.compilations import compile_counter
from ernie_engine.model.rehearsal import compiling_plans, few_layers, sizes_up_to
from ernie_engine.model.startup import describe, open_model
from ernie_engine.parallel.mesh import Mesh
from ernie_engine.testing.checkpoints import write_checkpoint
from tests.processes import ROOT, without_interpreter
from tests.tiny import SPEC

HERE = Path(__file__).parent
LONG = replace(SPEC, max_position_embeddings=20000, tokenizer=False, dtype="bfloat16")
GEOMETRIES = {
    "groups of 2": LONG,
    "groups of 5, 64 experts": replace(
        LONG, num_heads=20, num_kv_heads=4, head_dim=16, num_experts=64, top_k=6, hidden_size=80
    ),
    "one kv head, odd sizes": replace(
        LONG, num_kv_heads=1, head_dim=32, hidden_size=40, vocab_size=701, moe_intermediate_size=24
    ),
    "dense, fp32": replace(LONG, num_experts=0, num_shared_experts=0, dtype="float32"),
    "Hopper's attention, a short context": replace(
        LONG, num_heads=5, num_kv_heads=1, head_dim=128, max_position_embeddings=8192
    ),
}


def check_kernel_keys(folder: Path, **case) -> None:
    """Of random steps, of start-up and of the processes that fill the cache."""
    script = HERE / "kernel_keys.py"
    *missed, counts = without_interpreter(script, folder, json.dumps(case))
    assert not missed
    asked, needed = map(int, counts.split())
    assert 0.9 * asked < needed <= asked and asked > 30


@pytest.mark.parametrize("name", GEOMETRIES)
def test_no_random_step_asks_for_a_kernel_that_startup_did_not(tmp_path, name):
    write_checkpoint(tmp_path, GEOMETRIES[name], [])
    check_kernel_keys(tmp_path)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "mesh",
    [
        {"pp_size": 2, "pp_rank": 1, "tp_size": 2, "tp_rank": 1, "expert_parallel": True},
        pytest.param({"tp_size": 2, "tp_rank": 1}, marks=slow),
        pytest.param({"tp_size": 2, "tp_rank": 1, "expert_parallel": True}, marks=slow),
        pytest.param({"pp_size": 2, "pp_rank": 0}, marks=slow),
        pytest.param({"pp_size": 2, "pp_rank": 1}, marks=slow),
        pytest.param({"pp_size": 4, "pp_rank": 2, "tp_size": 2, "tp_rank": 0}, marks=slow),
    ],
    ids=str,
)
def test_no_random_step_of_a_rank_does(tmp_path, mesh):
    """Two shared experts: with half of the others whole, a rank has the width of one. Five layers:
    the last of two stages has two."""
    write_checkpoint(tmp_path, replace(LONG, num_shared_experts=2, num_layers=5), [])
    check_kernel_keys(tmp_path, mesh=mesh, num_plans=200)


EXPERTS_OF_8 = {"tp_size": 8, "tp_rank": 3, "expert_parallel": True}


@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("21b-a3b", {"num_plans": 60}),
        *(
            pytest.param(model, case, marks=slow)
            for model, case in (
                ("0.3b", {}),
                ("21b-a3b", {}),
                ("21b-a3b", {"fields": {"enable_chunked_prefill": False, "max_num_seqs": 512}}),
                ("21b-a3b", {"fields": {"max_num_batched_tokens": 37, "max_num_seqs": 5}}),
                ("21b-a3b", {"mesh": {"tp_size": 4, "tp_rank": 3}}),
                ("300b-a47b", {"mesh": {"tp_size": 8, "tp_rank": 3}}),
                ("300b-a47b", {"mesh": EXPERTS_OF_8}),
            )
        ),
    ],
    ids=str,
)
def test_no_random_step_of_a_real_model_does(model, case):
    """Contexts of up to 131,072 tokens."""
    check_kernel_keys(ROOT / "configs" / f"ernie-4.5-{model}", real=True, **case)


def test_startup_finds_its_kernels_with_any_op_switched_to_torch(tmp_path):
    """Twins that cannot do without numbers, and what they would give to kernels."""
    write_checkpoint(tmp_path, replace(SPEC, tokenizer=False), [])
    lines = without_interpreter(HERE / "switched_kernels.py", tmp_path)
    found = dict(line.split() for line in lines)
    assert list(found) == list(IMPLEMENTATIONS) and all(int(n) > 30 for n in found.values())


KEYS = """
import sys
from ernie_engine.kernels import norm_router, router
from ernie_engine.model.kernel_cache import settle_keys
kernels = [router._choose_kernel, norm_router._norm_router_kernel]
early = [kernel.cache_key for kernel in kernels[:: int(sys.argv[1])]]
settle_keys()
print(*(kernel.cache_key for kernel in kernels))
print(*early[:: int(sys.argv[1])])
"""


def test_a_kernels_key_does_not_depend_on_which_was_launched_first():
    orders = (without_interpreter("-c", KEYS, order) for order in ("1", "-1"))
    settled, early = zip(*orders, strict=True)
    assert settled[0] == settled[1]
    assert early[0] != early[1], "Triton does not need settle_keys() any more"


def test_kernels_are_asked_for_by_few_layers_and_all_of_them_serve(tiny):
    model = open_model(describe(EngineConfig(model=str(tiny), device="cpu"))).model
    layers = model.layers
    kinds = [type(layer.mlp) for layer in layers]
    with pytest.raises(ValueError, match="x"), few_layers(model):
        few = [type(layer.mlp) for layer in model.layers]
        assert set(few) == set(kinds) and 2 <= len(few) < len(kinds)
        raise ValueError("x")
    assert model.layers is layers


def test_compiling_plans_reach_all_limits_and_stay_within(tiny):
    config = EngineConfig(
        model=str(tiny), device="cpu", max_num_seqs=20, max_num_batched_tokens=700, max_model_len=90
    )
    config = describe(config).config
    plans = list(compiling_plans(config, num_blocks=6))
    for plan in plans:
        contexts = [c + n for (_, c), n in zip(plan.starts, plan.num_tokens, strict=True)]
        assert len(plan.slots) <= 20 and sum(plan.num_tokens) <= 700 and max(contexts) <= 89
        assert sorted(plan.num_tokens, key=lambda n: n > 1) == list(plan.num_tokens)
        assert set(plan.new_block_ids) <= set(range(6))
    assert max(len(plan.slots) for plan in plans) == 20
    assert max(sum(plan.num_tokens) for plan in plans) == 700


def test_sizes_end_with_the_largest():
    assert sizes_up_to(1) == [1] and sizes_up_to(10) == list(range(1, 11))
    assert sizes_up_to(100)[-4:] == [64, 65, 96, 100] and sizes_up_to(64)[-1] == 64


def test_each_kernel_that_triton_tells_of_is_counted_once_and_told_on(monkeypatch):
    told = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **what: told.append(what))
    counter = compile_counter()
    assert compile_counter() is counter is knobs.compilation.listener and counter.count == 0
    knobs.compilation.listener(src="kernel", cache_hit=True)
    knobs.compilation.listener(src="other", cache_hit=False)
    assert counter.count == 2 and [what["src"] for what in told] == ["kernel", "other"]


# --- the processes that fill Triton's cache ---


@pytest.fixture
def filling(tiny, tmp_path, monkeypatch):
    """A fill by three processes that run `code` instead of compiling."""
    description = describe(EngineConfig(model=str(tiny), device="cpu", kernels="torch"))
    config = replace(description.config, kernels="triton", device="cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def fill(code: str, **changes) -> kernel_cache.CacheFill:
        monkeypatch.setattr(kernel_cache, "_MAIN", code)
        return kernel_cache.CacheFill(
            replace(config, **changes), description.model_config, Mesh(tp_size=2)
        )

    return fill


COUNTING = "import json, sys; [print('k') for _ in range(json.load(sys.stdin)['job'] + 1)]"


def test_kernels_are_told_as_they_come_and_a_full_cache_is_left_alone(filling):
    for code, changes, expected in (
        (COUNTING, {}, 1 + 2 + 3),
        ("exit(3)", {}, 0),  # nobody is started
        ("exit(3)", {"enable_prefix_caching": False, "device": "cuda:1"}, 0),
        (COUNTING, {"max_num_seqs": 7}, 6),
    ):
        beats = []
        with filling(code, **changes) as fill:
            fill.wait(lambda told=beats: told.append(1), shows_bar=False)
        assert len(beats) == expected


@pytest.mark.parametrize("shows_bar", [True, False])
def test_who_waits_for_kernels_sees_how_many_there_are(filling, capsys, shows_bar):
    with filling(COUNTING) as fill:
        fill.wait(lambda: None, shows_bar)
    shown = capsys.readouterr().err
    assert "compiling: 6kernel" in shown if shows_bar else shown == ""


def test_fields_without_kernels_are_fields():
    assert {field.name for field in fields(ResolvedConfig)} > set(kernel_cache.WITHOUT_KERNELS)


def test_a_process_that_fails_is_told_and_nothing_is_stamped(filling):
    for _ in range(2):
        with filling("exit(3)") as fill, pytest.raises(RuntimeError, match=r"\[3, 3, 3\]"):
            fill.wait(lambda: None, shows_bar=False)


def test_no_process_stays_when_loading_fails(filling):
    with pytest.raises(ValueError, match="weights"), filling("import time; time.sleep(60)") as fill:
        raise ValueError("weights")
    assert [process.returncode for process in fill._processes] == [-9] * 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_processes_share_the_kernels_and_compile_them(filling, tmp_path):
    """Two kernels of many; launchers cannot be built without a driver."""
    code = (
        "from ernie_engine.model import kernel_cache as k; k.CudaLauncher = lambda *a: None;"
        "import json, sys, io; t = json.load(sys.stdin); t['jobs'] = 105;"
        "sys.stdin = io.StringIO(json.dumps(t)); k.main()"
    )
    beats = []
    with filling(code) as fill:
        fill.wait(lambda: beats.append(1), shows_bar=False)
    assert 0 < len(beats) == len(list(tmp_path.rglob("*.cubin"))) <= 3
