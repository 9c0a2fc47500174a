"""Into which rank grids (pp, tp) a model can be cut, which one is taken, a stage's layers.

Owns that arithmetic, on sizes alone. Never sees a process, a device or a tensor.
"""

from dataclasses import dataclass
from itertools import pairwise

from ernie_engine.config import ModelConfig
from ernie_engine.parallel.world import World


@dataclass(frozen=True)
class Grid:
    """Rank = pp_rank * tp + tp_rank: the ranks of a stage are neighbours, so on one host."""

    pp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        return self.pp * self.tp


def legal_tp_sizes(model: ModelConfig, expert_parallel: bool, most: int = 1024) -> list[int]:
    """The tensor parallel sizes that every cut matrix allows; K/V heads are copied above their
    number, the vocabulary is padded."""
    return [tp for tp in range(1, most + 1) if _can_cut(model, expert_parallel, tp)]


def _can_cut(model: ModelConfig, expert_parallel: bool, tp: int) -> bool:
    kv_heads, moe_layers = model.num_key_value_heads, _moe_layers(model)
    widths = [model.num_attention_heads]
    if len(moe_layers) < model.num_hidden_layers:
        widths.append(model.intermediate_size)
    if moe_layers:
        width = model.moe_intermediate_size
        widths.append(model.moe_num_experts if expert_parallel else width)
        widths.append(width * model.moe_num_shared_experts)
    return all(n % tp == 0 for n in widths) and (kv_heads % tp == 0 or tp % kv_heads == 0)


def _moe_layers(model: ModelConfig) -> list[int]:
    return [i for i in range(model.num_hidden_layers) if model.is_moe_layer(i)]


def choose_grid(
    model: ModelConfig, tp: int | None, pp: int | None, expert_parallel: bool, world: World
) -> Grid:
    """The grid to run with. Where a size is None: alone, 1; under torchrun tp is the largest legal
    size that divides a host's ranks, and pp takes the rest.

    ValueError, naming sizes that work, if the model or the number of ranks does not allow it.
    """
    legal = legal_tp_sizes(model, expert_parallel)
    if not world.is_launched:
        grid = Grid(pp or 1, tp or 1)
    elif tp is None and pp is None:
        tp = max(size for size in legal if world.local_size % size == 0)
        grid = Grid(world.size // tp, tp)
    else:
        grid = Grid(pp or max(1, world.size // (tp or 1)), tp or max(1, world.size // (pp or 1)))
    if grid.tp not in legal:
        how = "with" if expert_parallel else "without"
        raise ValueError(
            f"tensor_parallel_size={grid.tp}: this model can be cut into "
            f"{', '.join(map(str, legal))} ({how} enable_expert_parallel)"
        )
    if grid.pp > model.num_hidden_layers:
        raise ValueError(
            f"pipeline_parallel_size={grid.pp}: the model has {model.num_hidden_layers} layers "
            "and a stage needs one"
        )
    if world.is_launched and grid.size != world.size:
        raise ValueError(
            f"tensor_parallel_size={grid.tp} x pipeline_parallel_size={grid.pp} = {grid.size} "
            f"ranks, but {world.size} were started; {_sensible(model, legal, world)}"
        )
    return grid


def _sensible(model: ModelConfig, legal: list[int], world: World) -> str:
    """Which sizes fit the ranks that are there."""
    fitting = [
        f"{tp} x {world.size // tp}"
        for tp in legal
        if world.size % tp == 0 and world.size // tp <= model.num_hidden_layers
    ]
    if not fitting:
        return f"no grid of this model has that many: tensor parallel sizes are {legal}"
    return f"for that many: {', '.join(fitting)}"


def deal_layers(model: ModelConfig, pp: int) -> list[range]:
    """The layers of each stage: neighbours, at least one, so that the dearest stage is as cheap
    as it can be. Of cuts that are equal so far, the more even one goes on."""
    costs = layer_costs(model)
    head = model.vocab_size * model.hidden_size
    num_layers = len(costs)
    total = [0, *(sum(costs[: i + 1]) for i in range(num_layers))]
    # best[i]: of the stages so far, together holding the layers below i, (dearest, sum of
    # squares, borders). The head is the last stage's; the embedding is looked up, not read.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
    for stage in range(pp):
        is_last = stage == pp - 1
        found: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for end in [num_layers] if is_last else range(stage + 1, num_layers - pp + stage + 2):
            options = []
            for start, (dearest, squares, borders) in best.items():
                if start < end:
                    cost = total[end] - total[start] + (head if is_last else 0)
                    options.append((max(dearest, cost), squares + cost * cost, (*borders, end)))
            if options:
                found[end] = min(options)
        best = found
    return [range(*pair) for pair in pairwise(best[num_layers][2])]


def layer_costs(model: ModelConfig) -> list[int]:
    """Weights that a step of many tokens reads, layer by layer: what decode waits for, and what
    a stage must hold."""
    hidden, head_dim = model.hidden_size, model.head_dim
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    attention = hidden * head_dim * heads
    dense = 3 * hidden * model.intermediate_size
    experts = model.moe_num_experts + model.moe_num_shared_experts
    moe = 3 * hidden * model.moe_intermediate_size * experts
    return [
        attention + (moe if model.is_moe_layer(i) else dense)
        for i in range(model.num_hidden_layers)
    ]
