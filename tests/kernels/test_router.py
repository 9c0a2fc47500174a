import pytest
import torch

from ernie_engine.kernels import router as router_file
from ernie_engine.kernels.launch import DEFAULT
from tests.kernels.tile_check import where_kernels_run

NORM_MIN = 1e-12
# p + bias near 24 is rounded to about 2e-6; two experts nearer than this may change places.
NEAR_TIE = 4e-6


def naive_scores(x, weight):  # softmax in fp64
    logits = x.cpu().double() @ weight.cpu().double().T
    p = torch.exp(logits - logits.amax(dim=1, keepdim=True))
    return p / p.sum(dim=1, keepdim=True)


def make(num_tokens, num_experts, hidden, device, dtype):
    """Scores and a bias like a trained one's: near +20, with a spread of hundredths."""
    x = torch.randn(num_tokens, hidden).to(dtype)
    weight = torch.randn(num_experts, hidden) * 0.4 / hidden**0.5
    bias = 20 + torch.rand(num_experts) * 0.03
    return x.to(device), weight.to(device), bias.to(device)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "hidden"),
    [
        *((0, 4, 2, 37), (1, 1, 1, 37), (1, 64, 6, 37), (33, 64, 8, 37), (9, 5, 5, 37)),
        *((7, 3, 1, 37), (33, 16, 3, 1100)),  # longer than a program's part of the inner dimension
    ],
)
def test_router(router, device, dtype, assert_near, num_tokens, num_experts, top_k, hidden):
    x, weight, bias = make(num_tokens, num_experts, hidden, device, dtype)
    weights, ids = router(x, weight, bias, top_k, NORM_MIN)
    assert weights.dtype == dtype
    assert ids.dtype == torch.int64
    assert weights.shape == ids.shape == (num_tokens, top_k)
    ids, p = ids.cpu(), naive_scores(x, weight)
    scores = p + bias.cpu().double()
    for row, chosen in zip(scores, ids, strict=True):
        assert len(set(chosen.tolist())) == top_k
        assert (row[chosen].diff() <= NEAR_TIE).all()  # best first
        rest = row.clone().index_fill_(0, chosen, -torch.inf)
        assert row[chosen].min() >= rest.max() - NEAR_TIE
    picked = p.gather(1, ids)
    assert_near(weights, picked / picked.sum(dim=1, keepdim=True))


def choices(scores, top_k):
    return scores.topk(top_k).indices.sort().values


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_choice_is_the_same_whatever_is_chosen_beside(monkeypatch, rows):
    """But for the last bits of its weights: a GPU's threads share a sum out by the rows."""
    case = *make(19, 64, 37, where_kernels_run(), torch.float32), 6, NORM_MIN
    weights, ids = router_file.router_triton(*case)
    monkeypatch.setattr(router_file, "CHOICE_TABLE", {(DEFAULT, 1): {"ROWS": rows}})
    other_weights, other_ids = router_file.router_triton(*case)
    assert torch.equal(other_ids, ids)
    torch.testing.assert_close(other_weights, weights, rtol=1e-5, atol=0)


def test_bias_selects_in_full_precision(router, device):
    x, weight, bias = make(200, 64, 37, device, torch.bfloat16)
    _, ids = router(x, weight, bias, 6, NORM_MIN)
    ids, p, bias = ids.cpu().sort().values, naive_scores(x, weight), bias.cpu()
    sharp = (ids == choices(p + bias.double(), 6)).all(dim=1)
    assert sharp.float().mean() > 0.99  # near-ties are rare enough for what follows
    for wrong in (p, p + bias.bfloat16(), (p + bias).bfloat16().double()):
        assert (ids != choices(wrong, 6)).any(dim=1).float().mean() > 0.5


def test_bias_is_not_in_the_weights(router, device):
    x, weight, bias = make(50, 64, 37, device, torch.float32)
    weights, ids = router(x, weight, bias, 6, NORM_MIN)
    p, ids = naive_scores(x, weight), ids.cpu()
    with_bias = (p + bias.cpu()).gather(1, ids)
    with_bias = with_bias / with_bias.sum(dim=1, keepdim=True)  # all nearly 1/6
    assert (weights.cpu() - with_bias).abs().max() > 0.05


def test_product_of_half_inputs_is_fp32(router, device):
    # In bf16 the two logits would be 4 + 1/64 -> 4 both; in fp32 expert 1 leads.
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16, device=device)
    weight = torch.tensor([[4.0, 0.0], [4.0, 2**-6]], device=device)
    _, ids = router(x, weight, torch.zeros(2, device=device), 1, NORM_MIN)
    assert ids.tolist() == [[1]]


def test_equal_experts_in_order_of_id(router, device):
    x = torch.randn(3, 8).to(device)
    weight = torch.randn(1, 8).expand(64, 8).contiguous().to(device)
    weights, ids = router(x, weight, torch.full((64,), 22.0, device=device), 6, NORM_MIN)
    assert ids.tolist() == [list(range(6))] * 3
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


def test_weights_of_improbable_experts_stay_finite(router, device):
    # Expert 0 has all the probability, but the bias chooses others, whose sum underflows.
    weight = torch.tensor([[200.0], [0.0], [0.0]], device=device)
    bias = torch.tensor([0.0, 9.0, 8.0], device=device)
    weights, ids = router(torch.ones(1, 1, device=device), weight, bias, 2, NORM_MIN)
    assert ids.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.0, 0.0]]
