"""How CUDA graphs are recorded and proven, and how their memory is known beforehand.

Owns the comparison of replay with eager and the arithmetic of bytes. Leaves all slots that it was
given free and decides nothing about steps: when a graph is made a plan says, what it is good for
graphs.py.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ernie_engine.engine.plan import RecordingRoom, StepPlan
from ernie_engine.model.batch import StepShape
from ernie_engine.model.forward import MOST_LOGITS, Forward, StepOutput
from ernie_engine.model.graphs import GraphShapes, Recorder, StepGraph
from ernie_engine.model.rehearsal import (
    Row,
    made_up_plan,
    placed,
    release_plan,
    rows_filling,
    turned,
)
from ernie_engine.model.slots import Slots, to_device

logger = logging.getLogger(__name__)
GIB = 1 << 30
T = TypeVar("T")
MADE_UP_POSITIONS = 256  # of a later stage's input; then the same again
BEFORE = 0.5  # K and V where a compared step has written nothing
# What the driver keeps for a graph of some hundred kernels, with a margin: 37 of 21B-A3B took 0.43
# GiB with all that they give, where 0.72 were set aside.
GRAPH_BYTES = 8 << 20
# And NCCL for a graph's collectives: 44 of 21B-A3B's share on each of two GPUs took 0.84 GiB, where
# 0.74 had been set aside with the above.
NCCL_GRAPH_BYTES = 8 << 20
# Relative RMS difference of what a replay gives from what an eager run does. The kernels are the
# same and equal bits are expected; but a library may choose another kernel while it is recorded,
# and what differs by a rounding may send a token to another expert.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class GraphMaker:
    """Makes the graphs of `shapes` with one recorder. `stream` [T, H]: where a later stage's take
    their input from, finite numbers that differ; None in the first."""

    def __init__(
        self, forward: Forward, shapes: GraphShapes, recorder: Recorder, stream: Tensor | None
    ):
        self.shapes, self._forward, self._stream = shapes, forward, stream
        self._by_position = None if stream is None else stream[:MADE_UP_POSITIONS].clone()
        self._recorder = recorder
        self.inexact: list[StepShape] = []  # whose replay differed from the eager run by roundings

    def room(self, shape: StepShape) -> RecordingRoom:
        """What make() needs: a slot for each of its rows, at least for those of more tokens."""
        rows, block_size = self._rows(shape), self._forward.state.block_size
        num_prompts = sum(count > 1 for _, count in rows)
        num_blocks = max(-(-sum(row) // block_size) for row in rows)
        return RecordingRoom(len(rows), max(1, num_prompts), num_blocks)

    @torch.inference_mode()
    def make(self, shape: StepShape, slots: Sequence[int], block_ids: Sequence[int]) -> StepGraph:
        """Record a made-up step of this shape and compare the replay of another with its eager run:
        in other slots and blocks, so that no number of the first can be part of the graph.
        RuntimeError if they differ."""
        graph = StepGraph(shape, self._forward, self._stream)
        rows = self._rows(shape)[-len(slots) :]
        recorded = self._plan(rows, slots, block_ids)
        proven = self._plan(turned(rows), slots[::-1], block_ids[::-1])
        # Before it is recorded, for a library takes its memory when it is first used.
        expected = self._given(graph, proven, lambda: self._recorder.run(graph.run))
        try:
            self._after(graph, recorded, lambda: graph.record(self._recorder))
            replay = self._given(
                graph, proven, lambda: graph.replay(proven.slots, proven.num_tokens, None)
            )
            both = zip(replay, expected, strict=True)
            if not all([compare(*pair, shape) for pair in both]):
                self.inexact.append(shape)
        except Exception:
            graph.drop()  # the error holds this frame
            raise
        return graph

    @torch.inference_mode()
    def measure(self, shape: StepShape) -> StepGraph:
        """A graph as large as make()'s, over whatever blocks there are, compared with nothing."""
        graph, plan = self._anywhere(shape)
        self._after(graph, plan, lambda: self._recorder.run(graph.run))
        self._after(graph, plan, lambda: graph.record(self._recorder))
        return graph

    @torch.inference_mode()
    def rehearse(self, shape: StepShape) -> None:
        """Ask for all kernels that make() will."""
        graph, plan = self._anywhere(shape)
        self._after(graph, plan, graph.run)

    def _anywhere(self, shape: StepShape) -> tuple[StepGraph, StepPlan]:
        """While there are no requests: their slots and blocks are free."""
        rows, num_blocks = self._rows(shape), self._forward.kv.num_blocks
        plan = self._plan(rows, range(len(rows)), range(num_blocks))
        return StepGraph(shape, self._forward, self._stream), plan

    def _given(
        self, graph: StepGraph, plan: StepPlan, run: Callable[[], StepOutput]
    ) -> list[Tensor]:
        """Copies of what a step gives: its rows' places, the hidden stream, logits if there are,
        and its blocks, in which there was nothing before."""
        kv, blocks = self._forward.kv, sorted(set(plan.new_block_ids))
        kv.fill(blocks, BEFORE)
        (slots, row_ends, positions, next_positions), hidden, logits = self._after(graph, plan, run)
        num_rows, num_tokens = len(plan.slots), sum(plan.num_tokens)
        given = [column[:num_rows] for column in (slots, row_ends, next_positions)]
        given += [
            column[:num_tokens] for column in (positions, hidden, logits) if column is not None
        ]
        return [*(tensor.clone() for tensor in given), kv.copy_of(blocks)]

    def _after(self, graph: StepGraph, plan: StepPlan, run: Callable[[], T]) -> T:
        """run() with the plan's requests in their slots and its rows among the graph's inputs."""
        with made_up(self._forward.state, plan):
            graph.fill(plan.slots, plan.num_tokens, self.stream_of(plan))
            return run()

    def stream_of(self, plan: StepPlan) -> Tensor | None:
        """What the stage before might send of a plan [T, H]; None in the first. Equal for equal
        positions, as token ids are: the plan's rows write the same blocks."""
        if self._by_position is None:
            return None
        counts = zip(plan.starts, plan.num_tokens, strict=True)
        positions = [first + i for (_, first), count in counts for i in range(count)]
        at = [position % len(self._by_position) for position in positions]
        return self._by_position[to_device(at, torch.int64, self._by_position.device)]

    def _rows(self, shape: StepShape) -> list[Row]:
        state = self._forward.state
        longest = min(state.history.shape[1] - 1, shape.most_blocks * state.block_size)
        return rows_filling(shape, longest)

    def _plan(
        self, rows: Sequence[Row], slots: Sequence[int], block_ids: Sequence[int]
    ) -> StepPlan:
        vocab_size = self._forward.model.vocab_size
        token_ids = [(37 * i + 5) % vocab_size for i in range(max(map(sum, rows)))]
        plan = made_up_plan(rows, self._forward.state.block_size, len(block_ids), token_ids)
        return placed(plan, slots, block_ids)


class ToldMaker:
    """A maker that tells how it goes: by a bar, and once all are made what they took, beside what
    was set aside for them (0: nothing was)."""

    def __init__(self, maker: GraphMaker, set_aside: int, shows_bar: bool):
        self._maker, self._set_aside, self._shows_bar = maker, set_aside, shows_bar
        self._num_left = len(maker.shapes.largest_first)
        self._seconds, self._took = 0.0, 0
        self._bar: tqdm | None = None

    def room(self, shape: StepShape) -> RecordingRoom:
        return self._maker.room(shape)

    def make(self, shape: StepShape, slots: Sequence[int], block_ids: Sequence[int]) -> StepGraph:
        if self._bar is None:
            hidden = not self._shows_bar
            self._bar = tqdm(total=self._num_left, desc="graphs", unit="graph", disable=hidden)
        began, before = time.monotonic(), free_memory()
        graph = self._maker.make(shape, slots, block_ids)
        self._seconds += time.monotonic() - began
        self._took += before - free_memory()
        self._num_left -= 1
        self._bar.update()
        if self._num_left == 0:
            self._bar.close()
            self._tell()
        return graph

    def _tell(self) -> None:
        num_graphs, inexact = len(self._maker.shapes.largest_first), self._maker.inexact
        logger.info(
            "CUDA graphs: %d recorded in %.1f s, %d with the bits of an eager run; %.2f GiB",
            *(num_graphs, self._seconds, num_graphs - len(inexact), self._took / GIB),
        )
        for shape in inexact:
            logger.info("the CUDA graph of %s differs from an eager run by roundings", shape)
        if 0 < self._set_aside < self._took:
            logger.warning(
                "CUDA graphs took more than the %.2f GiB set aside", self._set_aside / GIB
            )


@contextmanager
def made_up(state: Slots, plan: StepPlan) -> Iterator[None]:
    state.apply(plan)
    yield
    state.apply(release_plan(plan))


def compare(found: Tensor, expected: Tensor, shape: StepShape) -> bool:
    """Whether all bits are equal; RuntimeError if more than roundings differ."""
    if torch.equal(found, expected):
        return True
    most = TOLERANCE.get(expected.dtype, 0.0)
    error = (found - expected).float().square().mean() / expected.float().square().mean()
    error = error.sqrt().item()
    if not error <= most:
        raise RuntimeError(
            f"the CUDA graph of {shape} is wrong: what it gives is off from the eager run by "
            f"{error:.3g} (relative RMS; at most {most:g}); enforce_eager=True goes without"
        )
    return False


def bytes_of_graphs(
    maker: GraphMaker, hidden_bytes: int, logits_bytes: int, has_collectives: bool
) -> int:
    """The GPU memory that all graphs will take; hidden_bytes, logits_bytes: of one token's.

    The two that make the pool as large as it gets are recorded and measured, and dropped. Of each
    other there are the hidden stream and the logits that it gives, and what driver and NCCL keep.
    """
    largest = maker.shapes.largest_first[:2]
    others = maker.shapes.largest_first[2:]
    before = free_memory()
    made = [maker.measure(shape) for shape in largest]
    measured = before - free_memory()
    del made
    few = sum(s.num_rows for s in others if s.num_decodes and s.num_rows <= MOST_LOGITS)
    kept = GRAPH_BYTES + (NCCL_GRAPH_BYTES if has_collectives else 0)
    given = sum(kept + s.num_tokens * hidden_bytes for s in others) + few * logits_bytes
    return max(0, measured) + given


def free_memory() -> int:
    """Of the current GPU, after giving back what torch merely keeps."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
