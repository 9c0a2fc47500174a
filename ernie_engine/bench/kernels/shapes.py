"""What one rank of a layout sees of a model: the sizes that its kernels are called with.

Owns the list of layouts that kernels are measured for. Reads no checkpoint: the numbers are those
of configs/, which a test compares.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankShape:
    """Sizes of one rank; widths are its share, None of them is the whole model's but `hidden`,
    `num_experts` (what the router chooses from) and `top_k`."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    dense_width: int
    vocab: int
    num_experts: int = 0
    local_experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared_width: int = 0
    head_dim: int = 128

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def _dense() -> RankShape:
    return RankShape("0.3B", 1024, heads=16, kv_heads=2, dense_width=3072, vocab=VOCAB)


def _moe_21b(tp: int) -> RankShape:
    return RankShape(
        f"21B tp{tp}",
        2560,
        heads=20 // tp,
        kv_heads=4 // tp,
        dense_width=12288 // tp,
        vocab=VOCAB // tp,
        num_experts=64,
        local_experts=64,
        top_k=6,
        expert_width=1536 // tp,
        shared_width=2 * 1536 // tp,
    )


def _moe_300b(tp: int, experts_whole: bool = False) -> RankShape:
    """experts_whole: the experts are dealt out over the ranks, not cut."""
    return RankShape(
        f"300B tp{tp}" + (" ep" if experts_whole else ""),
        8192,
        heads=64 // tp,
        kv_heads=8 // tp,
        dense_width=28672 // tp,
        vocab=VOCAB // tp,
        num_experts=64,
        local_experts=64 // tp if experts_whole else 64,
        top_k=8,
        expert_width=3584 if experts_whole else 3584 // tp,
    )


VOCAB = 103424
SHAPES = {
    shape.name: shape
    for shape in (
        _dense(),
        *(_moe_21b(tp) for tp in (1, 2, 4)),
        *(_moe_300b(tp) for tp in (8, 4)),
        _moe_300b(8, experts_whole=True),
    )
}
NUM_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
