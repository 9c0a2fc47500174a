"""Conversations packed into rows: shards of training data, made by worker processes ahead of use.

Shard `i` depends on the seed and `i` alone, whoever makes it. Run as a module this file is a
worker. Never imports torch.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import numpy as np

from .sample import Sample, Split
from .settings import Settings
from .tasks import TASK_NAMES, draw_long, draw_short
from .tokenizer import ChatEncoder

PAD, CONTEXT = 0, 1  # token classes; an answer token of task i has the class FIRST_TASK + i
FIRST_TASK = 2
_AHEAD = 4  # finished shards that a worker may leave unread
_PENDING = 16  # conversations among which a row's gap is filled


class Rows:
    """Packed rows: token ids, token classes, and which conversation (from 1) a token belongs to."""

    def __init__(self, count: int, length: int):
        self.tokens = np.zeros((count, length), np.uint16)
        self.classes = np.zeros((count, length), np.uint8)
        self.documents = np.zeros((count, length), np.uint16)

    def put(self, row: int, start: int, number: int, ids: list[int], classes: list[int]) -> None:
        place = (row, slice(start, start + len(ids)))
        self.tokens[place], self.classes[place], self.documents[place] = ids, classes, number


def encode(encoder: ChatEncoder, sample: Sample) -> tuple[list[int], list[int]]:
    """Ids and classes of one conversation."""
    ids, learned = encoder.sample(sample)
    answer = FIRST_TASK + TASK_NAMES.index(sample.task)
    return ids, [answer if is_learned else CONTEXT for is_learned in learned]


def pack(encoder: ChatEncoder, samples: Iterator[Sample], count: int, length: int) -> Rows:
    """Fill `count` rows; the longest waiting conversation that fits a gap goes there.

    A conversation longer than a row is dropped.
    """
    rows = Rows(count, length)
    pending: list[tuple[list[int], list[int]]] = []
    for row in range(count):
        start, number = 0, 1
        while True:
            while len(pending) < _PENDING:
                document = encode(encoder, next(samples))
                if len(document[0]) <= length:
                    pending.append(document)
            fitting = [d for d in pending if start + len(d[0]) <= length]
            if not fitting:
                break
            best = fitting[0] if start == 0 else max(fitting, key=lambda d: len(d[0]))
            pending.remove(best)
            rows.put(row, start, number, *best)
            start, number = start + len(best[0]), number + 1
    return rows


def make_shard(encoder: ChatEncoder, settings: Settings, index: int) -> dict[str, np.ndarray]:
    """Arrays `short_*` and `long_*` with the rows of one shard's steps."""
    rng = random.Random(f"shard {settings.seed} {index}")
    shares = settings.task_shares()
    ramp = min(1.0, (index + 1) / settings.ramp_shards)
    max_facts = max(8, int(ramp * settings.max_facts))

    def short() -> Iterator[Sample]:
        while True:
            yield draw_short(rng, Split.TRAIN, shares)

    def long() -> Iterator[Sample]:
        while True:
            is_long = rng.random() < 0.6
            yield (
                draw_long(rng, Split.TRAIN, max_facts)
                if is_long
                else draw_short(rng, Split.TRAIN, shares)
            )

    num_long = settings.long_steps
    num_short = settings.steps_per_shard - num_long
    arrays: dict[str, np.ndarray] = {}
    for kind, samples, steps, length in (
        ("short", short(), num_short, settings.short_row),
        ("long", long(), num_long, settings.long_row),
    ):
        rows = pack(encoder, samples, steps * settings.batch_tokens // length, length)
        arrays |= {f"{kind}_{name}": array for name, array in vars(rows).items()}
    return arrays


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:06d}.npz"


def work(folder: Path, worker: int, workers: int, settings: Settings) -> None:
    """Make every `workers`-th shard while the parent lives, at most `_AHEAD` of them in advance."""
    encoder = ChatEncoder((folder / "tokenizer.model").read_bytes())
    parent, index = os.getppid(), worker
    while os.getppid() == parent:
        if _shard_path(folder, index - _AHEAD * workers).exists():
            time.sleep(0.02)
            continue
        path = _shard_path(folder, index)
        with path.with_suffix(".tmp").open("wb") as file:
            np.savez(file, allow_pickle=False, **make_shard(encoder, settings, index))
        path.with_suffix(".tmp").rename(path)
        index += workers


@contextmanager
def shards(settings: Settings, tokenizer: bytes) -> Iterator[Iterator[dict[str, np.ndarray]]]:
    """Start the workers and give their shards in order; they end with the context."""
    with tempfile.TemporaryDirectory(prefix="ernie-tiny-") as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(tokenizer)
        processes = [_start_worker(folder, i, settings) for i in range(settings.num_workers())]
        try:
            yield _read_in_order(folder, processes)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


def _start_worker(folder: Path, worker: int, settings: Settings) -> Popen:
    names = ("seed", "short_row", "long_row", "batch_tokens", "steps_per_shard", "long_steps")
    names += ("ramp_shards", "max_facts", "shares")
    options = json.dumps({name: getattr(settings, name) for name in names})
    module = f"{__package__}.corpus"
    root = Path(__file__).resolve().parents[len(module.split(".")) - 1]
    command = [sys.executable, "-m", module, str(folder), str(worker)]
    return Popen([*command, str(settings.num_workers()), options], cwd=root)


def _read_in_order(folder: Path, processes: list[Popen]) -> Iterator[dict[str, np.ndarray]]:
    index = 0
    while True:
        path = _shard_path(folder, index)
        while not path.exists():
            dead = [process.returncode for process in processes if process.poll() is not None]
            if dead:
                raise RuntimeError(f"a data worker ended with exit status {dead[0]}")
            time.sleep(0.01)
        with np.load(path, allow_pickle=False) as arrays:
            yield dict(arrays)
        path.unlink()
        index += 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A data worker; started by training.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("worker", type=int)
    parser.add_argument("workers", type=int)
    parser.add_argument("options", type=json.loads)
    args = parser.parse_args()
    work(args.folder, args.worker, args.workers, Settings(**args.options))
