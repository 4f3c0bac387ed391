# SPDX-License-Identifier: Apache-2.0
"""What each part of a recipe gives: the recipe built up step by step over a data set, each step measured."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from vosops.data.files import replacing, write_file

from .recipe import Memory, Recipe, dump

_TABLE = "ablation"


class AblationError(RuntimeError):
    """A step that failed; the steps before it stay, and the same call goes on."""


@dataclass(frozen=True)
class Step:
    """The scores and costs of one step.

    Attributes:
        name: "baseline", or what was added to the step before, as "+tta".
        j, f, j_and_f: means over all objects of the data set.
        fps: frames per second of the process that segmented, reading and writing included.
        peak_bytes: the most resident memory of that process.
    """

    name: str
    j: float
    f: float
    j_and_f: float
    fps: float
    peak_bytes: int


def ablation_steps(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The recipe from its first member alone to the whole, one part more at each step.

    The order is baseline, +tta, +ensemble, +refine, +zoom, +memory; parts that the recipe lacks are left out.
    The last step is the recipe itself.

    Returns:
        Names and recipes, at least the baseline.
    """
    first = replace(recipe.members[0], tta=None, weight=1.0)
    step = replace(recipe, members=(first,), tta=(), merge="average", zoom=None, refine=None, memory=Memory())
    looks = any(member.tta for member in recipe.members) or bool(recipe.tta)
    additions = [
        ("+tta", looks, {"members": (replace(first, tta=recipe.members[0].tta),), "tta": recipe.tta}),
        ("+ensemble", len(recipe.members) > 1, {"members": recipe.members, "merge": recipe.merge}),
        ("+refine", recipe.refine is not None, {"refine": recipe.refine}),
        ("+zoom", recipe.zoom is not None, {"zoom": recipe.zoom}),
        ("+memory", recipe.memory != Memory(), {"memory": recipe.memory}),
    ]
    steps = [("baseline", step)]
    for name, present, change in additions:
        if present:
            step = replace(step, **change)  # type: ignore[arg-type]
            steps.append((name, step))
    return steps


def ablate(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    sequences: Sequence[str] | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[Step]:
    """Measures every step of a recipe on a data set with ground truth on every frame.

    Each step is a `vosops dataset run` in a process of its own, so that its peak of memory is its own, into
    `out`/<number>_<step>; what a stopped call did is not done again. Writes ablation.json, .csv and .png.

    Args:
        recipe: the whole.
        data: in DAVIS's layout.
        out: folder to write to.
        sequences: names; see `find_sequences`.
        on_step: called with the name, the number from 1, and the number of steps before each.

    Returns:
        The steps, in their order.

    Raises:
        AblationError: a step failed, or none of the sequences has ground truth on every frame.
        WriteError: `out` cannot be written.
    """
    steps = ablation_steps(recipe)
    found = []
    out.mkdir(parents=True, exist_ok=True)
    for number, (name, part) in enumerate(steps, 1):
        if on_step is not None:
            on_step(name, number, len(steps))
        stem = f"{number}_{name.removeprefix('+')}"
        config, folder = out / f"{stem}.yaml", out / stem
        write_file(config, lambda file, part=part: file.write(dump(part).encode()))  # type: ignore[misc]
        command = [sys.executable, "-m", "vosops", "dataset", "run", str(data)]
        command += ["--recipe", str(config), "--out", str(folder)]
        command += [] if sequences is None else ["--sequences", ",".join(sequences)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise AblationError(f"step {name} failed (exit code {done.returncode}, its error is above)")
        found.append(_read(name, folder))
    _write(found, out)
    draw(found, out / f"{_TABLE}.png")
    return found


def gains(steps: Sequence[Step]) -> list[float]:
    """The change of J&F from the step before, in points, to one decimal; that of the first step is 0."""
    before = [steps[0], *steps]
    # Plus 0.0: a loss too small to show is not "-0.0".
    return [
        round(100 * (step.j_and_f - last.j_and_f), 1) + 0.0 for step, last in zip(steps, before, strict=False)
    ]


def draw(steps: Sequence[Step], path: Path) -> None:
    """Draws J, F and J&F, frames per second and peak memory of every step, side by side, as a PNG.

    Raises:
        WriteError: the file cannot be written.
    """
    # Imported here: only this needs it, and it takes a second.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [step.name for step in steps]
    rows = range(len(steps))
    figure, (scores, speed, memory) = plt.subplots(
        1,
        3,
        figsize=(11, 1.3 + 0.42 * len(steps)),
        sharey=True,
        width_ratios=(2, 1, 1),
        layout="constrained",
    )
    for label, values, colour, marker in (
        ("J", [step.j for step in steps], "#30638e", "o"),
        ("F", [step.f for step in steps], "#edae49", "s"),
        ("J&F", [step.j_and_f for step in steps], "#d1495b", "D"),
    ):
        scores.plot([100 * value for value in values], rows, marker, color=colour, label=label)
    for row, step, gain in zip(rows, steps, gains(steps), strict=True):
        text = f"{100 * step.j_and_f:.1f}" + (f" ({gain:+.1f})" if row else "")
        scores.annotate(
            text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, color="#d1495b"
        )
    scores.set_yticks(rows, names)
    scores.invert_yaxis()
    scores.set_title("J, F and J&F, percent (J&F and its change)")
    figure.legend(loc="outside lower left", fontsize=8, ncols=3, frameon=False)
    speed.set_title("frames per second")
    memory.set_title("peak memory, MB")
    for axes, values, template in (
        (speed, [step.fps for step in steps], "{:.2f}"),
        (memory, [step.peak_bytes / 1e6 for step in steps], "{:.0f}"),
    ):
        bars = axes.barh(rows, values, color="#00798c", height=0.6)
        axes.bar_label(bars, [template.format(value) for value in values], padding=3, fontsize=8)
        axes.margins(x=0.25)
    for axes in (scores, speed, memory):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def _read(name: str, folder: Path) -> Step:
    report = json.loads((folder / "report.json").read_text())
    scores = report["scores"]
    if scores is None:
        raise AblationError(f"{folder}: none of the sequences has ground truth on every frame")
    means = (scores["J-Mean"], scores["F-Mean"], scores["J&F-Mean"])
    return Step(name, *means, report["frames_per_second"], report["peak_bytes"])


def _write(steps: Sequence[Step], out: Path) -> None:
    rows = [asdict(step) for step in steps]
    text = json.dumps(rows, indent=1) + "\n"
    write_file(out / f"{_TABLE}.json", lambda file: file.write(text.encode()))
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Step)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / f"{_TABLE}.csv", lambda file: file.write(table.getvalue().encode()))
