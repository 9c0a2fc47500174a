"""What every rank checks of every plan."""

from types import SimpleNamespace

import pytest

from ernie_engine.engine.plan import SamplingPart, StepPlan, StepResult, decode_result
from ernie_engine.engine.stage import Stage, plan_frame


class Runner:
    def __init__(self, reports: bool = True):
        self.plans, self.reports = [], reports

    def launch(self, plan):
        self.plans.append(plan)

    def sample(self, part):
        result = StepResult(self.plans[-1].step_id, [[4]], [[]], [])
        return SimpleNamespace(wait=lambda: result) if self.reports else None


def plan(step_id: int) -> StepPlan:
    return StepPlan(step_id, (), (), (), (), [0], [1], [0], [], SamplingPart([0]))


@pytest.mark.parametrize("debug", [False, True])
def test_plans_are_run_in_order_and_answered(debug):
    stage = Stage(Runner(), debug)
    for step in range(3):
        result = decode_result(stage.run(plan_frame(plan(step), debug)).wait())
        assert (result.step_id, result.token_ids) == (step, [[4]])
    assert [p.step_id for p in stage.runner.plans] == [0, 1, 2]


def test_a_rank_that_reports_nothing_has_no_answer():
    stage = Stage(Runner(reports=False))
    assert stage.run(plan_frame(plan(0))) is None and stage.num_steps == 1


@pytest.mark.parametrize("step_id", [0, 2, 7])
def test_a_step_out_of_turn_is_refused_with_its_plan(step_id):
    stage = Stage(Runner())
    stage.run(plan_frame(plan(0)))
    with pytest.raises(RuntimeError, match=rf"step 1 was due.*StepPlan\(step_id={step_id}"):
        stage.run(plan_frame(plan(step_id)))
    assert len(stage.runner.plans) == 1


def test_with_debug_a_plan_that_was_changed_on_the_way_is_refused_with_what_was_read():
    frame = bytearray(plan_frame(plan(0), debug=True))
    frame[12] ^= 4  # the step's id
    with pytest.raises(RuntimeError, match=r"something else than what was sent: StepPlan\("):
        Stage(Runner(), debug=True).run(bytes(frame))
