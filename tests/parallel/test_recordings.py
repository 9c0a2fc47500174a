"""Graphs are recorded by steps that rank 0 plans and all ranks run, here without a GPU."""

import os
from pathlib import Path

import pytest

from ernie_engine import SamplingParams
from ernie_engine.engine.loop import EngineLoop
from tests.recorder import record_by_rerunning
from tests.tiny import open_engine, token_ids

PROMPTS = [[5, 6, 7], [9] * 40, [11, 12] * 25, [3]]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
TP2, PP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


@pytest.fixture(autouse=True)
def recorded_everywhere(monkeypatch):
    here = Path(__file__).parent
    paths = [str(here / "rerun"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    record_by_rerunning(monkeypatch.setattr)


@pytest.mark.parametrize(
    "layout",
    [
        TP2,
        pytest.param(PP2, marks=pytest.mark.slow),
        pytest.param({**PP2, "max_steps_in_flight": 4}, marks=pytest.mark.slow),
        pytest.param({**TP2, **PP2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_all_ranks_record_what_rank_0_plans_also_between_requests(tiny, monkeypatch, layout):
    fields = {"device": "cpu", "max_num_seqs": 8}
    with open_engine(tiny, **fields, enforce_eager=True) as engine:
        expected = token_ids(engine.generate(PROMPTS, GREEDY, use_tqdm=False))
    settle = EngineLoop.settle
    monkeypatch.setattr(EngineLoop, "settle", lambda loop: None)
    with open_engine(tiny, **fields, **layout, debug=True) as engine:
        among = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
        settle(engine._loop)
        assert engine._core.num_graphs == len(engine._core.scheduler._recordings) > 8
        replayed = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert engine._core.ranks.stage.num_steps > 8 + 20
    assert token_ids(among) == token_ids(replayed) == expected
