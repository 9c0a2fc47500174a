"""How many launches a step of one token takes: at batch 1 they are what a step waits for."""

import json
from pathlib import Path

import pytest

from tests.model.launches import BETWEEN
from tests.processes import ROOT, without_interpreter

SCRIPT = Path(__file__).with_name("launches.py")
KINDS = {
    "ernie-4.5-0.3b": ["MLP"],
    "ernie-4.5-21b-a3b": ["MLP", "MoE"],
    "ernie-4.5-300b-a47b": ["MLP", "MoE"],
}
A_LAYER = 5  # as docs/kernels.md tells
# The batch and the rows' next positions; the embedding; behind the layers the sum, norm and head.
AROUND = 6


@pytest.fixture(scope="module")
def parts() -> list[dict]:
    """Of all models: each layer of a kind, and what comes between layers."""
    folders = (ROOT / "configs" / name for name in KINDS)
    return [json.loads(line) for line in without_interpreter(SCRIPT, *folders)]


def test_a_layer_of_one_token_is_five_launches_and_no_op_of_torch(parts):
    layers = [part for part in parts if part["part"] != BETWEEN]
    found = {(part["model"], part["part"]) for part in layers}
    assert found == {(model, kind) for model, kinds in KINDS.items() for kind in kinds}
    assert [part for part in layers if len(part["launches"]) != A_LAYER] == []
    assert not [name for part in layers for name in part["launches"] if name.startswith("aten")]


@pytest.mark.parametrize("model", KINDS)
def test_around_the_layers_of_one_token_there_are_few_launches(parts, model):
    place = {"model": model, "part": BETWEEN}
    before, *between, after = [part["launches"] for part in parts if part.items() >= place.items()]
    assert not any(between) and len(before) + len(after) == AROUND, (before, between, after)
