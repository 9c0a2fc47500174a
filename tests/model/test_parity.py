"""The engine against transformers: greedy tokens, log-probabilities, error in bf16."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from ernie_engine import Engine, SamplingParams
from ernie_engine.engine.plan import NewSlot, SamplingPart, SamplingSpec, StepPlan
from ernie_engine.engine_config import EngineConfig
from ernie_engine.kernels import norm_moe
from ernie_engine.kernels.registry import Ops
from ernie_engine.model.moe import MoE
from ernie_engine.model.startup import describe, open_model
from tests.reference import (
    GEOMETRIES,
    MOE,
    Geometry,
    greedy,
    load_reference,
    logits,
    write_reference,
)

NUM_TOKENS = 64
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], list(range(10, 60))]
BIASED = GEOMETRIES["large router bias"]


SMALL = {"max_num_seqs": 8, "kv_cache_memory_bytes": 4 << 20}
STEPS = [120, 1, 1, 4, 40, 34]  # tokens of the steps of a prompt of 200: every kernel has its turn

# (device, kernels)
TWINS = [("cpu", "torch"), pytest.param("cuda", "torch", marks=pytest.mark.gpu)]
KERNELS = [pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
# Each geometry compiles kernels of its own: those that differ in what kernels see.
OF_KERNELS = [
    "dense, q width != hidden",
    "dense, untied, one kv head",
    "moe, two shared experts",
    "first moe layer 3, top-1",
    "odd vocabulary",
    "large router bias",
]


def forward(
    folder, dtype: str, tokens: list[int], device="cpu", change=None, kernels="torch", steps=()
) -> torch.Tensor:
    """The engine's logits [T, V] for one prompt, in one step or in `steps` of so many tokens;
    `change` may tamper with the model."""
    config = EngineConfig(model=str(folder), dtype=dtype, device=device, kernels=kernels, **SMALL)
    runner = open_model(describe(config))
    if change is not None:
        change(runner.model)
    found, done = [], 0
    for count in steps or [len(tokens)]:
        begins = done == 0
        new = [NewSlot(0, tokens, SamplingSpec())] if begins else []
        blocks = list(range(-(-done // 16), -(-(done + count) // 16)))
        plan = StepPlan(
            *(len(found), (), (), new, [(0, 0)] if begins else [], [0], [count]),
            *([len(blocks)], blocks, SamplingPart()),
        )
        runner.launch(plan)
        hidden = runner._launched[1].hidden
        with torch.inference_mode():
            found.append(runner.model.logits(hidden))
        done += count
    assert done == len(tokens)
    return torch.cat(found)


@pytest.mark.parametrize(("device", "kernels"), [*TWINS, *KERNELS])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_greedy_tokens_and_logprobs_equal_in_fp32(tmp_path, name, device, kernels):
    if kernels == "triton" and name not in OF_KERNELS:
        pytest.skip("differs in nothing that kernels see")
    shape = GEOMETRIES[name]
    write_reference(tmp_path, shape, torch.float32)
    model = load_reference(tmp_path, shape, torch.float32).to(device)
    params = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    fields = {"device": device, "dtype": "float32", "kernels": kernels, **SMALL}
    with Engine(tmp_path, **fields) as engine:
        outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = output.outputs[0]
        assert answer.token_ids == greedy(model, prompt, NUM_TOKENS)
        tokens = torch.tensor(prompt + answer.token_ids)
        expected = logits(model, tokens.tolist()).cpu().log_softmax(-1)[:-1]
        expected = expected.gather(1, tokens[1:, None])[:, 0]
        scores = output.prompt_logprobs[1:] + answer.logprobs
        got = torch.tensor([s[t].logprob for s, t in zip(scores, tokens[1:].tolist(), strict=True)])
        assert (got - expected).abs().max() < 1e-4


def drop_bias(moe: MoE) -> None:
    moe.gate.bias.data.zero_()


def round_bias(moe: MoE) -> None:
    moe.gate.bias.data.copy_(moe.gate.bias.bfloat16())


def add_bias_to_weights(moe: MoE) -> None:
    right = moe.ops.norm_router

    def wrong(x, residual, norm, eps, weight, bias, top_k, norm_min):
        y, total, _, ids = right(x, residual, norm, eps, weight, bias, top_k, norm_min)
        scores = ((y.float() @ weight.T).softmax(-1) + bias).gather(1, ids)
        return y, total, (scores / scores.sum(-1, keepdim=True)).to(x.dtype), ids

    parts = norm_moe.Parts(wrong, moe.ops.moe_experts)
    moe.ops = replace(moe.ops, norm_moe=partial(norm_moe.composed, parts))


@pytest.mark.parametrize("fault", [drop_bias, round_bias, add_bias_to_weights])
def test_a_wrong_use_of_the_router_bias_shows(tmp_path, fault):
    """The check of the test above, with a fault planted in the engine, must fail."""
    write_reference(tmp_path, BIASED, torch.float32)
    model = load_reference(tmp_path, BIASED, torch.float32)
    tokens = [(7 * i) % BIASED.config["vocab_size"] for i in range(64)]
    expected = logits(model, tokens)

    def plant(engine_model) -> None:
        for module in engine_model.modules():
            if isinstance(module, MoE):
                assert isinstance(module.ops, Ops)
                fault(module)

    right = forward(tmp_path, "float32", tokens)
    wrong = forward(tmp_path, "float32", tokens, change=plant)
    assert (right - expected).abs().max() < 1e-4
    assert (wrong - expected).abs().max() > 0.1


@pytest.mark.parametrize(("device", "kernels"), [*TWINS, *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dense, q width != hidden", "moe, two shared experts"])
def test_error_in_half_precision_is_not_above_transformers(tmp_path, name, dtype, device, kernels):
    """Root-mean-square error of the logits of 1600 tokens against an fp64 run of the same rounded
    weights, prompts in one step and in several."""
    shape, dtype_name = GEOMETRIES[name], str(dtype).removeprefix("torch.")
    write_reference(tmp_path, shape, dtype)
    exact_model = load_reference(tmp_path, shape, torch.float64)
    rounded_model = load_reference(tmp_path, shape, dtype).to(device)
    ours, theirs = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(shape.config["vocab_size"], (200,), generator=generator).tolist()
        exact = logits(exact_model, tokens)
        steps = STEPS if seed % 2 else ()
        got = forward(tmp_path, dtype_name, tokens, device, kernels=kernels, steps=steps)
        ours.append(got.cpu().double() - exact)
        theirs.append(logits(rounded_model, tokens).cpu().double() - exact)
    error, allowed = (torch.cat(e).square().mean().sqrt() for e in (ours, theirs))
    assert error <= 1.2 * allowed
    assert allowed < 0.1 * exact.std()  # else the reference itself would say nothing


def test_the_router_stays_fp32_in_a_bf16_model(tmp_path):
    write_reference(tmp_path, Geometry(MOE, bias_mean=20.0, bias_spread=0.02), torch.bfloat16)
    runner = open_model(describe(EngineConfig(model=str(tmp_path), device="cpu")))
    parameters = dict(runner.model.named_parameters())
    dtypes = {name: p.dtype for name, p in parameters.items() if ".gate." in name}
    assert len(dtypes) == 6 and set(dtypes.values()) == {torch.float32}
    assert parameters["layers.1.mlp.experts.gate_up"].dtype == torch.bfloat16
