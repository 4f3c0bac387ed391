# SPDX-License-Identifier: Apache-2.0
"""What `vosops.compat` does to published code: `python -m benchmarks.run dropin --peers DIR`.

DIR holds checkouts of the published code (`peers/checkouts.py`). Each model runs in a process of its own,
with random weights: its own inference loop on the same clip before and after enable(), frames/s and peak
memory of both, and how far masks and probabilities agree; then its memory read alone at the size that
its memory reaches, both ways in turn.

A random network can be so sensitive that one top-k position, ranked the other way among equals, changes
later masks. So the published code also runs on frames with noise of 1e-6: what that does to its own masks and
probabilities stands beside the difference, which must be within the limits, or no larger.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import dropin_aot, environment, measure
from .peers import checkouts
from .peers.checkouts import CHANNELS, Checkout, moving_clip, on_cpu

RESULTS = Path(__file__).parent / "results" / "dropin.json"
AGREEMENT, DIFFERENCE = 0.9999, 1e-4  # what must hold of masks and probabilities
_NOISE = 1e-6  # of frames in 0..1: some roundings
FOLDERS = {**checkouts.FOLDERS, **dict.fromkeys(dropin_aot.MODELS, dropin_aot.FOLDER)}
"""Checkout of every model."""
_FILE_WIDTH = 140
_CPU = torch.device("cpu")
_LONG_TERM = 10_000


def measure_model(
    name: str,
    root: Path,
    *,
    frames: int,
    size: tuple[int, int],
    objects: int,
    fill: int = 0,
    settings: dict[str, Any] | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """One code base before and after enable(), in this process.

    Args:
        name: one of `FOLDERS`.
        root: the folder of the checkouts.
        frames, size, objects: of the clip; size in pixels, (height, width).
        fill: frames that STCN's memory holds before the clip, AOT's throughout.
        settings: of `Checkout`.
        repeats: rounds of the read alone; 0 leaves it out.

    Returns:
        Sizes, seconds per frame, peak bytes beyond what was held before, agreement and difference, the
        published code's own under noise, the largest number of memory positions, and the milliseconds of
        the read alone.
    """
    if name in dropin_aot.MODELS:
        return dropin_aot.measure_aot(name, root, frames=frames, size=size, objects=objects, fill=fill)
    checkout = Checkout(name, root, settings, fill=fill)
    compat = importlib.import_module(f"vosops.compat.{checkout.base}")
    clip = moving_clip(frames, size, objects)
    checkout.run(moving_clip(2, size, objects))  # the first call of a convolution is slower
    before = _timed_run(checkout, clip)
    own = _timed_run(checkout, _noisy(clip))
    with compat.enable() as report:
        after = _timed_run(checkout, clip)
    row = {
        "model": name,
        "size": list(size),
        "objects": objects,
        "frames": frames,
        "filled_frames": fill,
        "replaced": sorted(report.replaced),
        "published_s_per_frame": before["seconds"],
        "vosops_s_per_frame": after["seconds"],
        "speedup": before["seconds"] / after["seconds"],
        "published_peak_bytes": before["peak"],
        "vosops_peak_bytes": after["peak"],
        **_compared(before, after, own),
        "memory_positions": after["positions"],
    }
    if repeats:
        row |= measure_read(checkout, compat, size, objects, repeats)
    return row


def _compared(before: dict[str, Any], after: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """How far masks and probabilities agree, after enable() and under noise, and whether that is enough."""
    found: dict[str, Any] = {}
    for name, other in (("", after), ("own_", own)):
        found[f"{name}mask_agreement"] = (before["masks"] == other["masks"]).double().mean().item()
        difference = (before["probabilities"] - other["probabilities"]).abs().max().item()
        found[f"{name}largest_difference"] = difference
    found["equal"] = (
        found["mask_agreement"] >= min(AGREEMENT, found["own_mask_agreement"])
        and found["largest_difference"] <= max(DIFFERENCE, found["own_largest_difference"])
    )  # fmt: skip
    return found


def _noisy(clip: checkouts.Clip) -> checkouts.Clip:
    generator = torch.Generator().manual_seed(1)
    return replace(clip, frames=clip.frames + _NOISE * torch.randn(clip.frames.shape, generator=generator))


def _timed_run(checkout: Checkout, clip: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"positions": 0}

    def run() -> None:
        begin = time.perf_counter()
        result["probabilities"] = checkout.run(clip)
        result["seconds"] = (time.perf_counter() - begin) / (len(clip.frames) - 1)

    result["peak"] = measure.peak_extra_bytes(run, _CPU)
    result["masks"] = result["probabilities"].argmax(1)
    result["positions"] = checkout.positions()
    return result


def measure_read(
    checkout: Checkout, compat: Any, size: tuple[int, int], objects: int, repeats: int
) -> dict[str, Any]:
    """The memory read alone, on a memory of random features at the size that it reaches.

    XMem: nine frames and 10,000 long-term positions; Cutie: five frames, or those; STCN: 20 frames; STM and
    MiVOS: ten frames, of every object its own keys. Published and replaced calls take turns; medians.
    """
    grid = tuple(-(-side // 16) for side in size)
    reads: list[Callable[[], Tensor]] = []
    with torch.no_grad(), on_cpu():
        reads.append(_filled(checkout, grid, objects))
        with compat.enable():
            reads.append(_filled(checkout, grid, objects))
            reads[1]()
        reads[0]()
        samples: list[list[float]] = [[], []]
        gc.collect()
        for _ in range(repeats):
            samples[0].append(_milliseconds(reads[0]))
            with compat.enable():
                samples[1].append(_milliseconds(reads[1]))
    published, ours = (statistics.median(times) for times in samples)
    return {"published_read_ms": published, "vosops_read_ms": ours, "read_speedup": published / ours}


def _milliseconds(call: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _filled(checkout: Checkout, grid: tuple[int, ...], objects: int) -> Callable[[], Tensor]:
    """The published read of a memory that is filled by the published code."""
    generator = torch.Generator().manual_seed(1)
    key_channels, value_channels = CHANNELS[checkout.base]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, selection = draw(1, key_channels, *grid), draw(1, key_channels, *grid).sigmoid()
    if checkout.base in ("stm", "mivos"):
        keys = draw(objects, key_channels, 10, *grid)
        values = draw(objects, value_channels, 10, *grid)
        if checkout.base == "stm":
            query_value = draw(objects, value_channels, *grid)
            queries = query.expand(objects, -1, -1, -1)
            return lambda: checkout.network.Memory(keys, values, queries, query_value)[0]
        reader = checkout.network.memory
        return lambda: torch.cat([reader(keys[i : i + 1], values[i : i + 1], query) for i in range(objects)])
    if checkout.base == "stcn":
        bank = checkout.core.MemoryBank(objects)
        for _ in range(20):
            bank.add_memory(draw(1, key_channels, 1, *grid), draw(objects, value_channels, 1, *grid))
        return lambda: bank.match_memory(query)
    return _filled_manager(checkout, grid, objects, query, selection, draw)


def _filled_manager(
    checkout: Checkout,
    grid: tuple[int, ...],
    objects: int,
    query: Tensor,
    selection: Tensor,
    draw: Callable[..., Tensor],
) -> Callable[[], Tensor]:
    key_channels, value_channels = CHANNELS[checkout.base]
    ids = list(range(1, objects + 1))
    manager = checkout.manager()
    for _ in range(9 if checkout.long else 5):
        key, shrinkage = draw(1, key_channels, *grid), 1 + draw(1, 1, *grid).square()
        value = draw(1, objects, value_channels, *grid)
        kept_selection = selection if checkout.long else None
        if checkout.base == "xmem":
            manager.add_memory(key, shrinkage, value, ids, selection=kept_selection)
        else:
            manager.add_memory(
                key, shrinkage, value, None, ids, selection=kept_selection, as_permanent="first"
            )
    if checkout.long:
        key, shrinkage = draw(1, key_channels, _LONG_TERM), 1 + draw(1, 1, _LONG_TERM).square()
        if checkout.base == "xmem":
            values: Any = [draw(objects, value_channels, _LONG_TERM)]
            manager.long_mem.add(key, values, shrinkage, selection=None, objects=None)
        else:
            values = {number: draw(1, value_channels, _LONG_TERM) for number in ids}
            manager.long_mem.add(key, values, shrinkage, selection=None, supposed_bucket_id=0)
    if checkout.base == "xmem":
        return lambda: manager.match_memory(query, selection)
    module = importlib.import_module("cutie.inference.memory_manager")

    def read() -> Tensor:
        keys, shrinkages = manager.work_mem.key[0], manager.work_mem.shrinkage[0]
        if checkout.long:
            keys = torch.cat((manager.long_mem.key[0], keys), -1)
            shrinkages = torch.cat((manager.long_mem.shrinkage[0], shrinkages), -1)
        similarity = module.get_similarity(keys, shrinkages, query, selection)
        affinity = module.do_softmax(
            similarity, top_k=manager.top_k, inplace=True, return_usage=checkout.long
        )
        if checkout.long:
            affinity, _ = affinity
        return manager._readout(affinity, manager._get_visual_values_by_ids(ids))

    return read


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("model", no_wrap=True)
    for name in (
        "frames/s",
        "after",
        "x",
        "peak MiB",
        "after",
        "read ms",
        "after",
        "x",
        "masks",
        "error",
        "own",
    ):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("ok")
    for row in rows:
        peaks = [row["published_peak_bytes"], row["vosops_peak_bytes"]]
        read = [row.get(name) for name in ("published_read_ms", "vosops_read_ms", "read_speedup")]
        filled = f" t{row['filled_frames']}" if row["filled_frames"] else ""
        result.add_row(
            row["model"] + filled,
            f"{1 / row['published_s_per_frame']:.3f}",
            f"{1 / row['vosops_s_per_frame']:.3f}",
            f"{row['speedup']:.2f}",
            *("" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
            *("" if value is None else f"{value:.1f}" for value in read),
            f"{100 * row['mask_agreement']:.4f}%",
            f"{row['largest_difference']:.0e}",
            "" if row["own_largest_difference"] is None else f"{row['own_largest_difference']:.0e}",
            "[green]✓[/]" if row["equal"] else "[red]✗[/]",
        )
    return result


def main(
    peers: Annotated[Path, typer.Option(help="Folder of checkouts: XMem, Cutie, aot-benchmark, ...")],
    model: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 12,
    height: Annotated[int, typer.Option(help="Of the clip, pixels.")] = 480,
    width: Annotated[int, typer.Option(help="Of the clip, pixels.")] = 854,
    objects: Annotated[int, typer.Option(help="Objects to follow.")] = 3,
    fill: Annotated[int, typer.Option(help="Frames in the memory of STCN and AOT.")] = 0,
    repeats: Annotated[int, typer.Option(help="Rounds of the read alone; 0 for none.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
    settings: Annotated[str, typer.Option(help="JSON: entries of XMem's or Cutie's configuration.")] = "{}",
    here: Annotated[bool, typer.Option(help="One model in this process; print its JSON.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="What belongs in benchmarks/results, written there.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write this JSON file.")] = None,
) -> None:
    """Run published code before and after vosops.compat, and compare."""
    names = model or [name for name in FOLDERS if (peers / FOLDERS[name]).is_dir()]
    unknown = [name for name in names if name not in FOLDERS]
    if unknown or not names:
        raise typer.BadParameter(
            f"--model must be of {', '.join(FOLDERS)}; got {', '.join(unknown) or 'none'}"
        )
    if frames < 3 or min(height, width) < 64 or objects < 1 or fill < 0 or repeats < 0:
        raise typer.BadParameter("--frames from 3, sizes from 64, --objects from 1, the others from 0")
    if threads is not None:
        torch.set_num_threads(threads)
    if here:
        row = measure_model(
            names[0],
            peers,
            frames=frames,
            size=(height, width),
            objects=objects,
            fill=fill,
            settings=json.loads(settings),
            repeats=repeats,
        )
        print(json.dumps(row))
        return
    options = {"--objects": objects, "--threads": torch.get_num_threads(), "--settings": settings}
    clip = {"--frames": frames, "--height": height, "--width": width, "--fill": fill, "--repeats": repeats}
    jobs = [(name, clip) for name in names]
    if everything:
        jobs.append(("stcn", clip | {"--frames": 7, "--fill": 19, "--repeats": 0}))
        jobs += [(name, clip | {"--frames": 6, "--fill": 10}) for name in dropin_aot.MODELS if name in names]
        jobs.append(("xmem-long", clip | {"--frames": 120, "--height": 240, "--width": 432, "--repeats": 0}))
        output = output or RESULTS
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    rows = []
    for name, sizes in jobs:
        rows.append(_in_process(name, peers, options | sizes))
        console.print(table(rows[-1:]))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment.collect(_CPU), "rows": rows}
        output.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {output}", highlight=False, soft_wrap=True)
    if not all(row["equal"] for row in rows):
        raise typer.Exit(1)


def _in_process(name: str, peers: Path, options: dict[str, Any]) -> dict[str, Any]:
    """`measure_model` in a process of its own, as several checkouts name their packages alike."""
    command = [sys.executable, "-m", "benchmarks.dropin", "--here", "--peers", str(peers), "--model", name]
    command += [str(part) for pair in options.items() for part in pair]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # published code prints, too
    return row


if __name__ == "__main__":
    typer.run(main)
