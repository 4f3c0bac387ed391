# SPDX-License-Identifier: Apache-2.0
"""`vosops dataset`: a recipe over a whole data set, and its results as a server takes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from vosops.data import object_ids, open_frames
from vosops.data.files import WriteError
from vosops.data.layouts import LayoutError
from vosops.data.masks import MaskError
from vosops.data.submission import SubmissionError, write_submission
from vosops.evaluation import EvaluationError
from vosops.recipes import DatasetError, DatasetReport, Pipeline, Processes, load_recipe, run_dataset
from vosops.recipes.sequences import find_sequences

from .eval import sequence_names, table
from .progress import progress_bar

dataset = typer.Typer(no_args_is_help=True, help=__doc__)


@dataset.command("run")
def run(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A data set in DAVIS's or YouTube-VOS's layout.")
    ],
    recipe: Annotated[
        Path, typer.Option(metavar="CONFIG", help="YAML file, such as those in configs/recipes/.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; the same command goes on with it.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values over those of the file, as tta=[flip]."),
    ] = None,
    sequences: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAMES", help="What to segment: a text file, or names joined by commas."),
    ] = None,
    save_probabilities: Annotated[
        bool,
        typer.Option("--save-probabilities", help="Write probabilities/ as well, for ensembles to read."),
    ] = False,
) -> None:
    """Segment every sequence from its given masks, and score those with ground truth on every frame.

    On several processes, GPUs or machines: torchrun --nproc-per-node N -m vosops dataset run ... A call that
    was stopped goes on where it was when it is repeated, with any number of processes.

    Exit code 0: done; 1: stopped, or sequences failed, what was written stays; 2: nothing was done.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        names = None if sequences is None else sequence_names(sequences)
        processes = Processes()
        pipeline = Pipeline(load_recipe(recipe, assignments or ()), processes.device)
        if processes.rank == 0:
            _foresee(pipeline, data, names, errors)
        with processes, progress_bar(errors, processes.rank == 0) as progress:
            task = progress.add_task("frames", total=None)
            report = run_dataset(
                pipeline,
                data,
                out,
                processes,
                sequences=names,
                save_probabilities=save_probabilities,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except DatasetError as error:
        if processes.rank:  # every process knows of all failures; one says so
            raise typer.Exit(1) from error
        _fail(errors, "run", str(error), 1)
    except KeyboardInterrupt:
        _fail(errors, "run", "interrupted; the same command goes on", 1)
    except (LayoutError, EvaluationError, ValueError, TypeError, OSError, ImportError) as error:
        _fail(errors, "run", str(error), 2)
    if report is not None:
        _show(report, out)


@dataset.command("submit")
def submit(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Folder of `vosops dataset run`.")],
    data: Annotated[
        Path,
        typer.Option(metavar="DATA", help="The data set: its frames go in, its layout is the server's."),
    ],
    out: Annotated[Path, typer.Option(help="The zip to write.")],
    sequences: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAMES", help="What goes in: a text file, or names joined by commas."),
    ] = None,
) -> None:
    """Write results as the zip that the evaluation server of DAVIS or YouTube-VOS takes.

    Exit code 2: a mask is missing or does not fit; nothing was written.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        names = None if sequences is None else sequence_names(sequences)
        with progress_bar(errors) as progress:
            task = progress.add_task("sequences", total=None)
            count = write_submission(
                results,
                data,
                out,
                sequences=names,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except (SubmissionError, LayoutError, MaskError, EvaluationError, WriteError, OSError) as error:
        _fail(errors, "submit", str(error), 2)
    typer.echo(f"{count} masks in {out}")


def _foresee(pipeline: Pipeline, data: Path, names: list[str] | None, console: Console) -> None:
    """Says what the longest sequence will hold in memory, where several segmenters do."""
    longest = find_sequences(data, names)[0][0]
    size, (given, _) = open_frames(longest.frames).size, longest.read_given()
    note = pipeline.describe(size, len(object_ids(given[0])), len(longest.names))
    if note is not None:
        console.print(f"{longest.name}: {note}", highlight=False)


def _show(report: DatasetReport, out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    if report.scores is None:
        console.print("no sequence has ground truth on every frame: nothing was scored")
    else:
        console.print(table(report.scores, console))
    console.print(
        f"{report.sequences} sequence{'s' * (report.sequences != 1)} in {out}, {report.fps:.2f} frames/s a "
        f"process, peak memory {report.peak_bytes / 1e6:.0f} MB",
        highlight=False,
    )


def _fail(console: Console, command: str, message: str, code: int) -> NoReturn:
    console.print(Text(f"vosops dataset {command}: {message}", style="red"))
    raise typer.Exit(code)
