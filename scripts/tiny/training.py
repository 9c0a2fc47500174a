"""The training loop: shards in, a trained TinyModel and its log out.

The learning rate follows the share of the run that is over, by the clock or by steps, so a run ends
in time on any machine. Never writes anything but the log.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .batch import NUM_CLASSES, Batch, class_weights, weighted_loss
from .corpus import FIRST_TASK
from .model import RouterBalance, TinyModel
from .optimizer import MasterOptimizer
from .probe import Probe
from .settings import Settings
from .tasks import TASK_NAMES


@dataclass
class Progress:
    """How far a run is; the clock starts with the second step, after kernels are loaded."""

    settings: Settings
    step: int = 0
    tokens: int = 0
    started: float = 0.0
    ended: float = 0.0  # seconds that the whole training took

    def advance(self, num_tokens: int) -> None:
        self.step += 1
        self.tokens += num_tokens
        if self.step == 1:
            self.started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.started if self.step else 0.0

    def share(self) -> float:
        """0 at the start, 1 at the end."""
        if self.settings.steps:
            return min(1.0, self.step / self.settings.steps)
        return min(1.0, self.seconds() / (60 * self.settings.minutes))

    def rate(self) -> float:
        """Factor on the learning rate: up during warm-up, then straight down to 0."""
        share = self.share()
        return min(1.0, (share + 1e-4) / self.settings.warmup) * (1 - share)


@dataclass
class Log:
    """Sums since the last line, on the device; a line of JSON each `probe_seconds`."""

    path: Path
    device: str
    lines: list[dict] = field(default_factory=list)
    written: float = 0.0

    def __post_init__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(2, 2, NUM_CLASSES, device=self.device)  # target and MTP
        self.norm = torch.zeros((), device=self.device)
        self.steps = 0

    def add(self, target: Tensor, drafted: Tensor, norm: Tensor) -> None:
        self.sums += torch.stack((target, drafted))
        self.norm += norm
        self.steps += 1

    def write(self, **values: object) -> dict:
        """Append one line with the mean losses since the last; returns it."""
        losses, tokens = self.sums.double().cpu().unbind(1)
        means = (losses / tokens.clamp(min=1)).tolist()
        answers = (
            losses[:, FIRST_TASK:].sum(1) / tokens[:, FIRST_TASK:].sum(1).clamp(min=1)
        ).tolist()
        line = {
            **values,
            "loss": round(answers[0], 5),
            "mtp_loss": round(answers[1], 5),
            "context_loss": round(means[0][1], 4),
            "grad_norm": round(float(self.norm) / max(1, self.steps), 4),
            "losses": {t: round(means[0][FIRST_TASK + i], 5) for i, t in enumerate(TASK_NAMES)},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        self.reset()
        return line


def batches(
    shards: Iterator[dict[str, np.ndarray]], settings: Settings, device: str
) -> Iterator[Batch]:
    """The steps' batches in order, long rows spread evenly among short ones."""
    for arrays in shards:
        rows, places = {}, {"long": 0, "short": 0}
        for kind in places:
            parts = {k.removeprefix(f"{kind}_"): a for k, a in arrays.items() if k.startswith(kind)}
            rows[kind] = Batch.from_arrays(parts, device)
        for step in range(settings.steps_per_shard):
            kind = "long" if settings.is_long(step) else "short"
            start = places[kind]
            length = settings.long_row if kind == "long" else settings.short_row
            places[kind] += settings.batch_tokens // length
            yield rows[kind].rows(start, places[kind])


def train(
    model: TinyModel, data: Iterator[Batch], probe: Probe, settings: Settings, device: str
) -> tuple[Progress, list[dict]]:
    """Train `model` in place; returns how far it came, and the lines of the log."""
    optimizer = MasterOptimizer(
        model, settings.weight_decay, settings.beta2, settings.clip, settings.muon
    )
    balance = RouterBalance(model, settings.bias_spread, settings.seed)
    progress = Progress(settings)
    weights = class_weights(settings.context_weight, device)
    log = Log(settings.docs / "log.jsonl", device)
    model.train()
    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a pipe keeps every redrawn bar
    with tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}", mininterval=interval) as bar:
        while progress.share() < 1:
            log.add(*_step(model, next(data), optimizer, balance, weights, progress))
            progress.advance(settings.batch_tokens)
            if progress.seconds() - log.written > settings.probe_seconds:
                _report(model, probe, log, progress, balance, bar)
            bar.update(100 * progress.share() - bar.n)
        if log.steps:
            _report(model, probe, log, progress, balance, bar)
    progress.ended = progress.seconds()
    return progress, log.lines


def _step(
    model: TinyModel,
    batch: Batch,
    optimizer: MasterOptimizer,
    balance: RouterBalance,
    weights: Tensor,
    progress: Progress,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update; returns the sums of the target's and the MTP block's losses, and the norm."""
    settings = progress.settings
    logits, drafts = model(batch.tokens, batch.positions(), batch.mask(model.dtype()))
    loss, sums = weighted_loss(logits, *batch.ahead(1), weights)
    draft_loss, draft_sums = weighted_loss(drafts, *batch.ahead(2), weights)
    loss = loss + settings.mtp_weight * draft_loss + settings.balance_weight * balance.loss()
    loss.backward()
    norm = optimizer.step(settings.lr * progress.rate())
    balance.step(settings.bias_rate * progress.rate())
    return sums, draft_sums, norm


def _report(
    model: TinyModel,
    probe: Probe,
    log: Log,
    progress: Progress,
    balance: RouterBalance,
    bar: tqdm,
) -> None:
    """Probe, and write one line of the log to file and terminal."""
    model.eval()
    accuracy = {task: round(value, 4) for task, value in probe.accuracy(model).items()}
    model.train()
    line = log.write(
        step=progress.step,
        seconds=round(progress.seconds(), 2),
        tokens=progress.tokens,
        imbalance=round(balance.imbalance(), 3),
        accuracy=accuracy,
    )
    log.written = progress.seconds()
    speed = progress.tokens / max(progress.seconds(), 1e-9)
    shown = " ".join(f"{task}={value:.2f}" for task, value in accuracy.items())
    bar.write(
        f"step {progress.step} {progress.seconds():.0f}s {speed / 1e3:.0f}k tok/s "
        f"loss {line['loss']:.4f} mtp {line['mtp_loss']:.3f} | {shown}"
    )
