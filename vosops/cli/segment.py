# SPDX-License-Identifier: Apache-2.0
"""`vosops segment`: a video's masks from the mask of its first frame."""

from __future__ import annotations

import re
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from vosops.data import object_ids, open_frames, read_mask
from vosops.models import MODELS
from vosops.models.registry import default_model
from vosops.propagate.label_propagator import PropagationSettings
from vosops.propagate.probabilities import SavingSegmenter
from vosops.propagate.run import RunError, Summary, segment_video
from vosops.recipes import Member, Memory, Pipeline, Recipe, Refinement, load_recipe, parse_tta
from vosops.recipes.pipeline import PROBABILITIES
from vosops.recipes.recipe import PROPAGATE

_DEFAULTS = PropagationSettings()
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class MemoryDtype(StrEnum):
    """Storage types that `--memory-dtype` takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Dtype(StrEnum):
    """Types that `--dtype` takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Refine(StrEnum):
    """What `--refine` takes; refiners with weights of your own go into a recipe."""

    boundary = "boundary"


class Zoom(StrEnum):
    """What `--zoom` takes."""

    small = "small"


def segment(
    video: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Folder of frames (jpg, png) or a video file.")
    ],
    mask: Annotated[
        Path,
        typer.Option(help="Indexed or grey PNG of object ids on the first frame; 0 background, 255 void."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to: masks/, overlay.mp4, contact_sheet.png.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    max_size: Annotated[
        int | None, typer.Option(help="Longer side, pixels, to work at; masks keep the input's size.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"What follows the objects: {', '.join(MODELS)}, or {PROPAGATE} for training-free "
            "propagation. (default: a model whose weights are shipped)"
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of --model (.pth, .pt, .safetensors). (default: the shipped one)"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the model's convolutions. (default float32)")
    ] = None,
    memory_frames: Annotated[
        int | None,
        typer.Option(
            help=f"Frames remembered besides the first. (default {_DEFAULTS.memory_frames}; as published)"
        ),
    ] = None,
    memory_every: Annotated[
        int | None,
        typer.Option(help=f"Distance of those, in frames. (default {_DEFAULTS.memory_every}; as published)"),
    ] = None,
    memory_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes of memory, as 512MB or 2GiB.")
    ] = None,
    memory_balanced: Annotated[
        bool,
        typer.Option("--memory-balanced", help="Spread --memory-frames over the video and its motion."),
    ] = False,
    memory_dtype: Annotated[
        MemoryDtype | None, typer.Option(help="Storage of the propagation's memory. (default float32)")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help=f"Memory positions that each query keeps. (default {_DEFAULTS.top_k}; as published)"
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Of the propagation: builtin, timm:NAME, torchvision:NAME, or two joined by +. "
            f"(default {_DEFAULTS.features})"
        ),
    ] = None,
    feature_weights: Annotated[
        Path | None, typer.Option(help="Weight file of the backbone of --features (.safetensors, .pth).")
    ] = None,
    tta: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Segment mirrored and at other sizes as well, and average: flip and factors on the frame's "
            "sides, as flip,1.0,1.2.",
        ),
    ] = None,
    ensemble: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="A recipe's YAML file, in place of --model and its options."),
    ] = None,
    refine: Annotated[
        Refine | None, typer.Option(help="Correct the masks along their boundaries, patch by patch.")
    ] = None,
    zoom: Annotated[
        Zoom | None, typer.Option(help="Segment objects that are small once more, in an enlarged crop.")
    ] = None,
    save_probabilities: Annotated[
        bool,
        typer.Option("--save-probabilities", help="Write probabilities/ as well, for ensembles to read."),
    ] = False,
    no_overlay: Annotated[
        bool, typer.Option("--no-overlay", help="Write masks only: no overlay.mp4, no contact_sheet.png.")
    ] = False,
) -> None:
    """Segment a video from the mask of its first frame.

    Writes one indexed PNG per frame as soon as it is known. A run that was stopped goes on with --resume.
    Of two defaults the first is the propagation's, the second that of a model. --tta, --refine, --zoom,
    --max-size and the --memory options also change what the recipe of --ensemble says.

    Exit code 0: done; 1: stopped in the middle, what was written stays; 2: nothing was done.
    """
    console = Console(stderr=True, soft_wrap=True)
    try:
        size = None if memory_bytes is None else _parse_bytes(memory_bytes)
        memory = {"every": memory_every, "frames": memory_frames, "bytes": size}
        memory = {name: value for name, value in memory.items() if value is not None}
        if memory_balanced:
            memory["balanced"] = True
        if ensemble is None:
            options = {"memory_dtype": memory_dtype, "features": features, "feature_weights": feature_weights}
            member = _member(model or default_model(), weights, dtype, top_k, options)
            recipe = Recipe((member,), memory=_remember(Memory(), memory))
        else:
            _refuse(
                "a single --model; write them into the file of --ensemble",
                model=model,
                weights=weights,
                dtype=dtype,
                memory_dtype=memory_dtype,
                top_k=top_k,
                features=features,
                feature_weights=feature_weights,
            )
            recipe = load_recipe(ensemble)
            recipe = replace(recipe, memory=_remember(recipe.memory, memory))
        if tta is not None:
            parse_tta(tta)
            members = tuple(replace(member, tta=None) for member in recipe.members)
            recipe = replace(recipe, members=members, tta=tuple(part.strip() for part in tta.split(",")))
        if refine is not None:
            recipe = replace(recipe, refine=Refinement("boundary"))
        if zoom is not None:
            recipe = replace(recipe, zoom="small")
        if max_size is not None:
            recipe = replace(recipe, max_size=max_size)
        source = open_frames(video)
        labels, palette = read_mask(mask, source.size)
        pipeline = Pipeline(recipe)
        note = pipeline.describe(source.size, len(object_ids(labels)), source.length)
        if note is not None:
            console.print(note, highlight=False)
        segmenter = pipeline()
        if save_probabilities:
            segmenter = SavingSegmenter(segmenter, out / PROBABILITIES, pipeline.settings)
        with _FrameProgress(console) as progress:
            summary = segment_video(
                segmenter,
                source,
                labels,
                out,
                palette=palette,
                resume=resume,
                max_size=recipe.max_size,
                write_overlay=not no_overlay,
                settings=pipeline.settings,
                on_progress=progress.on_progress,
            )
    except RunError as error:
        _fail(console, str(error), 1)
    except KeyboardInterrupt:
        _fail(console, f"interrupted; --resume goes on with the run in {out}", 1)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        _fail(console, str(error), 2)
    typer.echo(_report(summary))


def _member(
    name: str, weights: Path | None, dtype: Dtype | None, top_k: int | None, options: dict[str, Any]
) -> Member:
    """The only member of a recipe, from the options of the command line."""
    if name == PROPAGATE:
        _refuse(f"a --model other than {PROPAGATE}", weights=weights, dtype=dtype)
    else:
        _refuse(f"the training-free propagation (--model {PROPAGATE})", **options)
    given = {key: str(value) for key, value in options.items() if value is not None}
    kind = cast(Literal["float32", "bfloat16", "float16"], str(dtype or Dtype.float32))
    return Member(name, weights, given, dtype=kind, top_k=top_k)


def _remember(memory: Memory, options: dict[str, Any]) -> Memory:
    """The memory of a recipe with the options of the command line over it."""
    try:
        return replace(memory, **options)
    except ValueError as error:
        raise ValueError(f"memory_{error}") from error  # it begins with the field's name


def _refuse(method: str, **options: object) -> None:
    """Options of another method than the one chosen are an error, not silently unused."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: only for {method}")


class _FrameProgress:
    """A progress bar with frames per second; a line at the end of each stage where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), _Speed(), console=console
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _FrameProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            # Frames of an earlier call are no work of this one: they would spoil the speed.
            self._tasks[stage] = self._progress.add_task(stage, total=total, completed=done - 1)
        self._progress.update(self._tasks[stage], completed=done)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} frames/s")


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if match is None:
        raise ValueError(f"--memory-bytes must be a size such as 512MB or 2GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _report(summary: Summary) -> str:
    objects = ", ".join(str(number) for number in summary.object_ids)
    lines = [f"{summary.frames} masks (objects {objects}) in {summary.masks}"]
    if summary.overlay is not None and summary.contact_sheet is not None:
        lines += [f"overlay video {summary.overlay}", f"contact sheet {summary.contact_sheet}"]
    if summary.segmented:
        lines.append(f"{summary.segmented} frames segmented now, {summary.fps:.2f} frames/s")
    else:
        lines.append("nothing was left to segment")
    return "\n".join(lines)


def _fail(console: Console, message: str, code: int) -> NoReturn:
    console.print(Text(f"vosops segment: {message}", style="red"))
    raise typer.Exit(code)
