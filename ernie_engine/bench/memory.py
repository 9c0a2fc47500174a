"""What a measurement takes of a GPU's memory beside what was there before it.

Counts tensors of this process (so of rank 0), as torch's allocator does. Never frees anything.
"""

from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Bytes of tensors: before, and at most since then."""

    held: int
    most: int


class MemoryPeak:
    """Begins to watch when it is made. On a CPU there is nothing to read."""

    def __init__(self, device: str):
        self._device, self._held = torch.device(device), 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._held = torch.cuda.memory_allocated(self._device)

    def read(self) -> Peak | None:
        if self._device.type != "cuda":
            return None
        return Peak(self._held, torch.cuda.max_memory_allocated(self._device))
