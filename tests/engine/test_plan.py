"""The byte codec of plans and results, and the seeds of choices."""

import math
import struct
import time
from array import array
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_engine.engine.columns import ColumnWriter
from ernie_engine.engine.plan import (
    NewSlot,
    Recording,
    SamplingPart,
    SamplingSpec,
    StepPlan,
    StepResult,
    TokenLogprobs,
    decode_plan,
    decode_result,
    derived_seed,
    encode_plan,
    encode_result,
    write_logprobs,
)

int64 = st.integers(-(1 << 63), (1 << 63) - 1)
ids = st.lists(st.integers(0, 1 << 20), max_size=8)
as_array = partial(array, "q")
floats = st.floats(allow_nan=False)
specs = st.builds(
    SamplingSpec,
    *([floats] * 6),
    *([int64] * 5),
    banned_ids=ids.map(tuple),
    bias_ids=ids.map(tuple),
    bias_values=st.lists(floats, max_size=8).map(tuple),
)
plans = st.builds(
    StepPlan,
    step_id=int64,
    freed=ids,
    preempted=ids,
    new=st.lists(
        st.builds(NewSlot, slot=int64, token_ids=ids.map(as_array), spec=specs), max_size=3
    ),
    starts=st.lists(st.tuples(int64, int64), max_size=4),
    slots=ids,
    num_tokens=ids,
    num_new_blocks=ids,
    new_block_ids=ids,
    sampling=st.builds(SamplingPart, ids, ids, ids, ids),
    recording=st.none() | st.builds(Recording, st.integers(0, 1 << 20), ids, ids),
)
pairs = st.lists(st.tuples(st.integers(0, 1 << 20), floats), max_size=4)
scores = st.builds(
    lambda logprob, rank, top: TokenLogprobs(
        logprob, rank, [t for t, _ in top], [p for _, p in top]
    ),
    floats,
    int64,
    pairs,
)
rows = st.tuples(st.lists(int64, min_size=1, max_size=3), st.lists(scores, max_size=3))


@given(plans)
def test_a_plan_survives_its_bytes(plan):
    assert decode_plan(encode_plan(plan)) == plan


@given(int64, st.lists(rows, max_size=4), st.lists(st.lists(scores, max_size=3), max_size=3))
def test_a_result_survives_its_bytes(step_id, rows, prompt):
    result = StepResult(step_id, [tokens for tokens, _ in rows], [lp for _, lp in rows], prompt)
    assert decode_result(encode_result(result)) == result


def test_infinite_logprobs_survive():
    token = TokenLogprobs(-math.inf, 5, [1], [-math.inf])
    result = StepResult(1, [[2]], [[token]], [])
    assert decode_result(encode_result(result)) == result


EMPTY = StepPlan(1, (), (), (), (), (), (), (), (), SamplingPart())


@pytest.mark.parametrize("cut", [0, 5, 12, -8, -1])
def test_a_cut_frame_is_refused(cut):
    frame = encode_plan(EMPTY)
    with pytest.raises(ValueError):
        decode_plan(frame[:cut])
    with pytest.raises(ValueError):
        decode_result(frame)
    with pytest.raises(ValueError):
        decode_plan(frame + bytes(8))


def test_a_frame_whose_counts_lie_is_refused():
    data = encode_plan(EMPTY)
    for count in (3, 1 << 40, -1):
        lying = data[:20] + struct.pack("<q", count) + data[28:]  # the length of `freed`
        with pytest.raises(ValueError, match="plan"):
            decode_plan(lying)


@pytest.mark.parametrize("counts", [[1, 2], [1], [2, -1], []])
def test_a_result_whose_counts_do_not_add_up_is_refused(counts):
    out = ColumnWriter(b"done")
    out.ints.append(3)
    out.int_list(counts)
    out.int_list([7, 8])
    for _ in range(2):
        write_logprobs(out, [])
    with pytest.raises(ValueError):
        decode_result(out.done())


def test_a_decode_step_of_256_rows_costs_little():
    rows = list(range(256))
    plan = StepPlan(9, (), (), (), (), rows, [1] * 256, [0] * 256, (), SamplingPart(rows))
    started = time.perf_counter()
    for _ in range(200):
        decode_plan(encode_plan(plan))
    assert (time.perf_counter() - started) / 200 < 1e-3  # about 30 us; the bound is for slow CI


def test_choices_draw_from_seeds_of_their_own():
    assert derived_seed(5, 0) == 5
    seeds = {derived_seed(seed, choice) for seed in range(-50, 50) for choice in range(128)}
    assert len(seeds) == 100 * 128
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)
