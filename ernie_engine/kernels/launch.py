"""Launch parameters by table: an op's file holds a small dict, chosen by scripts/bench_kernels.py;
and how a launch may overlap the one before.

Owns the choice of a row by architecture and size. Never times anything: a row is right or slow,
and there is always a default one for cards that nobody has measured. Rows of sm_90 were found by

    python scripts/bench_kernels.py --tune --shapes "0.3B" "21B tp1" "300B tp8"

on an NVIDIA H100 80GB HBM3 (driver 580.159.04, torch 2.11.0+cu130, triton 3.6.0), but for these. By
timing all candidates there: decode attention for 1 to 256 rows of 128 to 131072 tokens,
prefill_hopper.py for 8 to 8192 tokens behind up to 123k, moe_hopper.py for 128 to 4096 tokens, the
two launches of experts narrower than 21B's and of 8192 columns. In a graph of 21B's whole step (as
scripts/bench_replays.py does): linear and norm_qkv_rope at 2560 columns, the experts without
sorting and attention of one and two rows on an H200, attention of 33 to 256 rows, the router's
choice and the default rows of the sort on an H100.
"""

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DEFAULT = "default"
# (architecture such as "sm_90" or DEFAULT, largest size of the bucket) -> launch parameters.
# Sizes above an architecture's largest bucket use that bucket.
Table = Mapping[tuple[str, int], Mapping[str, int]]


@cache
def architecture(device: torch.device) -> str:
    """sm_90 for an H200; DEFAULT where there is no CUDA device (the interpreter)."""
    if device.type != "cuda":
        return DEFAULT
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def is_hopper(device: torch.device) -> bool:
    """Has what Gluon kernels name by hand: the copy engine, products of a group of warps."""
    return architecture(device) == "sm_90"


@cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs that fill one run at the same time; an H100's where there is no device."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def pick(table: Table, device: torch.device, size: int) -> Mapping[str, int]:
    """The row of the smallest bucket that holds `size`, of this architecture or the default."""
    arch = architecture(device)
    buckets = sorted(bound for name, bound in table if name == arch)
    if not buckets:
        arch = DEFAULT
        buckets = sorted(bound for name, bound in table if name == arch)
    bound = next((b for b in buckets if size <= b), buckets[-1])
    return table[arch, bound]


def overlap(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that begins with wait_for_inputs(PDL): its programs may be placed, and
    do what needs no result of the launch before, while that one is still running (programmatic
    dependent launch, from sm_90 on)."""
    arch = architecture(device)
    can = arch != DEFAULT and int(arch.removeprefix("sm_")) >= 90
    return {"PDL": can, "launch_pdl": can}


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Everything that earlier launches wrote may be read from here on, and anything be written.
    Before, weights, and what the last launch but one or an earlier one wrote: that had ended when
    the last one went on from here. But only past the L1 cache (cache_modifier=".cg"), which may
    hold what was there before. Then the next launch may place its programs.

    In this order, or the next launch could start before the last but one has ended.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def ask_for_rows(rows, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """Bring rows of WIDTH numbers (pointers [N]) into the L2 cache, before wait_for_inputs(PDL).
    Not a load: what is still being written there is not missed."""
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth  # 128 bytes
    LINES: tl.constexpr = (WIDTH + LINE - 1) // LINE
    lines = rows[:, None] + (tl.arange(0, LINES) * LINE)[None, :]
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0",
            "=r,l",
            [lines],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
