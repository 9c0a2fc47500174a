"""Prefill and decode attention: one maths, so one naive reference and one set of checks."""

import pytest
import torch
import torch.nn.functional as F

from ernie_engine.kernels import decode_attention as decode
from ernie_engine.kernels import prefill_attention as prefill

GROUPS = [(1, 1), (4, 2), (3, 1), (8, 2), (5, 1), (12, 2), (7, 1), (16, 2)]  # of 1 to 8 heads


class Case:
    """Rows of (query tokens, context) in a paged cache whose unused slots are all NaN."""

    def __init__(self, rows, heads, head_dim, randn, device, block_size=4):
        num_heads, num_kv_heads = heads
        self.rows, self.scale = rows, head_dim**-0.5
        self.q = randn(sum(n for n, _ in rows), num_heads, head_dim)
        self.k = [randn(context, num_kv_heads, head_dim) for _, context in rows]
        self.v = [randn(context, num_kv_heads, head_dim) for _, context in rows]
        needed = [-(-context // block_size) for _, context in rows]
        unused = sum(needed)  # the last block, which tables are padded with
        shape = (unused + 1, block_size, num_kv_heads, head_dim)
        self.k_cache, self.v_cache = (
            torch.full(shape, torch.nan, dtype=self.q.dtype, device=device) for _ in range(2)
        )
        ids = torch.randperm(unused).split(needed) if needed else []
        width = max(needed, default=0) + 2
        tables = torch.full((len(rows), width), unused, dtype=torch.int32)
        for row, blocks in enumerate(ids):
            tables[row, : len(blocks)] = blocks
            slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
            slots = slots[: rows[row][1]].to(device)
            self.k_cache.view(-1, *shape[2:])[slots] = self.k[row]
            self.v_cache.view(-1, *shape[2:])[slots] = self.v[row]
        lens = torch.tensor([n for n, _ in rows], dtype=torch.int32)
        self.block_tables = tables.to(device)
        self.query_start = F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
        self.context_lens = torch.tensor([c for _, c in rows], dtype=torch.int32, device=device)

    def run(self, op):
        before = self.q.clone(), self.k_cache.clone(), self.v_cache.clone()
        out = op(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.query_start,
            self.context_lens,
            self.scale,
            max((n for n, _ in self.rows), default=0),
        )
        for tensor, old in zip((self.q, self.k_cache, self.v_cache), before, strict=True):
            assert torch.equal(tensor.nan_to_num(), old.nan_to_num())
        return out

    def naive(self):  # fp64, one query token and head at a time
        out, group = [], self.q.shape[1] // self.k_cache.shape[2]
        queries = self.q.cpu().double().split([n for n, _ in self.rows])
        for q, k, v, (num_queries, context) in zip(queries, self.k, self.v, self.rows, strict=True):
            k, v = k.cpu().double(), v.cpu().double()
            for i in range(num_queries):
                seen = context - num_queries + i + 1
                for head in range(q.shape[1]):
                    p = (k[:seen, head // group] @ q[i, head] * self.scale).softmax(dim=0)
                    out.append(p @ v[:seen, head // group])
        return torch.stack(out).view(self.q.shape) if out else self.q.cpu().double()


PREFILL_ROWS = [
    [],
    [(1, 1)],
    [(9, 9)],
    [(5, 12), (1, 8), (13, 13)],  # a prefix; one token at a block's end; a whole prompt
    [(4, 4), (0, 6), (3, 21)],  # a row without query tokens
]
DECODE_ROWS = [
    [],
    [(1, 1)],
    [(1, 5), (1, 4), (1, 33), (1, 1)],
    [(8, 8), (1, 30), (3, 4), (5, 17)],  # ragged, as speculation makes them
    [(0, 3), (1, 9), (0, 0), (2, 6)],
]


@pytest.mark.parametrize("rows", PREFILL_ROWS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_prefill(prefill_attention, device, dtype, randn, assert_near, rows, head_dim):
    case = Case(rows, (4, 2), head_dim, randn, device)
    out = case.run(prefill_attention)
    assert out.dtype == dtype
    assert_near(out, case.naive())


@pytest.mark.parametrize("rows", DECODE_ROWS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_decode(decode_attention, device, dtype, randn, assert_near, rows, head_dim):
    case = Case(rows, (4, 2), head_dim, randn, device)
    out = case.run(decode_attention)
    assert out.dtype == dtype
    assert_near(out, case.naive())


@pytest.mark.parametrize("heads", GROUPS)
@pytest.mark.parametrize("block_size", [1, 16])
def test_prefill_groups(prefill_attention, device, dtype, randn, assert_near, heads, block_size):
    case = Case([(6, 6), (3, 19)], heads, 16, randn, device, block_size)
    assert_near(case.run(prefill_attention), case.naive())


@pytest.mark.parametrize("heads", GROUPS)
@pytest.mark.parametrize("block_size", [1, 16])
def test_decode_groups(decode_attention, device, dtype, randn, assert_near, heads, block_size):
    case = Case([(1, 6), (2, 19)], heads, 16, randn, device, block_size)
    assert_near(case.run(decode_attention), case.naive())


def row_alone(case, row):
    alone = object.__new__(Case)
    alone.__dict__.update(case.__dict__, rows=[case.rows[row]])
    start, stop = case.query_start[row : row + 2].tolist()
    alone.q = case.q[start:stop]
    alone.query_start = case.query_start[row : row + 2] - case.query_start[row]
    alone.block_tables = case.block_tables[row : row + 1]
    alone.context_lens = case.context_lens[row : row + 1]
    return alone, slice(start, stop)


def check_rows_alone(op, case, assert_near):
    together = case.run(op)
    for row in range(len(case.rows)):
        alone, queries = row_alone(case, row)
        assert_near(together[queries], alone.run(op).cpu().double())


def test_a_prefill_row_does_not_know_its_company(
    prefill_attention, device, dtype, randn, assert_near
):
    case = Case([(3, 3), (2, 70), (11, 19)], (4, 2), 64, randn, device)
    check_rows_alone(prefill_attention, case, assert_near)


def test_a_decode_row_does_not_know_its_company(
    decode_attention, device, dtype, randn, assert_near
):
    case = Case([(1, 3), (2, 70), (1, 19)], (4, 2), 64, randn, device)
    check_rows_alone(decode_attention, case, assert_near)


def test_a_prompt_in_chunks_is_the_prompt(prefill_attention, device, dtype, randn, assert_near):
    case = Case([(21, 21)], (4, 2), 64, randn, device)
    whole, q = case.run(prefill_attention), case.q
    for start, stop in [(0, 7), (7, 8), (8, 21)]:  # 7 is inside a block, 8 is a block's border
        case.rows, case.q = [(stop - start, stop)], q[start:stop]
        case.query_start = case.query_start.new_tensor([0, stop - start])
        case.context_lens = case.context_lens.new_tensor([stop])
        assert_near(case.run(prefill_attention), whole[start:stop].cpu().double())


@pytest.fixture
def products(monkeypatch):
    """The (mask shape, key shape) of every product of attention that runs."""
    seen, product = [], F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **kwargs):
        assert q.dim() == 4  # torch's fused kernels take nothing else
        seen.append((None if attn_mask is None else attn_mask.shape, k.shape))
        return product(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return seen


@pytest.mark.parametrize("limit", [1, 64, 100])
def test_prefill_twin_bounds_its_masks(monkeypatch, products, assert_near, limit):
    monkeypatch.setattr(prefill, "MAX_MASK_ELEMENTS", limit)
    case = Case([(9, 9), (13, 30)], (4, 2), 16, torch.randn, "cpu")
    assert_near(case.run(prefill.prefill_attention_torch), case.naive())
    masks = [mask for mask, _ in products if mask is not None]
    assert len(masks) == -(-13 // max(1, limit // 30))
    assert all(rows * keys <= max(limit, 30) for rows, keys in masks)


@pytest.mark.parametrize("limit", [1, 64, 100])
def test_decode_twin_bounds_what_it_gathers(monkeypatch, products, assert_near, limit):
    monkeypatch.setattr(decode, "MAX_GATHERED_TOKENS", limit)
    case = Case([(1, 9), (2, 30), (1, 4), (1, 30), (4, 7)], (4, 2), 16, torch.randn, "cpu")
    assert_near(case.run(decode.decode_attention_torch), case.naive())
    assert len(products) == -(-5 // max(1, limit // 30))
    assert all(keys[0] * keys[2] <= max(limit, 30) for _, keys in products)
