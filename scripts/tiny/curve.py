"""Draws the log of a training run: losses and held-out accuracy over tokens.

A program of its own, `python curve.py log.jsonl curve.png`, since it alone needs matplotlib.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

_LOSSES = {"loss": "answers", "mtp_loss": "answers, MTP", "context_loss": "questions"}


def draw(log: Path, picture: Path) -> None:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    tokens = [line["tokens"] / 1e6 for line in lines]
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in _LOSSES.items():
        left.plot(tokens, [line[name] for line in lines], label=label)
    left.set(yscale="log", xlabel="million tokens", ylabel="cross-entropy", title="Training loss")
    for task in lines[0]["accuracy"]:
        right.plot(tokens, [line["accuracy"][task] for line in lines], label=task)
    right.set(ylim=(0, 1.02), xlabel="million tokens", title="Held-out answers entirely right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
