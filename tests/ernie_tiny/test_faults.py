"""ernie-tiny itself, through the engine in float32 on the CPU: it knows its world, it answers as
under transformers, and the evaluation catches a planted fault.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny.answerer import TransformersAnswerer
from tiny.checking import questions
from tiny.faults import plant
from tiny.tasks import THRESHOLDS

from ernie_engine import Engine, SamplingParams
from ernie_engine.evals.harness import Record, run
from ernie_engine.evals.intervals import paired_p_value
from ernie_engine.evals.report import compare, scores
from ernie_engine.evals.transport import EngineAnswerer

REAL = Path(__file__).parents[2] / "models" / "ernie-tiny"
SENSITIVE = ("boxed", "lists", "copy")  # where this checkpoint feels a wrong choice of experts
COUNT = 300  # questions a task: bias_in_bf16 loses one answer in fifty, less would be chance
Ask = Callable[[Path, tuple[str, ...], int], list[Record]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ask() -> Ask:
    def ask(folder: Path, tasks: tuple[str, ...], count: int) -> list[Record]:
        with Engine(model=str(folder), dtype="float32", device="cpu") as engine:
            answerer = EngineAnswerer(engine, SamplingParams)
            return run(questions(tasks, count), answerer, 96, 64, progress=False)

    return ask


@pytest.fixture(scope="module")
def clean(ask: Ask) -> list[Record]:
    return ask(REAL, SENSITIVE, COUNT)


def test_it_knows_its_world(ask: Ask):
    rows = scores(ask(REAL, ("arithmetic", "world", "choice", "json"), 60))
    assert all(row.accuracy >= THRESHOLDS[row.task] for row in rows), rows


def test_the_engine_answers_as_transformers_does(clean: list[Record]):
    reference = TransformersAnswerer(REAL, "float32", "cpu")
    theirs = run(questions(SENSITIVE, COUNT), reference, 96, COUNT, progress=False)
    assert all(row.same_answer == row.count for row in compare(clean, theirs))
    assert all(row.accuracy >= 0.98 for row in scores(clean))


@pytest.mark.parametrize("fault", ["bias_dropped", "bias_in_bf16", "rope_neox", "experts_swapped"])
def test_the_evaluation_catches_a_planted_fault(
    fault: str, clean: list[Record], ask: Ask, tmp_path: Path
):
    config = json.loads((REAL / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    plant(REAL, tmp_path / fault, fault, head_dim)
    rows = compare(clean, ask(tmp_path / fault, SENSITIVE, COUNT))
    lost, won = sum(row.only_first for row in rows), sum(row.only_second for row in rows)
    assert lost > won and paired_p_value(lost, won) < 0.01, rows
