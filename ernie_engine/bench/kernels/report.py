"""Kernel measurements as a table, and as a picture (which needs matplotlib).

Never computes a figure.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER = (
    f"{'op':<18} {'case':<24} {'tokens':>6} {'us':>10} {'GB/s':>8} {'TFLOP/s':>8} "
    f"{'share':>7} {'bound':<8} {'x twin':>7}"
)


def line(row: Mapping[str, Any]) -> str:
    """One Measurement.row() under HEADER."""
    start = f"{row['op']:<18} {row['case']:<24} {row['num_tokens']:>6}"
    if "problem" in row:
        return f"{start} {row['problem']}"
    return (
        f"{start} {row['us']:>10.1f} {row['gb_per_s']:>8.0f} {row['tflop_per_s']:>8.1f} "
        f"{row['share_of_ceiling']:>7.1%} {row['bound']:<8} {row['speedup']:>7.2f}"
    )


def draw(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Share of the ceiling over the number of tokens, a panel for each op."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (matplotlib is optional)

    rows = [row for row in rows if "problem" not in row]
    ops = sorted({row["op"] for row in rows})
    figure = Figure(figsize=(11, 3 * len(ops)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(len(ops), 1, squeeze=False)[:, 0]
    for op, panel in zip(ops, panels, strict=True):
        of_op = [row for row in rows if row["op"] == op]
        for case in dict.fromkeys(row["case"] for row in of_op):
            points = [(r["num_tokens"], r["share_of_ceiling"]) for r in of_op if r["case"] == case]
            panel.plot(*zip(*points, strict=True), marker="o", label=case)
        panel.set(title=op, xlabel="tokens", ylabel="share of the ceiling", ylim=(0, 1.05))
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6, ncols=4)
    figure.savefig(path, dpi=110)
