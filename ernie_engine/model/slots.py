"""What the ranks remember of every running request between steps, on the device, by slot.

Owns token history, lengths, block tables and sampling values; applies a plan's deltas to them in
the plan's order. Knows no queue: a slot is reused as soon as a plan says so.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ernie_engine.engine.plan import NewSlot, SamplingSpec, StepPlan

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


def send(columns: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Columns of integers as device tensors [len(column)] int64, by one copy of all."""
    values = array("q")
    for column in columns:
        values.extend(column)
    sent = host_tensor(values, torch.int64, device).to(device, non_blocking=True)
    return list(sent.split([len(column) for column in columns]))


def _columns_of_new(requests: Sequence[NewSlot]) -> tuple[Sequence[int], ...]:
    """Slots, lengths of prompts, INTS, FLOATS (the bits of an fp64), tokens."""
    floats = array("d", [getattr(new.spec, name) for new in requests for name in FLOATS])
    tokens = array("q")
    for new in requests:
        tokens.extend(new.token_ids)
    return (
        [new.slot for new in requests],
        [len(new.token_ids) for new in requests],
        [getattr(new.spec, name) for new in requests for name in INTS],
        array("q", floats.tobytes()),
        tokens,
    )


def _columns_of_starts(plan: StepPlan) -> tuple[list[int], list[int]]:
    return [slot for slot, _ in plan.starts], [computed for _, computed in plan.starts]


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
        """Bring the slots up to the plan, before its step reads them. All numbers go to the device
        in one copy: a burst of requests would wait for hundreds."""
        for slot in plan.freed:
            del self.specs[slot], self.host_prompt_lens[slot], self.num_blocks[slot]
        for new in plan.new:
            self.specs[new.slot], self.host_prompt_lens[new.slot] = new.spec, len(new.token_ids)
        for slot, _ in plan.starts:
            self.num_blocks[slot] = 0
        columns = [
            *_columns_of_new(plan.new),
            *_columns_of_starts(plan),
            *self._table_columns(plan),
        ]
        if not any(columns):
            return
        sent = send(columns, self.device)
        if plan.new:
            self._add(plan.new, *sent[:5])
        if plan.starts:
            slots, computed = sent[5:7]
            self.num_computed[slots] = computed
        if plan.new_block_ids:
            slots, places, block_ids = sent[7:]
            self.block_tables[slots, places] = block_ids.int()

    def _add(
        self,
        requests: Sequence[NewSlot],
        slots: Tensor,
        lens: Tensor,
        ints: Tensor,
        floats: Tensor,
        tokens: Tensor,
    ) -> None:
        self.prompt_lens[slots] = lens
        self.ints[slots] = ints.view(len(requests), -1)
        self.floats[slots] = floats.view(torch.float64).view(len(requests), -1).float()
        each = tokens.int().split([len(new.token_ids) for new in requests])
        for new, prompt in zip(requests, each, strict=True):
            self.history[new.slot, : len(prompt)] = prompt

    def _table_columns(self, plan: StepPlan) -> tuple[list[int], list[int], Sequence[int]]:
        """Slots, places in their tables, and the blocks that belong there."""
        slots: list[int] = []
        places: list[int] = []
        for slot, count in zip(plan.slots, plan.num_new_blocks, strict=True):
            if count:  # of most rows none
                slots += [slot] * count
                places += range(self.num_blocks[slot], self.num_blocks[slot] + count)
                self.num_blocks[slot] += count
        return slots, places, plan.new_block_ids

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
