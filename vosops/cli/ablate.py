# SPDX-License-Identifier: Apache-2.0
"""`vosops ablate`: what each part of a recipe gives on a data set."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vosops.data.layouts import LayoutError
from vosops.evaluation import EvaluationError
from vosops.recipes import AblationError, Pipeline, Step, load_recipe
from vosops.recipes import ablate as run
from vosops.recipes.ablation import gains
from vosops.recipes.sequences import find_sequences

from .eval import sequence_names

_DATA = Path(os.environ.get("VOSOPS_DATA", "../shared/data"))


def ablate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A recipe's YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; the same command goes on with it.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values over those of the file, as max_size=480."),
    ] = None,
    data: Annotated[
        Path, typer.Option(metavar="DATA", help="A data set in DAVIS's layout. (default: VOSOPS_DATA)")
    ] = _DATA,
    sequences: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAMES", help="What to segment: a text file, or names joined by commas."),
    ] = None,
) -> None:
    """Build a recipe up step by step on a data set, and print and plot what each part gives and costs.

    The steps are baseline (the first member alone), +tta, +ensemble, +refine, +zoom, +memory, as far as the
    recipe has them, each in a process of its own. Writes a folder and a recipe per step, ablation.json, .csv
    and .png.

    Exit code 0: done; 1: stopped, the same command goes on; 2: nothing was done.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        recipe = load_recipe(config, assignments or ())
        names = None if sequences is None else sequence_names(sequences)
        found, _ = find_sequences(data, names)
        if not any(sequence.scored for sequence in found):
            raise LayoutError(f"{data}: none of its sequences has ground truth on every frame")
        Pipeline(recipe)  # what is wrong with the last step shows before the first one runs
    except (LayoutError, EvaluationError, ValueError, TypeError, OSError, ImportError) as error:
        errors.print(Text(f"vosops ablate: {error}", style="red"))
        raise typer.Exit(2) from error
    try:
        steps = run(
            recipe,
            data,
            out,
            sequences=names,
            on_step=lambda name, number, count: errors.print(f"step {number} of {count}: {name}"),
        )
    except (AblationError, OSError) as error:
        errors.print(Text(f"vosops ablate: {error}", style="red"))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        errors.print(Text("vosops ablate: interrupted; the same command goes on", style="red"))
        raise typer.Exit(1) from None
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(steps, console))
    console.print(f"wrote {out / 'ablation.png'}, .csv, .json", highlight=False)


def _table(steps: Sequence[Step], console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 1, 0, 0))
    table.add_column("step", no_wrap=True)
    for column in ("J", "F", "J&F", "change", "frames/s", "peak MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, (step, gain) in enumerate(zip(steps, gains(steps), strict=True)):
        table.add_row(
            step.name,
            *(f"{100 * score:.1f}" for score in (step.j, step.f, step.j_and_f)),
            f"{gain:+.1f}" if number else "",
            f"{step.fps:.2f}",
            f"{step.peak_bytes / 1e6:.0f}",
        )
    return table
