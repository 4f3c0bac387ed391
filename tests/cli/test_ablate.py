# SPDX-License-Identifier: Apache-2.0
"""`vosops ablate`: its table, and what it refuses before the first step."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.recipes.clips import write_davis, write_youtube
from vosops.cli import app
from vosops.recipes import AblationError, Step

MODULE = sys.modules["vosops.cli.ablate"]
RECIPE = "members: [{model: propagate}]\ntta: [flip]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_davis(Path("data"), {"ant": 4})
    Path("recipe.yaml").write_text(RECIPE)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["ablate", *map(str, arguments)])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


CALL = ("recipe.yaml", "--data", "data", "--out", "out")


def test_prints_what_each_part_gives(folder, monkeypatch):
    asked = []

    def measured(recipe, data, out, *, sequences, on_step):
        asked.append((recipe, data, out, sequences))
        on_step("baseline", 1, 2)
        return [
            Step("baseline", 0.70, 0.80, 0.75, 3.0, 10**9),
            Step("+tta", 0.72, 0.81, 0.765, 1.5, 2 * 10**9),
        ]

    monkeypatch.setattr(MODULE, "run", measured)
    result = run("recipe.yaml", "max_size=64", *CALL[1:], "--sequences", "ant")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["step", "J", "F", "J&F", "change", "frames/s", "peak", "MB"]
    assert lines[1] == ["baseline", "70.0", "80.0", "75.0", "3.00", "1000"]
    assert lines[2] == ["+tta", "72.0", "81.0", "76.5", "+1.5", "1.50", "2000"]
    assert lines[3] == ["wrote", "out/ablation.png,", ".csv,", ".json"]
    assert "step 1 of 2: baseline" in result.stderr
    ((recipe, data, out, sequences),) = asked
    assert (recipe.tta, recipe.max_size) == (("flip",), 64)
    assert (data, out, sequences) == (Path("data"), Path("out"), ["ant"])


def test_a_step_that_fails_exits_with_1(folder, monkeypatch):
    def fails(*arguments, **options):
        raise AblationError("step +tta failed")

    monkeypatch.setattr(MODULE, "run", fails)
    assert "vosops ablate: step +tta failed" in run(*CALL, code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone.yaml", *CALL[1:]), "cannot read gone.yaml"),
        (("recipe.yaml", "zoom=big", *CALL[1:]), "zoom must be one of small"),
        (("recipe.yaml", "members.0.model=stm", *CALL[1:]), "model stm needs its checkpoint"),
        ((*CALL, "--sequences", "cat"), "cat: no such folder"),
        (("recipe.yaml", "--data", "youtube", *CALL[3:]), "none of its sequences has ground truth on every"),
    ],
)
def test_mistakes_cost_nothing(folder, arguments, message):
    write_youtube(Path("youtube"), count=3)
    result = run(*arguments, code=2)
    assert "vosops ablate: " in result.stderr
    assert message in result.stderr
    assert not Path("out").exists()
