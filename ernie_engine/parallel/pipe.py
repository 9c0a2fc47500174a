"""What goes between the stages of a pipeline: the hidden stream down, drawn tokens back to the
first stage. With one stage nothing does.

Sends never wait for the other side; a receive is posted only once the plan is known that says
how much will come. Owns the buffers until they are sent. Knows no plan.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from ernie_engine.parallel.mesh import Mesh, Placement


class Pipe:
    """A stage's ends of the pipe; at most `max_in_flight` sends of a kind are under way."""

    def __init__(self, place: Placement, hidden_size: int, max_in_flight: int):
        self.mesh: Mesh = place.mesh
        self._dtype, self._device = place.dtype, place.device
        self._hidden_size, self._max_in_flight = hidden_size, max_in_flight
        self._sends: dict[str, deque[tuple[Work, Tensor]]] = {"stream": deque(), "tokens": deque()}

    @property
    def bytes_per_token(self) -> int:
        """Of the hidden stream."""
        return self._hidden_size * self._dtype.itemsize

    def most_bytes(self, num_tokens: int) -> int:
        """Of hidden streams of `num_tokens` that wait to be taken, beside the one being made."""
        if self.mesh.is_last_stage:
            return 0
        return (self._max_in_flight - 1) * num_tokens * self.bytes_per_token

    def receive_stream(self, num_tokens: int) -> Tensor | None:
        """The hidden stream [num_tokens, H] of the stage before; None in the first."""
        if self.mesh.is_first_stage:
            return None
        x = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype, device=self._device)
        source = self.mesh.rank_of_stage(self.mesh.pp_rank - 1)
        _posted(dist.irecv(x, source, group=self.mesh.stream_group)).wait()
        self.mesh.pulse.beat()
        return x

    def send_stream(self, x: Tensor) -> None:
        """Hand the hidden stream [T, H] to the next stage; the last has none."""
        if not self.mesh.is_last_stage:
            self._send("stream", x, self.mesh.pp_rank + 1, self.mesh.stream_group)

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage: drawn tokens [R] int64 for the first; nothing if it is that too."""
        if not self.mesh.is_first_stage:
            self._send("tokens", tokens, 0, self.mesh.token_group)

    def expect_tokens(self, count: int) -> "Receipt":
        """In the first stage of several: tokens that the last one will send."""
        tokens = torch.empty(count, dtype=torch.int64, device=self._device)
        source = self.mesh.rank_of_stage(self.mesh.pp_size - 1)
        return Receipt(_posted(dist.irecv(tokens, source, group=self.mesh.token_group)), tokens)

    def _send(self, kind: str, x: Tensor, stage: int, group: ProcessGroup | None) -> None:
        sends = self._sends[kind]
        while len(sends) >= self._max_in_flight:
            sends.popleft()[0].wait()
        x = x.contiguous()
        work = _posted(dist.isend(x, self.mesh.rank_of_stage(stage), group=group))
        sends.append((work, x))
        self.mesh.pulse.beat()


class Receipt:
    """Tokens on their way; wait() gives them (on a GPU: makes the stream wait, not the host)."""

    def __init__(self, work: Work, tokens: Tensor):
        self._work, self._tokens = work, tokens

    def wait(self) -> Tensor:
        self._work.wait()
        return self._tokens


def _posted(work: Work | None) -> Work:
    assert work is not None, "this rank is in its own groups"
    return work
