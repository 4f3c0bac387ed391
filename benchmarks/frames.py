# SPDX-License-Identifier: Apache-2.0
"""What a whole frame of a model costs: `python -m benchmarks.run frames`.

Stages of STM to XMem: encode the image, read the memory, decode, memorise (every fifth frame). Of AOT and
DeAOT: encode, propagate through the transformer, decode, memorise, and append to the long-term memory (every
fifth frame). Implementations run in one process with the same weights and the same filled memory,
interleaved; each frame's probabilities are compared first:

- vosops: the model's own session, as `Tracker` runs it;
- published: the published formulas throughout (`peers/stcn_frame.py`, `peers/aot_frame.py`), channels first;
- eager_read (STCN, XMem): our network around the published read and a bank that torch.cat grows;
- published_sdpa (AOT, DeAOT): the published formulas with SDPA for dense attention.

glibc's malloc gives large freed blocks back to the system, and every tensor's pages are mapped anew. Formulas
that store large matrices pay most: rows say whether the process was told to keep its pages (`PAGES_KEPT`).

Beside them: memory formats and types of the convolutions, and the peak memory of a frame, each in a process
of its own. Weights are random: the cost does not depend on them.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vosops.models.aot import AOT

from . import environment, measure
from .frame_models import ASSOCIATING, MATCHING, FrameCase, Ours, Times, implementations, random_model
from .peers import aot_frame

RESULTS = Path(__file__).parent / "results" / "frames.json"
PAGES_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
"""Environment under which glibc's malloc keeps all pages that it once had."""
_TOLERANCE = 1e-3  # of probabilities: scores within rounding may be ranked either way by a top-k
_FILE_WIDTH = 140
_CPU = torch.device("cpu")

CASES = {
    "stcn-480p-t20-o3": FrameCase("stcn", (480, 854), 3, 20),
    "stcn-480p-t20-o1": FrameCase("stcn", (480, 854), 1, 20),
    "xmem-480p-cap-o3": FrameCase("xmem", (480, 854), 3, 10, 10_000),
    "xmem-480p-cap-o1": FrameCase("xmem", (480, 854), 1, 10, 10_000),
    "stm-480p-t5-o1": FrameCase("stm", (480, 854), 1, 5),
    "xmem-1080p-cap-o3": FrameCase("xmem", (1080, 1920), 3, 10, 10_000),
    "aott-481x849-t1-o3": FrameCase("aott", (481, 849), 3, 1),
    "aotl-481x849-t10-o3": FrameCase("aotl", (481, 849), 3, 10),
    "aotl-481x849-t10-o12": FrameCase("aotl", (481, 849), 12, 10),
    "r50_aotl-481x849-t10-o3": FrameCase("r50_aotl", (481, 849), 3, 10),
    "r50_deaotl-481x849-t10-o3": FrameCase("r50_deaotl", (481, 849), 3, 10),
    "aotl-1080p-t10-o3": FrameCase("aotl", (1080, 1920), 3, 10),
}
PEAK = ("xmem-1080p-cap-o3", "aotl-1080p-t10-o3")
STANDARD = tuple(name for name in CASES if name not in PEAK and not name.startswith("stm"))


@torch.no_grad()
def measure_case(name: str, *, repeats: int) -> list[dict[str, Any]]:
    """Rows of one case: every implementation's stages, after their probabilities were compared.

    Raises:
        RuntimeError: an implementation gives other probabilities.
    """
    case = CASES[name]
    ours = Ours(case)
    family, peers = ours.family, implementations(ours, case)
    expected = ours.frame()[1]
    samples: dict[str, list[Times]] = {key: [] for key in peers}
    errors = {}
    for key, implementation in peers.items():
        errors[key] = (implementation.frame()[1] - expected).abs().amax().item()  # also the warm-up
        if not errors[key] <= _TOLERANCE:  # NaN too
            raise RuntimeError(f"{name}: {key} differs from vosops by {errors[key]:.1e}")
    names = list(peers)
    for turn in range(repeats):
        at = turn % len(names)
        for key in names[at:] + names[:at]:
            samples[key].append(peers[key].frame()[0])
    grid = [-(-side // 16) for side in case.size]
    positions = case.prototypes + case.frames * grid[0] * grid[1]
    rows = []
    for key in names:
        stages = {stage: statistics.median(times[stage] for times in samples[key]) for stage in family.stages}
        frame = sum(count * stages[stage] for stage, count in family.stages.items())
        rows.append(
            {
                "case": name,
                **asdict(case),
                "size": list(case.size),
                "positions": positions,
                "implementation": key,
                "pages_kept": all(os.environ.get(name) == value for name, value in PAGES_KEPT.items()),
                **{f"{stage}_ms": value for stage, value in stages.items()},
                "frame_ms": frame,
                f"{family.match}_share": stages[family.match] / frame,
                "repeats": repeats,
                "error": errors[key],
            }
        )
    for row in rows:
        row["ratio"] = row["frame_ms"] / rows[0]["frame_ms"]
    return rows


@torch.no_grad()
def measure_formats(model_name: str, *, repeats: int) -> list[dict[str, Any]]:
    """Encoder, decoder and value encoder by memory format and type: what `prefers_channels_last` rests on."""
    original = random_model(model_name)
    image, masks = torch.rand(1, 3, 480, 864), torch.rand(1, 3, 480, 864)
    calls: dict[tuple[str, str, str], Callable[[], object]] = {}
    for layout in ("channels_first", "channels_last"):
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        model = copy.deepcopy(original).to(memory_format=memory_format)
        x = image.contiguous(memory_format=memory_format)
        for dtype in ("float32", "bfloat16"):
            for stage, call in _convolution_stages(model, x, masks, dtype).items():
                calls[stage, layout, dtype] = call
    for call in calls.values():
        call()
    timings = measure.interleaved(
        {"|".join(key): call for key, call in calls.items()}, _CPU, repeats=repeats, budget_s=120
    )
    rows = []
    for key, timing in timings.items():
        stage, layout, dtype = key.split("|")
        base = timings[f"{stage}|channels_first|float32"].median_ms
        rows.append(
            {
                "model": model_name,
                "stage": stage,
                "layout": layout,
                "dtype": dtype,
                "ms": timing.median_ms,
                "repeats": timing.repeats,
                "speedup": base / timing.median_ms,
            }
        )
    return rows


def _convolution_stages(
    model: Any, image: Tensor, masks: Tensor, dtype: str
) -> dict[str, Callable[[], object]]:
    def cast() -> Any:
        return nullcontext() if dtype == "float32" else torch.autocast("cpu", getattr(torch, dtype))

    with cast():
        features = model.encode(image)
        value = model.encode_value(image, masks, features)

    def run(call: Callable[[], object]) -> Callable[[], object]:
        def timed() -> object:
            with cast():
                return call()

        return timed

    return {
        "encode": run(lambda: model.encode(image)),
        "memorise": run(lambda: model.encode_value(image, masks, features)),
        "decode": run(lambda: model.decode(value, features)),
    }


@torch.no_grad()
def measure_peak(name: str) -> dict[str, Any]:
    """Peak resident memory of this process during a whole frame, all of it: torch, weights and memory."""
    case = CASES[name]
    ours = Ours(case)
    held = ours.session.memory_nbytes
    ours.state = {}  # a copy of the memory that only the timing needs

    extra = measure.peak_extra_bytes(ours.step, _CPU)
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "case": name,
        **asdict(case),
        "size": list(case.size),
        "memory_bytes": held,
        "frame_extra_bytes": extra,
        "frame_peak_bytes": whole if extra is None else measure._status_bytes("VmHWM"),
    }
    if isinstance(ours.model, AOT):
        network = ours.model.network_size(case.size)
        grid = (-(-network[0] // 16), -(-network[1] // 16))
        result["published_matrices_bytes"] = aot_frame.matrices(ours.model, grid, case.frames)
    return result


def _in_process(*arguments: str, threads: int) -> Any:
    """JSON from this module run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.frames", *arguments, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> Table:
    """One case's stages."""
    first = rows[0]
    family = next(x for x in (MATCHING, ASSOCIATING) if f"{x.match}_share" in first)
    result = Table(
        title=f"{first['case']}: {first['positions']} memory positions, {first['objects']} objects; ms"
        + (", pages kept" if first["pages_kept"] else ""),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    result.add_column("")
    for name in (*family.stages, "frame", "x vosops", f"{family.match} share", "error"):
        result.add_column(name, justify="right")
    for row in rows:
        stages = [f"{row[f'{stage}_ms']:.0f}" for stage in family.stages]
        result.add_row(
            row["implementation"],
            *stages,
            f"{row['frame_ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row[f'{family.match}_share']:.1%}",
            f"{row['error']:.0e}",
        )
    return result


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A record with what `new` measured, and the cases of `old` that it did not.

    Rows name the date and the revision of their run; those of `old` without get them from its environment.
    """

    def key(row: dict[str, Any]) -> tuple[str, bool]:
        return row["case"], row.get("pages_kept", False)

    about = {name: old["environment"][name] for name in ("date", "revision")}
    result = old | new
    for part in ("rows", "peak"):
        fresh = {key(row) for row in new.get(part, ())}
        result[part] = [about | row for row in old.get(part, ()) if key(row) not in fresh] + new.get(part, [])
    return result


def main(
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(CASES)}; repeatable. Default: those at 480p with peers."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds; medians are reported.")] = 7,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Formats, types and peak memory too, into benchmarks/results.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write this JSON file; its other cases stay.")
    ] = None,
    peak: Annotated[
        str | None, typer.Option(help="Print the peak memory of one case, in this process.")
    ] = None,
) -> None:
    """Time whole frames of the models against the published formulas."""
    names = case or list(STANDARD)
    unknown = [name for name in [*names, *([peak] if peak else [])] if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"--case must be one of {', '.join(CASES)}; got {', '.join(unknown)}")
    if repeats < 1:
        raise typer.BadParameter(f"--repeats must be at least 1, got {repeats}")
    if threads is not None:
        torch.set_num_threads(threads)
    if peak is not None:
        print(json.dumps(measure_peak(peak)))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    record: dict[str, Any] = {"environment": environment.collect(_CPU), "rows": []}
    for name in names:
        rows = measure_case(name, repeats=repeats)
        record["rows"] += rows
        console.print(table(rows))
    if everything:
        output = output or RESULTS
        record["formats"] = measure_formats("stcn", repeats=repeats)
        for row in record["formats"]:
            console.print("{stage:9} {layout:14} {dtype:9} {ms:6.0f} ms  x{speedup:.2f}".format(**row))
        record["peak"] = [_in_process("--peak", name, threads=torch.get_num_threads()) for name in PEAK]
        for row in record["peak"]:
            console.print(f"{row['case']}: peak {row['frame_peak_bytes'] / 1e9:.2f} GB")
    if output is not None:
        about = {key: record["environment"][key] for key in ("date", "revision")}
        for part in ("rows", "peak"):
            record[part] = [row | about for row in record.get(part, ())]
        if output.exists():
            record = merged(json.loads(output.read_text()), record)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
