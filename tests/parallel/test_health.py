"""Who is lost, by what was heard and when."""

from dataclasses import replace

import pytest

from ernie_engine.parallel.health import INTERVAL_SECONDS, State, Vitals, Watch

NAMES = {0: "rank 0 (a)", 1: "rank 1 (b)", 2: "rank 2 (c)"}
STEP = Vitals(State.STEPPING, steps_begun=5, steps_done=4, pulse=100)


def looks(watch: Watch, start: float, seconds: float, hear) -> str | None:
    """Look twice a second, after `hear`(now); the first verdict."""
    now = start
    while now < start + seconds:
        now += INTERVAL_SECONDS
        hear(now)
        if (verdict := watch.look(now)) is not None:
            return f"{now - start:g} s: {verdict}"
    return None


def test_all_are_well():
    watch = Watch(NAMES, 10.0, now=0.0)
    states = [Vitals(State.LOADING), Vitals(State.IDLE, 0, 3, 3), Vitals(State.COMPILING)]

    def hear(now):
        for rank, vitals in enumerate(states):
            watch.hear(rank, vitals, now)

    assert looks(watch, 0.0, 100.0, hear) is None  # no progress is fine while no step is run


@pytest.mark.parametrize("state", list(State))
def test_a_silent_rank_is_named_in_time_whatever_it_did(state):
    watch = Watch(NAMES, 10.0, now=0.0)
    for rank in NAMES:
        watch.hear(rank, replace(STEP, state=state), 0.0)

    def hear(now):
        for rank in (0, 2):
            watch.hear(rank, replace(STEP, state=state, pulse=int(now * 10)), now)

    seconds, verdict = looks(watch, 0.0, 20.0, hear).split(" s: ")
    assert 8 <= float(seconds) < 10
    assert verdict.startswith("rank 1 (b) has not been heard of for 8 s") and state in verdict


def test_a_step_without_progress_is_a_hang_of_the_one_who_is_behind():
    watch = Watch(NAMES, 10.0, now=0.0)

    def hear(now):
        watch.hear(0, STEP, now)
        watch.hear(1, replace(STEP, pulse=99), now)
        watch.hear(2, Vitals(State.IDLE, 0, 4, 4), now)

    seconds, verdict = looks(watch, 0.0, 20.0, hear).split(" s: ")
    assert 10 <= float(seconds) < 12
    assert verdict.startswith("rank 1 (b) hangs: a step has made no progress for 10 s")
    assert "rank 0 (a): stage 0, 5 steps begun, 4 done, pulse 100" in verdict
    assert "rank 2" not in verdict


@pytest.mark.parametrize(
    ("stuck", "culprit"),
    [  # (stage, steps begun, done, pulse) of each rank
        ([(0, 5, 4, 58), (1, 5, 4, 55)], 0),  # a stage of more layers has counted more
        ([(0, 5, 4, 58), (0, 5, 4, 57), (1, 5, 4, 55)], 1),
        ([(0, 7, 6, 7), (1, 5, 4, 11), (2, 5, 4, 10)], 1),  # the first waits for a token
        ([(0, 7, 6, 7), (1, 7, 6, 14), (2, 6, 5, 12)], 2),
    ],
)
def test_between_stages_the_one_that_the_others_wait_for_is_named(stuck, culprit):
    watch = Watch(NAMES, 10.0, now=0.0)

    def hear(now):
        for rank in NAMES:
            is_stuck = rank < len(stuck)
            vitals = Vitals(State.STEPPING, *stuck[rank]) if is_stuck else Vitals(State.IDLE)
            watch.hear(rank, vitals, now)

    verdict = looks(watch, 0.0, 20.0, hear)
    assert verdict.split(" s: ")[1].startswith(f"{NAMES[culprit]} hangs")


def test_a_culprit_heard_of_a_little_later_is_named_all_the_same():
    watch = Watch(NAMES, 10.0, now=0.0)

    def hear(now):
        watch.hear(0, replace(STEP, pulse=100), now)
        watch.hear(1, replace(STEP, pulse=99 if now > 0.7 else 90), now)
        watch.hear(2, Vitals(State.IDLE), now)

    verdict = looks(watch, 0.0, 20.0, hear)
    assert verdict.split(" s: ")[1].startswith("rank 1 (b) hangs")


def test_a_slow_step_that_gets_on_is_no_hang():
    watch = Watch(NAMES, 10.0, now=0.0)

    def hear(now):
        for rank in NAMES:
            watch.hear(rank, replace(STEP, pulse=int(now // 9)), now)

    assert looks(watch, 0.0, 60.0, hear) is None


def test_hangs_can_be_left_to_rank_0():
    watch = Watch({0: "rank 0 (a)"}, 10.0, now=0.0)
    now = 0.0
    while now < 30:
        now += INTERVAL_SECONDS
        watch.hear(0, STEP, now)
        assert watch.look(now, hangs=False) is None


def test_who_was_stopped_itself_blames_nobody():
    watch = Watch(NAMES, 10.0, now=0.0)
    for rank in NAMES:
        watch.hear(rank, STEP, 0.0)
    assert watch.look(0.5) is None
    assert watch.look(60.0) is None  # nothing could be heard meanwhile
    assert watch.look(60.5) is None
    assert looks(watch, 60.5, 9.0, lambda now: None) is not None


def test_vitals_survive_json():
    assert Vitals.from_json(STEP.to_json()) == STEP
    with pytest.raises(ValueError):
        Vitals.from_json({**STEP.to_json(), "state": "dancing"})
