# SPDX-License-Identifier: Apache-2.0
"""Curves of training runs: `python -m benchmarks.training_curves LOG.csv ... --out OUT.png`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

_SMOOTH = 20  # rows of the log that a point of the loss is the mean of


def draw(logs: list[Path], out: Path) -> None:
    """Loss and J on held-out clips over the hours of training; the logs are stages, one after the other.

    Args:
        logs: log.csv of runs of `vosops train`.
        out: PNG to write.

    Raises:
        OSError, KeyError: a log that cannot be read, or is none.
    """
    figure = Figure((8, 3), layout="constrained")
    loss_axes, judged_axes = figure.subplots(1, 2)
    begin = 0.0
    for number, log in enumerate(logs):
        with log.open(newline="") as file:
            rows = list(csv.DictReader(file))
        hours = [begin + float(row["seconds"]) / 3600 for row in rows]
        losses = [float(row["loss"]) for row in rows]
        windows = [losses[max(0, i + 1 - _SMOOTH) : i + 1] for i in range(len(losses))]
        colour = f"C{number}"
        loss_axes.plot(hours, losses, color=colour, alpha=0.2, linewidth=0.8)
        loss_axes.plot(hours, [sum(w) / len(w) for w in windows], color=colour, label=log.stem)
        judged = [
            (hour, float(row["held_out_j"]))
            for hour, row in zip(hours, rows, strict=True)
            if row["held_out_j"]
        ]
        judged_axes.plot(*zip(*judged, strict=True), color=colour, marker=".", label=log.stem)
        begin = hours[-1]
    loss_axes.set(xlabel="hours", ylabel="loss", ylim=(0, None), title="loss, and its running mean")
    judged_axes.set(xlabel="hours", ylabel="J", title="J on clips held out")
    for axes in (loss_axes, judged_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=100)


def main(
    logs: Annotated[list[Path], typer.Argument(help="log.csv of the stages, in order.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
) -> None:
    """Draw the curves of a training."""
    draw(logs, out)


if __name__ == "__main__":
    typer.run(main)
