# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.run OPERATOR`: time vosops against its peers, each result checked first."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import environment, gpu, measure, plot
from .case import Case, Job, Operator, Settings

OPERATORS = ("memory_read", "attention", "identity", "local_attention")
RESULTS = Path(__file__).parent / "results"
_REPEATS, _REPEATS_CUDA = 7, 50
_FILE_WIDTH = 140  # columns where the output is not a terminal
_DRAW_SEED = 20260101
# Part of the memory that is free now that a peer may take: the estimate is rough, the machine shared.
_MEMORY_SHARE = 0.85
_ENVIRONMENT_COLUMNS = ("cpu", "isa", "threads", "gpu", "torch", "revision", "date")


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation on one shape. Times in milliseconds, memory in MiB; None where not measured.

    `graph_ms` is the median of a CUDA graph's replay, which leaves out what launching costs; None on the CPU
    and for what a graph cannot hold. `ratio` is this implementation's time over that of vosops; `over_limit`
    its time, by graph where there is one, over the arithmetic limit; `note` says why an implementation was
    not run.
    """

    operator: str
    shape: str
    facts: dict[str, object]
    dtype: str
    layout: str
    direction: str
    implementation: str
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    graph_ms: float | None = None
    repeats: int = 0
    ratio: float | None = None
    extra_mib: float | None = None
    error: float | None = None
    tolerance: float | None = None
    correct: bool | None = None
    limit_ms: float | None = None
    limit_basis: str | None = None
    over_limit: float | None = None
    note: str | None = None

    def flat(self) -> dict[str, object]:
        """The row with the sizes as columns of their own, for JSON and CSV."""
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        facts = columns.pop("facts")
        head = {name: columns.pop(name) for name in ("operator", "shape")}
        return {**head, **facts, **columns}


def load(name: str) -> Operator:
    """The benchmark of an operator.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in OPERATORS:
        raise ValueError(f"OPERATOR must be one of {', '.join(OPERATORS)}, got '{name}'")
    operator = importlib.import_module(f".{name}", __package__).OPERATOR
    assert isinstance(operator, Operator)
    return operator


def select_shapes(operator: Operator, names: Sequence[str]) -> list[str]:
    """Shape names for a list of shape or group names; the standard group for an empty list.

    Raises:
        ValueError: a name is neither a shape nor a group of the operator.
    """
    selected: dict[str, None] = {}
    for name in names or ("standard",):
        if name in operator.groups:
            selected |= dict.fromkeys(operator.groups[name])
        elif name in operator.shapes:
            selected[name] = None
        else:
            known = ", ".join((*operator.groups, *operator.shapes))
            raise ValueError(f"--shape must be one of {known}, got '{name}'")
    return list(selected)


def select_peers(operator: Operator, names: Sequence[str], device: str = "cpu") -> list[str]:
    """vosops and the named peers, or all that `device` has for an empty list.

    Raises:
        ValueError: a name is not a peer of the operator on this device.
    """
    there = operator.implementations + (operator.cuda_implementations if device == "cuda" else ())
    for name in names:
        if name not in there:
            raise ValueError(f"--peer must be one of {', '.join(there[1:])}, got '{name}'")
    return [name for name in there if not names or name == "vosops" or name in names]


def measure_case(
    operator: Operator,
    shape: str,
    implementations: Sequence[str],
    settings: Settings,
    *,
    repeats: int,
    seed: int = _DRAW_SEED,
    budget_s: float = 8.0,
    keep_going: bool = False,
) -> list[Row]:
    """Draw the inputs, check every implementation against float64, then time them interleaved.

    Args:
        implementations: names, "vosops" among them for the ratios.
        repeats: timed rounds; fewer, but three at least, once `budget_s` seconds are spent.
        keep_going: an implementation that raises gets a row saying so; otherwise the error ends the run.

    Returns:
        One Row per implementation, in the order given; those that cannot run carry the reason.
    """
    if {"compiled", "compiled_smart", "flex"} & set(implementations):
        torch.compiler.reset()  # they must not meet the recompilation limit through earlier shapes
    case = operator.case(shape, settings, seed)
    limit_ms, limit_basis = case.limit_ms()
    reasons: dict[str, str] = {}
    errors: dict[str, float] = {}
    memory: dict[str, int | None] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in implementations:
        reason = case.refuses(name) or _too_large(case, name, settings.device)
        if reason is not None:
            reasons[name] = f"n/a: {reason}"
            continue
        try:
            errors[name] = case.error(name)  # also the warm-up: compiled peers compile here
            call = case.call(name)
            memory[name] = measure.peak_extra_bytes(call, settings.device)
            calls[name] = call
        except Exception as error:
            if not keep_going:
                raise
            reasons[name] = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    timings = measure.interleaved(calls, settings.device, repeats=repeats, budget_s=budget_s)
    replays = gpu.replays(calls, settings.device, repeats=repeats, budget_s=budget_s)
    common = {
        "operator": operator.name,
        "shape": shape,
        "facts": case.facts(),
        "dtype": settings.dtype,
        "layout": settings.layout,
        "direction": "forward+backward" if settings.backward else "forward",
        "tolerance": case.tolerance(),
        "limit_ms": limit_ms,
        "limit_basis": limit_basis,
    }
    rows = []
    for name in implementations:
        row = Row(**common, implementation=name, note=reasons.get(name))  # type: ignore[arg-type]
        if name in timings:
            timing, extra, graph_ms = timings[name], memory[name], replays.get(name)
            ours = timings.get("vosops")
            row = dataclasses.replace(
                row,
                ms=timing.median_ms,
                p20_ms=timing.p20_ms,
                p80_ms=timing.p80_ms,
                graph_ms=graph_ms,
                repeats=timing.repeats,
                ratio=timing.median_ms / ours.median_ms if ours else None,
                extra_mib=None if extra is None else extra / 2**20,
                error=errors[name],
                correct=errors[name] <= case.tolerance(),
                over_limit=(graph_ms or timing.median_ms) / limit_ms,
            )
        rows.append(row)
    return rows


def _too_large(case: Case, implementation: str, device: torch.device) -> str | None:
    free, needed = measure.available_bytes(device), case.needs_bytes(implementation)
    if free is None or needed <= _MEMORY_SHARE * free:
        return None
    return f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def table(rows: Sequence[Row]) -> Table:
    """One shape's rows as a table for the terminal, 80 columns wide; what did not run stands below it."""
    first = rows[0]
    sizes = ", ".join(f"{name} {value}" for name, value in first.facts.items() if value is not None)
    below = [sizes, f"limit {first.limit_ms:.2f} ms = {first.limit_basis}"]
    result = Table(
        title=f"{first.operator} {first.shape}: {first.direction}, {first.dtype}, {first.layout}",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    result.add_column("", no_wrap=True)
    graphs = any(row.graph_ms is not None for row in rows)
    columns = (
        "ms",
        "p20 - p80",
        *(("graph ms",) if graphs else ()),
        "x vosops",
        "extra MiB",
        "x limit",
        "error",
    )
    for name in columns:
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("ok")
    for row in rows:
        if row.ms is None or row.p20_ms is None or row.p80_ms is None or row.error is None:
            below.append(f"{row.implementation} {row.note}")
            continue
        result.add_row(
            row.implementation,
            _milliseconds(row.ms),
            f"{_milliseconds(row.p20_ms)} - {_milliseconds(row.p80_ms)}",
            *(("" if row.graph_ms is None else _milliseconds(row.graph_ms),) if graphs else ()),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.extra_mib is None else f"{row.extra_mib:.1f}",
            f"{row.over_limit:.2f}",
            f"{row.error:.0e}",
            "[green]✓[/]" if row.correct else f"[red]✗[/] > {row.tolerance:g}",
        )
    result.caption = "\n".join(below)
    return result


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def write(
    rows: Sequence[Row], about: dict[str, str | int | None], target: Path, *, plots: bool = True
) -> list[Path]:
    """Write `target` (JSON), and beside it the CSV and the plots; returns what was written.

    Results of a GPU carry what was held against its targets (`gpu.targets`). The CSV repeats the
    environment's main columns in every row, so that files can be appended.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    flat = [row.flat() for row in rows]
    result: dict[str, object] = {"environment": about, "rows": flat}
    if about["gpu"]:
        result["targets"] = [dataclasses.asdict(entry) for entry in gpu.targets(flat)]
    target.write_text(json.dumps(result, indent=1) + "\n")
    machine = {name: about[name] for name in _ENVIRONMENT_COLUMNS}
    table_path = target.with_suffix(".csv")
    with table_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*flat[0], *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in flat)
    return [target, table_path, *(plot.draw(flat, about, target.with_suffix("")) if plots else ())]


def run(
    operator_name: str,
    *,
    shapes: Sequence[str] = (),
    peers: Sequence[str] = (),
    dtype: str = "float32",
    layout: str = "channel_major",
    backward: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    repeats: int | None = None,
    everything: bool = False,
    target: Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """What the command line does; see `vosops bench --help`.

    Args:
        repeats: timed rounds; 7 on the CPU and 50 on CUDA for None.
        everything: run what belongs in benchmarks/results and write it there. On CUDA the file is named for
            the GPU, and written again after every shape: a session may be cut short.
        target: JSON file to write, with its CSV and plots beside it.
        console: where the tables go; the terminal by default.

    Returns:
        Every row, in the order measured.

    Raises:
        ValueError: an unknown operator, shape, peer, dtype, layout or device, repeats or threads below 1, or
            `everything` together with a choice of its own.
    """
    operator = load(operator_name)
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        known = "cpu or cuda" if torch.cuda.is_available() else "cpu (there is no CUDA device)"
        raise ValueError(f"--device must be {known}, got '{device}'")
    chosen = torch.device(device)
    if repeats is None:
        repeats = _REPEATS_CUDA if device == "cuda" else _REPEATS
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    settings = Settings(dtype, layout, backward, chosen)
    if everything:
        if shapes or peers or backward or settings != Settings(device=chosen):
            raise ValueError(
                "--all chooses shapes, peers, dtypes, layouts and direction itself: leave them out"
            )
        jobs: Iterable[Job] = operator.everything
        name = operator.name
        if device == "cuda":
            jobs = operator.cuda_everything
            name += f"-{gpu.short_name(torch.cuda.get_device_name(chosen))}"
        target = target or RESULTS / f"{name}.json"
    else:
        names = select_peers(operator, peers, device)
        jobs = [Job(select_shapes(operator, shapes), names, settings)]
    if threads is not None:
        torch.set_num_threads(threads)
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_FILE_WIDTH)
    rows: list[Row] = []
    about = environment.collect(chosen)
    budget_s, keep_going = (2.0, everything) if device == "cuda" else (8.0, False)
    done: set[tuple[str, Settings]] = set()
    # Compiler warnings of torch would stand between the tables.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        for job in jobs:
            job_settings = dataclasses.replace(job.settings, device=chosen)
            for shape in job.shapes:
                if (shape, job_settings) in done:
                    continue
                done.add((shape, job_settings))
                implementations = job.implementations or operator.implementations
                measured = measure_case(
                    operator,
                    shape,
                    implementations,
                    job_settings,
                    repeats=repeats,
                    budget_s=budget_s,
                    keep_going=keep_going,
                )
                console.print(table(measured))
                rows += measured
                if keep_going and target is not None:
                    write(rows, about, target, plots=False)
    if device == "cuda":
        console.print(gpu.targets_table(gpu.targets([row.flat() for row in rows])))
    if target is not None:
        for path in write(rows, about, target):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return rows


if __name__ == "__main__":
    import sys

    import typer

    if sys.argv[1:2] == ["frames"]:  # whole frames of models: no operator, so options of its own
        from .frames import main

        del sys.argv[1]
        typer.run(main)
    elif sys.argv[1:2] == ["dropin"]:  # published code before and after vosops.compat: likewise
        from . import dropin

        del sys.argv[1]
        typer.run(dropin.main)
    elif sys.argv[1:2] == ["train-step"]:  # a training step of STCN: likewise
        from . import train_step

        del sys.argv[1]
        typer.run(train_step.main)
    else:
        from vosops.cli.bench import bench

        typer.run(bench)
