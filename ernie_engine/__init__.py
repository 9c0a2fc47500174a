"""ernie_engine: a standalone inference engine for ERNIE-4.5 in PyTorch and Triton."""

from ernie_engine.engine.engine import Engine, Stream
from ernie_engine.engine.loop import EngineDeadError
from ernie_engine.engine.plan import derived_seed
from ernie_engine.engine.request import (
    CompletionOutput,
    Logprob,
    Piece,
    RequestOutput,
    SamplingParams,
)
from ernie_engine.engine_config import EngineConfig
from ernie_engine.version import VERSION

__version__ = VERSION
__all__ = [
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "Logprob",
    "Piece",
    "RequestOutput",
    "SamplingParams",
    "Stream",
    "derived_seed",
]
