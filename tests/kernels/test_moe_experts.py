import pytest
import torch
import torch.nn.functional as F

from ernie_engine.kernels import expert_sort, moe, moe_grouped, moe_hopper
from ernie_engine.kernels.expert_sort import sort_by_expert
from ernie_engine.kernels.launch import DEFAULT
from ernie_engine.kernels.moe import moe_experts_torch
from ernie_engine.kernels.moe_few import moe_experts_few
from ernie_engine.kernels.moe_grouped import moe_experts_grouped
from ernie_engine.kernels.moe_units import BLOCK_M
from tests.kernels.tile_check import assert_as_near_as_twin, half_and_single, where_kernels_run


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


def constant_experts(values, dtype, device):
    """Experts whose output for x = 1 is the given value, exactly: silu(32) is 32 in half types."""
    gate_up = torch.tensor([[32.0], [1 / 32]], device=device).expand(len(values), 2, 1)
    down = torch.tensor(values, device=device).view(-1, 1, 1)
    return gate_up.to(dtype).contiguous(), down.to(dtype)


def only_half(dtype):
    if dtype.itemsize != 2:
        pytest.skip("the sum is not wider than this dtype")


def test_sum_is_wider_than_the_dtype(moe_experts, device, dtype):
    # In the half types 2 / eps + 1 is 2 / eps again; in fp32 the ones add up.
    only_half(dtype)
    large = 2 / torch.finfo(dtype).eps
    gate_up, down = constant_experts([large, 1.0, 1.0, 1.0, 1.0], dtype, device)
    x = torch.ones(1, 1, dtype=dtype, device=device)
    ids = torch.arange(5, device=device)[None]
    y = moe_experts(x, gate_up, down, torch.ones_like(ids, dtype=dtype), ids)
    assert y.item() == large + 4


def test_each_product_with_a_weight_is_rounded(moe_experts, device, dtype):
    only_half(dtype)
    values, weights = torch.rand(40, 7).to(dtype) + 1, torch.rand(40, 7).to(dtype)
    rounded = (values * weights).float().sum(dim=1).to(dtype)
    unrounded = (values.float() * weights.float()).sum(dim=1).to(dtype)
    assert (rounded != unrounded).any()
    x = torch.ones(1, 1, dtype=dtype, device=device)
    ids = torch.arange(7, device=device)[None]
    for value, weight, expected in zip(values, weights, rounded, strict=True):
        gate_up, down = constant_experts(value.tolist(), dtype, device)
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


# The two sets of Triton kernels, each at sizes that the choice by size would not give it.

BOTH = pytest.mark.parametrize("kernels", [moe_experts_few, moe_experts_grouped])


def make_there(dtype, *sizes):
    return make(lambda *shape: torch.randn(*shape).to(where_kernels_run(), dtype), *sizes)


def check(kernels, case, first_expert=0):
    """case: the matrices of all experts; the kernels are given those from first_expert on."""
    x, gate_up, down, weights, ids = case
    mine = x, gate_up[first_expert:], down[first_expert:], weights, ids, first_expert
    weights = weights.where(ids >= first_expert, 0)
    exact = naive(x, gate_up, down, weights, ids)
    assert_as_near_as_twin(kernels(*mine), moe_experts_torch(*mine), exact)


SIZES = [
    (1, 64, 33, 17, 6),  # most experts without a token
    (32, 2, 8, 1, 1),
    (3, 9, 300, 40, 2),  # more columns than are read at once
    (2, 3, 16, 270, 3),  # in the second product, too; every expert has every token
]
MANY = [(20, 2, 70, 20, 2)]  # experts of more than one tile: for the sorted ones


@half_and_single
@pytest.mark.parametrize(
    ("kernels", "sizes"),
    [
        *((moe_experts_few, sizes) for sizes in SIZES),
        *((moe_experts_grouped, sizes) for sizes in (*SIZES, *MANY)),
    ],
)
def test_both_sets(dtype, kernels, sizes):
    check(kernels, make_there(dtype, *sizes))


@half_and_single
@BOTH
def test_both_sets_with_a_share_of_the_experts(dtype, kernels):
    case = make_there(dtype, 7, 8, 24, 20, 2)
    check(kernels, case, first_expert=3)
    case[-1][:] = torch.tensor([1, 0])
    assert (kernels(*(t[5:] if i in (1, 2) else t for i, t in enumerate(case)), 5) == 0).all()


@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_grouped_at_each_tile(monkeypatch, block_m):
    monkeypatch.setattr(moe_grouped, "TILE_TABLE", {(DEFAULT, 1): {"BLOCK_M": block_m}})
    check(moe_experts_grouped, make_there(torch.float16, 90, 3, 40, 70, 2))


# (tokens, experts, hidden, width, choices, shared width)
ON_HOPPER = [
    (1, 4, 64, 8, 2, 0),
    (300, 3, 128, 72, 2, 0),  # widths that fill no box
    (300, 3, 64, 200, 3, 400),
    (129, 2, 320, 448, 2, 8),
    (700, 64, 256, 128, 6, 256),  # most tiles hold few entries
    (2000, 5, 192, 320, 2, 640),
    (140, 4, 8192, 448, 2, 0),
]


def check_without_the_last(case):
    """Choices of an expert behind the local ones."""
    x, gate_up, down, weights, ids = case
    mine = x, gate_up[:-1], down[:-1], weights, ids, 0
    exact = naive(x, gate_up, down, weights.where(ids < len(down) - 1, 0), ids)
    assert_as_near_as_twin(moe_experts_grouped(*mine), moe_experts_torch(*mine), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("programs", [None, 3])  # as many as fit; few, with many units each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", ON_HOPPER)
def test_on_hopper(monkeypatch, sizes, dtype, programs, at_once):
    _, _, hidden, _, top_k, shared_width = sizes
    case = make_there(dtype, *sizes[:-1])
    if not moe_hopper.takes(case[0], case[2], None):
        pytest.skip("not on this card")
    monkeypatch.setattr(moe_grouped, "HOPPER", {("sm_90", 1): {"HOPPER": 1}})
    monkeypatch.setattr(moe_hopper, "TABLE", {("sm_90", 1): {"AT_ONCE": at_once}})
    if programs:
        monkeypatch.setattr(moe_hopper, "num_multiprocessors", lambda device: programs)
    check(moe_experts_grouped, case)
    check(moe_experts_grouped, case, first_expert=1)
    check_without_the_last(case)
    case[-1][:] = torch.arange(top_k)  # experts without a token, and many with as many as can be
    check(moe_experts_grouped, case)
    x, gate_up, down, weights, ids = case
    none = moe_experts_grouped(x, gate_up, down, weights, ids + len(down), 0)
    assert (none == 0).all()
    if shared_width:
        shared = make_there(dtype, 1, 1, hidden, shared_width, 1)[1:3]
        shared = shared[0][0], shared[1][0]
        exact = naive(*case) + naive_mlp(case[0], *shared)
        twin = moe_experts_torch(*case, 0, *shared)
        y = moe_experts_grouped(*case, 0, *shared)
        assert_as_near_as_twin(y, twin, exact.to(y.device))
        alone = moe_experts_grouped(x, gate_up, down, weights, ids + len(down), 0, *shared)
        twin = moe_experts_torch(x, gate_up, down, weights, ids + len(down), 0, *shared)
        assert_as_near_as_twin(alone, twin, naive_mlp(x, *shared).to(y.device))


def products_in_torch(x, gate_up, down, shared_gate_up, shared_down, weights, tiles):
    """What moe_hopper.products_hopper() gives for these; NaN of entries of other ranks."""

    def mlp(rows, gate_up, down):
        gate, up = F.linear(rows, gate_up).chunk(2, dim=1)
        return F.linear(F.silu(gate) * up, down)

    products = x.new_full((weights.numel(), x.shape[1]), torch.nan)
    for expert, first, last in tiles.bounds[:, : tiles.used[0]].T.tolist():
        assert last - first <= BLOCK_M.value
        entries = tiles.order[first:last].long()
        y = mlp(x[entries // weights.shape[1]], gate_up[expert], down[expert])
        products[entries] = y * weights.flatten()[entries, None]
    if shared_down is None:
        return products
    return torch.cat([products, mlp(x, shared_gate_up, shared_down)])


def test_what_hoppers_products_are_given_and_what_becomes_of_them(monkeypatch):
    calls = []

    def products(*args):
        calls.append(args)
        return products_in_torch(*args)

    monkeypatch.setattr(moe_grouped, "HOPPER", {(DEFAULT, 1): {"HOPPER": 1}})
    monkeypatch.setattr(moe_hopper, "takes", lambda *tensors: True)
    monkeypatch.setattr(moe_hopper, "products_hopper", products)
    case = make_there(torch.float16, 150, 3, 24, 16, 2)
    check(moe_experts_grouped, case)
    check(moe_experts_grouped, case, first_expert=1)
    shared = make_there(torch.float16, 1, 1, 24, 20, 1)[1:3]
    shared = shared[0][0], shared[1][0]
    exact = (naive(*case) + naive_mlp(case[0], *shared)).to(case[0].device)
    twin = moe_experts_torch(*case, 0, *shared)
    assert_as_near_as_twin(moe_experts_grouped(*case, 0, *shared), twin, exact)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("dtype", "hidden", "width", "shared_width", "taken"),
    [
        (torch.bfloat16, 2560, 1536, 3072, True),
        (torch.float16, 64, 8, None, True),
        (torch.float32, 2560, 1536, 3072, False),
        (torch.bfloat16, 96, 64, None, False),  # rows of tokens come in whole steps
        (torch.bfloat16, 64, 20, None, False),  # the copy engine takes rows of whole 16 bytes
        (torch.bfloat16, 64, 64, 20, False),
    ],
)
def test_what_is_done_on_hopper(monkeypatch, dtype, hidden, width, shared_width, taken):
    x, down = torch.empty(3, hidden, dtype=dtype), torch.empty(2, hidden, width, dtype=dtype)
    shared = None if shared_width is None else torch.empty(hidden, shared_width, dtype=dtype)
    assert not moe_hopper.takes(x, down, shared)  # not on this card
    monkeypatch.setattr(moe_hopper, "is_hopper", lambda device: True)
    assert moe_hopper.takes(x, down, shared) == taken


@BOTH
def test_roundings_are_the_twins(kernels):
    """With sums of one term only roundings are left; one left out changes many a result."""
    case = make_there(torch.float16, 80, 5, 1, 1, 2)
    same = kernels(*case) == moe_experts_torch(*case)
    assert same.double().mean() > 0.98  # two exponentials may fall on two sides of a border


@BOTH
@pytest.mark.gpu  # the interpreter runs one program after the other: always the same
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again(kernels, dtype):
    case = make_there(dtype, 300, 16, 256, 128, 3)
    expected = kernels(*case)
    assert all(torch.equal(kernels(*case), expected) for _ in range(20))


@pytest.mark.parametrize(("num_tokens", "chosen"), [(1, "few"), (4, "few"), (5, "grouped")])
def test_choice_by_size(monkeypatch, num_tokens, chosen):
    calls = []
    for name in ("few", "grouped"):
        record = lambda *args, name=name: calls.append(name)  # noqa: E731
        monkeypatch.setattr(moe, f"moe_experts_{name}", record)
    moe.moe_experts_triton(*make(torch.randn, num_tokens, 4, 8, 8, 2))
    assert calls == [chosen]


UNWRITTEN = torch.iinfo(torch.int32).max  # poisoned_memory


def check_sort(ids, num_experts, first_expert, block_m):
    """Every local entry in exactly one tile, in a tile of its own expert, in order."""
    there = ids.to(where_kernels_run())
    order, bounds, (used, *taken) = sort_by_expert(there, num_experts, first_expert, block_m)
    local = ids.flatten() - first_expert
    key = local.where((local >= 0) & (local < num_experts), num_experts)
    num_local = int((key < num_experts).sum())
    expected = key.argsort(stable=True)[:num_local]
    assert torch.equal(order[:num_local].cpu().long(), expected)
    assert (order[num_local:] == UNWRITTEN).all()  # other ranks' entries are placed nowhere
    covered = []
    assert taken == [0, 0]
    assert (bounds[:, used:] == UNWRITTEN).all()
    for expert, first, last in bounds[:, :used].cpu().T.tolist():
        assert 0 <= expert < num_experts and 0 < last - first <= block_m
        assert (local[expected[first:last]] == expert).all()
        covered += range(first, last)
    assert covered == list(range(num_local))


def sort_in(monkeypatch, block, round_size, at_once):
    row = {"BLOCK": block, "ROUND": round_size, "AT_ONCE": at_once, "num_warps": 4}
    monkeypatch.setattr(expert_sort, "SORT_TABLE", {(DEFAULT, 1): row})


@pytest.mark.parametrize("at_once", [0, 256])
@pytest.mark.parametrize(("num_experts", "first_expert"), [(1, 0), (5, 0), (5, 3)])
@pytest.mark.parametrize(
    ("shape", "block_m"), [((1, 1), 16), ((7, 3), 16), ((33, 2), 16), ((50, 4), 16), ((50, 4), 32)]
)
def test_sort(monkeypatch, shape, num_experts, first_expert, block_m, at_once):
    sort_in(monkeypatch, 64, 16, at_once)  # so that there are several blocks, and rounds in each
    ids = torch.randint(0, first_expert + num_experts + 2, shape)
    check_sort(ids, num_experts, first_expert, block_m)
    for expert in (first_expert, first_expert + num_experts - 1, first_expert + num_experts):
        check_sort(torch.full(shape, expert), num_experts, first_expert, block_m)


def test_sort_of_more_blocks_than_are_added_together(monkeypatch):
    sort_in(monkeypatch, 8, 8, 0)
    check_sort(torch.randint(0, 9, (70, 4)), 6, 2, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("first_expert", [0, 8])
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 64, 65, 255, 256, 257, 1000, 16384])
def test_sort_at_real_sizes(num_tokens, first_expert):
    ids = torch.rand(num_tokens, 64).topk(8).indices
    check_sort(ids, 64 - 2 * first_expert, first_expert, 128)


@pytest.mark.parametrize("at_once", [6, 7, 20])
def test_tokens_in_parts_are_the_tokens(monkeypatch, at_once):
    case = make_there(torch.float32, 20, 6, 24, 20, 2)
    whole = moe_experts_grouped(*case)
    monkeypatch.setattr(moe_grouped, "TOKENS_AT_ONCE", at_once)
    assert torch.equal(moe_experts_grouped(*case), whole)  # fp32 has one tile for all sizes


@pytest.mark.gpu
@pytest.mark.parametrize("at_once", [150, 299])
def test_tokens_in_parts_are_the_tokens_on_hopper(monkeypatch, at_once):
    case = make_there(torch.bfloat16, 300, 6, 256, 128, 2)
    if not moe_hopper.takes(case[0], case[2], None):
        pytest.skip("not on this card")
    monkeypatch.setattr(moe_grouped, "HOPPER", {("sm_90", 1): {"HOPPER": 1}})
    whole = moe_experts_grouped(*case)
    monkeypatch.setattr(moe_grouped, "TOKENS_AT_ONCE", at_once)
    assert torch.equal(moe_experts_grouped(*case), whole)


@BOTH
def test_planted_errors_are_found(kernels):
    case = make_there(torch.float16, 18, 5, 40, 8, 2)

    def one_percent_in_a_tile(*args):
        y = kernels(*args)
        y[:16, 32:] *= 1.01
        return y

    def unwritten_row(*args):
        y = kernels(*args)
        y[7] = torch.empty_like(y[7])
        return y

    def wrong_expert(x, gate_up, down, weights, ids, first_expert):
        ids = ids.clone()
        ids[17, 1] = (set(range(5)) - set(ids[17].tolist())).pop()
        return kernels(x, gate_up, down, weights, ids, first_expert)

    def swapped_weights(x, gate_up, down, weights, ids, first_expert):
        weights = weights.clone()
        weights[0] = weights[0].flip(0)
        return kernels(x, gate_up, down, weights, ids, first_expert)

    check(kernels, case)
    for wrong in (one_percent_in_a_tile, unwritten_row, wrong_expert, swapped_weights):
        with pytest.raises(AssertionError, match="worst tile"):
            check(wrong, case)


def shared_mlp(randn, hidden, width):
    return randn(2 * width, hidden) / hidden**0.5, randn(hidden, width) / width**0.5


def naive_mlp(x, gate_up, down):  # fp64
    x, gate_up, down = (t.cpu().double() for t in (x, gate_up, down))
    gate, up = (x @ gate_up.T).chunk(2, dim=1)
    return (gate / (1 + torch.exp(-gate)) * up) @ down.T


@pytest.mark.parametrize("shared_width", [12, 24, 36, 20])  # 20: not so many routed ones wide
@pytest.mark.parametrize("num_tokens", [1, 3, 19])
def test_shared_experts_add_to_the_sum(
    moe_experts, dtype, randn, assert_near, num_tokens, shared_width
):
    case = make(randn, num_tokens, 6, 20, 12, 3)
    shared = shared_mlp(randn, 20, shared_width)
    exact = naive(*case) + naive_mlp(case[0], *shared)
    assert_near(moe_experts(*case, 0, *shared), exact, factor=2.5)
    x, gate_up, down, weights, ids = case
    mine = moe_experts(x, gate_up[2:4], down[2:4], weights, ids, 2, *shared)  # of another rank's
    kept = weights.where((ids >= 2) & (ids < 4), 0)
    assert_near(mine, naive(x, gate_up, down, kept, ids) + naive_mlp(x, *shared), factor=2.5)


@half_and_single
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 20, 70])
def test_shared_experts_in_the_launches_of_the_routed(monkeypatch, dtype, num_tokens, num_parts):
    case = make_there(dtype, num_tokens, 5, 40, moe_grouped.MOST_BLOCK_K, 2)
    x, _, down, *_ = case
    shared = make_there(dtype, 1, 1, 40, num_parts * moe_grouped.MOST_BLOCK_K, 1)[1:3]
    shared = shared[0][0], shared[1][0]
    assert moe_grouped._num_parts(x, down, shared[1]) == num_parts
    exact = naive(*case) + naive_mlp(x, *shared)
    twin = moe_experts_torch(*case, 0, *shared)
    assert_as_near_as_twin(moe_experts_grouped(*case, 0, *shared), twin, exact.to(x.device))
    monkeypatch.setattr(moe_grouped, "SHARED_TABLE", {(DEFAULT, 1): {"TOGETHER": 0}})
    assert moe_grouped._num_parts(x, down, shared[1]) == 0
    assert_as_near_as_twin(moe_experts_grouped(*case, 0, *shared), twin, exact.to(x.device))
