import pytest
import torch

BLOCK_SIZE, LENGTH, SPARE = 4, 36, 6


def make_state(device):
    """Six slots with contexts on both sides of a block's border, and the spare one."""
    computed = torch.tensor([0, 3, 4, 7, 34, 35, 0])
    history = torch.randint(0, 1000, (SPARE + 1, LENGTH))
    tables = torch.randperm((SPARE + 1) * 9).view(SPARE + 1, 9)
    return (x.to(device) for x in (computed, history.int(), tables.int()))


@pytest.mark.parametrize("width", [9, 1])
@pytest.mark.parametrize("slots", [[], [1], [4, 0, 5, 2, 1, 3], [3, SPARE, SPARE, 0, SPARE]])
def test_rows_are_what_the_slots_say(decode_rows, device, slots, width):
    if width == 1:  # tables of one block: a full one beside others
        slots = [slot for slot in slots if slot in (0, 1, SPARE)]
    computed, history, tables = make_state(device)
    before = [x.clone() for x in (history, tables)]
    expected = computed.tolist()
    at = torch.tensor(slots, dtype=torch.int64, device=device)
    ids, positions, cache_slots, context_lens, copied = decode_rows(
        at, computed, history, tables, BLOCK_SIZE, width, SPARE
    )
    assert positions.tolist() == [expected[slot] for slot in slots]
    assert ids.tolist() == [history[slot, expected[slot]].item() for slot in slots]
    assert context_lens.tolist() == [expected[slot] + 1 for slot in slots]
    for slot, where in zip(slots, cache_slots.tolist(), strict=True):
        block, offset = divmod(expected[slot], BLOCK_SIZE)
        assert where == tables[slot, block] * BLOCK_SIZE + offset
    assert copied.shape == (len(slots), width)
    for slot, row in zip(slots, copied, strict=True):
        used = expected[slot] // BLOCK_SIZE + 1
        assert torch.equal(row[:used], tables[slot, :used])
    for slot in set(slots) - {SPARE}:
        expected[slot] += 1
    assert computed.tolist() == expected
    assert torch.equal(history, before[0]) and torch.equal(tables, before[1])
    assert [x.dtype for x in (ids, positions, cache_slots)] == [torch.int64] * 3
    assert context_lens.dtype == copied.dtype == torch.int32


def test_a_long_table_is_copied_whole(decode_rows, device):
    width = 2500
    computed = torch.tensor([width * BLOCK_SIZE - 1, 0], device=device)
    history = torch.zeros(2, width * BLOCK_SIZE, dtype=torch.int32, device=device)
    tables = torch.randperm(2 * width, device=device).int().view(2, width)
    slots = torch.tensor([0], device=device)
    *_, copied = decode_rows(slots, computed, history, tables, BLOCK_SIZE, width, 1)
    assert torch.equal(copied, tables[:1])
