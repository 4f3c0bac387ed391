# SPDX-License-Identifier: Apache-2.0
"""`vosops demo`: segment a clip, score it, and time the operator behind it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from vosops.data import open_frames, read_labels, read_mask
from vosops.data.rendered_clip import render_clip, write_clip
from vosops.evaluation import SequenceScore, evaluate_sequence
from vosops.models.registry import default_model
from vosops.propagate.run import RunError, Summary, segment_video
from vosops.recipes import Member, Pipeline, Recipe

from .bench import load_benchmarks

_DATA = Path("../shared/data")
_SEQUENCE = "camel"
_RENDERED_SIZE = (480, 854)  # that of the real clip
_RECORD = "demo.json"  # also tells a folder of this command from one that is not ours to replace
_RESULTS = ("masks", "overlay.mp4", "contact_sheet.png")
_SHAPE = "stcn-t10-o1"
_PEERS = ("vosops", "eager", "smart_eager")
_REPEATS = 5


@dataclass(frozen=True)
class _Clip:
    name: str
    origin: str
    frames: Path  # folder of 00000.jpg ...
    masks: Path  # folder of 00000.png ..., the ground truth


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder to write to; that of an earlier demo is replaced.")
    ] = Path("demo"),
    model: Annotated[
        str | None,
        typer.Option(
            help="One with shipped weights, or propagate, without training. (default the best shipped one)"
        ),
    ] = None,
) -> None:
    """Segment a clip from its first mask, score it, and time memory_read against plain PyTorch.

    The clip is DAVIS' camel from the folder VOSOPS_DATA (default ../shared/data), or, without it, one
    rendered from photographs inside scikit-image. Takes about a minute on two cores. Leaves masks/,
    overlay.mp4, contact_sheet.png, benchmark.png and demo.json.

    Exit code 1: stopped in the middle; 2: nothing was done.
    """
    console, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True)
    try:
        model = model or default_model()
        pipeline = Pipeline(Recipe((Member(model),)))
        data = _find_data()
        _prepare(out)
        clip = _rendered(out) if data is None else _real(data)
    except (OSError, ValueError) as error:
        errors.print(f"vosops demo: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    try:
        summary, score = _segment(clip, pipeline, out, console)
        record: dict[str, Any] = {
            "clip": clip.name,
            "model": model,
            "origin": clip.origin,
            "frames": summary.frames,
            "frames_per_second": summary.fps,
            "j": score.j_mean,
            "f": score.f_mean,
            "j_and_f": score.jf_mean,
        }
        record["benchmark"] = _benchmark(out, console)
        (out / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
    except RunError as error:  # its own text tells how to resume, which a demo does not
        cause = error.__cause__ or error
        errors.print(f"vosops demo: frame {error.frame} of {clip.name}: {cause}", style="red", markup=False)
        raise typer.Exit(1) from error
    except (OSError, ValueError) as error:
        errors.print(f"vosops demo: {error}", style="red", markup=False)
        raise typer.Exit(1) from error


def _find_data() -> Path | None:
    """The DAVIS root with the real clip; None where no data was named and none lies at the default.

    Raises:
        FileNotFoundError: VOSOPS_DATA names a folder without the clip.
    """
    named = os.environ.get("VOSOPS_DATA")
    root = Path(named) if named else _DATA
    if all((root / kind / "480p" / _SEQUENCE).is_dir() for kind in ("JPEGImages", "Annotations")):
        return root
    if named:
        raise FileNotFoundError(
            f"VOSOPS_DATA={named} must hold JPEGImages/480p/{_SEQUENCE} and Annotations/480p/{_SEQUENCE}; "
            "unset it to segment a rendered clip"
        )
    return None


def _prepare(out: Path) -> None:
    """Make `out`, or empty it of an earlier demo.

    Raises:
        OSError: it cannot be made or written.
        ValueError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} must be a folder, it is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / _RECORD).is_file():
        raise ValueError(f"--out {out} must be new, empty or of an earlier demo: it holds other files")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("masks", "clip"):
        if (out / name).exists():
            shutil.rmtree(out / name)
    for name in ("overlay.mp4", "contact_sheet.png", "benchmark.png"):
        (out / name).unlink(missing_ok=True)
    (out / _RECORD).write_text("{}\n")


def _real(root: Path) -> _Clip:
    frames, masks = (root / kind / "480p" / _SEQUENCE for kind in ("JPEGImages", "Annotations"))
    return _Clip(_SEQUENCE, "DAVIS, a real video with human annotation", frames, masks)


def _rendered(out: Path) -> _Clip:
    clip = render_clip(size=_RENDERED_SIZE)
    frames, masks = write_clip(clip, out / "clip")
    origin = f"rendered from photographs, since there is no data in {_DATA} and VOSOPS_DATA is not set"
    return _Clip(clip.name, origin, frames, masks)


def _segment(clip: _Clip, pipeline: Pipeline, out: Path, console: Console) -> tuple[Summary, SequenceScore]:
    source = open_frames(clip.frames)
    annotations = [clip.masks / f"{name}.png" for name, _ in source]
    labels, palette = read_mask(annotations[0], source.size)
    height, width = source.size
    console.print(f"clip          {clip.name}, {len(annotations)} frames of {width}x{height}: {clip.origin}")
    with (
        tempfile.TemporaryDirectory(dir=out) as work,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        tasks = {stage: progress.add_task(stage, total=len(annotations)) for stage in ("segment", "overlay")}
        summary = segment_video(
            pipeline(),
            source,
            labels,
            work,
            palette=palette,
            on_progress=lambda stage, done, total: progress.update(tasks[stage], completed=done),
        )
        for name in _RESULTS:
            os.replace(Path(work) / name, out / name)
    predictions = [out / "masks" / path.name for path in annotations]
    score = evaluate_sequence(map(read_labels, annotations), map(read_labels, predictions), name=clip.name)
    (member,) = pipeline.recipe.members
    console.print(
        f"segmented     from the first mask, {member.model}: {summary.seconds:.1f} s, "
        f"{summary.fps:.2f} frames/s\n"
        f"J&F           {score.jf_mean:.3f} (J {score.j_mean:.3f}, F {score.f_mean:.3f}), objects: "
        f"{score.num_objects}\n"
        f"wrote         {out / 'overlay.mp4'}, {out / 'contact_sheet.png'}, {out / 'masks'}/"
    )
    return summary, score


def _benchmark(out: Path, console: Console) -> list[dict[str, object]] | str:
    """Time the operator and draw it; returns the rows, or why there are none."""
    try:
        run, case, plot, environment = (
            load_benchmarks(module) for module in ("run", "case", "plot", "environment")
        )
    except ModuleNotFoundError as error:
        if error.name != "benchmarks":
            raise
        console.print(f"benchmark     skipped: {error}")
        return f"skipped: {error}"
    with console.status(f"timing memory_read at {_SHAPE} ..."):
        settings = case.Settings()
        rows = run.measure_case(run.load("memory_read"), _SHAPE, _PEERS, settings, repeats=_REPEATS)
    console.print(run.table(rows))
    flat = [row.flat() for row in rows]
    plot.draw_times(flat, environment.collect(settings.device), out / "benchmark.png")
    console.print(f"wrote         {out / 'benchmark.png'}")
    return flat
