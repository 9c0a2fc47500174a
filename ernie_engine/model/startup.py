"""From a folder to a runner that is ready: configuration, weights, memory.

Start-up values flow once: config resolved -> model filled -> memory measured -> K/V cache made ->
kernels asked for -> graphs ready to be recorded, each when a plan says so. Owns that order. Runs
no request.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ernie_engine.config import ModelConfig, Shapes
from ernie_engine.engine_config import EngineConfig, ResolvedConfig
from ernie_engine.kernels.registry import Ops, asked_for, select
from ernie_engine.model.checkpoint import Checkpoint
from ernie_engine.model.compilations import compile_counter
from ernie_engine.model.ernie import Ernie
from ernie_engine.model.forward import Forward
from ernie_engine.model.graphs import (
    NO_GRAPHS,
    CudaRecorder,
    GraphShapes,
    Recorder,
    StepGraphs,
    graph_shapes,
    obstacle,
)
from ernie_engine.model.kernel_cache import CacheFill
from ernie_engine.model.kv_cache import KVCache, KVGeometry
from ernie_engine.model.memory import GIB, kv_bytes, tell_blocks
from ernie_engine.model.recording import GraphMaker, ToldMaker
from ernie_engine.model.rehearsal import compiling_plans, few_layers, rehearse
from ernie_engine.model.runner import ModelRunner
from ernie_engine.model.slots import Slots
from ernie_engine.model.weights import fill_dummy, load_weights
from ernie_engine.parallel.health import State
from ernie_engine.parallel.mesh import Mesh, Placement
from ernie_engine.parallel.pipe import Pipe
from ernie_engine.parallel.planner import Grid, choose_grid, deal_layers
from ernie_engine.parallel.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """A checkpoint folder that was read but for its weights."""

    config: ResolvedConfig
    model_config: ModelConfig
    checkpoint: Checkpoint | None  # None: dummy weights
    world: World

    @property
    def grid(self) -> Grid:
        return Grid(self.config.pipeline_parallel_size, self.config.tensor_parallel_size)


def describe(config: EngineConfig) -> Description:
    """Read a checkpoint's headers and settle the configuration. ValueError, saying why not."""
    folder = Path(config.model)
    if not folder.is_dir():
        raise ValueError(f"model={config.model!r} is not a folder with a checkpoint")
    checkpoint = None if config.load_format == "dummy" else Checkpoint.open(folder)
    model_config = ModelConfig.from_folder(folder, checkpoint and checkpoint.shapes)
    world = World.from_env(os.environ)
    grid = choose_grid(
        model_config,
        config.tensor_parallel_size,
        config.pipeline_parallel_size,
        config.enable_expert_parallel,
        world,
    )
    if not world.is_launched:
        world = replace(world, size=grid.size, local_size=grid.size)
    config = replace(config, kernels=asked_for(config.kernels))
    cuda = torch.cuda.is_available()
    resolved = config.resolve(
        model_config, cuda, tp=grid.tp, pp=grid.pp, local_rank=world.local_rank
    )
    if resolved.device.startswith("cuda"):
        _check_devices(world)
    return Description(resolved, model_config, checkpoint, world)


def _check_devices(world: World) -> None:
    if world.local_size > max(1, count := torch.cuda.device_count()):
        raise ValueError(
            f"{world.local_size} ranks on this host and {count} GPUs that torch sees; "
            "each rank needs one of its own"
        )


def open_model(
    description: Description,
    mesh: Mesh | None = None,
    agree: Callable[[int], int] = lambda num_blocks: num_blocks,
    alive: Callable[[State], None] = lambda state: None,
) -> ModelRunner:
    """Load this rank's weights and take the memory. Raises ValueError for what cannot be served.

    `agree` is told a number by each rank and says to all which is the smallest: how many K/V blocks
    there will be. `alive` is told between parts of the work what this rank does, and may raise to
    give up.
    """
    started, counter = time.monotonic(), compile_counter()
    config, device = description.config, torch.device(description.config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ops = select(config.kernels, device.type)
    if config.log_kernels:
        ops = ops.counted()
    place = Placement(mesh or Mesh(), getattr(torch, config.dtype), device)
    shows_bar = place.mesh.pp_rank == place.mesh.tp_rank == 0
    compiles = device.type == "cuda" and "triton" in ops.implementations().values()
    model = _load(description, ops, place, compiles, alive, shows_bar)
    if compiles:
        agree(0)  # on every host all is compiled
    parts = _put_down(description, model, place)
    alive(State.COMPILING)  # the first step compiles kernels
    budget, for_graphs, why = kv_bytes(config, parts.geometry, parts.runner, parts.maker)
    num_blocks = agree(parts.geometry.blocks_in(budget))
    tell_blocks(config, parts.geometry, num_blocks, budget, why)
    kv, graphs = KVCache(parts.geometry, num_blocks, device), NO_GRAPHS
    maker = parts.maker(kv)
    if compiles:
        _compile_kernels(config, parts.runner(kv), maker, alive, shows_bar)
    if maker is not None:
        graphs = StepGraphs(maker.shapes, ToldMaker(maker, for_graphs, shows_bar))
    runner = parts.runner(kv, graphs)
    took = time.monotonic() - started
    logger.info("the model is ready after %.1f s, with %d kernels", took, counter.count)
    return runner


def _load(
    description: Description,
    ops: Ops,
    place: Placement,
    compiles: bool,
    alive: Callable[[State], None],
    shows_bar: bool,
) -> Ernie:
    """This stage's layers with their weights; meanwhile other processes compile kernels."""
    config, model_config = description.config, description.model_config
    layers = deal_layers(model_config, place.mesh.pp_size)[place.mesh.pp_rank]
    model = Ernie(model_config, ops, place, config.max_model_len, layers)
    if not compiles or description.world.local_rank > 0:
        _fill(model, description, place.mesh, alive)
        return model
    with CacheFill(config, model_config, place.mesh) as cache_fill:
        _fill(model, description, place.mesh, alive)
        cache_fill.wait(partial(alive, State.COMPILING), shows_bar)
    return model


@dataclass(frozen=True)
class _Parts:
    """What runners and graphs of one rank are made from, whatever cache they get."""

    config: ResolvedConfig
    model: Ernie
    place: Placement
    hidden_size: int
    slots: Slots
    geometry: KVGeometry
    recorder: Recorder | None
    shapes: GraphShapes
    stream: Tensor | None

    def runner(self, kv: KVCache, graphs: StepGraphs = NO_GRAPHS) -> ModelRunner:
        depth, debug = self.config.max_steps_in_flight, self.config.debug
        pipe = Pipe(self.place, self.hidden_size, depth)
        return ModelRunner(self.model, self.model.ops, self.slots, kv, pipe, depth, debug, graphs)

    def maker(self, kv: KVCache) -> GraphMaker | None:
        """None where nothing is recorded."""
        if self.recorder is None:
            return None
        forward = Forward(self.model, self.slots, kv)
        return GraphMaker(forward, self.shapes, self.recorder, self.stream)


def _put_down(description: Description, model: Ernie, place: Placement) -> _Parts:
    """Slots, and how large blocks and graphs will be."""
    config, model_config = description.config, description.model_config
    recorder, shapes = _recorder_for(config, model.ops), graph_shapes(config)
    hidden_size = model_config.hidden_size
    return _Parts(
        config,
        model,
        place,
        hidden_size,
        Slots(config.max_num_seqs, config.max_model_len, config.block_size, place.device),
        KVGeometry(
            num_layers=len(model.layers),
            num_kv_heads=place.mesh.share_of_kv_heads(model_config.num_key_value_heads),
            head_dim=model_config.head_dim,
            block_size=config.block_size,
            dtype=place.dtype,
        ),
        recorder,
        shapes,
        None if recorder is None else _made_up_stream(shapes, place, hidden_size),
    )


def _recorder_for(config: ResolvedConfig, ops: Ops) -> Recorder | None:
    why_not = obstacle(config, ops)
    if why_not is not None:
        logger.info("no CUDA graphs: %s", why_not)
        return None
    return CudaRecorder()


def _made_up_stream(shapes: GraphShapes, place: Placement, hidden_size: int) -> Tensor | None:
    """Where a later stage's graphs take their input from [T, H]; equal on all ranks of a stage."""
    if place.mesh.is_first_stage:
        return None
    num_tokens = max((shape.num_tokens for shape in shapes.largest_first), default=0)
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(num_tokens, hidden_size, generator=generator)
    return stream.to(place.device, place.dtype)


def _compile_kernels(
    config: ResolvedConfig,
    runner: ModelRunner,
    maker: GraphMaker | None,
    alive: Callable[[State], None],
    shows_bar: bool,
) -> None:
    """Ask for every kernel that requests and recordings can ask for, so that none of them waits for
    one."""
    started, counter = time.monotonic(), compile_counter()
    steps = [partial(rehearse, runner, p) for p in compiling_plans(config, runner.kv.num_blocks)]
    if maker is not None:
        steps += [partial(maker.rehearse, shape) for shape in maker.shapes.largest_first]
    with few_layers(runner.model):
        for step in tqdm(steps, desc="kernels", unit="step", disable=not shows_bar):
            step()
            alive(State.COMPILING)
    torch.cuda.synchronize()
    took = time.monotonic() - started
    logger.info("kernels: %d after %d steps in %.1f s", counter.count, len(steps), took)


def tensors_of(model_config: ModelConfig, ops: Ops) -> Shapes:
    """What a checkpoint of the whole model holds; nothing is allocated for it."""
    nowhere = Placement(Mesh(), torch.bfloat16, torch.device("meta"))
    model = Ernie(model_config, ops, nowhere, max_model_len=1)
    return {part.name: part.shape for part in model.parts()}


def _fill(
    model: Ernie, description: Description, mesh: Mesh, alive: Callable[[State], None]
) -> None:
    started, parameters = time.monotonic(), dict(model.named_parameters())
    on_part = partial(alive, State.LOADING)
    checkpoint = description.checkpoint
    if checkpoint is None:
        fill_dummy(model.parts(), on_part=on_part)
    else:
        expected = tensors_of(description.model_config, model.ops)
        shows_bar = mesh.pp_rank == mesh.tp_rank == 0
        load_weights(
            model.parts(), parameters, checkpoint, expected, progress=shows_bar, on_part=on_part
        )
    num_bytes = sum(p.nbytes for p in parameters.values())
    if description.config.device.startswith("cuda"):
        torch.cuda.synchronize()  # or the time would be that of asking for them
    took = time.monotonic() - started
    made = "made" if checkpoint is None else "loaded"
    logger.info("weights: %.2f GiB %s in %.1f s", num_bytes / GIB, made, took)
