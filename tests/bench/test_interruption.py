"""Gaps between tokens while a long prompt comes in: by made-up times, and as people call it."""

import numpy as np
import pytest

from ernie_engine.bench.interruption import (
    Interruption,
    check_fits,
    interrupt,
    interruption_row,
)
from ernie_engine.bench.metrics import RequestLog, Run
from ernie_engine.bench.serving import Measurement
from ernie_engine.bench.workload import WorkloadSpec

SPEC = WorkloadSpec(num_prompts=3, max_input_len=4, max_output_len=9)
IDS = np.arange(100)


def log(sent: float, times, num_inputs: int = 4, error=None) -> RequestLog:
    return RequestLog(sent, times, num_inputs, len(times), 0, error)


ALONE = Measurement(None, Run([log(0, [1, 2, 3, 4])], 4.0), 4)


class Fake:
    """Answers with logs that were made beforehand, and keeps what it was asked."""

    def __init__(self, logs):
        self.logs, self.asked = logs, []

    def run(self, requests, max_concurrency, on_done):
        self.asked = requests
        return Run(self.logs, 9.0)


def test_figures():
    others = [log(0, [1, 2, 6, 7]), log(0, [1, 3, 4.5, 8])]
    late = log(2.5, [5.0], 50)
    row = interruption_row(Interruption(ALONE.run, others, late), 50)
    assert row["prompt_len"] == 50 and row["ttft_ms"] == 2500
    assert row["alone"] == {"count": 3, "median": 1000, "tail": 1000, "max": 1000}
    assert row["interrupted"]["count"] == 6 and row["interrupted"]["max"] == 4000
    # 2..6 and 1..3, 3..4.5, 4.5..8: not 1..2, which had ended, nor 6..7, which began later
    assert row["meanwhile"] == {"count": 4, "median": 2750, "tail": 2750, "max": 4000}


def test_the_long_prompt_comes_half_way():
    driver = Fake([log(0, [1, 2, 6]), log(2.0, [5.0], 50), log(3.0, [4.0, 7.0])])
    found = interrupt(driver, SPEC, IDS, ALONE, 50)
    assert [len(r.prompt) for r in driver.asked] == [4, 4, 4, 50]
    assert driver.asked[-1].arrival == 2.0 and driver.asked[-1].output_len == 1
    assert found.late.num_input_tokens == 50 and len(found.others) == 2


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ([log(0, [1, 2]), log(2.0, [5.0], 50)], "greater max_output_len"),
        ([log(0, [1, 2]), log(2.0, [5.0], 50), log(6, [7, 8])], "greater max_output_len"),
        ([log(0, [1], error="it burst"), log(2.0, [5.0], 50)], "4 tokens failed: it burst"),
    ],
)
def test_what_would_measure_nothing_is_an_error(logs, message):
    with pytest.raises(ValueError, match=message):
        interrupt(Fake(logs), SPEC, IDS, ALONE, 50)


def test_only_a_long_prompt_that_fits():
    check_fits(50, SPEC, 51)
    with pytest.raises(ValueError, match="min_output_len"):
        check_fits(50, WorkloadSpec(max_input_len=4, max_output_len=1), 51)
    for prompt_len in (4, 51):
        with pytest.raises(ValueError, match="long_prompt="):
            check_fits(prompt_len, SPEC, 51)
