"""Start-up's arithmetic: how many K/V blocks there are, and the step that memory is measured by."""

from dataclasses import replace

import pytest
import torch

from ernie_engine.engine.plan import NO_LOGPROBS
from ernie_engine.engine_config import EngineConfig, ResolvedConfig
from ernie_engine.kernels.decode_attention import MAX_GATHERED_TOKENS
from ernie_engine.model import memory
from ernie_engine.model.kv_cache import KVCache, KVGeometry
from ernie_engine.model.rehearsal import largest_plan, release_plan
from ernie_engine.model.runner import PROMPT_LOGITS_CHUNK
from ernie_engine.model.startup import describe, open_model

BLOCK_BYTES = 16 * 2 * 4 * 2 * 16 * 4  # of the tiny checkpoint: 4 layers, 2 heads of 16, fp32


def config_of(folder, **fields) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", load_format="dummy", **fields)


def num_blocks(folder, **fields) -> int:
    return open_model(describe(config_of(folder, **fields))).kv.num_blocks


def test_one_request_of_full_length_must_fit(tiny):
    fields = {"max_model_len": 100, "max_num_seqs": 4}  # 7 blocks of 16
    assert num_blocks(tiny, **fields, kv_cache_memory_bytes=7 * BLOCK_BYTES) == 7
    with pytest.raises(ValueError) as caught:
        num_blocks(tiny, **fields, kv_cache_memory_bytes=7 * BLOCK_BYTES - 1)
    assert "max_model_len=100 needs 7 K/V blocks and 6 fit" in str(caught.value)
    assert "lower max_model_len to 96" in str(caught.value)  # and then it works
    lower = {"max_model_len": 96, "kv_cache_memory_bytes": 7 * BLOCK_BYTES - 1}
    assert num_blocks(tiny, **lower) == 6


def test_on_a_cpu_the_cache_holds_what_all_slots_can_use_within_the_default(tiny, monkeypatch):
    fields = {"max_model_len": 100, "max_num_seqs": 4}
    assert num_blocks(tiny, **fields) == 4 * 7
    monkeypatch.setattr(memory, "CPU_KV_BYTES", 20 * BLOCK_BYTES + 5)
    assert num_blocks(tiny, **fields) == 20
    monkeypatch.setattr(memory, "CPU_KV_BYTES", 1)
    assert num_blocks(tiny, **fields) == 7  # one request of full length at least
    monkeypatch.undo()
    assert num_blocks(tiny, **fields, kv_cache_memory_bytes=9 * BLOCK_BYTES) == 9


def test_bytes_of_the_cache_are_those_it_takes():
    geometry = KVGeometry(3, 2, 8, block_size=4, dtype=torch.bfloat16)
    assert geometry.bytes_per_block == 4 * geometry.bytes_per_token == 4 * 2 * 3 * 2 * 8 * 2
    assert (
        KVCache(geometry, 5, torch.device("cpu"))._data.nbytes == 6 * geometry.bytes_per_block
    )  # one for padding
    assert [geometry.blocks_for(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert [geometry.blocks_in(n * 384 + 383) for n in (0, 1, 7)] == [0, 0, 3]


def test_the_cache_is_zeroed_and_no_layer_or_half_shares_memory(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    cache = KVCache(KVGeometry(3, 2, 8, 4, torch.float32), 5, torch.device("cpu"))
    halves = [half for layer in range(3) for half in cache.layer(layer)]
    assert all(half.shape == (6, 4, 2, 8) and not half.any() for half in halves)
    for value, half in enumerate(halves):
        half.fill_(value)
    assert [half.unique().tolist() for half in halves] == [[float(i)] for i in range(6)]


def resolved(tiny, **fields) -> ResolvedConfig:
    return describe(config_of(tiny, **fields)).config


# max_num_seqs, max_num_batched_tokens, max_model_len -> rows, query tokens of the last
LARGEST = {
    (8, 64, 512): (8, 57),
    (8, 64, 30): (8, 29),  # the longest row cannot fill the budget
    (1, 64, 512): (1, 64),
    (64, 20, 512): (20, 1),  # a token a row is all there is
    (8, 2048, 512): (8, 511),
    (3, 3, 2): (3, 1),
}


@pytest.mark.parametrize("sizes", LARGEST, ids=str)
def test_the_largest_step_uses_all_slots_and_the_budget(tiny, sizes):
    max_num_seqs, budget, max_len = sizes
    config = resolved(
        tiny, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=max_len
    )
    plan, (num_rows, num_last) = largest_plan(config), LARGEST[sizes]
    assert plan.num_tokens == [1] * (num_rows - 1) + [num_last]
    slots = list(range(num_rows))
    assert list(plan.slots) == [n.slot for n in plan.new] == [s for s, _ in plan.starts] == slots
    assert list(plan.sampling.rows) == slots
    contexts = [c + n for (_, c), n in zip(plan.starts, plan.num_tokens, strict=True)]
    assert contexts[-1] == max_len - 1 and max(contexts) < max_len  # room for the token drawn
    assert plan.num_new_blocks == [-(-context // 16) for context in contexts]
    assert plan.new_block_ids == [0] * sum(plan.num_new_blocks)


def test_the_largest_step_asks_for_all_that_sampling_can_do(tiny):
    config = resolved(tiny, max_num_seqs=4, max_logprobs=7)
    for new in largest_plan(config).new:
        spec = new.spec
        assert spec.num_logprobs == spec.num_prompt_logprobs == 7 != NO_LOGPROBS
        assert spec.temperature > 0 and 0 < spec.top_p < 1 and spec.top_k > 0 and spec.min_p > 0
        assert spec.frequency_penalty != 0


@pytest.mark.parametrize("budget, scored", [(4, 0), (5, 1), (100, 96), (4096, PROMPT_LOGITS_CHUNK)])
def test_the_largest_step_scores_a_chunk_of_a_prompt(tiny, budget, scored):
    part = largest_plan(resolved(tiny, max_num_seqs=4, max_num_batched_tokens=budget)).sampling
    columns = part.prompt_rows, part.prompt_offsets, part.prompt_counts
    expected = ([3], [0], [scored]) if scored else ([], [], [])
    assert tuple(map(list, columns)) == expected


def test_single_rows_of_the_largest_step_fill_what_decode_attention_gathers(tiny):
    config = replace(resolved(tiny, max_num_batched_tokens=8192), max_num_seqs=2000)
    contexts = [computed + 1 for _, computed in largest_plan(config).starts][:-1]
    long = [context for context in contexts if context == 511]
    assert contexts[: len(long)] == long and set(contexts[len(long) :]) == {1}
    assert len(long) * 511 >= MAX_GATHERED_TOKENS > (len(long) - 2) * 511


@pytest.mark.parametrize("sizes", LARGEST, ids=str)
def test_the_largest_step_runs_and_leaves_the_slots_free(tiny, sizes):
    max_num_seqs, budget, max_len = sizes
    fields = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
    description = describe(config_of(tiny, **fields, max_model_len=max_len))
    runner, plan = open_model(description), largest_plan(description.config)
    runner.launch(plan)
    result = runner.sample(plan.sampling).wait()
    assert len(result.token_ids) == LARGEST[sizes][0]
    assert [len(row[0].top_ids) for row in result.logprobs] == [20] * LARGEST[sizes][0]
    runner.state.apply(release_plan(plan))
    state = runner.state
    assert not (state.specs or state.host_prompt_lens or state.num_blocks)


def test_the_cache_gets_what_the_measured_step_and_others_leave(tiny, monkeypatch):
    description = describe(config_of(tiny, gpu_memory_utilization=0.75, max_num_seqs=2))
    runner, gib = open_model(description), memory.GIB
    numbers = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 20 * gib,
        "empty_cache": None,
        "mem_get_info": (50 * gib, 80 * gib),
        "memory_reserved": 26 * gib,  # so that 80 - 50 - 26 = 4 are outside torch
    }
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    parts = description.config, runner.kv.geometry, lambda kv: runner, lambda kv: None
    assert memory.measure_free_memory(*parts)[0] == (60 - 20 - 4) * gib
    assert not runner.state.specs
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 70 * gib)
    assert memory.measure_free_memory(*parts)[0] == 0


def test_other_ranks_are_told_what_fits_here_and_their_word_counts(tiny):
    description = describe(config_of(tiny, max_model_len=100, max_num_seqs=4))
    told = []
    runner = open_model(description, agree=lambda fits: told.append(fits) or 9)
    assert told == [28] and runner.kv.num_blocks == 9
    with pytest.raises(ValueError, match="needs 7 K/V blocks and 6 fit"):
        open_model(description, agree=lambda fits: 6)
