"""What sampling knows of a row before it looks for a token: a line of settings, the greedy token.

    z = (logit - best logit) / temperature, and -inf where z < log(min_p)

The bound of a row with top-k is a z that every token reaches which top-k can keep: the k-th largest
of the maxima of groups of tokens, for that is at most the k-th largest token.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.candidates import find_maxima
from ernie_engine.kernels.ordering import FIRST_KEY, MAX_IDS, key_ids, key_values, kth_largest

# A row's line, fp32. FLOOR is log(min_p). BOUND is infinite if the row has neither top-k nor top-p,
# and minus infinity if every token may be kept.
NUM_SETTINGS = 6
TEMPERATURE, TOP_K, TOP_P, BEST, FLOOR, BOUND = (tl.constexpr(i) for i in range(NUM_SETTINGS))
_LINE = tl.constexpr(NUM_SETTINGS)
_MAX_IDS = tl.constexpr(MAX_IDS)


@triton.jit
def load_setting(settings, which: tl.constexpr):
    """Of this program's row."""
    return tl.load(settings + tl.program_id(0) * _LINE + which)


@triton.jit
def scaled_logits(logits, settings):
    """z, with the bits of the twin."""
    z = logits - load_setting(settings, BEST)
    z = tl.div_rn(z, load_setting(settings, TEMPERATURE))
    return tl.where(z < load_setting(settings, FLOOR), -float("inf"), z)


@triton.jit
def _settings_kernel(
    best_keys,
    group_maxima,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    settings,
    greedy,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    num_chunks,
    num_groups,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The greedy token of a row, and its settings."""
    row = tl.program_id(0).to(tl.int64)
    chunks, groups = tl.arange(0, CHUNKS), tl.arange(0, GROUPS)
    keys = tl.load(best_keys + row * num_chunks + chunks, mask=chunks < num_chunks, other=FIRST_KEY)
    best_key = tl.max(keys, axis=0)
    tl.store(greedy + row, key_ids(best_key))
    best = key_values(best_key)
    temperature = tl.load(temperatures + row * temperature_stride)
    top_k = tl.minimum(tl.load(top_ks + row * top_k_stride), _MAX_IDS).to(tl.float32)
    top_p = tl.load(top_ps + row * top_p_stride)
    floor = tl.log(tl.load(min_ps + row * min_p_stride).to(tl.float64)).to(tl.float32)
    bound = tl.full([], float("inf"), tl.float32)
    if temperature > 0 and (top_k > 0 or top_p < 1):
        bound = tl.full([], -float("inf"), tl.float32)
        if top_k > 0 and top_k <= num_groups:
            inside = groups < num_groups
            maxima = group_maxima + row * num_groups + groups
            values = tl.load(maxima, mask=inside, other=-float("inf"))
            bound = tl.div_rn(kth_largest(values, top_k) - best, temperature)
    line = settings + row * _LINE
    tl.store(line + TEMPERATURE, temperature)
    tl.store(line + TOP_K, top_k)
    tl.store(line + TOP_P, top_p)
    tl.store(line + BEST, best)
    tl.store(line + FLOOR, floor)
    tl.store(line + BOUND, bound)


def find_settings(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments as sample's, logits contiguous -> (settings [R, NUM_SETTINGS] fp32, greedy token
    [R] int64)."""
    rows = len(logits)
    best_keys, group_maxima = find_maxima(logits)
    chunks, groups = best_keys.shape[1], group_maxima.shape[1]
    settings = torch.empty(rows, NUM_SETTINGS, dtype=torch.float32, device=logits.device)
    greedy = torch.empty(rows, dtype=torch.int64, device=logits.device)
    columns = temperature, top_k, top_p, min_p
    _settings_kernel[(rows,)](
        *(best_keys, group_maxima, *columns, settings, greedy),
        *(*(column.stride(0) for column in columns), chunks, groups),
        CHUNKS=triton.next_power_of_2(chunks),
        GROUPS=triton.next_power_of_2(groups),
    )
    return settings, greedy
