"""Cases of the ops of a decoder layer that are neither attention nor experts."""

from collections.abc import Iterator

import torch

from ernie_engine.bench.floors import Work
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.checking import same_bits
from ernie_engine.bench.kernels.shapes import RankShape
from ernie_engine.kernels.rope import rope_table

EPS = 1e-5
BLOCK_SIZE = 16
MAX_HEAD_ROWS = 256  # rows of logits in a step: as many as sequences run at once
ROPE_LEN = 131072


def decode_rows_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    """Rows of the spare slot: others would stand further on at every repetition, and at last
    outside their tables."""
    if tokens > MAX_HEAD_ROWS:
        return

    def make(device):
        slots, computed = (torch.zeros(n, dtype=torch.int64, device=device) for n in (tokens, 1))
        history = torch.randint(0, shape.vocab, (1, BLOCK_SIZE), device=device)
        tables = torch.randint(0, 1 << 20, (1, 1), device=device)
        return slots, computed, history.int(), tables.int(), BLOCK_SIZE, 1, 0

    moved = tokens * (8 * 6 + 4 * 5)
    yield KernelCase(
        "decode_rows", shape.name, tokens, make, Work(moved, 0), same_bits, written=(1,)
    )


def embedding_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    def make(device):
        ids = torch.randint(0, shape.vocab, (tokens,), device=device)
        return ids, torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=device)

    moved = tokens * (8 + 2 * shape.hidden * dtype.itemsize)
    yield KernelCase("embedding", shape.name, tokens, make, Work(moved, 0), same_bits)


def rms_norm_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    def make(device):
        x, weight = (
            _rows(tokens, shape.hidden, dtype, device),
            _rows(1, shape.hidden, dtype, device),
        )
        return x, weight[0], EPS

    moved = 2 * tokens * shape.hidden * dtype.itemsize
    yield KernelCase("rms_norm", shape.name, tokens, make, Work(moved, 0), table_size=shape.hidden)


def add_rms_norm_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    def make(device):
        x, residual = (_rows(tokens, shape.hidden, dtype, device) for _ in range(2))
        return x, residual, _rows(1, shape.hidden, dtype, device)[0], EPS

    moved = 4 * tokens * shape.hidden * dtype.itemsize
    yield KernelCase(
        "add_rms_norm", shape.name, tokens, make, Work(moved, 0), table_size=shape.hidden
    )


def swiglu_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    for what, width in (("dense", shape.dense_width), ("shared", shape.shared_width)):
        if width:
            yield KernelCase(
                "swiglu",
                f"{shape.name} {what}",
                tokens,
                lambda device, width=width: (_rows(tokens, 2 * width, dtype, device),),
                Work(3 * tokens * width * dtype.itemsize, 0),
            )


def linear_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    products = {
        "qkv": (shape.hidden, shape.qkv_width),
        "o": (shape.heads * shape.head_dim, shape.hidden),
        "dense gate_up": (shape.hidden, 2 * shape.dense_width),
        "dense down": (shape.dense_width, shape.hidden),
        "shared gate_up": (shape.hidden, 2 * shape.shared_width),
        "shared down": (shape.shared_width, shape.hidden),
    }
    for what, (inner, columns) in products.items():
        if inner and columns:
            yield _product("linear", f"{shape.name} {what}", tokens, inner, columns, dtype)


def vocab_head_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    if tokens <= MAX_HEAD_ROWS:
        yield _product("vocab_head", shape.name, tokens, shape.hidden, shape.vocab, dtype)


def _product(op: str, label: str, rows: int, inner: int, columns: int, dtype) -> KernelCase:
    def make(device):
        return _rows(rows, inner, dtype, device), _rows(columns, inner, dtype, device)

    out_size = 4 if op == "vocab_head" else dtype.itemsize
    moved = (rows + columns) * inner * dtype.itemsize + rows * columns * out_size
    return KernelCase(op, label, rows, make, Work(moved, 2 * rows * inner * columns))


def rope_and_cache_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    num_blocks = -(-tokens // BLOCK_SIZE) + 1

    def make(device):
        qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        caches = torch.zeros(2, num_blocks, BLOCK_SIZE, kv_heads, dim, dtype=dtype, device=device)
        slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:tokens]
        positions = torch.randint(0, ROPE_LEN, (tokens,), device=device)
        table = rope_table(ROPE_LEN, dim, 500000.0, device)
        return q, k, v, table, positions, caches[0], caches[1], slots

    moved = tokens * (2 * shape.qkv_width * dtype.itemsize + dim * 4 + 16)
    yield KernelCase("rope_and_cache", shape.name, tokens, make, Work(moved, 0), written=(5, 6))


def norm_qkv_rope_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    kv_heads, dim, hidden, width = shape.kv_heads, shape.head_dim, shape.hidden, shape.qkv_width
    num_blocks = -(-tokens // BLOCK_SIZE) + 1

    def make(device):
        x, residual = (_rows(tokens, hidden, dtype, device) for _ in range(2))
        weight = _rows(width, hidden, dtype, device) / hidden**0.5
        caches = torch.zeros(2, num_blocks, BLOCK_SIZE, kv_heads, dim, dtype=dtype, device=device)
        slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:tokens]
        positions = torch.randint(0, ROPE_LEN, (tokens,), device=device)
        table = rope_table(ROPE_LEN, dim, 500000.0, device)
        norm = _rows(1, hidden, dtype, device)[0]
        return x, residual, norm, EPS, weight, table, positions, caches[0], caches[1], slots

    numbers = width * hidden + tokens * (3 * hidden + width)
    moved = numbers * dtype.itemsize + tokens * (dim * 4 + 16)
    yield KernelCase(
        "norm_qkv_rope",
        shape.name,
        tokens,
        make,
        Work(moved, 2 * tokens * hidden * width),
        written=(7, 8),
    )


def norm_swiglu_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    hidden, width = shape.hidden, shape.dense_width

    def make(device):
        x, residual = (_rows(tokens, hidden, dtype, device) for _ in range(2))
        weight = _rows(2 * width, hidden, dtype, device) / hidden**0.5
        return x, residual, _rows(1, hidden, dtype, device)[0], EPS, weight

    moved = (2 * width * hidden + tokens * (3 * hidden + width)) * dtype.itemsize
    work = Work(moved, 4 * tokens * hidden * width)
    yield KernelCase("norm_swiglu", shape.name, tokens, make, work)


def _rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, width, dtype=dtype, device=device)
