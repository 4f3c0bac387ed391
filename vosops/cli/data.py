# SPDX-License-Identifier: Apache-2.0
"""`vosops data`: checks data sets for training, and makes them."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from vosops.data.check import check_dataset
from vosops.data.convert import ConvertError, convert
from vosops.data.convert_sources import vspw_videos, youtube_vis_videos
from vosops.data.files import WriteError
from vosops.data.layouts import LayoutError
from vosops.data.rendered_clip import render_clip, write_clip

from .progress import progress_bar

data = typer.Typer(no_args_is_help=True, help=__doc__)

_RENDERED_SIZE = (360, 640)


class Layout(StrEnum):
    """What `--from` takes."""

    youtube_vis = "youtube-vis"
    ovis = "ovis"
    vspw = "vspw"


@data.command("check")
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A set like DAVIS or YouTube-VOS, or images beside masks.")
    ],
) -> None:
    """Decode every image and mask of a data set and name each one that is broken or does not fit.

    Exit code 0: all is well; 1: problems, one line each; 2: DIR is no data set.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        with progress_bar(errors) as progress:
            task = progress.add_task("checked", total=None)
            report = check_dataset(
                folder, lambda done, total: progress.update(task, completed=done, total=total)
            )
    except (LayoutError, OSError) as error:
        _fail(errors, "check", error)
    for problem in report.problems:
        typer.echo(problem)
    sequences = f" of {_count(report.sequences, 'sequence')}" if report.sequences else ""
    seen = f"{_count(report.images, 'image')} and {_count(report.masks, 'mask')}{sequences}"
    typer.echo(f"{seen}: {_count(len(report.problems), 'problem')}")
    raise typer.Exit(1 if report.problems else 0)


@data.command("convert")
def convert_command(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="The data set's folder, or its JSON of annotations.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write to.")],
    layout: Annotated[Layout, typer.Option("--from", help="The data set that SRC is.")],
) -> None:
    """Convert a data set to the layout of YouTube-VOS: frames linked, masks as indexed PNGs, meta.json.

    A call that was stopped goes on where it was. Exit code 2: SRC cannot be converted, or DST not written.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        videos = vspw_videos(source) if layout is Layout.vspw else youtube_vis_videos(source)
        with progress_bar(errors) as progress:
            task = progress.add_task("videos", total=len(videos))
            report = convert(videos, target, lambda done, total: progress.update(task, completed=done))
    except (ConvertError, WriteError, OSError) as error:
        _fail(errors, "convert", error)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on", style="red")
        raise typer.Exit(1) from None
    kept = report.masks - report.written
    typer.echo(
        f"{_count(report.videos, 'video')}, {_count(report.masks, 'mask')} ({kept} already there) in {target}"
    )


@data.command("render")
def render(
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write to, in DAVIS's layout.")],
    clips: Annotated[int, typer.Option(min=1, help="How many clips.")] = 8,
    frames: Annotated[int, typer.Option(min=2, help="Frames of each.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of the first clip; the others follow.")] = 0,
) -> None:
    """Render clips from scikit-image's photographs: a small training set that needs no download.

    Exit code 2: DST cannot be written.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        for number in range(seed, seed + clips):
            clip = render_clip(frames, _RENDERED_SIZE, number, "pillar" if number % 2 else "passing")
            write_clip(replace(clip, name=f"{clip.name}-{number:03d}"), target)
    except (WriteError, OSError) as error:
        _fail(errors, "render", error)
    typer.echo(f"{_count(clips, 'clip')} of {frames} frames in {target}")


@data.command("show")
def show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of `vosops train`.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="PNG to write.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values over those of the file, as data.merge=1."),
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="How many clips, one a row.")] = 6,
    progress: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the training that is done: gaps grow with it.")
    ] = 0.5,
) -> None:
    """Draw clips as a training would see them, with their labels: void is whitened.

    Exit code 2: the configuration or its data cannot be used, or DST not written.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        from vosops.training.clips import collate
        from vosops.training.config import load_config
        from vosops.training.dataset import build_dataset
        from vosops.training.sheet import write_clip_sheet

        run = load_config(config, assignments or ())
        dataset = build_dataset(
            run.data, frames=run.frames, crop=run.crop, max_objects=run.max_objects, seed=run.seed
        )
        dataset.set_progress(progress)
        drawn = [dataset[index] for index in range(min(clips, len(dataset)))]
        write_clip_sheet(target, collate(drawn))
    except ModuleNotFoundError as error:
        errors.print(f"vosops data show: needs the package '{error.name}': pip install 'vosops[apps]'")
        raise typer.Exit(2) from error
    except (ValueError, TypeError, OSError) as error:
        _fail(errors, "show", error)
    typer.echo(f"{_count(len(drawn), 'clip')} in {target}")


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"


def _fail(console: Console, command: str, error: Exception) -> NoReturn:
    console.print(f"vosops data {command}: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(2) from error
