import pytest
import torch


@pytest.mark.parametrize("num_rows", [0, 1, 6])
@pytest.mark.parametrize("vocab_size", [1, 9, 130])
def test_penalties(apply_penalties, device, num_rows, vocab_size):
    logits = torch.randn(num_rows, vocab_size) * 4
    logits[:, 0] = -torch.inf  # a forbidden token stays so
    prompt = torch.rand(num_rows, vocab_size) < 0.4
    counts = torch.poisson(torch.full((num_rows, vocab_size), 0.7)).int()
    repetition = torch.rand(num_rows) + 0.5
    frequency, presence = torch.randn(num_rows), torch.randn(num_rows)
    case = [t.to(device) for t in (logits, prompt, counts, repetition, frequency, presence)]
    before = case[0].clone()
    out = apply_penalties(*case)
    assert torch.equal(case[0], before)
    assert out.dtype == torch.float32
    expected = torch.zeros(num_rows, vocab_size, dtype=torch.float64)
    for r in range(num_rows):
        for v in range(vocab_size):
            z, count = logits[r, v].item(), counts[r, v].item()
            if prompt[r, v] or count:
                z = z / repetition[r].item() if z > 0 else z * repetition[r].item()
            expected[r, v] = z - frequency[r].item() * count - presence[r].item() * (count > 0)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-6, atol=2e-6)


def test_a_prompt_token_is_only_repetition_penalised(apply_penalties, device):
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]], device=device)
    prompt = torch.tensor([[True, True, False, False]], device=device)
    counts = torch.tensor([[0, 0, 3, 0]], dtype=torch.int32, device=device)
    penalties = (torch.tensor([x], device=device) for x in (2.0, 0.5, 0.25))
    out = apply_penalties(logits, prompt, counts, *penalties)
    assert out.tolist() == [[1.0, -4.0, 1.0 - 1.5 - 0.25, -2.0]]


def test_neutral_values_change_no_bit(apply_penalties, device):
    logits = torch.randn(3, 50, device=device)
    everything = torch.ones(3, 50, dtype=torch.bool, device=device)
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)
    assert torch.equal(
        apply_penalties(logits, everything, everything.int(), one, zero, zero), logits
    )


@pytest.mark.parametrize(
    ("slots", "starts", "ends"),
    [
        ([], [], []),
        ([2], [0], [0]),  # nothing
        ([2], [0], [17]),  # the whole line
        ([3, 0, 3, 1], [0, 5, 16, 2], [4, 6, 17, 2]),
    ],
)
def test_token_counts(token_counts, device, slots, starts, ends):
    vocab_size = 5
    history = torch.full((4, 17), 10**6, dtype=torch.int32)  # outside start:end: anything
    for slot, start, end in zip(slots, starts, ends, strict=True):
        history[slot, start:end] = torch.randint(0, vocab_size, (end - start,), dtype=torch.int32)
    arguments = (torch.tensor(x, dtype=torch.int64, device=device) for x in (slots, starts, ends))
    counts = token_counts(history.to(device), *arguments, vocab_size)
    assert counts.dtype == torch.int32
    assert counts.shape == (len(slots), vocab_size)
    for row, slot, start, end in zip(counts.tolist(), slots, starts, ends, strict=True):
        tokens = history[slot, start:end].tolist()
        assert row == [tokens.count(token) for token in range(vocab_size)]
