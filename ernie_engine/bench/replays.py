"""What a decode step's graph takes, with the launch tables as they are and with other rows in them.

Replays of a graph of the whole model: without the host and the sampler, and above MOST_LOGITS rows
without the vocabulary head; but each launch beside its neighbours, whose ends it may overlap and
whose traffic it shares. Owns made-up batches, changed launch rows and the clock. Never changes a
file.
"""

import importlib
import random
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from ernie_engine.engine.core import describe
from ernie_engine.engine.plan import NewSlot, SamplingSpec, StepPlan
from ernie_engine.engine_config import EngineConfig
from ernie_engine.kernels.launch import DEFAULT, architecture, pick
from ernie_engine.model.batch import StepShape
from ernie_engine.model.graphs import CudaRecorder, Recorder, StepGraph
from ernie_engine.model.recording import made_up
from ernie_engine.model.rehearsal import made_up_plan
from ernie_engine.model.runner import ModelRunner
from ernie_engine.model.startup import open_model

WARM_UP, REPLAYS, RUNS = 3, 20, 3
ROOM = 1 + WARM_UP + REPLAYS * RUNS  # each replay is a token more
BATCH = re.compile(r"(\d+)x(\d+)(?:-(\d+))?")
CHANGE = re.compile(r"(\w+)\.(\w+):(\d+):(\w+=-?\d+(?:,\w+=-?\d+)*)")
SPEC = SamplingSpec()


@dataclass(frozen=True)
class Batch:
    name: str
    contexts: Sequence[int]


def parse_batch(text: str) -> Batch:
    """Of "4x130" four rows behind 130 tokens; of "256x128-384" spread evenly, in no order."""
    if (found := BATCH.fullmatch(text)) is None or int(found[1]) < 1:
        raise ValueError(f"batch {text!r}: ROWSxCONTEXT or ROWSxFIRST-LAST, such as 256x128-384")
    num_rows, first, last = int(found[1]), int(found[2]), int(found[3] or found[2])
    contexts = [first + (last - first) * i // max(1, num_rows - 1) for i in range(num_rows)]
    random.Random(0).shuffle(contexts)
    return Batch(text, contexts)


@dataclass(frozen=True)
class Change:
    """A row of a launch table with some numbers changed."""

    table: dict[tuple[str, int], Mapping[str, int]]
    bucket: int
    numbers: Mapping[str, int]

    @contextmanager
    def made(self, device: torch.device) -> Iterator[None]:
        arch = architecture(device)
        key = (arch if any(name == arch for name, _ in self.table) else DEFAULT), self.bucket
        row, before = pick(self.table, device, self.bucket), dict(self.table)
        self.table[key] = {**row, **self.numbers}
        try:
            yield
        finally:
            self.table.clear()
            self.table.update(before)


def parse_change(text: str) -> Change:
    """Of "decode_attention.TABLE:1024:num_stages=3,BLOCK_N=64": that bucket's row, or a new one."""
    if (found := CHANGE.fullmatch(text)) is None:
        raise ValueError(f"change {text!r}: FILE.TABLE:BUCKET:NAME=NUMBER[,NAME=NUMBER]")
    try:
        table = getattr(importlib.import_module(f"ernie_engine.kernels.{found[1]}"), found[2])
    except (ImportError, AttributeError) as error:
        where = f"ernie_engine/kernels/{found[1]}.py"
        raise ValueError(f"change {text!r}: no {found[2]} in {where}") from error
    if not _is_table(table):
        raise ValueError(f"change {text!r}: {found[2]} is no launch table")
    pairs = (pair.split("=") for pair in found[4].split(","))
    numbers = {name: int(number) for name, number in pairs}
    names = {name for row in table.values() for name in row}
    if unknown := numbers.keys() - names:
        raise ValueError(
            f"change {text!r}: its rows have no {sorted(unknown)}, but {sorted(names)}"
        )
    return Change(table, int(found[3]), numbers)


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, tuple) and isinstance(key[1], int) and isinstance(row, dict)
        for key, row in value.items()
    )


def open_runner(config: EngineConfig) -> ModelRunner:
    """The whole model on one GPU. ValueError, saying why not."""
    description = describe(config)
    if description.grid.size > 1:
        raise ValueError("tensor_parallel_size, pipeline_parallel_size: replays are of one rank")
    if not description.config.device.startswith("cuda"):
        raise ValueError("there is no GPU, and so no CUDA graph to be timed")
    return open_model(description)


class Replays:
    """Times batches on one rank's model. All requests have blocks of their own, up to their last
    replay, with K and V that differ, and tokens that differ, so that they choose other experts."""

    def __init__(self, runner: ModelRunner, recorder: Recorder | None = None):
        self._runner, self._recorder = runner, recorder or CudaRecorder()
        self.device = runner.state.device

    @torch.inference_mode()
    def measure(self, batch: Batch) -> tuple[float, Tensor]:
        """Seconds of a step, and the hidden stream of the first [R, H]. TritonError if a launch
        does not fit."""
        plan, forward = self._plan(batch), self._runner.forward
        self._fill_cache()
        num_rows, most_blocks = len(batch.contexts), max(plan.num_new_blocks)
        graph = StepGraph(StepShape(num_rows, num_rows, num_rows, 1, most_blocks), forward, None)
        step = plan.slots, plan.num_tokens, None
        with made_up(forward.state, plan):
            graph.fill(*step)
            self._recorder.run(graph.run)
            graph.record(self._recorder)
        with made_up(forward.state, plan):  # from its first token again
            hidden = graph.replay(*step).hidden.clone()
            self._seconds(graph, step, WARM_UP)
            seconds = statistics.median(self._seconds(graph, step, REPLAYS) for _ in range(RUNS))
        graph.drop()
        return seconds, hidden

    def _seconds(self, graph: StepGraph, step: Any, count: int) -> float:
        self._synchronize()
        began = time.perf_counter()
        for _ in range(count):
            graph.replay(*step)
        self._synchronize()
        return (time.perf_counter() - began) / count

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _fill_cache(self) -> None:
        """With the same numbers each time: the replays before have written some."""
        generator = torch.Generator(self.device).manual_seed(0)
        for index in range(self._runner.kv.geometry.num_layers):
            for cache in self._runner.kv.layer(index):
                cache.normal_(generator=generator)

    def _plan(self, batch: Batch) -> StepPlan:
        state, num_blocks = self._runner.state, self._runner.kv.num_blocks
        rows = [(context, ROOM) for context in batch.contexts]
        plan = made_up_plan(rows, state.block_size, num_blocks)
        if (needed := sum(plan.num_new_blocks)) > num_blocks:
            raise ValueError(
                f"batch {batch.name!r} needs {needed} K/V blocks of {state.block_size} tokens and "
                f"{num_blocks} fit: fewer rows, or a larger kv_cache_memory_bytes"
            )
        blocks = random.Random(0).sample(range(num_blocks), needed)
        new = [self._request(slot, context) for slot, context in enumerate(batch.contexts)]
        return replace(plan, new=new, num_tokens=[1] * len(rows), new_block_ids=blocks)

    def _request(self, slot: int, context: int) -> NewSlot:
        length, vocab_size = context + ROOM, self._runner.model.vocab_size
        return NewSlot(slot, [(7919 * slot + i) % vocab_size for i in range(length)], SPEC)


def measure_all(
    replays: Replays,
    batches: Sequence[Batch],
    variants: Mapping[str, Sequence[Change]],
    turns: int,
) -> Iterator[dict[str, Any]]:
    """All variants in turns, with a report each time: microseconds by batch, and of which of them
    all bits are those of the first report's; or what was wrong with the variant."""
    expected: dict[str, Tensor] = {}
    for turn in range(turns):
        for name, changes in variants.items():
            report: dict[str, Any] = {"variant": name, "turn": turn, "us": {}, "equal": {}}
            with ExitStack() as stack:
                for change in changes:
                    stack.enter_context(change.made(replays.device))
                try:
                    for batch in batches:
                        seconds, hidden = replays.measure(batch)
                        known = expected.setdefault(batch.name, hidden)
                        report["us"][batch.name] = seconds * 1e6
                        report["equal"][batch.name] = torch.equal(hidden, known)
                except TritonError as error:
                    report["problem"] = str(error)
            yield report
