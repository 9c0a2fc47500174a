"""Compiles what launchers would launch, for any architecture, without a GPU and in parallel.

Calls the launchers themselves with a case's arguments on torch's "meta" device, and lets Triton
compile where it would launch. So what is compiled is what will run: the table's rows, the types,
the alignment; and what is compiled lies in Triton's cache. A launcher that waits for a number from
the device fails here. Never launches; changes Triton for good, so it wants a process of its own.
"""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.kernels import launch
from ernie_engine.kernels.no_device import NoDevice
from ernie_engine.kernels.registry import IMPLEMENTATIONS

META = torch.device("meta")


@contextmanager
def compiling_for(arch: int) -> Iterator[dict[str, CompiledKernel]]:
    """Launches compile for sm_`arch`: hash -> kernel, of all that would have been launched."""
    assert not knobs.runtime.interpret
    driver.set_active(NoDevice(arch))  # pyright: ignore[reportArgumentType]
    compiled, run, architecture = {}, JITFunction.run, launch.architecture

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert isinstance(kernel, CompiledKernel)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
    launch.architecture = lambda device: f"sm_{arch}"
    try:
        yield compiled
    finally:
        JITFunction.run, launch.architecture = run, architecture


def compile_case(case: KernelCase) -> None:
    """With the tables as they are; inside compiling_for()."""
    IMPLEMENTATIONS[case.op]["triton"](*case.make(META))


def in_processes(function: Any, tasks: Iterable[Any], jobs: int) -> Iterator[Any]:
    """function(task) of each, in the order in which they end. New processes, since those of a
    fork would have Triton's and CUDA's state of this one; they compile instead of interpreting."""
    environment = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            yield from pool.imap_unordered(function, tasks)
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment
