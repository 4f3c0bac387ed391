# SPDX-License-Identifier: Apache-2.0
"""`vosops bench`: the benchmarks of a source checkout."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

_ROOT = Path(__file__).parents[2]


def load_benchmarks(module: str) -> ModuleType:
    """Import a module of the `benchmarks` folder that lies beside `vosops` in a source checkout.

    The folder is not part of the wheel: results belong to a revision, and its peers are no public API.

    Args:
        module: name inside the folder, such as "run".

    Raises:
        ModuleNotFoundError: vosops is installed without its source checkout.
    """
    if not (_ROOT / "benchmarks" / "run.py").is_file():
        raise ModuleNotFoundError(
            "the benchmarks come with the source, not with the installed package: clone the repository, "
            "install it with `pip install -e .` and run the command there",
            name="benchmarks",
        )
    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))
    return importlib.import_module(f"benchmarks.{module}")


def bench(
    operator: Annotated[
        str, typer.Argument(help="Operator: memory_read, attention, local_attention or identity.")
    ],
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Shape or group (standard, small, frames); repeatable. Default: standard."),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Peer to time beside vosops; repeatable. Default: all.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    layout: Annotated[
        str,
        typer.Option(
            help="Memory as published code holds it, channel_major, or as MemoryBank, position_major."
        ),
    ] = "channel_major",
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward together.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed rounds; the median is reported. Default: 7, on CUDA 50.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Everything that belongs in benchmarks/results, written there.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Write this JSON file, and a CSV and plots beside it.", dir_okay=False)
    ] = None,
) -> None:
    """Time an operator against its peers: same process, same inputs, interleaved, checked against float64."""
    try:
        load_benchmarks("run").run(
            operator,
            shapes=shape or (),
            peers=peer or (),
            dtype=dtype,
            layout=layout,
            backward=backward,
            device=device,
            threads=threads,
            repeats=repeats,
            everything=everything,
            target=json,
        )
    except (ValueError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name not in ("benchmarks", "matplotlib"):
            raise
        typer.echo(f"vosops bench: {error}", err=True)
        raise typer.Exit(2) from error
