"""Answers on their way to the host, on a stream of their own: the next step's kernels do not wait
behind a copy.

Owns that stream. Never waits: whoever reads a copy waits for the event of done() first.
"""

import torch
from torch import Tensor


class HostCopies:
    """Of one device; without a GPU a tensor is its own copy."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._there = torch.cuda.Event() if self._stream is not None else None
        self._fetching = False  # has anything been fetched since done()?

    def fetch(self, x: Tensor) -> Tensor:
        """A host copy of what the current stream leaves in x; complete once done() is."""
        if self._stream is None or self._there is None:
            return x
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._there.record()
        self._stream.wait_event(self._there)  # as recorded now: the event serves the next one too
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self._stream)  # its memory is nobody else's until then
        self._fetching = True
        return host

    def done(self) -> torch.cuda.Event | None:
        """Comes after all copies since the last one, and what the current stream had been given
        before the last of them; without a copy after all that it was given, so that a step without
        an answer is not done before its kernels are. None without a GPU."""
        if self._stream is None:
            return None
        if not self._fetching:
            self._stream.wait_stream(torch.cuda.current_stream())
        self._fetching = False
        event = torch.cuda.Event()
        event.record(self._stream)
        return event
