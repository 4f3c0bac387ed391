# SPDX-License-Identifier: Apache-2.0
"""`vosops eval`: its table, files, exit codes."""

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from vosops.cli.eval import evaluate

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture
def folders(tmp_path):
    for name in ("camel", "libby"):
        for side in ("gt", "results"):
            (tmp_path / side / name).mkdir(parents=True)
        for index in range(4):
            labels = np.zeros((40, 60), np.uint8)
            labels[5:20, 5:20] = 1
            labels[25:35, 30:40] = 2
            Image.fromarray(labels).save(tmp_path / "gt" / name / f"{index:05d}.png")
            labels[5:20, 5:8] = 0
            Image.fromarray(labels).save(tmp_path / "results" / name / f"{index:05d}.png")
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_prints_a_plain_table_and_writes_the_csv_files(folders):
    result = invoke(folders / "results", folders / "gt", "--csv", folders / "csv")
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert rows["camel_1"][1] == "0.800"
    assert rows["camel_2"] == ["1.000", "1.000", "1.000", "0.000", "1.000", "1.000", "0.000"]
    assert "mean of 4 objects" in result.stdout
    assert not set(result.stdout) & set("│┃─━…")
    assert sorted(path.name for path in (folders / "csv").iterdir()) == [
        "global_results.csv",
        "per-frame_results.csv",
        "per-sequence_results.csv",
    ]
    assert "wrote" in result.stdout


def test_sequences_by_name_and_by_file(folders):
    (folders / "list.txt").write_text("libby\n")
    for chosen in ("libby", folders / "list.txt"):
        result = invoke(folders / "results", folders / "gt", "--sequences", chosen)
        assert result.exit_code == 0
        assert "libby_1" in result.stdout
        assert "camel" not in result.stdout
    both = invoke(folders / "results", folders / "gt", "--sequences", "libby, camel")
    assert both.stdout.index("libby_1") < both.stdout.index("camel_1")


def test_union(folders):
    result = invoke(folders / "results", folders / "gt", "--union")
    assert "camel_1" in result.stdout
    assert "camel_2" not in result.stdout
    assert "mean of 2 objects" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing", "gt"), "RESULTS must be a folder"),
        (("results", "gt", "--sequences", "dog"), "has no ground truth for dog; it has camel, libby"),
        (("results", "gt", "--sequences", "list.txt"), "--sequences: there is no file"),
        (("results", "gt", "--sequences", ","), "names no sequence"),
        (("results", "gt", "--csv", "file"), "--csv file: cannot be made a folder: File exists"),
    ],
)
def test_errors_are_one_line_on_stderr_with_code_2(folders, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    (folders / "file").write_text("")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("vosops eval: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
