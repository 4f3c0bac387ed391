# SPDX-License-Identifier: Apache-2.0
"""`vosops segment`: a video's masks from the mask of its first frame."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from vosops.data import open_frames, read_mask
from vosops.memory import Bounded, ByteBudget, Policy
from vosops.models import MODELS, SessionSettings, load
from vosops.models.registry import find
from vosops.propagate.augment import AugmentedSegmenter
from vosops.propagate.label_propagator import LabelPropagator, PropagationSettings
from vosops.propagate.run import RunError, Summary, VideoSegmenter, segment_video
from vosops.propagate.tracker import Tracker

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
            help=f"Follow objects with a model ({', '.join(MODELS)}), not with training-free propagation."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Checkpoint of --model (.pth, .pt, .safetensors).")
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
    scales: Annotated[
        str | None,
        typer.Option(
            metavar="FACTORS",
            help="Segment at several sizes and average, as 1.0,1.25: of the frame's sides. (default 1.0)",
        ),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Segment mirrored as well, and average.")] = False,
    no_overlay: Annotated[
        bool, typer.Option("--no-overlay", help="Write masks only: no overlay.mp4, no contact_sheet.png.")
    ] = False,
) -> None:
    """Segment a video from the mask of its first frame.

    Writes one indexed PNG per frame as soon as it is known. A run that was stopped goes on with --resume.
    Of two defaults the first is the propagation's, the second that of a --model. --scales and --flip work
    with both; each costs a run of its own.

    Exit code 0: done; 1: stopped in the middle, what was written stays; 2: nothing was done.
    """
    console = Console(stderr=True, soft_wrap=True)
    try:
        options: dict[str, Any] = {
            "memory_frames": memory_frames,
            "memory_every": memory_every,
            "memory_bytes": None if memory_bytes is None else _parse_bytes(memory_bytes),
            "top_k": top_k,
        }
        if model is None:
            _refuse("a --model", weights=weights, dtype=dtype)
            options |= {
                "memory_dtype": None if memory_dtype is None else getattr(torch, memory_dtype.value),
                "features": features,
                "feature_weights": feature_weights,
            }
            prepare = partial(_propagation, {k: v for k, v in options.items() if v is not None})
        else:
            _refuse(
                "the training-free propagation (no --model)",
                memory_dtype=memory_dtype,
                features=features,
                feature_weights=feature_weights,
            )
            prepare = partial(_tracking, model, weights, dtype or Dtype.float32, options)
        factors = (1.0,) if scales is None else _parse_scales(scales)
        source = open_frames(video)
        labels, palette = read_mask(mask, source.size)
        make, identity = prepare()
        augmented = flip or factors != (1.0,)
        segmenter = AugmentedSegmenter(make, factors, flip) if augmented else make()
        identity |= {"scales": list(factors), "flip": flip}
        with _FrameProgress(console) as progress:
            summary = segment_video(
                segmenter,
                source,
                labels,
                out,
                palette=palette,
                resume=resume,
                max_size=max_size,
                write_overlay=not no_overlay,
                settings=identity,
                on_progress=progress.on_progress,
            )
    except RunError as error:
        _fail(console, str(error), 1)
    except KeyboardInterrupt:
        _fail(console, f"interrupted; --resume goes on with the run in {out}", 1)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        _fail(console, str(error), 2)
    typer.echo(_report(summary))


def _refuse(method: str, **options: object) -> None:
    """Options of another method than the one chosen are an error, not silently unused."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: only for {method}")


def _propagation(options: dict[str, Any]) -> tuple[Callable[[], VideoSegmenter], dict[str, Any]]:
    """What makes the training-free propagator, and what a resumed run must repeat."""
    settings = PropagationSettings(**options)
    values = asdict(settings) | {"memory_dtype": str(settings.memory_dtype).removeprefix("torch.")}
    if settings.feature_weights is not None:
        values["feature_weights"] = _digest(Path(settings.feature_weights))
    return partial(LabelPropagator, settings), values


def _tracking(
    name: str, weights: Path | None, dtype: Dtype, options: dict[str, Any]
) -> tuple[Callable[[], VideoSegmenter], dict[str, Any]]:
    """What makes a tracker with a published model, and what a resumed run must repeat."""
    find(name)
    if weights is None:
        raise ValueError(f"--model {name} needs its checkpoint: --weights FILE")
    frames, size = options["memory_frames"], options["memory_bytes"]
    if frames is not None and frames < 1:
        raise ValueError(f"memory_frames must be at least 1, got {frames}")
    policy: Policy | None = None if frames is None else Bounded(1 + frames)
    if size is not None:
        policy = ByteBudget(size) if policy is None else ByteBudget(size, policy)
    settings = SessionSettings(memory_every=options["memory_every"], policy=policy, top_k=options["top_k"])
    make = partial(Tracker, load(name, weights), settings, dtype=getattr(torch, dtype.value))
    return make, {"model": name, "weights": _digest(weights), "dtype": dtype.value, **options}


def _digest(path: Path) -> str:
    """Weights count by content, wherever the file lies."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _parse_scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(factor) for factor in text.split(","))
    except ValueError:
        raise ValueError(f"--scales must be numbers joined by commas, as 1.0,1.25; got {text!r}") from None


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
