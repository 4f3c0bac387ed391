# SPDX-License-Identifier: Apache-2.0
"""Plots of benchmark rows: ratios per shape, and time against the number of memory frames."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Rows = Sequence[Mapping[str, Any]]
RatioGroups = dict[str, dict[str, tuple[float, bool]]]

_COLORS = {
    "vosops": "#d1495b",
    "eager": "#30638e",
    "smart_eager": "#00798c",
    "compiled": "#7a9e9f",
    "compiled_smart": "#a3b18a",
    "sdpa": "#edae49",
    "flex": "#8d6a9f",
    "unfold": "#30638e",
    "dense_scatter": "#00798c",
    "masked_dense": "#7a9e9f",
    "natten": "#a3b18a",
    "sampler": "#5f7470",
    "sdpa_flash": "#f4c95d",
    "sdpa_efficient": "#c58b1b",
    "sdpa_cudnn": "#f2a65a",
    "sdpa_split": "#a06a2c",
    "sdpa_split_cudnn": "#7a4e1d",
    "bags": "#00798c",
    "vosops_triton": "#e07a5f",
    "vosops_cuda": "#9b2226",
}
_LABELS = {
    "eager": "published formula (eager)",
    "smart_eager": "topk + embedding_bag (smart eager)",
    "compiled": "torch.compile of eager",
    "compiled_smart": "torch.compile of smart eager",
    "sdpa": "SDPA",
    "flex": "FlexAttention",
    "unfold": "published formula (unfold)",
    "dense_scatter": "published fallback (scatter into Q x Q)",
    "masked_dense": "masked dense attention",
    "natten": "NATTEN",
    "sampler": "spatial_correlation_sampler",
    "sdpa_flash": "SDPA, FlashAttention",
    "sdpa_efficient": "SDPA, memory-efficient",
    "sdpa_cudnn": "SDPA, cuDNN",
    "sdpa_split": "SDPA, value heads cut",
    "sdpa_split_cudnn": "SDPA, value heads cut, cuDNN",
    "bags": "embedding_bag of the taps",
    "vosops_triton": "vosops, Triton forced",
    "vosops_cuda": "vosops, CUDA C++ forced",
}
_FRAMES = re.compile(r"^stcn-t(\d+)-o1$")


def draw(rows: Rows, about: Mapping[str, Any], stem: Path) -> list[Path]:
    """Draw what the rows allow.

    `<stem>-ratios.png`: peers over vosops, forward, float32, channel-major; `<stem>-ratios-other.png`: the
    same for every other setting; `<stem>-frames.png`: time against memory frames, for a sweep.

    Args:
        rows: flat rows of `run.Row`.
        about: environment of `environment.collect`, for the caption.
        stem: path without suffix.

    Returns:
        The files written; none for rows without a timed peer.
    """
    written = []
    sweep = frame_sweep(rows)
    if len(sweep) > 1:
        written.append(_frames(sweep, about, stem.with_name(f"{stem.name}-frames.png")))
        in_sweep = {f"stcn-t{frames}-o1" for frames in sweep} - {"stcn-t10-o1"}  # of the standard shapes
        rows = [row for row in rows if row["shape"] not in in_sweep]
    for suffix, plain in (("ratios", True), ("ratios-other", False)):
        groups = ratio_groups([row for row in rows if _is_plain(row) is plain])
        if groups:
            path = stem.with_name(f"{stem.name}-{suffix}.png")
            written.append(_ratios(rows[0]["operator"], groups, about, path))
    return written


def draw_times(rows: Rows, about: Mapping[str, Any], path: Path) -> Path:
    """Draw one shape's times as bars, with the arithmetic limit as a line.

    Args:
        rows: flat rows of `run.Row` of one shape and setting.
        about: environment of `environment.collect`, for the caption.
        path: PNG file to write.
    """
    timed = [row for row in rows if row["ms"] is not None]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(timed) + 2), layout="constrained")
    labels = [str(_LABELS.get(row["implementation"], row["implementation"])) for row in timed]
    bars = axes.barh(
        range(len(timed)),
        [row["ms"] for row in timed],
        color=[_COLORS[row["implementation"]] for row in timed],
    )
    axes.set_yticks(range(len(timed)), labels)
    axes.bar_label(bars, [f"{row['ms']:.0f} ms" for row in timed], padding=3, fontsize=8)
    axes.axvline(timed[0]["limit_ms"], linestyle="--", color="black", label="arithmetic limit")
    axes.legend(fontsize=8, loc="lower right")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    first = timed[0]
    axes.set_xlabel(f"milliseconds per {first['operator']}, {first['direction']}, {first['dtype']}")
    axes.set_title(f"{first['shape']}: {first['queries']} queries, {first['memory']} memory positions")
    return _save(figure, about, path)


def _is_plain(row: Mapping[str, Any]) -> bool:
    return (row["dtype"], row["layout"], row["direction"]) == ("float32", "channel_major", "forward")


def ratio_groups(rows: Rows) -> RatioGroups:
    """Label of the case -> peer that ran -> its time over that of vosops, and whether it was right."""
    groups: RatioGroups = {}
    for row in rows:
        if row["implementation"] == "vosops" or row["ratio"] is None:
            continue
        settings = (row["dtype"], row["layout"].replace("_", "-"), row["direction"])
        plain = ("float32", "channel-major", "forward")
        marks = [mark for mark, usual in zip(settings, plain, strict=True) if mark != usual]
        label = "\n".join((row["shape"], *marks))
        groups.setdefault(label, {})[row["implementation"]] = (row["ratio"], row["correct"])
    return groups


def frame_sweep(rows: Rows) -> dict[int, dict[str, float]]:
    """Memory frames -> implementation (and "limit") -> milliseconds, of STCN's plain forward reads."""
    sweep: dict[int, dict[str, float]] = {}
    for row in rows:
        found = _FRAMES.match(row["shape"])
        if found and _is_plain(row) and row["ms"] is not None and row["correct"]:
            times = sweep.setdefault(int(found[1]), {"limit": row["limit_ms"]})
            times[row["implementation"]] = row["ms"]
    return dict(sorted(sweep.items()))


def _ratios(
    operator: str,
    groups: Mapping[str, Mapping[str, tuple[float, bool]]],
    about: Mapping[str, Any],
    path: Path,
) -> Path:
    timed = {name for ratios in groups.values() for name in ratios}
    unknown = timed - set(_LABELS)
    if unknown:
        raise KeyError(f"a peer needs a label and a colour in plot.py: {sorted(unknown)}")
    peers = [name for name in _LABELS if name in timed]
    height = 0.24 * sum(len(ratios) + 1 for ratios in groups.values()) + 1.8
    figure, axes = plt.subplots(figsize=(9, max(3.2, height)), layout="constrained")
    position, ticks = 0.0, []
    for label, ratios in groups.items():
        present = [name for name in peers if name in ratios]
        ticks.append((position + (len(present) - 1) / 2, label))
        for name in present:
            ratio, correct = ratios[name]
            hatch = None if correct else "//"
            axes.barh(position, ratio, height=0.9, color=_COLORS[name], hatch=hatch, edgecolor="white")
            axes.annotate(
                f"{ratio:.1f}" if correct else f"{ratio:.1f} ✗",
                (ratio, position),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"boxstyle": "square,pad=0.1", "color": "white"},
            )
            position += 1
        position += 1
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08, y=0.01)
    axes.axvline(1, color=_COLORS["vosops"], linewidth=1.5)
    handles = [Patch(color=_COLORS[name]) for name in peers]
    figure.legend(handles, [_LABELS[name] for name in peers], fontsize=8, loc="outside upper center", ncols=3)
    axes.set_xlabel(f"{operator}: time over that of vosops (above 1 vosops is faster; ✗ = wrong result)")
    return _save(figure, about, path)


def _frames(sweep: Mapping[int, Mapping[str, float]], about: Mapping[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    frames = list(sweep)
    axes.plot(frames, [sweep[t]["limit"] for t in frames], "--", color="black", label="arithmetic limit")
    for name in ("vosops", *_LABELS):
        known = [t for t in frames if name in sweep[t]]
        if len(known) > 1:
            times = [sweep[t][name] for t in known]
            width = 2.5 if name == "vosops" else 1.5
            axes.plot(known, times, "o-", color=_COLORS[name], linewidth=width, label=_LABELS.get(name, name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(frames, [str(t) for t in frames])
    axes.minorticks_off()
    axes.yaxis.minorticks_on()
    axes.grid(which="major", alpha=0.4)
    axes.set_xlabel("memory frames of 30 x 54 cells")
    axes.set_ylabel("milliseconds per read")
    axes.set_title("memory_read: STCN, 480p, one object, top-20, float32")
    axes.legend(fontsize=8)
    return _save(figure, about, path)


def _save(figure: Any, about: Mapping[str, Any], path: Path) -> Path:
    machine = about["gpu"] or f"{about['cpu']} ({about['isa']}), {about['threads']} thread(s)"
    caption = f"{machine}, torch {about['torch']}, revision {about['revision']}, {str(about['date'])[:10]}"
    figure.supxlabel(caption, fontsize=7, color="0.35")
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
