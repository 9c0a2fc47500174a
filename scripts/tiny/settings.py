"""Every choice of a training run in one frozen record, and the command line that overrides it.

Never imports torch: data workers read their part of the settings from their own command line.
"""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from .context import MAX_FACTS
from .tasks import SHARES, TASKS

MAX_PARAMETERS = 7_500_000
MAX_BYTES = 16_000_000


@dataclass(frozen=True)
class Settings:
    """Fields are options of the same name. Rows and batches are counted in tokens."""

    out: Path = Path("models/ernie-tiny")
    docs: Path = Path("docs/ernie-tiny")
    seed: int = 0
    minutes: float = 4.7  # of training; start, check and writing come on top
    steps: int = 0  # if given, train so many steps whatever the clock says
    device: str = "auto"
    dtype: str = "bfloat16"  # of weights, activations and gradients; masters are float32
    # model
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    dense_width: int = 512
    experts: int = 16
    top_k: int = 4
    expert_width: int = 64
    shared_experts: int = 1
    pieces: int = 2048
    max_positions: int = 4096
    # optimisation
    lr: float = 2e-3
    muon: bool = True  # for matrices inside layers; else AdamW for all
    weight_decay: float = 0.05
    beta2: float = 0.98
    warmup: float = 0.02  # share of the run
    clip: float = 1.0
    bias_spread: float = 0.2  # the correction bias starts within +- this
    bias_rate: float = 1e-5  # step of its rule, decays with lr
    balance_weight: float = 0.02  # of the routers' balance loss
    context_weight: float = 0.05  # loss weight of a token that is no part of an answer
    mtp_weight: float = 0.3
    # data
    batch_tokens: int = 32768
    short_row: int = 512
    long_row: int = 2048
    steps_per_shard: int = 24
    long_steps: int = 4  # of them, on long rows
    ramp_shards: int = 40  # shards until the longest contexts appear
    max_facts: int = MAX_FACTS
    workers: int = 0  # 0: half of the processors
    shares: str = ""  # overrides of task shares, as arithmetic=0.4,world=0.2
    # check
    probe_seconds: float = 20.0
    probe_samples: int = 96  # a task
    check_samples: int = 500  # a task
    check_dtype: str = "float32"
    allow_miss: bool = False
    smoke: bool = False

    def __post_init__(self):
        if self.minutes <= 0 and self.steps <= 0:
            raise ValueError("minutes: give --minutes or --steps above 0")
        if self.batch_tokens % self.long_row or self.batch_tokens % self.short_row:
            raise ValueError("batch_tokens: must be a multiple of short_row and long_row")
        if not 0 <= self.long_steps < self.steps_per_shard:
            raise ValueError("long_steps: must be below steps_per_shard")
        self.task_shares()

    def task_shares(self) -> dict[str, float]:
        """The shares of the short conversations, overrides applied."""
        shares = dict(SHARES)
        for item in filter(None, self.shares.split(",")):
            name, _, value = item.partition("=")
            if name not in TASKS:
                raise ValueError(f"shares: no task {name!r}; use {sorted(TASKS)}")
            shares[name] = float(value)
        return shares

    def num_workers(self) -> int:
        return self.workers or max(1, (os.cpu_count() or 2) // 2)

    def is_long(self, step: int) -> bool:
        """Long steps lie evenly in a shard."""
        place = step % self.steps_per_shard
        return (place + 1) * self.long_steps // self.steps_per_shard > (
            place * self.long_steps // self.steps_per_shard
        )


SMOKE = {
    "steps": 8,
    "hidden": 64,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "dense_width": 96,
    "experts": 4,
    "top_k": 2,
    "expert_width": 32,
    "pieces": 1024,
    "batch_tokens": 4096,
    "steps_per_shard": 4,
    "long_steps": 1,
    "ramp_shards": 1,
    "workers": 1,
    "probe_seconds": 3.0,
    "probe_samples": 2,
    "check_samples": 2,
    "allow_miss": True,
}


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from a command line; --smoke changes defaults to a run of a minute on a CPU."""
    smoke = argparse.ArgumentParser(add_help=False)
    smoke.add_argument("--smoke", action="store_true", help="the whole pipeline, tiny, on a CPU")
    is_smoke = smoke.parse_known_args(arguments)[0].smoke
    parser = argparse.ArgumentParser(
        parents=[smoke],
        description="Make ernie-tiny: text, tokenizer, training, check, checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Settings):
        if field.name == "smoke":
            continue
        option = "--" + field.name.replace("_", "-")
        default = SMOKE.get(field.name, field.default) if is_smoke else field.default
        if field.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(option, type=type(field.default), default=default)
    return Settings(**vars(parser.parse_args(arguments)))
