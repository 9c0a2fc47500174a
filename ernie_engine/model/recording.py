"""How start-up records the CUDA graphs, proves them, and knows their memory beforehand.

Owns the comparison of replay with eager and the arithmetic of bytes. Leaves all slots free and
decides nothing about later steps: see graphs.py.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from ernie_engine.engine.plan import StepPlan
from ernie_engine.model.batch import StepShape
from ernie_engine.model.forward import MOST_LOGITS, Forward, StepOutput
from ernie_engine.model.graphs import GraphShapes, Recorder, StepGraph, StepGraphs
from ernie_engine.model.rehearsal import made_up_plan, release_plan, rows_filling
from ernie_engine.model.slots import Slots, to_device

logger = logging.getLogger(__name__)
GIB = 1 << 30
MADE_UP_POSITIONS = 256  # of a later stage's input; then the same again
# What the driver keeps for a graph of some hundred kernels, with a margin; not measured yet.
GRAPH_BYTES = 8 << 20
# Relative RMS difference of a replayed hidden stream from the eager one. The kernels are the same
# and equal bits are expected; but a library may choose another kernel while it is recorded, and
# what differs by a rounding may send a token to another expert.
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

    def make_all(self, alive: Callable[[], None], shows_bar: bool) -> StepGraphs:
        """RuntimeError if a replay differs. `alive` is called between two."""
        graphs = StepGraphs(self.shapes)
        bar = tqdm(self.shapes.largest_first, desc="graphs", unit="graph", disable=not shows_bar)
        for shape in bar:
            graphs.add(self.make(shape))
            alive()
        return graphs

    @torch.inference_mode()
    def make(self, shape: StepShape, checked: bool = True) -> StepGraph:
        """Run a made-up step of this shape, record it, and compare."""
        graph, plan = StepGraph(shape, self._forward, self._stream), self._plan(shape)
        num_tokens, state = sum(plan.num_tokens), self._forward.state
        graph.fill(plan.slots, plan.num_tokens, self.stream_of(plan))
        with made_up(state, plan):
            # Compiles what is to be compiled, and is what the replay must equal.
            expected = outputs(self._recorder.run(graph.run), num_tokens)
        with made_up(state, plan):
            graph.record(self._recorder)
        if checked:
            with made_up(state, plan):
                found = outputs(graph.replay(plan.slots, plan.num_tokens, None), num_tokens)
            most = TOLERANCE[expected[0].dtype]
            both = zip(found, expected, strict=True)
            if not all([compare(*pair, shape, most) for pair in both]):
                self.inexact.append(shape)
        return graph

    def stream_of(self, plan: StepPlan) -> Tensor | None:
        """What the stage before might send of a plan [T, H]; None in the first. Equal for equal
        positions, as token ids are: the plan's rows write the same blocks."""
        if self._by_position is None:
            return None
        counts = zip(plan.starts, plan.num_tokens, strict=True)
        positions = [first + i for (_, first), count in counts for i in range(count)]
        at = [position % len(self._by_position) for position in positions]
        return self._by_position[to_device(at, torch.int64, self._by_position.device)]

    def _plan(self, shape: StepShape) -> StepPlan:
        state, kv = self._forward.state, self._forward.kv
        longest = min(state.history.shape[1] - 1, shape.most_blocks * state.block_size)
        rows = rows_filling(shape, longest)
        vocab_size = self._forward.model.vocab_size
        token_ids = [(37 * i + 5) % vocab_size for i in range(max(map(sum, rows)))]
        return made_up_plan(rows, state.block_size, kv.num_blocks, token_ids)


@contextmanager
def made_up(state: Slots, plan: StepPlan) -> Iterator[None]:
    state.apply(plan)
    yield
    state.apply(release_plan(plan))


def outputs(output: StepOutput, num_tokens: int) -> list[Tensor]:
    """Copies of what a step's real tokens gave: the hidden stream, and logits if there are."""
    given = output.hidden, output.logits
    return [tensor[:num_tokens].clone() for tensor in given if tensor is not None]


def compare(found: Tensor, expected: Tensor, shape: StepShape, most: float) -> bool:
    """Whether all bits are equal; RuntimeError if more than roundings differ."""
    if torch.equal(found, expected):
        return True
    error = (found - expected).float().square().mean() / expected.float().square().mean()
    error = error.sqrt().item()
    if not error <= most:
        raise RuntimeError(
            f"the CUDA graph of {shape} is wrong: what it gives is off from the eager run by "
            f"{error:.3g} (relative RMS; at most {most:g}); enforce_eager=True goes without"
        )
    return False


def bytes_of_graphs(maker: GraphMaker, hidden_bytes: int, logits_bytes: int) -> int:
    """The GPU memory that all graphs will take; hidden_bytes, logits_bytes: of one token's.

    The two that make the pool as large as it gets are recorded and measured, and dropped. Of each
    other there are the hidden stream and the logits that it gives and what the driver keeps.
    """
    largest = maker.shapes.largest_first[:2]
    others = maker.shapes.largest_first[2:]
    before = free_memory()
    made = [maker.make(shape, checked=False) for shape in largest]
    measured = before - free_memory()
    del made
    few = sum(s.num_rows for s in others if s.num_decodes and s.num_rows <= MOST_LOGITS)
    given = sum(GRAPH_BYTES + s.num_tokens * hidden_bytes for s in others) + few * logits_bytes
    return max(0, measured) + given


def make_graphs(
    maker: GraphMaker, set_aside: int, alive: Callable[[], None], shows_bar: bool
) -> StepGraphs:
    """All of them, and told what they took, beside what was set aside for them (0: nothing was)."""
    started, before = time.monotonic(), free_memory()
    graphs = maker.make_all(alive, shows_bar)
    took = before - free_memory()
    logger.info(
        "CUDA graphs: %d recorded in %.1f s, %d of them with the bits of an eager run; %.2f GiB",
        *(len(graphs), time.monotonic() - started, len(graphs) - len(maker.inexact), took / GIB),
    )
    for shape in maker.inexact:
        logger.info("the CUDA graph of %s differs from an eager run by roundings", shape)
    if 0 < set_aside < took:
        logger.warning("CUDA graphs took more than the %.2f GiB set aside", set_aside / GIB)
    return graphs


def free_memory() -> int:
    """Of the current GPU, after giving back what torch merely keeps."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
