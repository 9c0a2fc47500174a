"""Which grids a model can be cut into, and how its layers are dealt out."""

from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_engine.config import ModelConfig
from ernie_engine.parallel.planner import (
    Grid,
    choose_grid,
    deal_layers,
    layer_costs,
    legal_tp_sizes,
)
from ernie_engine.parallel.world import World

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = "0.3b", "21b-a3b", "300b-a47b"


def model(name: str) -> ModelConfig:
    return ModelConfig.from_folder(CONFIGS / f"ernie-4.5-{name}")


def hosts(num_hosts: int, per_host: int) -> World:
    size = num_hosts * per_host
    return World(size=size, local_size=per_host, is_launched=True)


def test_legal_sizes_of_the_released_models():
    sizes = {name: legal_tp_sizes(model(name), expert_parallel=False) for name in NAMES}
    assert sizes == {
        "0.3b": [1, 2, 4, 8, 16],
        "21b-a3b": [1, 2, 4],
        "300b-a47b": [1, 2, 4, 8, 16, 32, 64],
    }


def test_with_expert_parallelism_the_number_of_experts_counts_not_their_width(tiny_model):
    narrow = tiny_model(moe_intermediate_size=6, moe_num_experts=8)
    assert legal_tp_sizes(narrow, expert_parallel=False) == [1, 2]
    assert legal_tp_sizes(narrow, expert_parallel=True) == [1, 2, 4]


@pytest.fixture
def tiny_model():
    def make(**changes) -> ModelConfig:
        values = {
            **{"model_type": "ernie4_5_moe", "vocab_size": 50, "hidden_size": 16},
            **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"head_dim": 4, "intermediate_size": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
            **{"max_position_embeddings": 64, "tie_word_embeddings": True, "dtype": "float32"},
            **{"bos_token_id": 1, "eos_token_ids": (2,), "moe_num_experts": 4, "moe_k": 2},
            **{"moe_intermediate_size": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 3},
        }
        return ModelConfig(**{**values, **changes})

    return make


@pytest.mark.parametrize(
    ("name", "world", "grid"),
    [
        ("21b-a3b", hosts(1, 8), Grid(pp=2, tp=4)),
        ("21b-a3b", hosts(1, 2), Grid(pp=1, tp=2)),
        ("21b-a3b", hosts(2, 1), Grid(pp=2, tp=1)),
        ("300b-a47b", hosts(2, 8), Grid(pp=2, tp=8)),
        ("300b-a47b", hosts(1, 6), Grid(pp=3, tp=2)),
        ("0.3b", hosts(1, 3), Grid(pp=3, tp=1)),
    ],
)
def test_under_torchrun_a_host_holds_as_much_of_a_layer_as_it_can(name, world, grid):
    assert choose_grid(model(name), None, None, False, world) == grid


def test_one_size_given_leaves_the_other_what_is_left():
    world = hosts(1, 8)
    assert choose_grid(model("300b-a47b"), 2, None, False, world) == Grid(pp=4, tp=2)
    assert choose_grid(model("300b-a47b"), None, 2, False, world) == Grid(pp=2, tp=4)
    assert choose_grid(model("300b-a47b"), None, None, False, World()) == Grid()
    assert choose_grid(model("300b-a47b"), 8, 2, False, World()) == Grid(pp=2, tp=8)


@pytest.mark.parametrize(
    ("name", "tp", "pp", "world", "message"),
    [
        ("21b-a3b", 8, 1, hosts(1, 8), "tensor_parallel_size=8: this model .* into 1, 2, 4 "),
        ("21b-a3b", 3, 1, World(), "into 1, 2, 4 "),
        ("21b-a3b", 1, 29, World(), "pipeline_parallel_size=29: the model has 28 layers"),
        ("21b-a3b", 2, 2, hosts(1, 8), r"= 4 ranks, but 8 were started.*: 1 x 8, 2 x 4, 4 x 2"),
        ("300b-a47b", 8, None, hosts(1, 4), "4 were started; for that many: 1 x 4, 2 x 2, 4 x 1"),
        ("300b-a47b", None, 3, hosts(1, 8), "but 8 were started"),
        ("21b-a3b", 4, None, hosts(31, 1), "no grid of this model has that many"),
    ],
)
def test_what_does_not_fit_is_told_with_what_does(name, tp, pp, world, message):
    with pytest.raises(ValueError, match=message):
        choose_grid(model(name), tp, pp, False, world)


def test_layers_of_the_released_models():
    dealt = {name: [len(r) for r in deal_layers(model(name), 2)] for name in NAMES}
    assert dealt == {"0.3b": [13, 5], "21b-a3b": [15, 13], "300b-a47b": [28, 26]}


@given(
    num_layers=st.integers(1, 9),
    pp=st.integers(1, 9),
    first_moe=st.integers(0, 9),
    vocab=st.sampled_from([3, 400, 5000]),
    width=st.integers(1, 40),
)
def test_no_other_cut_has_a_cheaper_dearest_stage(num_layers, pp, first_moe, vocab, width):
    if pp > num_layers:
        return
    config = ModelConfig(
        **{"model_type": "ernie4_5_moe", "vocab_size": vocab, "hidden_size": 8},
        **{"num_hidden_layers": num_layers, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 4, "intermediate_size": width, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
        **{"max_position_embeddings": 64, "tie_word_embeddings": True, "dtype": "float32"},
        **{"bos_token_id": 1, "eos_token_ids": (2,), "moe_num_experts": 4, "moe_k": 2},
        **{"moe_intermediate_size": 4, "moe_layer_end_index": num_layers - 1},
        moe_layer_start_index=first_moe,
    )
    costs, head = layer_costs(config), vocab * 8
    dealt = deal_layers(config, pp)
    assert [i for layers in dealt for i in layers] == list(range(num_layers))
    assert len(dealt) == pp and all(dealt)

    def dearest(borders) -> int:
        stages = [sum(costs[a:b]) for a, b in pairwise([0, *borders, num_layers])]
        return max([*stages[:-1], stages[-1] + head])

    best = min(dearest(borders) for borders in combinations(range(1, num_layers), pp - 1))
    assert dearest([layers.start for layers in dealt[1:]]) == best
