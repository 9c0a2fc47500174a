"""Fills Triton's cache on disk in several processes, while weights are loaded.

Owns how a process without a GPU learns which kernels an engine asks for: it runs start-up's steps
over tensors without data and compiles where Triton would launch. That changes Triton and
torch.distributed for good, in processes that do nothing else. Never decides what is compiled.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from triton import __version__ as TRITON_VERSION
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver
from triton.runtime.jit import JITCallable, JITFunction, compute_cache_key

from ernie_engine.config import ModelConfig
from ernie_engine.engine_config import ResolvedConfig
from ernie_engine.kernels import launch
from ernie_engine.kernels.no_device import NoDevice
from ernie_engine.kernels.registry import IMPLEMENTATIONS, select
from ernie_engine.model.ernie import DecoderLayer, Ernie
from ernie_engine.model.graphs import graph_shapes
from ernie_engine.model.kv_cache import KVCache, KVGeometry
from ernie_engine.model.rehearsal import compiling_plans, different_layers, largest_plan, rehearse
from ernie_engine.model.runner import ModelRunner
from ernie_engine.model.slots import Slots
from ernie_engine.parallel.mesh import Mesh, Placement
from ernie_engine.parallel.pipe import Pipe

_SOURCES = Path(__file__).parents[2]  # so that a child finds the package as this process did
_MAIN = "from ernie_engine.model.kernel_cache import main; main()"
MOST_PROCESSES = 16
KERNELS = "ernie_engine.kernels."
META = torch.device("meta")
# Fields of a config that no kernel depends on; a new field is taken to be none of them.
WITHOUT_KERNELS = (
    *("model", "device", "load_format", "log_kernels", "debug", "control_port"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "enable_prefix_caching"),
    *("distributed_timeout_seconds", "peer_timeout_seconds"),
)
# What twins in torch give that cannot do without numbers: they launch no kernel of ours.
EMPTY_TWINS: dict[str, Callable[..., Tensor]] = {
    "prefill_attention": lambda q, *_: torch.empty_like(q),
    "decode_attention": lambda q, *_: torch.empty_like(q),
    "moe_experts": lambda x, *_: torch.empty_like(x),
    "sample": lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
}
Meet = Callable[[str, str, Callable[[], Any]], None]  # a kernel's name, key, and how to compile it


class CacheFill:
    """The processes, from here to wait() or the end of the `with`; none where a stamp beside the
    cache says that all is there. Any rank of a host can do it for all of them: stages have parts
    of the same model, and tensor parallel ranks equal shares."""

    def __init__(self, config: ResolvedConfig, model_config: ModelConfig, mesh: Mesh):
        settle_keys()
        major, minor = torch.cuda.get_device_capability(config.device)
        cut = {"tp_size": mesh.tp_size, "tp_rank": mesh.tp_rank}
        task: dict[str, Any] = {
            "config": asdict(config),
            "model_config": asdict(model_config),
            "mesh": {**cut, "expert_parallel": mesh.expert_parallel},
            "arch": 10 * major + minor,
        }
        self._stamp = Path(knobs.cache.dir) / f"ernie_engine-{_digest(task)}"
        jobs = 0 if self._stamp.exists() else min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        reader, writer = os.pipe()
        self._told = os.fdopen(reader)  # a line for each kernel, from any of them
        shares = [task | {"job": job, "jobs": jobs} for job in range(jobs)]
        self._processes = [_start(share, writer) for share in shares]
        os.close(writer)

    def __enter__(self) -> "CacheFill":
        return self

    def __exit__(self, *error: object) -> None:
        self._told.close()
        for process in self._processes:
            process.kill()
            process.wait()

    def wait(self, alive: Callable[[], None], shows_bar: bool) -> None:
        """Until all is compiled; RuntimeError if a process fails."""
        for _ in tqdm(self._told, desc="compiling", unit="kernel", disable=not shows_bar):
            alive()
        if failed := [status for process in self._processes if (status := process.wait())]:
            raise RuntimeError(f"processes that compile kernels ended with status {failed}")
        self._stamp.parent.mkdir(parents=True, exist_ok=True)
        self._stamp.touch()


def settle_keys() -> None:
    """Give our kernels the keys that they have in Triton's cache, in one order in every process.

    A key counts constants of what a kernel calls only if that had a key before (in Triton 3.6), so
    it would depend on which kernel is launched first.
    """
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(KERNELS)]
    values = (value for module in modules for value in vars(module).values())
    functions = [value for value in values if isinstance(value, JITCallable)]
    for function in functions:
        function.hash, function.used_global_vals = None, {}
    for function in functions:
        function.cache_key  # noqa: B018 (computed when asked for)


def _digest(task: dict[str, Any]) -> str:
    """Of all that kernels depend on, and of what decides which there are."""
    config = {k: v for k, v in task["config"].items() if k not in WITHOUT_KERNELS}
    folders = (_SOURCES / "ernie_engine" / name for name in ("kernels", "model"))
    sources = [path.read_text("utf-8") for f in folders for path in sorted(f.glob("*.py"))]
    what = [task | {"config": config}, torch.__version__, TRITON_VERSION, sources]
    known = json.dumps(what, sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def _start(task: dict[str, Any], output: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(_SOURCES), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", _MAIN]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, env=environment)
    assert process.stdin is not None
    process.stdin.write(json.dumps(task).encode())
    process.stdin.close()
    return process


# --- in the processes ---


def main() -> None:
    """Every process meets the same kernels in the same order, and compiles its share of them."""
    settle_keys()
    task = json.load(sys.stdin)
    config = ResolvedConfig(**task["config"])
    fields = task["model_config"]
    model_config = ModelConfig(**fields | {"eos_token_ids": tuple(fields["eos_token_ids"])})
    met = 0

    def meet(name: str, key: str, compile_it: Callable[[], Any]) -> None:
        nonlocal met
        met += 1
        if met % task["jobs"] == task["job"]:
            compiled = compile_it()
            CudaLauncher(compiled.src, compiled.metadata)  # in C, else built at the first launch
            print(name, flush=True)

    meet_kernels(config, model_config, Mesh(**task["mesh"]), task["arch"], meet)


def meet_kernels(
    config: ResolvedConfig,
    model_config: ModelConfig,
    mesh: Mesh,
    arch: int,
    meet: Meet,
) -> None:
    """Call `meet` for each kernel that start-up will launch, once."""
    _pretend(arch, meet)
    runner = _runner_without_data(config, model_config, mesh)
    rehearse(runner, largest_plan(config))
    for plan in compiling_plans(config, runner.kv.num_blocks):
        rehearse(runner, plan)
    for shape in () if config.enforce_eager else graph_shapes(config).largest_first:
        slots, counts = torch.empty(2, shape.num_rows, dtype=torch.int64, device=META)
        runner.forward(slots, counts, shape, None)


def _pretend(arch: int, meet: Meet) -> None:
    """That there are such a GPU, numbers, and other ranks."""
    driver.set_active(NoDevice(arch))  # pyright: ignore[reportArgumentType]
    launch.architecture = lambda device: f"sm_{arch}"
    for collective in ("all_reduce", "all_gather"):
        setattr(dist, collective, lambda *args, **kwargs: SimpleNamespace(wait=lambda: None))
    for op, twin in EMPTY_TWINS.items():
        IMPLEMENTATIONS[op]["torch"] = twin
    run, seen = JITFunction.run, set()

    def met(self, *args, grid, warmup, **kwargs) -> None:
        _, known, _, _, binder = self.device_caches[arch]
        options = kwargs | {"debug": False, "instrumentation_mode": ""}
        _, specialization, options = binder(*args, **options)
        name, key = self.fn.__qualname__, compute_cache_key(known, specialization, options)
        if (self, key) not in seen:
            seen.add((self, key))
            meet(name, key, lambda: run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = met


def _runner_without_data(
    config: ResolvedConfig, model_config: ModelConfig, mesh: Mesh
) -> ModelRunner:
    place = Placement(mesh, getattr(torch, config.dtype), META)
    ops = select(config.kernels, "cuda")
    model = Ernie(model_config, ops, place, config.max_model_len)
    model.layers = different_layers(model.layers)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        layer.self_attn.index = i
    kv_heads = mesh.share_of_kv_heads(model_config.num_key_value_heads)
    sizes = len(model.layers), kv_heads, model_config.head_dim, config.block_size
    geometry = KVGeometry(*sizes, place.dtype)
    kv = KVCache(geometry, geometry.blocks_for(config.max_model_len), META)
    slots = Slots(config.max_num_seqs, config.max_model_len, config.block_size, META)
    depth = config.max_steps_in_flight
    return ModelRunner(model, ops, slots, kv, Pipe(place, model_config.hidden_size, depth), depth)
