"""Prefill and decode attention: one maths, so one naive reference and one set of checks."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ernie_engine.kernels import decode_attention as decode
from ernie_engine.kernels import paged_attention
from ernie_engine.kernels import prefill_attention as prefill
from ernie_engine.kernels import prefill_hopper as hopper
from ernie_engine.kernels.decode_attention import key_places
from ernie_engine.kernels.launch import DEFAULT
from tests.kernels.tile_check import assert_as_near_as_twin, half_and_single, where_kernels_run

OPS = {
    "prefill": (prefill.prefill_attention_triton, prefill.prefill_attention_torch),
    "decode": (decode.decode_attention_triton, decode.decode_attention_torch),
}
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

    def naive(self):  # fp64, one row and K/V head at a time
        out = torch.empty_like(self.q, dtype=torch.float64)
        starts = self.query_start.tolist()
        group = self.q.shape[1] // self.k_cache.shape[2]
        for row, (num_queries, context) in enumerate(self.rows):
            tokens = slice(starts[row], starts[row + 1])
            seen = context - num_queries + torch.arange(num_queries, device=out.device)
            mask = torch.arange(context, device=out.device) > seen[:, None, None]  # [n, 1, C]
            for head in range(self.k_cache.shape[2]):
                heads = slice(head * group, (head + 1) * group)
                k, v = self.k[row][:, head].double(), self.v[row][:, head].double()
                scores = self.q[tokens, heads].double() @ k.T * self.scale
                out[tokens, heads] = scores.masked_fill(mask, -torch.inf).softmax(dim=-1) @ v
        return out.cpu()


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


@pytest.fixture
def head_dim(request, few):
    """Under the interpreter the least and the largest must do."""
    if few(request.param, None) is None and request.param == 64:
        pytest.skip("left to a GPU")
    return request.param


HEAD_DIMS = pytest.mark.parametrize("head_dim", [16, 64, 128], indirect=True)


@pytest.mark.parametrize("rows", PREFILL_ROWS)
@HEAD_DIMS
def test_prefill(prefill_attention, device, dtype, randn, assert_near, rows, head_dim):
    case = Case(rows, (4, 2), head_dim, randn, device)
    out = case.run(prefill_attention)
    assert out.dtype == dtype
    assert_near(out, case.naive())


@pytest.mark.parametrize("rows", DECODE_ROWS)
@HEAD_DIMS
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


def make(rows, heads, head_dim, dtype, block_size=16):
    device = where_kernels_run()

    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    return Case(rows, heads, head_dim, randn, device, block_size)


def check(name, case, kernel=None):
    triton, torch_twin = OPS[name]
    assert_as_near_as_twin(case.run(kernel or triton), case.run(torch_twin), case.naive())


# Contexts on both sides of the borders of key tiles; queries that see nothing of the last split.
LONG_DECODES = [(1, 1), (1, 31), (1, 32), (1, 33), (1, 64), (1, 65), (8, 67), (3, 129), (1, 400)]
LONG_DECODES += [(0, 0), (0, 5), (1, 7)]


@half_and_single
@pytest.mark.parametrize(
    ("splits", "block_n", "wide"),
    [(1, 32, 0), (4, 64, 0), (16, 16, 0), (32, 16, 0), (1, 16, 64), (2, 16, 64), (16, 16, 32)],
)
def test_decode_splits(monkeypatch, dtype, splits, block_n, wide):
    row = {"SPLITS": splits, "BLOCK_N": block_n, "WIDE": wide, "num_warps": 4, "num_stages": 2}
    for table in ("TABLE", "TABLE_FP32"):
        monkeypatch.setattr(decode, table, {(DEFAULT, 1): row})
    check("decode", make(LONG_DECODES, (5, 1), 16, dtype))


@triton.jit
def _places_kernel(out, table, first, context, AHEAD: tl.constexpr):
    places = key_places(table, first, context, 1, 3, 16, 4, AHEAD)  # head 1 of 3 of 16, blocks of 4
    tl.store(out + tl.arange(0, AHEAD), places)


def test_keys_are_asked_for_where_they_are():
    device, ahead = where_kernels_run(), 8
    table = torch.tensor([7, 3, 9, -1], dtype=torch.int32, device=device)
    cache = torch.arange(10 * 4 * 3 * 16).view(10, 4, 3, 16)
    for first, context in ((0, 1), (0, 12), (4, 10), (8, 9)):
        out = torch.empty(ahead, dtype=torch.int64, device=device)
        _places_kernel[(1,)](out, table, first, context, AHEAD=ahead)
        keys = [min(first + i, context - 1) for i in range(ahead)]
        assert out.tolist() == [int(cache[table[k // 4], k % 4, 1, 0]) for k in keys]


@half_and_single
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_splits_are_merged_in_several_rounds(monkeypatch, dtype, at_once):
    row = {"SPLITS": 16, "BLOCK_N": 16, "WIDE": 0, "num_warps": 4, "num_stages": 2}
    for table in ("TABLE", "TABLE_FP32"):
        monkeypatch.setattr(decode, table, {(DEFAULT, 1): row})
    rows, head_dim = 64, 16  # of 5 heads and 8 query tokens
    monkeypatch.setattr(decode, "MERGED_NUMBERS", at_once * rows * head_dim)
    check("decode", make(LONG_DECODES, (5, 1), head_dim, dtype))


@half_and_single
@pytest.mark.parametrize("num_rows", [3, 20, 140])  # a bucket of the table each
def test_decode_at_each_bucket(dtype, num_rows):
    rows = [(1, 1 + 41 * row % 37) for row in range(num_rows)]
    check("decode", make(rows, (2, 1), 16, dtype))


# Prompts, chunks and short rows on both sides of the borders of tiles, together.
LONG_PREFILLS = [(2, 2), (0, 9), (33, 33), (16, 64), (31, 32), (65, 150), (1, 100), (70, 70)]


@half_and_single
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 32), (32, 64)])
def test_prefill_tiles(monkeypatch, dtype, block_m, block_n):
    row = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2}
    for table in ("TABLE", "TABLE_FP32"):
        monkeypatch.setattr(prefill, table, {(DEFAULT, 1): row})
    check("prefill", make(LONG_PREFILLS, (5, 1), 16, dtype))


@half_and_single
@pytest.mark.parametrize("splits", [2, 8])
def test_prefill_splits(monkeypatch, dtype, splits):
    row = {"SPLITS": splits, "MIN_KEYS": 1}
    monkeypatch.setattr(prefill, "SPLIT_TABLE", {(DEFAULT, 1): row})
    rows = [(2, 2), (0, 9), (9, 64), (13, 130)]  # the short row fills no second range
    check("prefill", make(rows, (5, 1), 16, dtype))


def test_splits_of_a_prefill_are_long_enough():
    table = {(DEFAULT, 9): {"SPLITS": 8, "MIN_KEYS": 512}}
    contexts = {8 * 512: 8, 8 * 512 - 1: 4, 1024: 2, 1023: 1, 16: 1}
    for context, splits in contexts.items():
        assert paged_attention.num_splits(table, 9, context, torch.device("cpu")) == splits


@pytest.mark.parametrize("name", OPS)
def test_padding_behind_the_last_row_is_left_alone(name):
    """A captured graph is given more tokens than a step has."""
    case = make([(3, 70), (2, 5)], (4, 2), 16, torch.float32)
    whole = case.run(OPS[name][0])
    case.q = torch.cat([case.q, case.q.new_full((4, 4, 16), torch.nan)])
    padded = case.run(OPS[name][0])
    assert torch.equal(padded[:5], whole)
    assert padded[5:].isnan().all()  # as the allocation left them


@pytest.mark.gpu
@half_and_single
@pytest.mark.parametrize("heads", [(20, 4), (8, 1), (2, 2)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode_at_all_lengths(dtype, heads, head_dim):
    rows = [(1, 131072), (8, 131071), (1, 1), (1, 32768), (4, 4097), (1, 1025), (2, 2)]
    check("decode", make(rows, heads, head_dim, dtype))
    check("decode", make(rows[:1], heads, head_dim, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4, 16])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("heads", [(20, 4), (8, 1), (16, 2), (4, 4), (3, 1)])
def test_prefill_on_hopper(monkeypatch, heads, block_size, splits):
    """Behind no prefix and long ones, at all borders of pages and tiles; more rows than tiles."""
    row = {"SPLITS": splits, "MIN_KEYS": 1}
    monkeypatch.setattr(hopper, "SPLIT_TABLE", {("sm_90", 1): row})
    lengths = [1, 15, 16, 17, 24, 25, 26, 127, 128, 129, 255, 256, 257, 300]
    rows = [(n, n + past) for past in (0, 1, 15, 16, 112, 128, 400) for n in lengths] + [(0, 9)]
    case = make(rows, heads, 128, torch.float16 if block_size == 32 else torch.bfloat16, block_size)
    if not hopper.takes(case.q, case.k_cache):
        pytest.skip("not on this card")
    check("prefill", case, lambda *args: hopper.prefill_attention_hopper(*args[:-1]))


@pytest.mark.gpu
@half_and_single
@pytest.mark.parametrize("heads", [(20, 4), (8, 1), (2, 2)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_at_all_lengths(dtype, heads, head_dim):
    rows = [(20, 131072), (1, 131071), (1, 1), (300, 300), (129, 4096), (64, 1025)]
    check("prefill", make(rows, heads, head_dim, dtype))


@pytest.mark.parametrize(
    ("name", "rows"), [("decode", [(1, 40), (2, 90)]), ("prefill", [(20, 40), (3, 90)])]
)
def test_planted_errors_are_found(name, rows):
    case = make(rows, (4, 2), 32, torch.float16)
    kernel = OPS[name][0]

    def one_percent_in_a_tile(*args):
        out = kernel(*args)
        out[:2, 2:] *= 1.01
        return out

    def unwritten_row(*args):
        out = kernel(*args)
        out[-1] = torch.empty_like(out[-1])
        return out

    def another_block(q, k_cache, v_cache, block_tables, *rest):
        block_tables = block_tables.clone()
        block_tables[1, 1] = block_tables[1, 2]  # holds numbers, but of other tokens
        return kernel(q, k_cache, v_cache, block_tables, *rest)

    def table_off_by_one(q, k_cache, v_cache, block_tables, *rest):
        return kernel(q, k_cache, v_cache, block_tables.roll(1, dims=1), *rest)

    def one_key_less(q, k_cache, v_cache, block_tables, query_start, context_lens, *rest):
        return kernel(q, k_cache, v_cache, block_tables, query_start, context_lens - 1, *rest)

    check(name, case)
    for wrong in (
        *(one_percent_in_a_tile, unwritten_row),
        *(another_block, table_off_by_one, one_key_less),
    ):
        with pytest.raises(AssertionError, match="worst tile"):
            check(name, case, wrong)
