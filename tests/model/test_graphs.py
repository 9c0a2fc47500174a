"""Recorded steps without a GPU: sizes, choice, padding that nobody notices, the check at start-up.

Here a recording is simply run again (tests/recorder.py); tests/engine/test_graphs.py has real ones.
"""

import random
import traceback
from dataclasses import replace

import pytest
import torch
from triton import knobs

from ernie_engine.engine.plan import NewSlot, Recording, SamplingPart, SamplingSpec, StepPlan
from ernie_engine.engine_config import EngineConfig
from ernie_engine.kernels.registry import select
from ernie_engine.model import graphs, recording
from ernie_engine.model.batch import StepShape, shape_of
from ernie_engine.model.ernie import Ernie
from ernie_engine.model.forward import Forward
from ernie_engine.model.graphs import StepGraph, graph_shapes, obstacle, padded
from ernie_engine.model.kv_cache import KVCache
from ernie_engine.model.rehearsal import made_up_plan, rows_filling
from ernie_engine.model.runner import ModelRunner
from ernie_engine.model.slots import Slots
from ernie_engine.model.startup import describe, open_model
from ernie_engine.parallel.mesh import Mesh, Placement
from tests.recorder import Rerun

BLOCKS = 12  # of 16 tokens, for each slot of its own
NUM_SLOTS = 9


@pytest.fixture(scope="module")
def runner(tiny) -> ModelRunner:
    config = EngineConfig(model=str(tiny), device="cpu", max_num_seqs=NUM_SLOTS)
    return open_model(describe(config))


def resolved(tiny, **fields):
    return describe(EngineConfig(model=str(tiny), device="cpu", **fields)).config


# --- sizes and choice ---


def test_sizes_are_small_steps_first_and_end_with_the_largest_step(tiny):
    shapes = graph_shapes(replace(resolved(tiny), max_num_seqs=100, max_num_batched_tokens=700))
    decode = [shape.num_rows for shape in shapes.decode]
    assert decode == [*range(1, 8), 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    assert all(s == StepShape(s.num_rows, s.num_rows, s.num_rows, 1, 32) for s in shapes.decode)
    few = [(16, 17), (32, 33), (64, 65), (128, 65), (256, 65), (512, 65), (700, 65)]
    many = [(128, 101), (256, 101), (512, 101), (700, 101)]
    assert [(s.num_tokens, s.num_rows) for s in shapes.mixed] == sorted(few + many)
    assert all(s.num_decodes == 0 and s.longest == s.num_tokens for s in shapes.mixed)
    assert shapes.largest_first[:2] == [shapes.mixed[-1], shapes.decode[-1]]
    assert sorted(map(hash, shapes.largest_first)) == sorted(
        map(hash, [*shapes.decode, *shapes.mixed])
    )


def test_no_size_is_above_512_rows_or_2048_tokens_or_a_stages_share(tiny):
    large = replace(resolved(tiny), max_num_seqs=4000, max_num_batched_tokens=8192)
    shapes = graph_shapes(large)
    assert shapes.decode[-1].num_rows == 512 and shapes.mixed[-1].num_tokens == 2048
    assert max(s.num_rows for s in shapes.mixed) == 513
    shapes = graph_shapes(replace(large, max_num_seqs=33, pipeline_parallel_size=2))
    assert shapes.decode[-1].num_rows == 17 and shapes.mixed[-1].num_rows == 18


def test_the_smallest_that_holds_a_step_is_taken(tiny):
    shapes = graph_shapes(replace(resolved(tiny), max_num_seqs=40, max_num_batched_tokens=300))
    for rows, size in ((1, 1), (7, 7), (8, 8), (9, 16), (33, 40), (40, 40)):
        assert shapes.fit(StepShape(rows, rows, rows, 1, 3)).num_rows == size
    for rows, tokens, size in ((1, 2, 16), (3, 16, 16), (3, 17, 32), (40, 129, 256), (2, 300, 300)):
        assert shapes.fit(StepShape(rows, tokens, 0, tokens, 3)).num_tokens == size


def test_few_rows_may_have_any_context_and_short_ones_come_first(tiny):
    config = replace(resolved(tiny), max_num_seqs=600, max_num_batched_tokens=100)
    shapes = graph_shapes(replace(config, max_model_len=9000))
    found = [(s.num_tokens, s.num_rows, s.most_blocks) for s in shapes.mixed]
    single = [(16, 17, 256), (32, 33, 256), (32, 5, 563), (64, 65, 256)]
    assert found == [*single, (100, 65, 256), (100, 101, 256), (100, 5, 563)]
    for rows, blocks, kind in ((4, 256, 256), (4, 257, 563), (1, 563, 563), (64, 256, 256)):
        assert shapes.fit(StepShape(rows, 90, 0, 27, blocks)).most_blocks == kind


def test_a_prompt_beside_many_running_requests_has_a_graph_and_few_keep_their_own(tiny):
    config = replace(resolved(tiny), max_num_seqs=256, max_num_batched_tokens=8192)
    shapes = graph_shapes(replace(config, max_model_len=9000))
    for rows, tokens, size, most in ((64, 90, 128, 64), (65, 90, 128, 128), (129, 200, 256, 256)):
        fitting = shapes.fit(StepShape(rows, tokens, rows - 1, tokens, 200))
        assert (fitting.num_tokens, fitting.num_rows) == (size, most + 1)


def test_what_no_graph_holds_runs_eagerly(tiny):
    config = replace(resolved(tiny), max_num_seqs=600, max_num_batched_tokens=4000)
    shapes = graph_shapes(replace(config, max_model_len=9000))
    assert shapes.fit(StepShape(512, 512, 512, 1, 563)) and shapes.mixed[-1].most_blocks == 256
    for step in (
        StepShape(513, 513, 513, 1, 3),
        StepShape(1, 2049, 0, 2049, 130),  # tokens
        StepShape(513, 600, 512, 88, 3),  # rows
        StepShape(65, 100, 64, 36, 257),  # rows behind a long context
        StepShape(5, 100, 4, 96, 257),  # rows behind so long a context
        StepShape(2, 1025, 1, 1024, 257),  # tokens there
        StepShape(2, 100, 1, 99, 564),  # context
    ):
        assert shapes.fit(step) is None
        assert shapes.fit(replace(step, num_rows=2, num_tokens=99, num_decodes=1, most_blocks=7))
    near = graph_shapes(replace(config, max_model_len=40))  # a padding row has 40 tokens at most
    assert near.fit(StepShape(3, 88, 1, 39, 3)) and not near.fit(StepShape(3, 87, 1, 39, 3))


def test_why_nothing_is_recorded_is_told(tiny):
    on_cpu = resolved(tiny)
    on_gpu, triton = replace(on_cpu, device="cuda:0"), select("triton", "cuda")
    assert obstacle(on_gpu, triton) is obstacle(on_gpu, triton.counted()) is None
    assert obstacle(on_cpu, triton) == "device=cpu"
    assert obstacle(replace(on_gpu, enforce_eager=True), triton) == "enforce_eager"
    reason = obstacle(on_gpu, select("triton,-decode_attention,-linear", "cuda"))
    assert reason == "decode_attention=torch waits for the device"


@pytest.mark.parametrize("max_len", [2, 3, 30, 100, 512])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 70])
@pytest.mark.parametrize("budget", [1, 5, 16, 100, 2048])
def test_a_made_up_step_of_each_shape_is_one_that_it_holds(tiny, max_len, max_num_seqs, budget):
    config = replace(resolved(tiny), max_model_len=max_len, max_num_seqs=max_num_seqs)
    shapes = graph_shapes(replace(config, max_num_batched_tokens=budget))
    for shape in shapes.largest_first:
        longest = min(max_len - 1, 16 * shape.most_blocks)
        rows = rows_filling(shape, longest)
        assert all(computed + count <= longest for computed, count in rows)
        slots, counts = padded(range(len(rows)), [n for _, n in rows], shape, spare=99)
        assert len(slots) == shape.num_rows and sum(counts) == shape.num_tokens
        assert min(counts) >= 0 and counts[-1] <= max_len
        if shape.num_decodes:
            assert set(counts) == {1}
        else:
            assert slots[-1] == 99 and counts[-1] <= shapes.most_padding
            behind = [computed for computed, _ in rows if computed]  # one writer a position
            longest_prompt = max(count for computed, count in rows if not computed)
            assert sorted(behind) == [longest_prompt + i for i in range(len(behind))]


# --- padding ---


def plan_of(rows: dict[int, tuple[int, int]], seed: int = 0) -> StepPlan:
    """slot -> tokens computed before, query tokens; each slot has all its blocks."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 700, (NUM_SLOTS, BLOCKS * 16), generator=generator).tolist()
    new = [NewSlot(slot, text[slot], SamplingSpec()) for slot in rows]
    starts = [(slot, computed) for slot, (computed, _) in rows.items()]
    ids = [BLOCKS * slot + i for slot in rows for i in range(BLOCKS)]
    counts = [count for _, count in rows.values()]
    sizes = list(rows), counts, [BLOCKS] * len(rows), ids
    return StepPlan(0, (), (), new, starts, *sizes, SamplingPart())


STEPS = {
    "one token": {4: (37, 1)},
    "single tokens": {3: (0, 1), 0: (100, 1), 8: (15, 1), 2: (16, 1), 5: (31, 1)},
    "a prompt": {1: (0, 29)},
    "prompts": {7: (0, 40), 1: (16, 5), 2: (0, 2)},
    "mixed": {0: (63, 1), 5: (0, 1), 2: (48, 17), 3: (7, 30)},
    "just as large": {6: (20, 1), 2: (0, 63)},
}
SHAPES = {
    "one token": [StepShape(1, 1, 1, 1, 32), StepShape(4, 4, 4, 1, 32)],
    "single tokens": [StepShape(n, n, n, 1, 32) for n in (5, 6, 16)],
    "a prompt": [StepShape(2, 29, 0, 29, 32), StepShape(9, 64, 0, 64, 14)],
    "prompts": [StepShape(10, 48, 0, 48, 32), StepShape(65, 128, 0, 128, 32)],
    "mixed": [StepShape(5, 64, 0, 64, 32), StepShape(65, 256, 0, 256, 32)],
    "just as large": [StepShape(3, 64, 0, 64, 32), StepShape(33, 64, 0, 64, 32)],
}


def run_eagerly(forward: Forward, plan: StepPlan, stream=None):
    forward.state.apply(plan)
    slots, counts = torch.tensor([list(plan.slots), list(plan.num_tokens)])
    return forward(slots, counts, shape_of(plan, forward.state.num_blocks), stream)


def release(state: Slots) -> None:
    for memory in (state.specs, state.host_prompt_lens, state.num_blocks):
        memory.clear()


def fresh_cache(forward: Forward, scratch: float) -> torch.Tensor:
    """K/V with something in it, the scratch block with `scratch`."""
    data = forward.kv._data
    data.copy_(torch.randn(data.shape, generator=torch.Generator().manual_seed(1)))
    data[:, :, forward.kv.scratch_block] = scratch
    return data


def check_padding(forward: Forward, name: str, shape: StepShape, stream=None) -> None:
    """Rows, hidden, lengths and blocks as of the eager step, whatever was in the scratch block."""
    state, plan, scratch = forward.state, plan_of(STEPS[name]), forward.kv.scratch_block
    num_rows, num_tokens = len(plan.slots), sum(plan.num_tokens)
    own = None if stream is None else stream[:num_tokens]
    before = fresh_cache(forward, 0.0).clone()
    rows, expected, expected_logits = run_eagerly(forward, plan, own)
    after, lengths = forward.kv._data.clone(), state.num_computed.clone()
    release(state)

    graph = StepGraph(shape, forward, None if stream is None else torch.zeros_like(stream))
    graph.fill([state.spare], [1], None)
    graph.record(Rerun())
    data = fresh_cache(forward, torch.nan)
    state.apply(plan)
    found_rows, found, logits = graph.replay(plan.slots, plan.num_tokens, own)
    release(state)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert (logits is not None) == (forward.model.is_last and shape.num_decodes > 0)
    for place, value in zip(found_rows, rows, strict=True):
        assert torch.equal(place[: len(value)], value)
    assert found_rows.slots[num_rows:].eq(state.spare).all()
    assert torch.equal(state.num_computed, lengths) and state.num_computed[state.spare] == 0
    data, before, after = (x[:, :, :scratch] for x in (data, before, after))
    torch.testing.assert_close(data, after, rtol=1e-4, atol=1e-5)
    assert (data != before).sum() == num_tokens * data[:, :, 0, 0].numel()


@pytest.mark.parametrize(
    "name, i", [(name, i) for name in SHAPES for i in range(len(SHAPES[name]))]
)
def test_padding_changes_nothing(runner, name, i):
    check_padding(runner.forward, name, SHAPES[name][i])


@pytest.mark.parametrize("name", ["single tokens", "mixed"])
def test_padding_changes_nothing_in_a_later_stage(runner, tiny, name):
    config = describe(EngineConfig(model=str(tiny), device="cpu")).model_config
    place = Placement(Mesh(pp_size=2, pp_rank=1), torch.float32, torch.device("cpu"))
    model, whole = Ernie(config, runner.ops, place, 512, range(2, 4)), runner.model
    for mine, theirs in zip(model.layers, whole.layers[2:], strict=True):
        mine.load_state_dict(theirs.state_dict())
    for name_of_part in ("norm", "embed", "lm_head"):
        if (part := getattr(model, name_of_part)) is not None:
            part.load_state_dict(getattr(whole, name_of_part).state_dict())
    geometry = replace(runner.kv.geometry, num_layers=2)
    kv, state = (
        KVCache(geometry, BLOCKS * NUM_SLOTS, place.device),
        Slots(NUM_SLOTS, 512, 16, "cpu"),
    )
    state.park_spare(kv.scratch_block)
    stream = torch.randn(64, config.hidden_size, generator=torch.Generator().manual_seed(2))
    shape = next(shape for shape in SHAPES[name] if shape.num_tokens in (16, 64))
    check_padding(Forward(model, state, kv), name, shape, stream)


def test_rows_are_put_there_whenever_they_differ(runner):
    graph = StepGraph(StepShape(5, 16, 0, 16, 32), runner.forward, None)
    steps = [([3, 1], [1, 2]), ([3, 1], [1, 2]), ([1, 3], [1, 2]), ([1, 3], [2, 1]), ([1], [2])]
    for slots, counts in steps:
        graph.fill(slots, counts, None)
        assert graph._columns.tolist() == list(
            padded(slots, counts, graph.shape, runner.forward.state.spare)
        )


def test_many_random_steps_replayed_equal_eager_ones(runner):
    """One graph after the other, each used again: nothing of an earlier step shows."""
    forward, rng = runner.forward, random.Random(3)
    state = forward.state
    made = {}
    for seed in range(30):
        slots = rng.sample(range(NUM_SLOTS), rng.randint(1, 6))
        rows = {slot: (rng.randrange(100), rng.choice([1, 1, 1, 9, 20])) for slot in slots}
        rows = dict(sorted(rows.items(), key=lambda item: item[1][1] > 1))
        plan = plan_of(rows, seed)
        num_tokens = sum(plan.num_tokens)
        singles = num_tokens == len(slots)
        size = 8 if singles else 128
        shape = StepShape(size, size, size, 1, 32) if singles else StepShape(8, size, 0, size, 32)
        fresh_cache(forward, 0.0)
        expected = run_eagerly(forward, plan).hidden
        release(state)
        if shape not in made:
            made[shape] = StepGraph(shape, forward, None)
            made[shape].fill(slots, plan.num_tokens, None)
            made[shape].record(Rerun())
        fresh_cache(forward, 0.0)
        state.apply(plan)
        found = made[shape].replay(plan.slots, plan.num_tokens, None).hidden
        release(state)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(made) == 2


# --- the check at start-up ---


def test_rows_that_write_the_same_slots_write_the_same(runner):
    """Or the check would depend on which of them is last: in a later stage too."""
    stream = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    maker = recording.GraphMaker(runner.forward, graphs.GraphShapes([], [], 512), Rerun(), stream)
    plan = made_up_plan([(0, 1), (299, 1), (0, 40), (30, 30), (0, 300)], 16, BLOCKS)
    made = maker.stream_of(plan)
    assert made.shape == (372, 8) and len(made[72:].unique(dim=0)) == 256
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[371])
    assert torch.equal(made[2:42], made[72:112]) and torch.equal(made[42:72], made[102:132])
    in_first_stage = recording.GraphMaker(runner.forward, maker.shapes, Rerun(), None)
    assert in_first_stage.stream_of(plan) is None


def maker_of(runner, recorder) -> recording.GraphMaker:
    shapes = graphs.GraphShapes(
        [StepShape(n, n, n, 1, 32) for n in (1, 3)],
        [StepShape(4, 16, 0, 16, 32), StepShape(10, 64, 0, 64, 32)],
        512,
    )
    return recording.GraphMaker(runner.forward, shapes, recorder, None)


def graphs_of(maker) -> graphs.StepGraphs:
    return graphs.StepGraphs(maker.shapes, maker)


def record_all(made: graphs.StepGraphs, slots=range(NUM_SLOTS), blocks=range(20)) -> None:
    for index in range(len(made.rooms())):
        made.record(Recording(index, slots, blocks))


def test_all_graphs_are_made_and_compared_and_the_slots_are_free(runner):
    recorder = Rerun()
    runner.kv._data.zero_()
    maker = maker_of(runner, recorder)
    made = graphs_of(maker)
    assert made.find(StepShape(2, 2, 2, 1, 5)) is None  # before it is recorded
    record_all(made)
    state = runner.state
    assert len(made) == recorder.num_replays == 4 and not maker.inexact
    assert not (state.specs or state.host_prompt_lens or state.num_blocks)
    assert state.num_computed[state.spare] == 0 and not state.history[state.spare].any()
    assert made.find(StepShape(2, 2, 2, 1, 5)).shape.num_rows == 3
    assert made.find(StepShape(4, 4, 4, 1, 5)) is None


def test_each_recording_is_one_of_the_shapes_in_their_order(runner):
    made = graphs_of(maker := maker_of(runner, Rerun()))
    for index, shape in enumerate(maker.shapes.largest_first):
        made.record(Recording(index, range(9), range(20)))
        assert list(made._graphs) == maker.shapes.largest_first[: index + 1]
        assert made._graphs[shape].shape == shape


def test_a_rehearsal_runs_each_shape_and_leaves_the_slots_free(runner, monkeypatch):
    maker, seen, forward = maker_of(runner, Rerun()), [], Forward.__call__

    def noted(self, slots, counts, shape, stream):
        seen.append((shape, len(slots), int(counts.sum())))
        return forward(self, slots, counts, shape, stream)

    monkeypatch.setattr(Forward, "__call__", noted)
    for shape in maker.shapes.largest_first:
        maker.rehearse(shape)
    assert seen == [(s, s.num_rows, s.num_tokens) for s in maker.shapes.largest_first]
    assert not (runner.state.specs or runner.state.num_blocks)


def test_a_recording_touches_the_slots_and_blocks_that_it_is_given_and_no_others(runner):
    """With fewer slots than it would like, and requests in the others."""
    state, data = runner.state, fresh_cache(runner.forward, 0.0)
    plan = plan_of({slot: (10 + slot, 1) for slot in (0, 2, 5)})
    state.apply(plan)
    blocks = [3, 50, 14, 77]
    kept = [i for i in range(runner.kv.num_blocks) if i not in blocks]
    before = data[:, :, kept].clone(), state.history[:NUM_SLOTS].clone(), state.num_computed.clone()
    tables = state.block_tables.clone()
    record_all(graphs_of(maker_of(runner, Rerun())), slots=[8, 1, 3], blocks=blocks)
    mine = [0, 2, 5, state.spare]
    assert torch.equal(data[:, :, kept], before[0])
    assert torch.equal(state.history[[0, 2, 5]], before[1][[0, 2, 5]])
    assert torch.equal(state.num_computed[mine], before[2][mine])
    assert torch.equal(state.block_tables[mine], tables[mine])
    assert set(state.specs) == {0, 2, 5}
    release(state)


def test_the_room_that_recordings_want_is_what_they_use(runner):
    maker, seen = maker_of(runner, Rerun()), []
    made, make = graphs_of(maker), maker._plan

    def noted(rows, slots, block_ids):
        seen.append(make(rows, slots, block_ids))
        return seen[-1]

    maker._plan = noted
    for index, room in enumerate(made.rooms()):
        seen.clear()
        made.record(Recording(index, range(room.num_slots), range(room.num_blocks)))
        assert {slot for plan in seen for slot in plan.slots} == set(range(room.num_slots))
        assert {b for plan in seen for b in plan.new_block_ids} == set(range(room.num_blocks))
        seen.clear()
        made.record(Recording(index, range(room.fewest_slots), range(room.num_blocks)))
        shape, counts = maker.shapes.largest_first[index], seen[0].num_tokens
        padded(seen[0].slots, counts, shape, spare=99)
        assert shape.num_decodes or 0 <= shape.num_tokens - sum(counts) <= 5


@pytest.mark.parametrize("which, shape", [(1, "num_rows=10, num_tokens=64"), (2, "num_rows=3")])
@pytest.mark.parametrize("share, is_wrong", [(1e-6, False), (1e-2, True), (float("nan"), True)])
def test_a_wrong_replay_is_found(runner, which, shape, share, is_wrong):
    class Wrong(Rerun):
        def record(self, work):
            output, replay = super().record(work)

            def wrongly():
                replay()
                if output[which] is None:
                    return
                output[which].mul_(1 + share)

            return output, wrongly

    maker = maker_of(runner, Wrong())
    if is_wrong:
        with pytest.raises(RuntimeError, match=rf"{shape}.*enforce_eager"):
            record_all(graphs_of(maker))
        release(runner.state)
    else:
        record_all(graphs_of(maker))
        assert len(maker.inexact) == (4 if which == 1 else 2)


class Baked(Rerun):
    """A recording that took something of the step it was made with for a number that never changes:
    `spoil(forward, graph)` gives what is to be put back before each replay."""

    def __init__(self, forward: Forward, spoil):
        super().__init__()
        self.forward, self.spoil = forward, spoil

    def record(self, work):
        output, replay = super().record(work)
        put_back = self.spoil(self.forward, work.__self__)

        def with_old_numbers():
            put_back()
            replay()

        return output, with_old_numbers


def old_columns(forward, graph):
    columns = graph._columns.clone()
    return lambda: graph._columns.copy_(columns)


def old_counts(forward, graph):
    counts = graph._columns[1].clone()
    return lambda: graph._columns[1].copy_(counts)


def old_tables(forward, graph):
    """What was each row's table stays so, whatever slot it has."""
    tables = forward.state.block_tables[graph._columns[0]]
    return lambda: forward.state.block_tables.index_copy_(0, graph._columns[0], tables)


def old_starts(forward, graph):
    computed = forward.state.num_computed.clone()
    return lambda: forward.state.num_computed.copy_(computed)


def scratch_tables(forward, graph):
    """All K and V go where nobody reads, though attention finds what the eager run has left."""
    return lambda: forward.state.block_tables.fill_(forward.kv.scratch_block)


@pytest.mark.parametrize(
    "spoil",
    [old_columns, old_counts, old_tables, old_starts, scratch_tables],
    ids=lambda f: f.__name__,
)
def test_a_number_that_became_part_of_a_recording_is_found(runner, spoil):
    made = graphs_of(maker_of(runner, Baked(runner.forward, spoil)))
    state = runner.state
    tables = state.block_tables.clone()
    with pytest.raises(RuntimeError, match="is wrong"):
        record_all(made)
    release(state)
    state.block_tables.copy_(tables)
    state.num_computed.zero_()


def test_a_replay_that_writes_nothing_is_found_though_what_it_tells_is_right(runner):
    """The eager run before has left the right K and V in the same blocks."""

    class Unwritten(Rerun):
        def record(self, work):
            output, replay = super().record(work)
            return output, lambda: (replay(), runner.kv.fill(range(20), recording.BEFORE))

    with pytest.raises(RuntimeError, match="is wrong"):
        record_all(graphs_of(maker_of(runner, Unwritten())))
    release(runner.state)


def test_no_graph_stays_that_is_made_while_all_are_dropped(runner):
    maker = maker_of(runner, Rerun())
    made, make = graphs_of(maker), maker.make

    def make_and_drop(*step):
        graph = make(*step)
        made.drop()
        return graph

    maker.make = make_and_drop
    made.record(Recording(0, range(9), range(20)))
    assert len(made) == 0


def test_an_error_holds_no_graph(runner):
    class Fails(Rerun):
        def record(self, work):
            output, _ = super().record(work)

            def fail():
                raise RuntimeError("a rank is lost")

            return output, fail

    with pytest.raises(RuntimeError, match="a rank is lost") as caught:
        record_all(graphs_of(maker_of(runner, Fails())))
    frames = [frame.f_locals.get("graph") for frame, _ in traceback.walk_tb(caught.tb)]
    graph = next(graph for graph in frames if graph is not None)
    assert graph._replay is None and graph._output is None
    release(runner.state)


def test_what_recordings_took_is_told_at_the_end(runner, monkeypatch, caplog):
    free = iter(range(1 << 40, 0, -(1 << 28)))  # each look finds 256 MiB less
    monkeypatch.setattr(recording, "free_memory", lambda: next(free))
    maker = maker_of(runner, Rerun())
    made = graphs.StepGraphs(maker.shapes, recording.ToldMaker(maker, 900 << 20, False))
    with caplog.at_level("INFO", "ernie_engine"):
        for index in range(4):
            assert not caplog.text
            made.record(Recording(index, range(9), range(20)))
    assert (
        "4 recorded in" in caplog.text
        and "4 with the bits of an eager run; 1.00 GiB" in caplog.text
    )
    assert "took more than the 0.88 GiB set aside" in caplog.text


@pytest.mark.parametrize("has_collectives", [False, True])
def test_the_bytes_of_graphs_are_two_measured_ones_and_an_estimate_of_the_others(
    runner, monkeypatch, has_collectives
):
    maker, free = maker_of(runner, Rerun()), iter([1000 << 20, 900 << 20])
    monkeypatch.setattr(recording, "free_memory", lambda: next(free))
    found = recording.bytes_of_graphs(maker, 128, 3000, has_collectives)
    kept = recording.GRAPH_BYTES + has_collectives * recording.NCCL_GRAPH_BYTES
    assert found == (100 << 20) + 2 * kept + (1 + 16) * 128 + 3000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not knobs.runtime.interpret, reason="tests/engine/test_graphs.py has a GPU")
@pytest.mark.parametrize("name", ["single tokens", "prompts", "mixed"])
def test_padding_changes_nothing_for_triton_kernels(tiny, name):
    """Interpreted: rows of the spare slot, rows of no tokens, NaN in what nobody has written."""
    config = EngineConfig(model=str(tiny), device="cpu", kernels="triton", max_num_seqs=NUM_SLOTS)
    check_padding(open_model(describe(config)).forward, name, SHAPES[name][-2])
