"""From the processes of one engine to its mesh: process groups are made, tried once, and ended.

Owns torch.distributed's global state, in this file alone. A program that has set that up for
itself is told so.
"""

import socket
from datetime import timedelta

# pyright: reportPrivateImportUsage=false
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Store
from torch.distributed.distributed_c10d import _abort_process_group

from ernie_engine.parallel.mesh import Mesh
from ernie_engine.parallel.planner import Grid
from ernie_engine.parallel.world import World


def host_store(size: int, timeout_seconds: float) -> dist.TCPStore:
    """The key-value store where ranks find each other, served by this process on loopback."""
    listener = socket.create_server(("127.0.0.1", 0))  # the store's own would be on all addresses
    host, port = listener.getsockname()
    return dist.TCPStore(
        host,
        port,
        size,
        True,
        timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_store(world: World, timeout_seconds: float) -> Store:
    """The store that torchrun, or the rank 0 that started this process, serves."""
    url = f"env://?rank={world.rank}&world_size={world.size}"
    store, _, _ = next(dist.rendezvous(url, timeout=timedelta(seconds=timeout_seconds)))
    return store


def own_store(store: Store, world: World) -> Store:
    """The keys of this engine alone: an earlier one of the same processes left its own behind.
    (When torchrun restarts the processes it gives them a new store.)"""
    nth = store.add(f"ernie_engine/engines of rank {world.rank}", 1)
    return dist.PrefixStore(f"ernie_engine/{nth}", store)


def connect(
    store: Store,
    world: World,
    grid: Grid,
    device: torch.device,
    timeout_seconds: float,
    expert_parallel: bool = False,
) -> Mesh:
    """Join the groups of the grid; every rank does so at once. NCCL on GPUs, gloo on CPUs."""
    if grid.size == 1:
        return Mesh()
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use in this process (by this program, or by another Engine "
            "that is open): close that first"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        return _make_groups(world, grid, device, expert_parallel)
    except BaseException:
        _end_groups()  # or this process could have no other engine
        raise


def _make_groups(world: World, grid: Grid, device: torch.device, expert_parallel: bool) -> Mesh:
    stages = [[s * grid.tp + t for t in range(grid.tp)] for s in range(grid.pp)]
    columns = [list(ranks) for ranks in zip(*stages, strict=True)]
    mesh = Mesh(
        pp_size=grid.pp,
        pp_rank=world.rank // grid.tp,
        tp_size=grid.tp,
        tp_rank=world.rank % grid.tp,
        expert_parallel=expert_parallel,
        tp_group=_own_group(stages, world.rank),
        stream_group=_own_group(columns, world.rank),
        token_group=_own_group(columns, world.rank),
    )
    _try_all(mesh, device)
    return mesh


def disconnect(mesh: Mesh) -> None:
    """End the groups. Every rank does so, after its last step."""
    if mesh.pp_size * mesh.tp_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def abort(mesh: Mesh) -> None:
    """After a rank is lost: end what is under way with it, from any thread, or another thread of
    this process would wait for ever. NCCL waits so; gloo notices a closed connection by itself."""
    if mesh.pp_size * mesh.tp_size > 1 and dist.is_initialized() and dist.get_backend() == "nccl":
        _abort_process_group()  # all of them at once: one by one they can wait for each other


def _end_groups() -> None:
    """Without the other ranks: what NCCL has under way with them is not waited for."""
    if dist.get_backend() == "nccl":
        _abort_process_group()
    else:
        dist.destroy_process_group()


def _own_group(partition: list[list[int]], rank: int) -> ProcessGroup | None:
    """All groups are made by all ranks, in the same order; None if they have one rank each."""
    if len(partition[0]) == 1:
        return None
    groups = [(ranks, dist.new_group(ranks)) for ranks in partition]
    own = next(group for ranks, group in groups if rank in ranks)
    assert isinstance(own, ProcessGroup)
    return own


def _try_all(mesh: Mesh, device: torch.device) -> None:
    """Each group's first use takes seconds on GPUs: here, not within a step that is watched."""
    one = torch.ones(1, device=device)
    if mesh.tp_group is not None:
        dist.all_reduce(one, group=mesh.tp_group)
    first, last = mesh.rank_of_stage(0), mesh.rank_of_stage(mesh.pp_size - 1)
    if mesh.stream_group is not None:
        if not mesh.is_first_stage:
            dist.recv(one, mesh.rank_of_stage(mesh.pp_rank - 1), group=mesh.stream_group)
        if not mesh.is_last_stage:
            dist.send(one, mesh.rank_of_stage(mesh.pp_rank + 1), group=mesh.stream_group)
    if mesh.token_group is not None and mesh.is_last_stage:
        dist.send(one, first, group=mesh.token_group)
    elif mesh.token_group is not None and mesh.is_first_stage:
        dist.recv(one, last, group=mesh.token_group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if one.item() != mesh.tp_size:
        raise RuntimeError(f"a sum over {mesh.tp_size} ranks gave {one.item()}")
