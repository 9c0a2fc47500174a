import math

import pytest
import torch


def naive(logits, token, num_top):
    total = math.fsum(math.exp(z - max(logits)) for z in logits)
    logprobs = [z - max(logits) - math.log(total) for z in logits]
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    top = order[:num_top]
    return logprobs[token], order.index(token) + 1, top, [logprobs[v] for v in top]


@pytest.mark.parametrize("num_rows", [0, 1, 4])
@pytest.mark.parametrize(("vocab_size", "num_top"), [(1, 1), (7, 0), (7, 7), (513, 20)])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_token_logprobs(token_logprobs, device, num_rows, vocab_size, num_top, scale):
    logits = torch.randn(num_rows, vocab_size) * scale
    logits[:, 3::5] = logits[:, 2:-1:5]  # ties
    logits[:, 4::11] = -torch.inf
    tokens = torch.randint(0, vocab_size, (num_rows,))
    logprob, rank, top_ids, top_logprobs = token_logprobs(
        logits.to(device), tokens.to(device), num_top
    )
    assert logprob.dtype == top_logprobs.dtype == torch.float32
    assert rank.dtype == top_ids.dtype == torch.int64
    assert logprob.shape == rank.shape == (num_rows,)
    assert top_ids.shape == top_logprobs.shape == (num_rows, num_top)
    for r in range(num_rows):
        expected = naive(logits[r].tolist(), tokens[r].item(), num_top)
        assert logprob[r].item() == pytest.approx(expected[0], rel=1e-6, abs=2e-6)
        assert rank[r].item() == expected[1]
        assert top_ids[r].tolist() == expected[2]
        assert top_logprobs[r].tolist() == pytest.approx(expected[3], rel=1e-6, abs=2e-6)


def test_rank_is_the_place_among_the_top(token_logprobs, device):
    logits = torch.randint(-3, 4, (1, 16)).float().repeat(16, 1).to(device)
    logits[:, ::3] *= -1  # -0.0 beside 0.0: equal numbers, so the lower id first
    _, rank, top_ids, _ = token_logprobs(logits, torch.arange(16, device=device), 16)
    assert sorted(rank.tolist()) == list(range(1, 17))
    for token in range(16):
        assert top_ids[0, rank[token] - 1] == token
    values = logits[0].cpu()[top_ids[0].cpu()]
    for i in range(15):
        assert values[i] > values[i + 1] or top_ids[0, i] < top_ids[0, i + 1]
