import pytest
import torch
import torch.nn.functional as F

from ernie_engine.kernels.moe import moe_experts_torch


def naive(x, gate_up, down, weights, ids):  # fp64, one token and choice at a time
    x, gate_up, down, weights = (t.cpu().double() for t in (x, gate_up, down, weights))
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            out[t] += w * (down[e] @ (gate / (1 + torch.exp(-gate)) * up))
    return out


def make(randn, num_tokens, num_experts, hidden, width, top_k):
    x = randn(num_tokens, hidden)
    gate_up = randn(num_experts, 2 * width, hidden) / hidden**0.5
    down = randn(num_experts, hidden, width) / width**0.5
    weights = randn(num_tokens, top_k).softmax(dim=-1)
    rows = [torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]
    ids = torch.stack(rows) if rows else torch.zeros(0, top_k, dtype=torch.int64)
    return x, gate_up, down, weights, ids.to(x.device)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "hidden", "width", "top_k"),
    [
        (0, 4, 8, 8, 2),
        (1, 64, 33, 17, 6),  # most experts without a token
        (1, 1, 8, 1, 1),
        (29, 8, 40, 24, 3),
        (9, 5, 16, 31, 5),  # every expert has every token
        (50, 7, 24, 16, 1),
    ],
)
def test_moe_experts(
    moe_experts, dtype, randn, assert_near, num_tokens, num_experts, hidden, width, top_k
):
    case = make(randn, num_tokens, num_experts, hidden, width, top_k)
    y = moe_experts(*case)
    assert y.dtype == dtype
    assert_near(y, naive(*case), factor=2)  # four roundings one after the other


@pytest.mark.parametrize("expert", [0, 3, 5])
def test_all_tokens_at_one_expert(moe_experts, dtype, randn, assert_near, expert):
    x, gate_up, down, weights, _ = make(randn, 13, 6, 20, 12, 1)
    ids = torch.full((13, 1), expert, device=x.device)
    gate_up[:expert], gate_up[expert + 1 :] = torch.nan, torch.nan  # of no concern
    case = x, gate_up, down, weights, ids
    assert_near(moe_experts(*case), naive(*case), factor=2)


def test_a_token_does_not_know_its_company(moe_experts, dtype, randn, assert_near):
    x, gate_up, down, weights, ids = make(randn, 12, 6, 20, 12, 2)
    together = moe_experts(x, gate_up, down, weights, ids)
    for t in range(12):
        alone = moe_experts(x[t : t + 1], gate_up, down, weights[t : t + 1], ids[t : t + 1])
        assert_near(together[t : t + 1], alone.cpu().double())


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_experts_dealt_out_whole_add_up(moe_experts, dtype, randn, assert_near, num_ranks):
    x, gate_up, down, weights, ids = make(randn, 9, 6, 20, 12, 2)
    partial = []
    for first in range(0, 6, 6 // num_ranks):
        mine = slice(first, first + 6 // num_ranks)
        partial.append(moe_experts(x, gate_up[mine], down[mine], weights, ids, first))
        passed_over = (ids < mine.start) | (ids >= mine.stop)
        assert (partial[-1][passed_over.all(dim=1)] == 0).all()
    total = torch.stack(partial).double().sum(dim=0)
    assert_near(total.to(dtype), naive(x, gate_up, down, weights, ids), factor=2)


def constant_experts(values, device):
    """Experts whose output for x = 1 is the given value, exactly: silu(32) is 32 in bf16."""
    values = torch.tensor(values, device=device)
    gate_up = torch.tensor([[32.0], [1 / 32]], device=device).expand(len(values), 2, 1)
    down = values.view(-1, 1, 1)
    return gate_up.bfloat16().contiguous(), down.bfloat16()


def test_sum_is_wider_than_the_dtype(moe_experts, device):
    # In bf16 256 + 1 is 256 again; in fp32 the ones add up.
    gate_up, down = constant_experts([256.0, 1.0, 1.0, 1.0, 1.0], device)
    x = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    ids = torch.arange(5, device=device)[None]
    y = moe_experts(x, gate_up, down, torch.ones_like(ids, dtype=x.dtype), ids)
    assert y.item() == 260


def test_each_product_with_a_weight_is_rounded(moe_experts, device):
    values, weights = torch.rand(40, 7).bfloat16() + 1, torch.rand(40, 7).bfloat16()
    rounded = (values * weights).float().sum(dim=1).bfloat16()
    unrounded = (values.float() * weights.float()).sum(dim=1).bfloat16()
    assert (rounded != unrounded).any()
    x = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    ids = torch.arange(7, device=device)[None]
    for value, weight, expected in zip(values, weights, rounded, strict=True):
        gate_up, down = constant_experts(value.tolist(), device)
        assert moe_experts(x, gate_up, down, weight[None].to(device), ids).item() == expected


def test_twin_runs_one_pair_of_products_per_expert_in_use(monkeypatch):
    rows, product = [], F.linear

    def record(x, weight):
        rows.append(len(x))
        return product(x, weight)

    monkeypatch.setattr(F, "linear", record)
    x, gate_up, down, weights, _ = make(torch.randn, 4, 9, 8, 8, 2)
    moe_experts_torch(x, gate_up, down, weights, torch.tensor([[1, 7], [7, 2], [7, 1], [2, 7]]))
    assert rows == [2, 2, 2, 2, 4, 4]  # experts 1, 2, 7
