# SPDX-License-Identifier: Apache-2.0
"""`vosops eval`: J and F of a folder of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vosops.evaluation import EvaluationError, EvaluationReport, Statistics, evaluate_folders, write_csv


def evaluate(
    results: Annotated[
        Path, typer.Argument(help="Folder of sequences, <sequence>/00000.png, or one sequence's masks.")
    ],
    ground_truth: Annotated[
        Path,
        typer.Argument(help="Folder of sequences, a DAVIS root (Annotations/480p), or one sequence's masks."),
    ],
    sequences: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAMES", help="What to score: a text file, or names joined by commas."),
    ] = None,
    union: Annotated[bool, typer.Option("--union", help="Score all objects together as one.")] = False,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the global, per-sequence and per-frame tables here."),
    ] = None,
) -> None:
    """Score masks as the DAVIS 2017 benchmark does (semi-supervised: region J, contour F).

    The first and the last frame are not scored. Exit code 2 when the folders cannot be scored.
    """
    # Piped output is for logs and scripts: no boxes, and lines that do not wrap at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        if csv is not None:
            _make_folder(csv)
        names = None if sequences is None else sequence_names(sequences)
        with console.status("scoring ...") as status:
            report = evaluate_folders(
                results,
                ground_truth,
                sequences=names,
                single_object=union,
                on_sequence=lambda score: status.update(f"scored {score.name} ..."),
            )
    except EvaluationError as error:
        errors.print(f"vosops eval: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    console.print(table(report, console))
    if csv is not None:
        for path in write_csv(report, csv):
            console.print(f"wrote {path}", markup=False, highlight=False)


def _make_folder(csv: Path) -> None:
    """Makes the folder of the tables before any scoring, so that a bad one costs no time."""
    try:
        csv.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"--csv {csv}: cannot be made a folder: {error.strerror}") from error


def sequence_names(text: str) -> list[str]:
    """The names in a text file, or in a text joined by commas.

    Raises:
        EvaluationError: no such file, or no name in it.
    """
    path = Path(text)
    if path.is_file():
        names = path.read_text(encoding="utf-8").split()
    elif path.suffix or "/" in text:
        raise EvaluationError(f"--sequences: there is no file {text}")
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise EvaluationError(f"--sequences {text}: names no sequence")
    return names


def table(report: EvaluationReport, console: Console) -> Table:
    """The scores of every object and their mean, in the width of `console`."""
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 1, 0, 0))
    table.add_column("object", overflow="fold")
    for column in ("J&F", "J mean", "J recall", "J decay", "F mean", "F recall", "F decay"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in report.sequences:
        for name, j, f in zip(score.object_names, score.j_statistics, score.f_statistics, strict=True):
            table.add_row(name, *_cells(j, f))
    objects = sum(score.num_objects for score in report.sequences)
    table.add_section()
    mean = f"mean of {objects} object{'s' * (objects > 1)}"
    table.add_row(mean, *_cells(report.j, report.f), style="bold")
    return table


def _cells(j: Statistics, f: Statistics) -> list[str]:
    return [f"{value:.3f}" for value in ((j.mean + f.mean) / 2, *j, *f)]
