"""What the ranks remember of every running request between steps, on the device, by slot.

Owns token history, lengths, block tables and sampling values; applies a plan's deltas to them in
the plan's order. Knows no queue: a slot is reused as soon as a plan says so.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ernie_engine.engine.plan import SamplingSpec, StepPlan

PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
FLOATS = ("temperature", "top_p", "min_p", *PENALTIES)
INTS = ("top_k", "seed", "min_tokens")


def host_tensor(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host list, or an array of int64 that is not empty and fits `dtype`, as a host tensor; if
    `device` is a GPU, one that it fetches by itself."""
    if isinstance(values, array):
        host = torch.frombuffer(values, dtype=torch.int64).to(dtype, copy=True)
    else:
        host = torch.tensor(values, dtype=dtype)
    return host.pin_memory() if device.type == "cuda" else host


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host list as a device tensor, without waiting for a GPU."""
    return host_tensor(values, dtype, device).to(device, non_blocking=True)


class Slots:
    """Per-slot device state for S = max_num_seqs + 1 slots of up to `max_model_len` tokens.

    No request ever has the last, `spare`: padding rows of a step belong to it. It has computed
    nothing, always, and its tokens are zeros.
    history [S, max_model_len] int32: the prompt, then each token as the sampler drew it.
    num_computed, prompt_lens [S] int64; block_tables [S, blocks of a full length] int32;
    floats [S, len(FLOATS)] fp32 and ints [S, len(INTS)] int64: the sampling values.
    counting [S + 1] int32: 0, 1, 2, ..., where rows of one token begin.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device):
        self.device, self.block_size = torch.device(device), block_size
        self.spare, num_slots = max_num_seqs, max_num_seqs + 1
        most_blocks = -(-max_model_len // block_size)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.history = zeros(num_slots, max_model_len, dtype=torch.int32)
        self.num_computed = zeros(num_slots, dtype=torch.int64)
        self.prompt_lens = zeros(num_slots, dtype=torch.int64)
        self.block_tables = zeros(num_slots, most_blocks, dtype=torch.int32)
        self.floats = zeros(num_slots, len(FLOATS), dtype=torch.float32)
        self.ints = zeros(num_slots, len(INTS), dtype=torch.int64)
        self.counting = torch.arange(num_slots + 1, dtype=torch.int32, device=device)
        self.specs: dict[int, SamplingSpec] = {}
        self.host_prompt_lens: dict[int, int] = {}
        self.num_blocks: dict[int, int] = {}

    def park_spare(self, block: int) -> None:
        """Padding rows read and write this block, whatever their length."""
        self.block_tables[self.spare].fill_(block)

    def apply(self, plan: StepPlan) -> None:
        """Bring the slots up to the plan, before its step reads them."""
        for slot in plan.freed:
            del self.specs[slot], self.host_prompt_lens[slot], self.num_blocks[slot]
        for new in plan.new:
            self._add(new.slot, new.token_ids, new.spec)
        if plan.starts:
            self._start(plan.starts)
        if plan.new_block_ids:
            self._extend_tables(plan)

    def _add(self, slot: int, token_ids: Sequence[int], spec: SamplingSpec) -> None:
        self.specs[slot], self.host_prompt_lens[slot] = spec, len(token_ids)
        floats = [getattr(spec, name) for name in FLOATS]
        ints = [*(getattr(spec, name) for name in INTS), len(token_ids)]
        tokens = to_device(token_ids, torch.int32, self.device)
        self.history[slot, : len(token_ids)] = tokens
        self.floats[slot] = to_device(floats, torch.float32, self.device)
        values = to_device(ints, torch.int64, self.device)
        self.ints[slot] = values[:-1]
        self.prompt_lens[slot] = values[-1]

    def _start(self, starts: Sequence[tuple[int, int]]) -> None:
        for slot, _ in starts:
            self.num_blocks[slot] = 0
        slots, computed = to_device(list(zip(*starts, strict=True)), torch.int64, self.device)
        self.num_computed[slots] = computed

    def _extend_tables(self, plan: StepPlan) -> None:
        slots, columns = [], []
        for slot, count in zip(plan.slots, plan.num_new_blocks, strict=True):
            if count:  # of most rows none
                slots += [slot] * count
                columns += range(self.num_blocks[slot], self.num_blocks[slot] + count)
                self.num_blocks[slot] += count
        entries = [slots, columns, list(plan.new_block_ids)]
        rows, cols, ids = to_device(entries, torch.int64, self.device)
        self.block_tables[rows, cols] = ids.int()

    def advance_to(self, slots: Tensor, num_computed: Tensor) -> None:
        """The step after which each slot [R] has `num_computed` tokens is launched. The spare slot
        may stand there more than once."""
        self.num_computed[slots] = num_computed
        self.num_computed[self.spare :].zero_()

    def next_positions(self, slots: Tensor) -> Tensor:
        """Where each slot's next token belongs [R] int64, once a step has computed all others."""
        return self.num_computed[slots]

    def write(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Put drawn tokens where the next step will read them."""
        self.history.index_put_((slots, positions), token_ids.int())
