# SPDX-License-Identifier: Apache-2.0
"""`vosops train`: trains a model as a YAML file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as those in configs/.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values over those of the file, as optim.lr=1e-4."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the configuration's folder.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Stop with a checkpoint after so long; --resume goes on.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the configuration with every value, and stop.")
    ] = False,
) -> None:
    """Train a model.

    Writes config.yaml, log.csv, tensorboard/, overlays/, checkpoint.pth and, at the end, model.safetensors
    into the folder `run` of the configuration. On several GPUs, processes or machines: torchrun
    --nproc-per-node N -m vosops train CONFIG.

    Exit code 0: done, or stopped with a checkpoint; 1: stopped by an error in the middle, the last
    checkpoint stays; 2: nothing was done.
    """
    console = Console(stderr=True, soft_wrap=True)
    from vosops.models import CheckpointError

    try:
        from vosops.training.config import ConfigError, dump, load_config
        from vosops.training.loop import TrainingError
        from vosops.training.loop import train as run
    except ModuleNotFoundError as error:
        _fail(console, f"needs the package '{error.name}': pip install 'vosops[apps]'", 2)
    try:
        settings = load_config(config, assignments or ())
        if show:
            typer.echo(dump(settings), nl=False)
            return
        outcome = run(settings, resume=resume, minutes=minutes, console=console)
    except TrainingError as error:
        _fail(console, str(error), 1)
    except (ConfigError, CheckpointError, ValueError, TypeError, OSError, ImportError) as error:
        _fail(console, str(error), 2)
    if outcome.weights is None:
        typer.echo(f"stopped after step {outcome.step} of {settings.steps}; --resume goes on")
    else:
        typer.echo(f"wrote {outcome.weights} after {outcome.step} steps")


def _fail(console: Console, message: str, code: int) -> NoReturn:
    console.print(Text(f"vosops train: {message}", style="red"))
    raise typer.Exit(code)
