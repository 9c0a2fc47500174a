"""The small random checkpoint that engine tests share, and how they open it.

ERNIE_TEST_DEVICE=cuda runs all of them on a GPU instead.
"""

import os
from pathlib import Path
from typing import Any

from ernie_engine import Engine
from ernie_engine.testing.checkpoints import write_checkpoint
from ernie_engine.testing.spec import CheckpointSpec

SPEC = CheckpointSpec(
    dtype="float32",
    hidden_size=64,
    moe_intermediate_size=32,
    intermediate_size=96,
    vocab_size=700,
    max_position_embeddings=512,
    router_bias_mean=20.0,
)


LICENSE = Path(__file__).parent.parent / "LICENSE"


def write_tiny(folder: Path) -> Path:
    """Its tokenizer is trained on a text that never changes, so that tests do not move with it."""
    return write_checkpoint(folder, SPEC, LICENSE.read_text().splitlines())


def open_engine(folder: Path, **fields: Any) -> Engine:
    """An fp32 engine with few slots and blocks; any field can be changed."""
    device = os.environ.get("ERNIE_TEST_DEVICE", "cpu")
    small = {"device": device, "max_num_seqs": 8, "kv_cache_memory_bytes": 4 << 20}
    return Engine(folder, **{**small, **fields})


def token_ids(outputs) -> list[list[list[int]]]:
    """[prompt][choice][token]"""
    return [[choice.token_ids for choice in output.outputs] for output in outputs]
