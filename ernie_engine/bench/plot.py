"""A picture of runs: throughput against concurrency, and how latencies are distributed.

Needs matplotlib, which only this file imports.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ernie_engine.bench.metrics import figures, latency_samples
from ernie_engine.bench.serving import Measurement

PANELS = {
    "ttft": "Time to first token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
TAIL = 99.5  # percentile at which a latency axis ends, so that one straggler does not squeeze it


def draw_runs(path: Path, title: str, measurements: Sequence[Measurement]) -> None:
    """Writes `path`; its suffix chooses the format."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(title, fontsize=12)
    _draw_throughput(axes[0, 0], measurements)
    colors = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(measurements)))
    for axis, (name, heading) in zip(axes.flat[1:], PANELS.items(), strict=True):
        _draw_distribution(axis, name, heading, measurements, colors)
    handles, labels = axes[0, 1].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=8, title="concurrent requests"
        )
    figure.savefig(path, dpi=130)


def _draw_throughput(axis: Axes, measurements: Sequence[Measurement]) -> None:
    """Output tokens a second over the bound on concurrency (without one: all the requests)."""
    points = sorted((_concurrency(m), figures(m.run)["output_throughput"]) for m in measurements)
    x, y = zip(*points, strict=True)
    axis.plot(x, y, marker="o", color="tab:blue")
    for at, value in points:
        axis.annotate(
            f"{value:,.0f}", (at, value), xytext=(-7, 5), textcoords="offset points", ha="right"
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(at) for at in x])
    axis.minorticks_off()
    axis.set_ylim(0, 1.18 * max(y))
    axis.margins(x=0.15)
    axis.set(title="Throughput", xlabel="concurrent requests", ylabel="output tokens/s")
    axis.grid(alpha=0.3)


def _draw_distribution(
    axis: Axes,
    name: str,
    heading: str,
    measurements: Sequence[Measurement],
    colors: np.ndarray,
) -> None:
    """The share of samples that are at most so long, a line for each run."""
    right = 0.0
    for measurement, color in zip(measurements, colors, strict=True):
        samples = np.sort(latency_samples(measurement.run, name))
        if samples.size:
            shares = np.arange(samples.size + 1) / samples.size
            points = np.concatenate([samples[:1], samples])
            axis.step(points, shares, where="post", color=color, label=_label(measurement))
            right = max(right, float(np.percentile(samples, TAIL)))
    axis.set(title=f"{heading} ({name.upper()})", xlabel="ms", ylabel="share of samples")
    axis.set_ylim(0, 1.02)
    if right > 0:
        axis.set_xlim(0, 1.08 * right)
    axis.grid(alpha=0.3)


def _concurrency(measurement: Measurement) -> int:
    return measurement.max_concurrency or len(measurement.run.logs)


def _label(measurement: Measurement) -> str:
    return "no bound" if measurement.max_concurrency is None else str(measurement.max_concurrency)
