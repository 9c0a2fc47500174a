"""What only a GPU shows: measured memory, the same draw as on a CPU."""

import pytest
import torch

from ernie_engine import Engine, SamplingParams
from ernie_engine.model.rehearsal import largest_plan
from tests.tiny import token_ids

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7], [9] * 40, list(range(30, 130))]


def test_the_cache_takes_what_the_largest_step_leaves(tiny):
    with Engine(tiny, device="cuda", gpu_memory_utilization=0.5) as engine:
        _, total = torch.cuda.mem_get_info()
        cache = engine._core.num_kv_blocks * 16 * 2 * 4 * 2 * 16 * 4
        assert 0.3 * total < cache < 0.5 * total
        torch.cuda.reset_peak_memory_stats()
        runner = engine._core.ranks.stage.runner
        plan = largest_plan(engine.config)
        runner.launch(plan)
        runner.sample(plan.sampling).wait()
        assert torch.cuda.max_memory_allocated() <= 0.5 * total


def test_too_little_memory_is_told(tiny):
    with pytest.raises(ValueError, match="max_model_len"):
        Engine(tiny, device="cuda", gpu_memory_utilization=1e-6)


def test_a_seed_draws_the_same_tokens_on_cpu_and_gpu(tiny):
    params = SamplingParams(
        max_tokens=40, temperature=0.8, top_p=0.9, top_k=50, seed=3, ignore_eos=True
    )
    found = []
    for device in ("cpu", "cuda"):
        with Engine(tiny, device=device, kv_cache_memory_bytes=4 << 20, max_num_seqs=8) as engine:
            found.append(token_ids(engine.generate(PROMPTS, params)))
    assert found[0] == found[1]
