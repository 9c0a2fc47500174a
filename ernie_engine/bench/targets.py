"""Whom a workload is sent to: a driver, the token ids to draw prompts from, and what to say about
it in the report. An engine in this process, or a server.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ernie_engine.bench.connection import Address
from ernie_engine.bench.environment import device_name
from ernie_engine.bench.floors import Ceilings
from ernie_engine.bench.http import HttpDriver, served_models, server_facts
from ernie_engine.bench.offline import OfflineDriver
from ernie_engine.bench.serving import Driver, ceiling_throughput
from ernie_engine.bench.workload import WorkloadSpec, model_ids, usable_ids
from ernie_engine.config import ModelConfig
from ernie_engine.engine.engine import Engine
from ernie_engine.engine.request import SamplingParams
from ernie_engine.options import option
from ernie_engine.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Target:
    title: str
    driver: Driver
    ids: np.ndarray
    facts: Mapping[str, Any]  # for the JSON line
    ceiling: float | None = None  # output tokens a second that the hardware allows, if known


def engine_facts(engine: Engine) -> dict[str, Any]:
    """What was run and how, for the JSON line."""
    return {"engine": asdict(engine.config), "model": asdict(engine.model_config)}


def engine_target(
    engine: Engine, spec: WorkloadSpec, ceilings: Ceilings, sampling: Mapping[str, Any]
) -> Target:
    """`sampling`: fields of SamplingParams. The workload must fit the engine."""
    config, model_config = engine.config, engine.model_config
    return Target(
        title=f"{Path(config.model).resolve().name} on {device_name()}",
        driver=OfflineDriver(engine, SamplingParams(**sampling)),
        ids=model_ids(model_config, engine.tokenizer),
        facts=engine_facts(engine) | {"ceilings": asdict(ceilings)},
        ceiling=ceiling_throughput(spec, config.max_num_seqs, model_config, config.dtype, ceilings),
    )


@dataclass(frozen=True)
class ServerOptions:
    """Which model of a server, and what the server may not tell itself. Flags of bench.py."""

    model: str | None = option(None, "None: the first that is served")
    tokenizer: str | None = option(None, "the served checkpoint's folder; None: the model's root")
    vocab_size: int | None = option(None, "without such a folder: all ids below it are drawn")
    timeout_s: float | None = option(None, "of one request")


def server_target(
    base_url: str,
    api_key: str | None,
    options: ServerOptions,
    spec: WorkloadSpec,
    sampling: Mapping[str, Any],
) -> Target:
    """`sampling` goes into each request's body. ValueError if the server, its model or the token
    ids to use cannot be found out, or the workload does not fit its context."""
    address = Address.from_url(base_url)
    models = served_models(address, api_key)
    entry = next((m for m in models if options.model in (None, m["id"])), models[0])
    if entry.get("max_model_len") is not None:
        spec.check_fits(entry["max_model_len"])
    model = options.model or entry["id"]
    folder = _folder(options, entry)
    driver = HttpDriver(
        address,
        model,
        dict(sampling),
        api_key,
        folder and load_tokenizer(folder),
        options.timeout_s,
    )
    facts = {"base_url": base_url, "model": model}
    facts |= server_facts(address, api_key)
    return Target(
        f"{model} at {base_url}", driver, _ids(folder, options.vocab_size), {"server": facts}
    )


def _folder(options: ServerOptions, entry: Mapping[str, Any]) -> Path | None:
    """The checkpoint's folder, if it can be read from here."""
    if options.tokenizer is not None:
        return Path(options.tokenizer)
    names = [entry.get("root"), entry["id"]]
    folders = [Path(name) for name in names if name and (Path(name) / "config.json").is_file()]
    return folders[0] if folders else None


def _ids(folder: Path | None, vocab_size: int | None) -> np.ndarray:
    if vocab_size is not None:
        return usable_ids(vocab_size)
    if folder is None:
        raise ValueError(
            "prompts are token ids: give --tokenizer FOLDER of the served checkpoint, or "
            "--vocab-size N if all ids below N are ordinary tokens"
        )
    return model_ids(ModelConfig.from_folder(folder), load_tokenizer(folder))
