# SPDX-License-Identifier: Apache-2.0
"""Ablations: the steps of a recipe, and what is measured, written and drawn."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vosops.recipes import AblationError, Member, Memory, Recipe, Refinement, Step, ablate, ablation_steps
from vosops.recipes.ablation import draw, gains

from .clips import write_davis, write_youtube

FIRST, SECOND = Member("stcn", Path("a.pth"), weight=2.0), Member("propagate", tta=())
WHOLE = Recipe(
    (FIRST, SECOND),
    tta=("flip",),
    merge="weighted",
    zoom="small",
    refine=Refinement("boundary"),
    memory=Memory(frames=9),
    max_size=480,
)


def test_one_part_more_at_each_step():
    steps = ablation_steps(WHOLE)
    assert [name for name, _ in steps] == ["baseline", "+tta", "+ensemble", "+refine", "+zoom", "+memory"]
    baseline = Recipe((replace(FIRST, weight=1.0),), max_size=480)
    assert steps[0][1] == baseline
    assert steps[1][1] == replace(baseline, tta=("flip",))
    assert steps[2][1] == replace(WHOLE, zoom=None, refine=None, memory=Memory())
    assert steps[3][1] == replace(WHOLE, zoom=None, memory=Memory())
    assert steps[4][1] == replace(WHOLE, memory=Memory())
    assert steps[5][1] == WHOLE


def test_parts_that_are_missing_are_left_out():
    assert [name for name, _ in ablation_steps(Recipe((SECOND,)))] == ["baseline"]
    own = Recipe((replace(FIRST, weight=1.0, tta=("flip",)), SECOND), memory=Memory(bytes=10**9))
    names, recipes = zip(*ablation_steps(own), strict=True)
    assert names == ("baseline", "+tta", "+ensemble", "+memory")
    assert recipes[0].members[0].tta is None
    assert recipes[1].members == own.members[:1]
    assert recipes[-1] == own


def test_measures_writes_and_draws(tmp_path):
    data = write_davis(tmp_path / "data", {"ant": 5})
    recipe, steps = Recipe((SECOND,), memory=Memory(frames=1)), []
    out = tmp_path / "out"
    found = ablate(recipe, data, out, on_step=lambda *step: steps.append(step))
    assert steps == [("baseline", 1, 2), ("+memory", 2, 2)]
    assert [step.name for step in found] == ["baseline", "+memory"]
    for step, folder in zip(found, ("1_baseline", "2_memory"), strict=True):
        report = json.loads((out / folder / "report.json").read_text())
        assert step.j == report["scores"]["J-Mean"]
        assert step.j_and_f == pytest.approx((step.j + step.f) / 2)
        assert step.fps == report["frames_per_second"] > 0
        assert step.peak_bytes > 50e6
    assert json.loads((out / "ablation.json").read_text())[1]["j"] == found[1].j
    rows = list(csv.DictReader((out / "ablation.csv").open()))
    assert [row["name"] for row in rows] == ["baseline", "+memory"]
    assert float(rows[0]["j_and_f"]) == found[0].j_and_f
    with Image.open(out / "ablation.png") as image:
        assert image.width > 1000


def test_a_step_that_fails_is_named(tmp_path, capfd):
    data = write_davis(tmp_path / "data", {"ant": 4})
    (tmp_path / "out/1_baseline").mkdir(parents=True)
    (tmp_path / "out/1_baseline/else").write_text("")
    with pytest.raises(AblationError, match=r"step baseline failed \(exit code 2, its error is above\)"):
        ablate(Recipe((SECOND,)), data, tmp_path / "out")
    assert "1_baseline is not empty" in capfd.readouterr().err


def test_gains_are_in_points_and_never_minus_nothing():
    steps = [Step("", 0, 0, score, 1.0, 1) for score in (0.8, 0.8123, 0.81226, 0.75)]
    assert [str(gain) for gain in gains(steps)] == ["0.0", "1.2", "0.0", "-6.2"]


def test_the_drawing_takes_one_step_and_many(tmp_path):
    steps = [Step(f"+part {n}", 0.7 + n / 100, 0.8, 0.75 + n / 200, 5.0 / (n + 1), 10**9) for n in range(6)]
    draw(steps[:1], tmp_path / "one.png")
    draw(steps, tmp_path / "many.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "many.png") as many:
        assert one.height < many.height


def test_without_ground_truth_there_is_nothing_to_measure(tmp_path):
    from vosops.recipes import Pipeline, Processes, run_dataset
    from vosops.recipes.ablation import _read

    data = write_youtube(tmp_path / "data", count=3)
    run_dataset(Pipeline(Recipe((SECOND,))), data, tmp_path / "out", Processes())
    with pytest.raises(AblationError, match="none of the sequences has ground truth on every frame"):
        _read("baseline", tmp_path / "out")
