# SPDX-License-Identifier: Apache-2.0
"""The shipped models and training-free propagation on seven DAVIS-2016 sequences:
`python -m benchmarks.propagation`.

Given the first frame's mask, every method segments the rest; J and F under the DAVIS semi-supervised
protocol (first and last frame not scored). Beside the models and `LabelPropagator` stand two baselines and
the masks that the authors of STM published. Four sequences are also run from their multi-object masks and
scored as the union of the objects, the only ground truth there is for those.

Needs the clips in the folder VOSOPS_DATA (default ../shared/data).
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from vosops import models
from vosops.data import open_frames, read_labels
from vosops.evaluation import evaluate_sequence
from vosops.models.registry import shipped_weights
from vosops.propagate import CopyFirstMask, LabelPropagator, PropagationSettings, Tracker, WarpPreviousMask
from vosops.propagate.run import VideoSegmenter

RESULTS = Path(__file__).parent / "results" / "propagation.json"
FRAMES, TRUTH, FIRST = "JPEGImages/480p", "Annotations/480p", "Annotations_2017_first/480p"
STM = "STM (published masks)"
_FILE_WIDTH = 150  # columns where the output is not a terminal
Labels = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Row:
    """Scores of one method on one sequence.

    objects: given in the first frame; above one, j and f are of their union.
    fps: frames per second of the method alone, without reading and scoring; None for published masks.
    """

    method: str
    sequence: str
    objects: int
    frames: int
    j: float
    f: float
    fps: float | None

    @property
    def jf(self) -> float:
        """J&F."""
        return (self.j + self.f) / 2


def run_sequence(
    data: Path, sequence: str, method: str, make: Callable[[], VideoSegmenter], multi: bool
) -> Row:
    """Segments a sequence from its first mask, or from its multi-object one, and scores it."""
    names = [name for name, _ in open_frames(data / FRAMES / sequence)]
    mask = read_labels(data / (FIRST if multi else TRUTH) / sequence / f"{names[0]}.png")
    segmenter, busy = make(), [0.0]

    def predicted() -> Iterator[Labels]:
        for number, (_, frame) in enumerate(open_frames(data / FRAMES / sequence)):
            begun = time.perf_counter()
            if number == 0:
                segmenter.add(frame, mask)
                labels: Labels = mask
            else:
                ids = np.array([0, *segmenter.object_ids])
                labels = ids[segmenter.step(frame).argmax(0).numpy()]
            busy[0] += time.perf_counter() - begun
            yield labels

    return _row(data, sequence, method, names, predicted(), len(set(np.unique(mask)) - {0, 255}), busy)


def published(data: Path, sequence: str) -> Row | None:
    """Scores of the masks that the authors of STM published, None where there are none."""
    folder = data / "Reference/STM16/480p" / sequence
    names = [name for name, _ in open_frames(data / FRAMES / sequence)]
    if not all((folder / f"{name}.png").exists() for name in names):
        return None
    return _row(data, sequence, STM, names, (read_labels(folder / f"{n}.png") for n in names), 1, None)


def _row(
    data: Path,
    sequence: str,
    method: str,
    names: list[str],
    predicted: Iterator[Labels],
    objects: int,
    busy: list[float] | None,
) -> Row:
    truth = (read_labels(data / TRUTH / sequence / f"{name}.png") for name in names)
    score = evaluate_sequence(truth, predicted, name=sequence, frames=names, single_object=True)
    fps = None if busy is None else len(names) / busy[0]
    return Row(method, sequence, objects, len(names), score.j_mean, score.f_mean, fps)


def means(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Mean J, F, J&F per method over the single-object rows, and over the multi-object rows beside them."""
    found: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(row.method for row in rows):
        for kind, multi in (("single", False), ("multi", True)):
            mine = [row for row in rows if row.method == method and (row.objects > 1) == multi]
            if mine:
                entry = found.setdefault(f"{method}|{kind}", {})
                entry.update(
                    j=float(np.mean([row.j for row in mine])),
                    f=float(np.mean([row.f for row in mine])),
                    jf=float(np.mean([row.jf for row in mine])),
                    sequences=len(mine),
                )
    return found


def tables(rows: list[Row]) -> Iterator[Table]:
    """One table for the single-object masks, one for the multi-object ones."""
    for multi, title in ((False, "One object"), (True, "Several objects, scored as their union")):
        mine = [row for row in rows if (row.objects > 1) == multi]
        if not mine:
            continue
        methods = list(dict.fromkeys(row.method for row in mine))
        table = Table(title=f"{title}: J / F / J&F (frames per second)")
        table.add_column("sequence")
        for method in methods:
            table.add_column(method, justify="right", min_width=18)
        for sequence in dict.fromkeys(row.sequence for row in mine):
            cells = {row.method: row for row in mine if row.sequence == sequence}
            table.add_row(sequence, *(_cell(cells.get(method)) for method in methods))
        table.add_section()
        average = means(mine)
        kind = "multi" if multi else "single"
        table.add_row("mean", *(_scores(**average[f"{method}|{kind}"]) for method in methods), style="bold")
        yield table


def _cell(row: Row | None) -> str:
    if row is None:
        return "n/a"
    return _scores(row.j, row.f, row.jf) + (f" ({row.fps:.1f})" if row.fps is not None else "")


def _scores(j: float, f: float, jf: float, sequences: float = 0) -> str:
    return f"{100 * j:.1f} / {100 * f:.1f} / {100 * jf:.1f}"


def write(path: Path, rows: list[Row], settings: list[dict[str, Any]]) -> None:
    """The JSON file, and beside it a CSV file of the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": environment.collect(torch.device("cpu")),
        "settings": settings,
        "means": means(rows),
        "rows": [{**asdict(row), "jf": row.jf} for row in rows],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "sequence", "objects", "frames", "J", "F", "J&F", "fps"])
        for row in rows:
            fps = "" if row.fps is None else f"{row.fps:.2f}"
            scores = [f"{value:.4f}" for value in (row.j, row.f, row.jf)]
            writer.writerow([row.method, row.sequence, row.objects, row.frames, *scores, fps])


def main(
    features: Annotated[
        list[str] | None,
        typer.Option(help="LabelPropagators with these features, beside the builtin ones; repeatable."),
    ] = None,
    feature_weights: Annotated[
        Path | None, typer.Option(help="Weight file of their backbone (.safetensors, .pth).")
    ] = None,
    sequence: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    output: Annotated[
        Path, typer.Option("--json", help="File to write; a CSV file goes beside it.")
    ] = RESULTS,
) -> None:
    """Score the shipped models, label propagation, its baselines and the published STM masks."""
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    data = Path(os.environ.get("VOSOPS_DATA", "../shared/data"))
    lists = data / "ImageSets/2017"
    if not lists.is_dir():
        raise typer.BadParameter(f"no clips: set VOSOPS_DATA to their folder (now {data})")
    known = (lists / "val.txt").read_text().split()
    several = (lists / "multi_object_first.txt").read_text().split()
    unknown = set(sequence or ()) - set(known)
    if unknown:
        raise typer.BadParameter(f"--sequence must be one of {', '.join(known)}; got {', '.join(unknown)}")
    if feature_weights is not None and features is None:
        raise typer.BadParameter("--feature-weights needs --features, as torchvision:mobilenet_v2")
    chosen = [PropagationSettings()]
    for kind in features or ():
        chosen.append(PropagationSettings(features=kind, feature_weights=feature_weights))
        LabelPropagator(chosen[-1])  # a bad name or file shows before the work
    methods: dict[str, Callable[[], VideoSegmenter]] = {
        name: partial(Tracker, models.load(name)) for name in models.MODELS if shipped_weights(name)
    }
    methods |= {f"propagation, {s.features}": partial(LabelPropagator, s) for s in chosen}
    methods |= {"first mask copied": CopyFirstMask, "previous mask warped": WarpPreviousMask}
    rows: list[Row] = []
    for name in known:
        if sequence and name not in sequence:
            continue
        for multi in (False, True) if name in several else (False,):
            for method, make in methods.items():
                with console.status(f"{name}, {method}"):
                    rows.append(run_sequence(data, name, method, make, multi))
        stm = published(data, name)
        rows += [stm] if stm else []
    for table in tables(rows):
        console.print(table)
    write(output, rows, [_plain(s) for s in chosen])
    console.print(f"written: {output} and {output.with_suffix('.csv').name}")


def _plain(settings: PropagationSettings) -> dict[str, Any]:
    """Settings without paths of this machine."""
    weights = settings.feature_weights
    return {
        **asdict(settings),
        "feature_weights": None if weights is None else Path(weights).name,
        "memory_dtype": str(settings.memory_dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    typer.run(main)
