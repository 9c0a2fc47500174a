"""Which kernels start-up asks for and which requests could ask for, without a GPU.

    python tests/model/kernel_keys.py FOLDER [CASE]

Run without TRITON_INTERPRET; CASE: a Case's fields, as JSON. Launches nothing: each launch is noted
by the key under which Triton keeps compiled kernels (types, alignment, integers that are 1 or
multiples of 16, constants). What kernels would have written is zero, so plans may not depend on it.
Prints a line for each key that a random step or a recording asked for and start-up did not, or
start-up did and the processes that fill the cache would not; then how many keys there were.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from ernie_engine.engine.plan import NO_LOGPROBS, SamplingPart, SamplingSpec, StepPlan
from ernie_engine.engine_config import EngineConfig
from ernie_engine.kernels import launch
from ernie_engine.kernels.no_device import NoDevice
from ernie_engine.kernels.registry import select
from ernie_engine.model import kernel_cache, recording, startup
from ernie_engine.model.graphs import graph_shapes
from ernie_engine.model.recording import GraphMaker
from ernie_engine.model.rehearsal import made_up_plan, rehearse
from ernie_engine.model.runner import ModelRunner
from ernie_engine.parallel.mesh import Mesh
from tests.recorder import Rerun

ARCH = 90
SMALL = {"max_num_seqs": 70, "max_num_batched_tokens": 2100}


@dataclass(frozen=True)
class Case:
    """One rank's start-up. A `real` model is too large for this machine: its tensors hold nothing,
    and its limits are those that an engine has if nobody changes them."""

    mesh: dict[str, Any] = field(default_factory=dict)
    real: bool = False
    fields: dict[str, Any] = field(default_factory=dict)  # of the EngineConfig
    num_plans: int = 400


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
    most = min(budget, config.max_num_seqs, rng.choice([1, 2, 3, 8, 20, 1000]))
    counts = [1] * rng.randint(0, most - 1)
    left = budget - len(counts)
    while left > 0 and len(counts) < most:
        wanted = rng.randint(1, rng.choice([2, 5, 20, 70, 300, left]))
        counts.append(min(longest, left, wanted))
        left -= counts[-1]
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


def keys_of(ask: Callable[[], None]) -> set:
    keys = Keys()
    JITFunction.run = keys.note()
    ask()
    return keys


def serve(runner: ModelRunner, maker: GraphMaker, config, num_plans: int) -> None:
    """Random steps, and all recordings."""
    rng, num_blocks = random.Random(1), runner.kv.num_blocks
    for _ in range(num_plans):
        rehearse(runner, random_plan(rng, config, num_blocks))
    for shape in maker.shapes.largest_first:
        maker.make(shape, range(maker.room(shape).num_slots), range(num_blocks))


def maker_of(runner: ModelRunner, config, hidden_size: int) -> GraphMaker:
    shapes, stream = graph_shapes(config), None
    if not runner.mesh.is_first_stage:
        num_tokens = max(shape.num_tokens for shape in shapes.largest_first)
        dtype, device = getattr(torch, config.dtype), runner.state.device
        stream = torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device)
    return GraphMaker(runner.forward, shapes, Rerun(), stream)


def pretend() -> None:
    """That there are such a GPU and other ranks."""
    torch.empty, torch.empty_like = zeroed(torch.empty), zeroed(torch.empty_like)
    F.linear = lambda x, weight: x.new_zeros(*x.shape[:-1], len(weight))  # a library's: no kernel
    driver.set_active(NoDevice(ARCH))  # pyright: ignore[reportArgumentType]
    launch.architecture = lambda device: f"sm_{ARCH}"
    startup.select = lambda kernels, device_type: select("triton", "cuda")
    for name in ("all_reduce", "all_gather", "isend", "irecv"):
        setattr(dist, name, lambda *args, **kwargs: SimpleNamespace(wait=lambda: None))
    torch.cuda.synchronize = lambda: None
    recording.compare = lambda *args: True


def describe(folder: str, mesh: Mesh, fields: dict[str, Any]) -> startup.Description:
    sizes = {
        "tensor_parallel_size": mesh.tp_size,
        "pipeline_parallel_size": mesh.pp_size,
        "enable_expert_parallel": mesh.expert_parallel,
    }
    given = {"model": folder, "device": "cpu", "load_format": "dummy"}
    return startup.describe(EngineConfig(**given, **sizes, **fields))


def main(folder: str, text: str = "{}") -> None:
    pretend()
    case = Case(**json.loads(text))
    mesh = Mesh(**case.mesh)
    described = describe(folder, mesh, case.fields if case.real else SMALL | case.fields)
    config, model_config = replace(described.config, kernels="triton"), described.model_config
    if case.real:
        runner = kernel_cache._runner_without_data(config, model_config, mesh)
    else:
        runner = startup.open_model(described, mesh)
    maker = maker_of(runner, config, model_config.hidden_size)
    arguments = config, runner, maker, lambda state: None, False
    asked = keys_of(lambda: startup._compile_kernels(*arguments))
    needed = keys_of(lambda: serve(runner, maker, config, case.num_plans))
    filled = set()
    # One rank of a host fills the cache for all of them.
    another = Mesh(tp_size=mesh.tp_size, expert_parallel=mesh.expert_parallel)
    kernel_cache.meet_kernels(config, model_config, another, ARCH, lambda *met: filled.add(met[:2]))
    for name, key in sorted((needed - asked) | (asked - filled)):
        print("missed", name, key)
    print(len(asked), len(needed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
