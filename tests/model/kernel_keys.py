"""Which kernels start-up asks for and which requests could ask for, without a GPU.

    python tests/model/kernel_keys.py FOLDER

Run without TRITON_INTERPRET. Launches nothing: each launch is noted by the key under which Triton
keeps compiled kernels (types, alignment, integers that are 1 or multiples of 16, constants). What
kernels would have written is zero, so plans may not depend on it. Prints a line for each key that a
random step asked for and start-up did not, or start-up did and the processes that fill the cache
would not; then how many keys there were.
"""

import random
import sys
from dataclasses import replace

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from ernie_engine.engine.plan import NO_LOGPROBS, SamplingPart, SamplingSpec, StepPlan
from ernie_engine.engine_config import EngineConfig
from ernie_engine.kernels import launch
from ernie_engine.kernels.no_device import NoDevice
from ernie_engine.kernels.registry import select
from ernie_engine.model import kernel_cache, startup
from ernie_engine.model.rehearsal import compiling_plans, made_up_plan, rehearse
from ernie_engine.model.runner import ModelRunner
from ernie_engine.parallel.mesh import Mesh

ARCH = 90


def zeroed(make):
    """What a kernel would have written may be used as an index."""

    def made(*args, **options):
        x = make(*args, **options)
        return x if x.is_meta else x.zero_()

    return made


class Keys(set):
    """Takes the place of JITFunction.run."""

    def note(self):
        def run(kernel, *args, grid, warmup, **kwargs):
            kwargs["debug"], kwargs["instrumentation_mode"] = False, ""
            _, known, _, _, binder = kernel.device_caches[ARCH]
            _, specialization, options = binder(*args, **kwargs)
            self.add((kernel.fn.__qualname__, compute_cache_key(known, specialization, options)))

        return run


def random_plan(rng: random.Random, config, num_blocks: int) -> StepPlan:
    """A step as a scheduler might make it, of requests that ask for all sorts of things."""
    longest, budget = config.max_model_len - 1, config.max_num_batched_tokens
    most = rng.choice([1, 2, 3, 8, 20, config.max_num_seqs])
    counts = [1] * rng.randint(0, most - 1)
    left = budget - len(counts)
    while left > 0 and len(counts) < most:
        counts.append(min(longest, rng.randint(1, rng.choice([2, 5, 20, 70, 300, left]))))
        left -= counts[-1]
    while sum(counts) > budget:
        counts.pop()
    counts.sort(key=lambda count: count > 1)
    contexts = rng.choice([64, 1000, longest])
    rows = [(rng.randint(0, min(contexts, longest - count)), count) for count in counts]
    if rng.random() < 0.2:  # as long as a table can be
        rows[-1] = longest - counts[-1], counts[-1]
    spec = SamplingSpec(
        temperature=rng.choice([0.0, 0.8]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 7]),
        presence_penalty=rng.choice([0.0, 0.5]),
        num_logprobs=rng.choice([NO_LOGPROBS, 0, 1, 16, 20]),
        num_prompt_logprobs=rng.choice([0, 1, 20]),
        bias_ids=rng.choice([(), (3,)]),
        bias_values=(1.0,),
    )
    if not spec.bias_ids:
        spec = SamplingSpec(temperature=spec.temperature, num_logprobs=spec.num_logprobs)
    drawn = [row for row in range(len(rows)) if rng.random() < 0.8]
    scoring = ()
    if counts[-1] > 2 and spec.num_prompt_logprobs != NO_LOGPROBS:
        offset = rng.randint(0, counts[-1] - 2)
        scoring = [len(rows) - 1], [offset], [rng.randint(1, counts[-1] - 1 - offset)]
    part = SamplingPart(drawn, *scoring)
    return made_up_plan(rows, config.block_size, num_blocks, (0,), spec, part)


def keys_of(runner: ModelRunner, plans) -> set:
    keys = Keys()
    JITFunction.run = keys.note()
    for plan in plans:
        rehearse(runner, plan)
    return keys


def main(folder: str) -> None:
    torch.empty, torch.empty_like = zeroed(torch.empty), zeroed(torch.empty_like)
    driver.set_active(NoDevice(ARCH))  # pyright: ignore[reportArgumentType]
    launch.architecture = lambda device: f"sm_{ARCH}"
    startup.select = lambda kernels, device_type: select("triton", "cuda")
    config = EngineConfig(
        model=folder,
        device="cpu",
        load_format="dummy",
        max_num_seqs=70,
        max_num_batched_tokens=2100,
    )
    runner = startup.open_model(startup.describe(config))
    resolved, num_blocks = startup.describe(config).config, runner.kv.num_blocks
    asked = keys_of(runner, compiling_plans(resolved, num_blocks))
    rng = random.Random(1)
    needed = keys_of(runner, (random_plan(rng, resolved, num_blocks) for _ in range(400)))
    filled = set()
    resolved = replace(resolved, kernels="triton")
    model_config = startup.describe(config).model_config
    kernel_cache.meet_kernels(
        resolved, model_config, Mesh(), ARCH, lambda *met: filled.add(met[:2])
    )
    for name, key in sorted((needed - asked) | (asked - filled)):
        print("missed", name, key)
    print(len(asked), len(needed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
