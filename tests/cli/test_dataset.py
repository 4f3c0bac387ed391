# SPDX-License-Identifier: Apache-2.0
"""`vosops dataset`: what it prints, exit codes, and what it says when something is wrong."""

import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.recipes.clips import write_davis, write_youtube
from vosops.cli import app
from vosops.recipes import processes

CLIPS = {"ant": 4, "bee": 5}
RECIPE = "members: [{model: propagate, options: {stride: 4}}]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set and a recipe in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    write_davis(Path("data"), CLIPS)
    Path("recipe.yaml").write_text(RECIPE)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["dataset", *map(str, arguments)])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


RUN = ("run", "data", "--recipe", "recipe.yaml", "--out", "out")


def test_runs_reports_and_submits(folder):
    result = run(*RUN)
    for name in ("ant_1", "ant_2", "bee_1", "bee_2", "mean of 4 objects"):
        assert name in result.stdout
    assert "2 sequences in out, " in result.stdout
    assert " frames/s a process, peak memory " in result.stdout
    assert run("submit", "out", "--data", "data", "--out", "a.zip").stdout == "9 masks in a.zip\n"
    assert "bee/00004.png" in zipfile.ZipFile("a.zip").namelist()


def test_options_and_assignments(folder):
    result = run("run", "data", "tta=[flip]", *RUN[2:], "--sequences", "ant", "--save-probabilities")
    assert "ant: 2 segmenters remember about" in result.stderr
    assert "1 sequence in out" in result.stdout
    assert Path("out/ant/probabilities/00003.npz").is_file()
    assert not Path("out/bee").exists()


def test_a_set_without_ground_truth(folder):
    write_youtube(Path("youtube"))
    result = run("run", "youtube", *RUN[2:])
    assert "no sequence has ground truth on every frame: nothing was scored" in result.stdout
    run("submit", "out", "--data", "youtube", "--out", "a.zip")
    assert "Annotations/0a49f5265b/00035.png" in zipfile.ZipFile("a.zip").namelist()


def test_a_failure_exits_with_1_and_the_same_command_goes_on(folder, monkeypatch):
    frame = Path("data/JPEGImages/480p/bee/00003.png")
    good = frame.read_bytes()
    frame.write_bytes(good[:50])
    result = run(*RUN, code=1)
    assert "vosops dataset run: 1 of 2 sequences failed" in result.stderr
    assert "\nbee: frame 00003 (data/JPEGImages/480p/bee/00003.png): cannot be read" in result.stderr
    frame.write_bytes(good)
    assert "2 sequences in out" in run(*RUN).stdout


def test_an_interrupt_exits_with_1(folder, monkeypatch):
    def interrupt(self, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.Processes, "gather", interrupt)
    assert "interrupted; the same command goes on" in run(*RUN, code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere", *RUN[2:]), "nowhere/JPEGImages: no such folder"),
        ((*RUN, "--sequences", "cat"), "cat: no such folder"),
        ((*RUN, "--sequences", "list.txt"), "there is no file list.txt"),
        (("run", "data", "tta=[flop]", *RUN[2:]), "tta must be flip and factors above 0"),
        ((*RUN[:3], "gone.yaml", *RUN[4:]), "cannot read gone.yaml"),
        ((*RUN[:-1], "data"), "data is not empty and holds no dataset.json"),
        (("submit", "data", "--data", "data", "--out", "a.zip"), "ant: there are no masks in data"),
        (("submit", "data", "--data", "nowhere", "--out", "a.zip"), "no such folder"),
    ],
)
def test_mistakes_cost_nothing(folder, arguments, message):
    result = run(*arguments, code=2)
    assert f"vosops dataset {arguments[0]}: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert sorted(path.name for path in Path().iterdir()) == ["data", "recipe.yaml"]
