"""Counters by which the programs of a launch know which of them is the last to finish.

Every launch finds its counters at zero and leaves them so: the last program puts them back. Tickets
are drawn after wait_for_inputs(), so the launch before has put its own back; launches of an op,
whose counters these are, come one after the other on one stream. Work that is handed to the last
program is summed in a fixed order, never in the order of arrival.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel's arguments are not Python's)

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 1 << 16


@cache
def tickets(op: str, device: torch.device) -> Tensor:
    """[MOST] int32, zero. Made at the first call, which must not be within a graph's capture."""
    with torch.inference_mode(False):  # or who first asked would decide who may write to it
        return torch.zeros(MOST, dtype=torch.int32, device=device)


@triton.jit
def is_last(ticket, num_programs):
    """Whether all others of `num_programs` have come here before: then what they had stored can be
    read, past the L1 cache (cache_modifier=".cg"), and the ticket is back at zero."""
    tl.debug_barrier()  # all of this program's stores come before its ticket is drawn
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == num_programs - 1
    if last:
        tl.store(ticket, 0)
    return last
