"""The served model as the front end sees it: its text side, its limits and its fingerprint.

Built from the configuration that the engine process has settled. Holds no weight.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ernie_engine.config import ModelConfig
from ernie_engine.engine.core import make_intake
from ernie_engine.engine.intake import Intake
from ernie_engine.engine_config import ResolvedConfig
from ernie_engine.server.calls import ModelLimits
from ernie_engine.text.tokenizer import Tokenizer
from ernie_engine.version import VERSION


@dataclass(frozen=True)
class ServedModel:
    """A model, and what may be said about it."""

    config: ResolvedConfig
    intake: Intake
    limits: ModelLimits
    fingerprint: str

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.intake.tokenizer


def describe_model(config: ResolvedConfig, model_config: ModelConfig) -> dict[str, Any]:
    """For read_served_model, in another process."""
    return {"config": asdict(config), "model_config": asdict(model_config)}


def read_served_model(data: Mapping[str, Any]) -> ServedModel:
    """Reads the tokenizer, so it takes a moment. ValueError if that cannot be used."""
    config = ResolvedConfig(**data["config"])
    eos = tuple(data["model_config"]["eos_token_ids"])
    model_config = ModelConfig(**{**data["model_config"], "eos_token_ids": eos})
    return ServedModel(
        config=config,
        intake=make_intake(config, model_config),
        limits=ModelLimits(config.max_model_len, config.max_logprobs, model_config.vocab_size),
        fingerprint=_fingerprint(config, data["model_config"]),
    )


def _fingerprint(config: ResolvedConfig, model_config: Mapping[str, Any]) -> str:
    """Equal fingerprint and seed: equal tokens. Where the model lies is left out."""
    told = [{**asdict(config), "model": ""}, model_config]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    layout = f"tp{config.tensor_parallel_size}pp{config.pipeline_parallel_size}"
    return f"ernie-{VERSION}-{layout}-{digest[:12]}"
