# SPDX-License-Identifier: Apache-2.0
"""What only a GPU's benchmark has: graph replays, and its results held against the targets.

python -m benchmarks.gpu benchmarks/results/*-h200.json      # targets and plots of results files
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import measure, plot

Rows = Sequence[Mapping[str, Any]]

_TOP_K = ("xmem-cap-o1", "stcn-t20-o3")
_LOW = ("bfloat16", "float16")
_ALL = (*_LOW, "float32")
_TOKENS = "position_major"
_SDPA = ("sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn")
_SDPA_CUT = ("sdpa_split", "sdpa_split_cudnn")
_MOST_EXTRA_MIB = 1e9 / 2**20


@dataclass(frozen=True)
class Target:
    """One line of the table of targets.

    Args:
        what: the case and what is compared.
        wanted: the bound, in words.
        measured: the figure, by CUDA events around plain calls; None where a row is missing or failed.
        graph: the same from graph replays, which leave out launching; None where one is missing.
        met: whether both figures keep the bound (for shares of the floor `graph` alone) and vosops was right.
    """

    what: str
    wanted: str
    measured: float | None
    graph: float | None
    met: bool


def short_name(device_name: str) -> str:
    """ "NVIDIA H200" -> "h200", for file names."""
    words = re.sub(r"\b(nvidia|geforce|tesla|graphics)\b", " ", device_name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "gpu"


def replays(
    calls: Mapping[str, measure.Call], device: torch.device, *, repeats: int, budget_s: float
) -> dict[str, float]:
    """Median milliseconds of each call's CUDA graph, interleaved; empty on the CPU.

    A call that a graph cannot hold (one that waits for the GPU, say) has no entry.
    """
    if device.type != "cuda":
        return {}
    graphs: dict[str, tuple[measure.Call, object]] = {}
    for name, call in calls.items():
        try:
            graphs[name] = measure.captured(call)
        except RuntimeError:  # the column stays empty, which the page of the columns explains
            torch.cuda.synchronize(device)
    timings = measure.interleaved(
        {name: replay for name, (replay, _) in graphs.items()}, device, repeats=repeats, budget_s=budget_s
    )
    graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return {name: timing.median_ms for name, timing in timings.items()}


def targets(rows: Rows) -> list[Target]:
    """The figures that a GPU's results must reach, from flat rows of `run.Row`, operator by operator.

    Forward unless said otherwise; the memory as published code holds it, and for the operators of AOT as
    that holds it, channels innermost. A ratio is the time of the fastest of the peers that ran over that of
    vosops.
    """
    present = dict.fromkeys(row["operator"] for row in rows)
    return [entry for name in present for entry in _TARGETS[name](rows)]


def _of_memory_read(rows: Rows) -> list[Target]:
    found = [
        *(_ratio(rows, shape, dtype, ("eager",), 10.0) for shape in _TOP_K for dtype in _LOW),
        *(_ratio(rows, shape, dtype, ("compiled",), 5.0) for shape in _TOP_K for dtype in _LOW),
        *(_ratio(rows, shape, "float32", ("eager",), 6.0) for shape in _TOP_K),
        *(_floor(rows, shape, "bfloat16", 3.0) for shape in _TOP_K),
        *(
            _ratio(rows, shape, "bfloat16", ("sdpa", "flex"), 1.0)
            for shape in ("stcn-t10-o1-dense", "stm-t10-o2")
        ),
        _ratio(rows, "kmn-t10-o1", "bfloat16", ("flex",), 2.0),
        *(
            _ratio(rows, shape, "bfloat16", ("eager",), 3.0, direction="forward+backward")
            for shape in ("stcn-t10-o1", "stm-t10-o2")
        ),
    ]
    ours = _row(rows, "xmem-1080p", "bfloat16", "vosops")
    extra = None if ours is None else ours["extra_mib"]
    met = extra is not None and extra < _MOST_EXTRA_MIB and bool(ours and ours["correct"])
    found.append(Target("xmem-1080p, bfloat16: extra MiB", f"< {_MOST_EXTRA_MIB:.0f}", extra, None, met))
    return found


def _of_attention(rows: Rows) -> list[Target]:
    """A twentieth below SDPA at most; where widths differ ahead of it, even of SDPA on heads cut equal."""
    equal = [
        _ratio(rows, shape, dtype, _SDPA, 0.95, layout=_TOKENS, peer="the best SDPA")
        for shape in ("lt-aotl-t1", "lt-aotl-t10")
        for dtype in _ALL
    ]
    unequal = [
        _ratio(rows, "lt-deaot-t10", dtype, peers, 1.0, layout=_TOKENS, peer=peer)
        for dtype in _ALL
        for peers, peer in ((_SDPA, "the best SDPA"), (_SDPA_CUT, "SDPA, heads cut,"))
    ]
    return [*equal, *unequal]


def _of_local_attention(rows: Rows) -> list[Target]:
    """FlexAttention has no relative_value, so the shapes without it; AOT's own against what AOT runs."""
    return [
        *(
            _ratio(rows, shape, dtype, ("flex",), 5.0, layout=_TOKENS)
            for shape in ("st-plain-480p", "st-deaot-480p")
            for dtype in _ALL
        ),
        *(
            _ratio(rows, shape, "bfloat16", ("flex",), 5.0, layout=_TOKENS)
            for shape in ("st-plain-1080p", "st-deaot-1080p")
        ),
        *(
            _ratio(rows, shape, dtype, ("sampler",), 3.0, layout=_TOKENS)
            for shape in ("st-aot-480p", "st-deaot-480p")
            for dtype in ("float32", "float16")
        ),
    ]


def _of_identity(rows: Rows) -> list[Target]:
    return [
        _ratio(rows, shape, dtype, ("eager", "bags", "compiled"), 1.0, peer="the best peer")
        for shape in ("id-480p", "id-1080p")
        for dtype in ("bfloat16", "float32")
    ]


_TARGETS: dict[str, Callable[[Rows], list[Target]]] = {
    "memory_read": _of_memory_read,
    "attention": _of_attention,
    "local_attention": _of_local_attention,
    "identity": _of_identity,
}


def targets_table(entries: Sequence[Target]) -> Table:
    """The targets for the terminal: wanted, measured, ok or short."""
    result = Table(title="targets on a GPU", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for name in ("wanted", "measured", "by graph"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("")
    for entry in entries:
        verdict = (
            "[green]ok[/]" if entry.met else "[red]short[/]" if entry.measured is not None else "not measured"
        )
        result.add_row(entry.what, entry.wanted, _figure(entry.measured), _figure(entry.graph), verdict)
    return result


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _row(
    rows: Rows,
    shape: str,
    dtype: str,
    implementation: str,
    direction: str = "forward",
    layout: str = "channel_major",
) -> Mapping[str, Any] | None:
    """The timed row of an implementation."""
    wanted = (shape, dtype, implementation, direction, layout)
    names = ("shape", "dtype", "implementation", "direction", "layout")
    for row in rows:
        if tuple(row[name] for name in names) == wanted and row["ms"] is not None:
            return row
    return None


def _ratio(
    rows: Rows,
    shape: str,
    dtype: str,
    peers: tuple[str, ...],
    bound: float,
    *,
    direction: str = "forward",
    layout: str = "channel_major",
    peer: str | None = None,
) -> Target:
    """The fastest of the peers that ran, over vosops; `peer` says what they are together."""
    what = f"{shape}, {dtype}{'' if direction == 'forward' else ', ' + direction}"
    what += f": {peer or ' or '.join(peers)} / vosops"
    ours = _row(rows, shape, dtype, "vosops", direction, layout)
    found = (_row(rows, shape, dtype, peer, direction, layout) for peer in peers)
    theirs = [row for row in found if row is not None]
    if ours is None or not theirs:
        return Target(what, f">= {bound:g}", None, None, False)
    measured = min(row["ms"] for row in theirs) / ours["ms"]
    graphs = [row["graph_ms"] for row in theirs if row["graph_ms"] is not None]
    graph = min(graphs) / ours["graph_ms"] if graphs and ours["graph_ms"] is not None else None
    slowest = measured if graph is None else min(measured, graph)
    return Target(what, f">= {bound:g}", measured, graph, slowest >= bound and bool(ours["correct"]))


def _floor(rows: Rows, shape: str, dtype: str, bound: float) -> Target:
    what = f"{shape}, {dtype}: vosops / floor"
    ours = _row(rows, shape, dtype, "vosops")
    if ours is None:
        return Target(what, f"<= {bound:g}", None, None, False)
    measured = ours["ms"] / ours["limit_ms"]
    graph = None if ours["graph_ms"] is None else ours["graph_ms"] / ours["limit_ms"]
    return Target(
        what, f"<= {bound:g}", measured, graph, (graph or measured) <= bound and bool(ours["correct"])
    )


def main(paths: Sequence[Path]) -> None:
    """Print the targets of results files, whole or cut short, and draw their plots beside them.

    Raises:
        OSError, json.JSONDecodeError, KeyError: there is no such file, or it holds no results.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for path in paths:
        result = json.loads(path.read_text())
        rows, about = result["rows"], result["environment"]
        console.print(f"{about['gpu']}, {path.stem}: {len(rows)} rows", highlight=False)
        console.print(targets_table(targets(rows)))
        plot.draw(rows, about, path.with_suffix(""))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
