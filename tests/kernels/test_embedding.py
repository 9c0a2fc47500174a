import pytest
import torch


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_rows_are_gathered(embedding, device, dtype, randn, num_tokens):
    weight = randn(11, 5)
    ids = torch.arange(num_tokens) * 5 % 11  # first, last and repeated ones
    y = embedding(ids.to(device), weight)
    assert y.dtype == dtype
    assert y.shape == (num_tokens, 5)
    for row, token in zip(y, ids.tolist(), strict=True):
        assert torch.equal(row, weight[token])
