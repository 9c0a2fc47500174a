"""What every rank can say of itself: how it is, and what it was started with.

Read from the threads of the control channel, while steps run.
"""

import hashlib
from dataclasses import asdict
from typing import Any

import torch

from ernie_engine.engine.stage import Stage
from ernie_engine.model.compilations import compile_counter
from ernie_engine.model.runner import ModelRunner
from ernie_engine.model.startup import Description
from ernie_engine.parallel.health import State, Vitals
from ernie_engine.parallel.mesh import Mesh
from ernie_engine.version import VERSION

_MAY_DIFFER = ("model", "control_port")  # a path on each host; a port of rank 0's


class SelfReport:
    """`state` is told until there is a stage to look at."""

    def __init__(self) -> None:
        self.state = State.LOADING
        self._sources: tuple[Mesh, Stage, ModelRunner] | None = None

    def attach(self, mesh: Mesh, stage: Stage, runner: ModelRunner) -> None:
        self._sources = mesh, stage, runner

    def vitals(self) -> Vitals:
        num_kernels = compile_counter().count
        if self._sources is None:
            return Vitals(self.state, num_compilations=num_kernels)
        mesh, stage, runner = self._sources
        clock = runner.clock
        clock.look()
        begun, done = stage.num_steps, clock.num_steps
        state = State.STEPPING if begun > done else State.IDLE
        peak = _peak_memory(runner.state.device)
        counts = begun, done, mesh.pulse.count
        return Vitals(state, mesh.pp_rank, *counts, clock.busy_seconds, peak, num_kernels)


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def facts_of(description: Description) -> dict[str, Any]:
    """What must be equal on all ranks, as JSON has it: configuration, model, tensors, versions."""
    config = asdict(description.config)
    config = {name: value for name, value in config.items() if name not in _MAY_DIFFER}
    config["device"] = config["device"].split(":")[0]
    model = asdict(description.model_config)
    model["eos_token_ids"] = list(model["eos_token_ids"])
    tensors = description.checkpoint.shapes if description.checkpoint else {}
    digest = hashlib.sha256(repr(sorted(tensors.items())).encode()).hexdigest()
    versions = {"ernie_engine": VERSION, "torch": torch.__version__}
    return {**config, **versions, "config.json": model, "tensors": digest}
