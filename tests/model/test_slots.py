"""What a plan puts into the slots, and that it takes one copy however much that is."""

import random
from array import array

import pytest
import torch

from ernie_engine.engine.plan import NewSlot, SamplingPart, SamplingSpec, StepPlan
from ernie_engine.model import slots as module
from ernie_engine.model.slots import FLOATS, INTS, Slots, send

CPU = torch.device("cpu")


def spec_of(rng: random.Random) -> SamplingSpec:
    floats = {name: rng.uniform(-2, 2) for name in FLOATS}
    seed = rng.choice([-(1 << 63), (1 << 63) - 1, rng.getrandbits(62)])
    return SamplingSpec(**floats, top_k=rng.randrange(100), seed=seed, min_tokens=rng.randrange(9))


def plan_of(new=(), starts=(), rows=(), freed=()) -> StepPlan:
    """rows: slot, query tokens, new blocks."""
    slots, counts, blocks = zip(*rows, strict=True) if rows else ((), (), ())
    ids = [block for row in blocks for block in row]
    sizes = slots, counts, [len(row) for row in blocks], ids
    return StepPlan(0, freed, (), list(new), list(starts), *sizes, SamplingPart())


@pytest.mark.parametrize("seed", range(5))
def test_each_request_is_in_its_slot(seed):
    rng = random.Random(seed)
    state = Slots(8, 64, 4, CPU)
    where = rng.sample(range(8), rng.randint(1, 8))
    new = []
    for slot in where:
        tokens = [rng.randrange(1 << 17) for _ in range(rng.randint(1, 60))]
        new.append(
            NewSlot(slot, rng.choice([tokens, array("q", tokens), tuple(tokens)]), spec_of(rng))
        )
    starts = [(slot, rng.randrange(50)) for slot in where]
    blocks = {slot: [rng.randrange(90) for _ in range(rng.randrange(16))] for slot in where}
    state.apply(plan_of(new, starts, [(slot, 1, blocks[slot]) for slot in where]))
    for one, (slot, computed) in zip(new, starts, strict=True):
        assert state.history[slot, : len(one.token_ids)].tolist() == list(one.token_ids)
        assert not state.history[slot, len(one.token_ids) :].any()
        expected = torch.tensor([getattr(one.spec, name) for name in FLOATS], dtype=torch.float32)
        assert torch.equal(state.floats[slot], expected)
        assert state.ints[slot].tolist() == [getattr(one.spec, name) for name in INTS]
        assert state.prompt_lens[slot] == state.host_prompt_lens[slot] == len(one.token_ids)
        assert state.num_computed[slot] == computed and state.specs[slot] is one.spec
        assert state.block_tables[slot, : len(blocks[slot])].tolist() == blocks[slot]
        assert state.num_blocks[slot] == len(blocks[slot])
    others = [slot for slot in range(9) if slot not in where]
    for tensor in (state.history, state.floats, state.ints, state.num_computed, state.block_tables):
        assert not tensor[others].any()


def test_tables_grow_and_begin_anew():
    state = Slots(4, 64, 4, CPU)
    prompt = NewSlot(2, [5], SamplingSpec())
    state.apply(plan_of([prompt], [(2, 0)], [(2, 1, [7, 8])]))
    state.apply(plan_of(rows=[(2, 1, [])]))
    state.apply(plan_of(rows=[(2, 1, [9])]))
    assert state.block_tables[2, :3].tolist() == [7, 8, 9] and state.num_blocks[2] == 3
    state.apply(plan_of(starts=[(2, 4)], rows=[(2, 1, [3])]))  # resumed: its tokens are known
    assert state.block_tables[2, 0] == 3 and state.num_blocks[2] == 1
    assert state.num_computed[2] == 4 and state.history[2, 0] == 5
    state.apply(plan_of(freed=[2]))
    assert not (state.specs or state.host_prompt_lens or state.num_blocks)


@pytest.mark.parametrize("num_new", [0, 1, 4])
def test_all_that_a_plan_says_goes_in_one_copy_or_none(monkeypatch, num_new):
    copies = []

    def noted(values, dtype, device):
        copies.append(len(values))
        return torch.tensor(list(values), dtype=dtype)

    monkeypatch.setattr(module, "host_tensor", noted)
    state = Slots(4, 64, 4, CPU)
    new = [NewSlot(slot, [5, 6], SamplingSpec()) for slot in range(num_new)]
    starts = [(slot, 0) for slot in range(num_new)]
    state.apply(plan_of(new, starts, [(slot, 2, [slot]) for slot in range(num_new)]))
    assert len(copies) == (num_new > 0)
    state.apply(plan_of(rows=[(slot, 1, []) for slot in range(num_new)]))
    assert len(copies) == (num_new > 0)


def test_columns_of_any_length_are_sent():
    columns = [[], [3, -4], array("q", [1 << 62]), range(3), ()]
    assert [column.tolist() for column in send(columns, CPU)] == [list(c) for c in columns]
