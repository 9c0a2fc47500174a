"""Start-up tells how far it is: a line for kernels, one for graphs, on one rank of all."""

import pytest
import torch

from ernie_engine.engine.plan import Recording
from ernie_engine.engine_config import EngineConfig
from ernie_engine.model import startup
from ernie_engine.model.runner import ModelRunner
from ernie_engine.parallel.mesh import Mesh
from tests.recorder import record_by_rerunning


def opened(tiny, stage: int) -> tuple[startup.Description, ModelRunner]:
    few = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "pipeline_parallel_size": 2}
    config = EngineConfig(model=str(tiny), device="cpu", load_format="dummy", **few)
    described = startup.describe(config)
    return described, startup.open_model(described, Mesh(pp_size=2, pp_rank=stage))


@pytest.mark.parametrize("stage", [0, 1])
def test_one_rank_shows_how_many_graphs_there_are(tiny, monkeypatch, capsys, stage):
    record_by_rerunning(monkeypatch.setattr)
    _, runner = opened(tiny, stage)
    rooms = runner.graphs.rooms()
    for i, room in enumerate(rooms):
        runner.graphs.record(Recording(i, range(room.num_slots), range(room.num_blocks)))
    shown, count = capsys.readouterr().err, len(rooms)
    assert count == len(runner.graphs) > 2
    assert ("graphs:" in shown, f"{count}/{count}" in shown) == (stage == 0, stage == 0)


@pytest.mark.parametrize("shows_bar", [True, False])
def test_the_steps_that_ask_for_kernels_are_shown(tiny, monkeypatch, capsys, shows_bar):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    described, runner = opened(tiny, stage=0)
    monkeypatch.setattr(startup, "rehearse", lambda runner, plan: None)
    startup._compile_kernels(described.config, runner, None, lambda state: None, shows_bar)
    shown = capsys.readouterr().err
    assert ("kernels: 100%" in shown) == shows_bar and (shown == "") != shows_bar
