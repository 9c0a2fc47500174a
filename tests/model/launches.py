"""What a step of one token puts on a GPU's stream, layer by layer, without a GPU.

    python tests/model/launches.py FOLDER ...

Run without TRITON_INTERPRET. Launches nothing: the step runs over tensors without data, and each
launch of Triton's and each op of torch that is no view and no empty memory is noted by name. Prints
a line of JSON for each layer of a kind and for what comes between them.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ernie_engine.engine_config import EngineConfig
from ernie_engine.kernels import launch
from ernie_engine.kernels.no_device import NoDevice
from ernie_engine.model import kernel_cache
from ernie_engine.model.graphs import graph_shapes
from ernie_engine.model.runner import ModelRunner
from ernie_engine.model.startup import describe
from ernie_engine.parallel.mesh import Mesh

ARCH = 90
BETWEEN = "between layers"


class Launches(TorchDispatchMode):
    """Of all that runs within it: part of the step -> names, in order."""

    def __init__(self):
        super().__init__()
        self.parts: list[tuple[str, list[str]]] = [(BETWEEN, [])]

    def begin(self, part: str) -> None:
        self.parts.append((part, []))

    def note(self, name: str) -> None:
        self.parts[-1][1].append(name)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not is_free(op, (args, kwargs), result):
            self.note(str(op))
        return result


def is_free(op, given, result) -> bool:
    """Whether torch only made a view of what there was, or memory that it does not write to."""
    if op._schema.is_mutable or not memory(result):
        return False
    return "empty" in op.__name__ or memory(result) <= memory(given)


def memory(values) -> set[int]:
    """Of all tensors among the values."""
    return {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, Tensor)}


def step_of_one_token(runner: ModelRunner, config) -> None:
    """As it is recorded."""
    shape = graph_shapes(config).decode[0]
    assert shape.num_tokens == 1
    slots, counts = torch.empty(2, 1, dtype=torch.int64, device="meta")
    runner.forward(slots, counts, shape, None)


def launches_of(folder: str) -> list[tuple[str, list[str]]]:
    fields = {"device": "cpu", "load_format": "dummy", "kernels": "torch"}
    described = describe(EngineConfig(model=folder, **fields))
    config = replace(described.config, kernels="triton")
    runner = kernel_cache._runner_without_data(config, described.model_config, Mesh())
    JITFunction.run = lambda *args, **kwargs: None
    step_of_one_token(runner, config)  # makes counters that stay
    noted = Launches()
    JITFunction.run = lambda kernel, *args, **kwargs: noted.note(kernel.fn.__qualname__)
    for layer in runner.model.layers:
        layer.register_forward_pre_hook(lambda layer, _: noted.begin(type(layer.mlp).__name__))
        layer.register_forward_hook(lambda *_: noted.begin(BETWEEN))
    with noted:
        step_of_one_token(runner, config)
    return noted.parts


def main(folders: list[str]) -> None:
    driver.set_active(NoDevice(ARCH))  # pyright: ignore[reportArgumentType]
    launch.architecture = lambda device: f"sm_{ARCH}"
    for folder in folders:
        for part, names in launches_of(folder):
            print(json.dumps({"model": Path(folder).name, "part": part, "launches": names}))


if __name__ == "__main__":
    main(sys.argv[1:])
