"""CUDA graphs: forward passes of a few sizes, recorded once and replayed for every step that fits.

Owns the sizes, their buffers, and the choice between replay and eager, which a step's shape and
what plans had recorded decide, so that all ranks of a stage choose alike. A step is padded to its
graph's size with rows of the spare slot. Never records what the host takes part in: sampling,
transfers between stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ernie_engine.engine.plan import Recording, RecordingRoom
from ernie_engine.engine_config import ResolvedConfig
from ernie_engine.kernels.registry import PARTS, Ops
from ernie_engine.model.batch import StepShape
from ernie_engine.model.forward import Forward, StepOutput
from ernie_engine.model.slots import host_tensor

DECODE_SIZES = (*range(1, 8), *range(8, 64, 8), *range(64, 128, 16), *range(128, 513, 32))
MIXED_SIZES = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
# The most rows of a recorded mixed step, their longest context, the most tokens, and 2 where every
# other size is enough. There single tokens go to the prefill kernel, whose grid is sized by rows
# that may be padding, so that of many rows or tokens keys are cut into few parts or none: bearable
# behind some thousand keys, not behind a hundred thousand. So few rows do not share a recording
# with many, and of any context, where attention is most of a step, there are few sizes. Other steps
# run eagerly.
MIXED_KINDS = ((64, 4096, 2048, 1), (512, 4096, 2048, 1), (4, 1 << 30, 1024, 2))
# Ops whose twins in torch wait for the device to learn a size.
_WAITING_TWINS = ("prefill_attention", "decode_attention", "moe_experts", "norm_moe")


def obstacle(config: ResolvedConfig, ops: Ops) -> str | None:
    """Why nothing is recorded; None if graphs it shall be."""
    if config.enforce_eager:
        return "enforce_eager"
    if not config.device.startswith("cuda"):
        return f"device={config.device}"
    chosen = ops.implementations()
    waiting = [f"{op}={chosen[op]}" for op in _WAITING_TWINS if chosen[op] not in ("triton", PARTS)]
    return f"{', '.join(waiting)} waits for the device" if waiting else None


@dataclass(frozen=True)
class GraphShapes:
    """The shapes that are recorded, by size, of equal ones few rows of short contexts first. In
    those of `decode` every row has one token; a mixed one has a row more than the steps it holds,
    for tokens of padding."""

    decode: Sequence[StepShape]
    mixed: Sequence[StepShape]
    most_padding: int  # tokens of a mixed step's padding row: as many as a request may have

    def fit(self, step: StepShape) -> StepShape | None:
        """The smallest that holds the step; None: it runs eagerly."""
        if step.num_decodes == step.num_rows:
            return next((s for s in self.decode if s.num_rows >= step.num_rows), None)
        return next((s for s in self.mixed if self._holds(s, step)), None)

    def _holds(self, mixed: StepShape, step: StepShape) -> bool:
        padding = mixed.num_tokens - step.num_tokens
        has_room = step.num_rows < mixed.num_rows and step.most_blocks <= mixed.most_blocks
        return has_room and 0 <= padding <= self.most_padding

    @property
    def largest_first(self) -> list[StepShape]:
        """In the order of recording: the largest of both kinds, then the others, small ones first.
        They share one pool of memory, which those two make large enough for nearly all: what keys
        in parts leave of a smaller step may take some more, for which each graph has room set
        aside."""
        largest = [*self.mixed[-1:], *self.decode[-1:]]
        return [*largest, *self.decode[:-1], *self.mixed[:-1]]


def graph_shapes(config: ResolvedConfig) -> GraphShapes:
    """Those that steps of this engine can have."""
    budget, block_size = config.max_num_batched_tokens, config.block_size
    # With stages a step has an even share of the requests: scheduler.py.
    most_rows = min(-(-config.max_num_seqs // config.pipeline_parallel_size), budget)
    most_blocks = -(-config.max_model_len // block_size)
    most_padding = min(config.max_model_len, *(context for _, context, *_ in MIXED_KINDS))
    mixed: list[StepShape] = []
    sizes = _up_to(MIXED_SIZES, budget)
    for size in sizes:
        of_size: list[StepShape] = []
        for rows, context, most_tokens, stride in MIXED_KINDS:
            if size > most_tokens or size not in sizes[::-stride]:
                continue
            num_rows = min(size, most_rows, rows)
            num_blocks = min(most_blocks, -(-context // block_size))
            # A request's last token is never computed.
            if size > num_rows * (most_padding - 1) + most_padding:  # no step comes near it
                continue
            if all(num_rows >= s.num_rows or num_blocks > s.most_blocks for s in of_size):
                of_size.append(StepShape(num_rows + 1, size, 0, size, num_blocks))
        mixed += of_size
    decode = [StepShape(n, n, n, 1, most_blocks) for n in _up_to(DECODE_SIZES, most_rows)]
    return GraphShapes(decode, mixed, most_padding)


def _up_to(sizes: Sequence[int], most: int) -> list[int]:
    """The sizes below `most`, and `most` itself unless it is above them all."""
    last = min(most, sizes[-1])
    return [*(size for size in sizes if size < last), last]


class Recorder(Protocol):
    """How work is recorded. CudaRecorder; tests without a GPU bring one that runs it again."""

    def run(self, work: Callable[[], StepOutput]) -> StepOutput:
        """Do it now, where it will be recorded."""
        ...

    def record(self, work: Callable[[], StepOutput]) -> tuple[StepOutput, Callable[[], None]]:
        """Its results' places, and what fills them anew."""
        ...


class CudaRecorder:
    """CUDA graphs out of one stream and one pool: they are replayed one after the other, so what a
    graph uses on the way another may use too."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], StepOutput]) -> StepOutput:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            output = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return output

    def record(self, work: Callable[[], StepOutput]) -> tuple[StepOutput, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may ask for events meanwhile.
        where = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **where):
            output = work()
        return output, graph.replay


class Maker(Protocol):
    """What makes graphs: model/recording.py."""

    def room(self, shape: StepShape) -> RecordingRoom: ...

    def make(
        self, shape: StepShape, slots: Sequence[int], block_ids: Sequence[int]
    ) -> "StepGraph": ...


class StepGraph:
    """One shape's recording: its inputs [2, R] int64 (slots and query tokens) and `stream` [T, H],
    shared with other shapes; its output, valid until any graph is replayed."""

    def __init__(self, shape: StepShape, forward: Forward, stream: Tensor | None):
        self.shape, self._forward = shape, forward
        self._device, self._spare = forward.state.device, forward.state.spare
        self._columns = torch.zeros(2, shape.num_rows, dtype=torch.int64, device=self._device)
        self._stream = None if stream is None else stream[: shape.num_tokens]
        self._output: StepOutput | None = None
        self._replay: Callable[[], None] | None = None
        self._filled: tuple[list[int], list[int]] | None = None

    def run(self) -> StepOutput:
        """The work itself, on the inputs as they are."""
        return self._forward(self._columns[0], self._columns[1], self.shape, self._stream)

    def record(self, recorder: Recorder) -> None:
        self._output, self._replay = recorder.record(self.run)

    def drop(self) -> None:
        """The recording, wherever this object is still held: see StepGraphs.drop()."""
        self._output = self._replay = None

    def fill(self, slots: Sequence[int], counts: Sequence[int], stream: Tensor | None) -> None:
        """Put a step's rows, and what the stage before sent of them, in front of padding. Most
        steps decode the same rows as the one before: then they are there already."""
        columns = padded(slots, counts, self.shape, self._spare)
        if columns != self._filled:
            rows = host_tensor(columns, torch.int64, self._device)
            self._columns.copy_(rows, non_blocking=True)
            self._filled = columns
        if stream is not None:
            assert self._stream is not None
            self._stream[: len(stream)].copy_(stream)

    def replay(
        self, slots: Sequence[int], counts: Sequence[int], stream: Tensor | None
    ) -> StepOutput:
        """As Forward, of a step that fits: rows, padding behind them, and what else there is of
        real tokens."""
        assert self._output is not None and self._replay is not None, "it was recorded"
        self.fill(slots, counts, stream)
        self._replay()
        rows, hidden, logits = self._output
        num_tokens = sum(counts)
        logits = None if logits is None else logits[:num_tokens]
        return StepOutput(rows, hidden[:num_tokens], logits)


def padded(
    slots: Sequence[int], counts: Sequence[int], shape: StepShape, spare: int
) -> tuple[list[int], list[int]]:
    """The rows of a step that fits `shape`, and rows of the spare slot up to its size."""
    num_rows = shape.num_rows - len(slots)
    padding = [1] * num_rows
    if not shape.num_decodes:  # the last row has all tokens of padding, perhaps none
        padding = [0] * (num_rows - 1) + [shape.num_tokens - sum(counts)]
    return [*slots, *[spare] * num_rows], [*counts, *padding]


class StepGraphs:
    """The recordings of one engine on one rank, each made when a plan says so. `maker`: None where
    there are no shapes."""

    def __init__(self, shapes: GraphShapes, maker: Maker | None):
        self.shapes, self._maker = shapes, maker
        self._graphs: dict[StepShape, StepGraph] = {}
        self._is_dropped = False

    def __len__(self) -> int:
        return len(self._graphs)

    def rooms(self) -> list[RecordingRoom]:
        """What each recording needs, in their order."""
        maker, shapes = self._maker, self.shapes.largest_first
        return [] if maker is None else [maker.room(shape) for shape in shapes]

    def record(self, recording: Recording) -> None:
        """RuntimeError if what it gives is not what an eager run gives."""
        assert self._maker is not None, "there is nothing to record"
        shape = self.shapes.largest_first[recording.index]
        self._graphs[shape] = self._maker.make(shape, recording.slots, recording.block_ids)
        if self._is_dropped:  # meanwhile, by another thread
            self._graphs.clear()

    def drop(self) -> None:
        """At the end, from any thread: a group of NCCL does not end while there is a graph with one
        of its collectives. One that runs, or is made, is dropped once it is done."""
        self._is_dropped = True
        self._graphs.clear()

    def find(self, step: StepShape) -> StepGraph | None:
        """The recording that holds a step; None, also before it is made: it runs eagerly."""
        shape = self.shapes.fit(step)
        return None if shape is None else self._graphs.get(shape)


NO_GRAPHS = StepGraphs(GraphShapes((), (), 0), None)
