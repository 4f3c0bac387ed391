# SPDX-License-Identifier: Apache-2.0
"""`vosops train`: assignments, exit codes, and what it says when something is wrong."""

import pytest
from typer.testing import CliRunner

from tests.training.runs import tiny_config, write_clips
from vosops.cli import app
from vosops.training import loop
from vosops.training.config import dump, load_config


@pytest.fixture
def config(tmp_path):
    write_clips(tmp_path / "clips")
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_config(tmp_path / "run", tmp_path / "clips", "steps=2")))
    return path


def _train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_trains_stops_and_goes_on(config, tmp_path):
    stopped = _train(config, "crop=96", "--minutes", "1e-9")
    assert stopped.exit_code == 0, stopped.output
    assert stopped.stdout == "stopped after step 1 of 2; --resume goes on\n"
    assert load_config(tmp_path / "run" / "config.yaml").crop == 96
    again = _train(config, "crop=96")
    assert again.exit_code == 2
    assert "holds a run: go on with --resume" in again.stderr
    done = _train(tmp_path / "run" / "config.yaml", "--resume")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"wrote {tmp_path / 'run' / 'model.safetensors'} after 2 steps\n"
    assert "step 2 of 2: loss" in done.stderr


def test_shows_every_value(config, tmp_path):
    shown = _train(config, "optim.lr=3e-4", "--show")
    assert shown.exit_code == 0
    file = tmp_path / "shown.yaml"
    file.write_text(shown.stdout)
    assert load_config(file) == load_config(config, ["optim.lr=3e-4"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.rate=1"], "vosops train: unknown key optim.rate; there are optim.lr, optim.min_lr,"),
        (["steps=many"], "vosops train: steps must be an integer, got 'many'"),
        (["--resume"], "vosops train: there is no run to go on with:"),
        (["model.name=stmn"], "vosops train: model: model must be one of stm,"),
        (["data.sources.0.path=nowhere"], "nowhere: no such folder of training data"),
    ],
)
def test_mistakes_cost_nothing(config, tmp_path, arguments, message):
    done = _train(config, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_middle(config, monkeypatch):
    def stop(*arguments, **options):
        raise loop.TrainingError("the loss of step 7 is nan")

    monkeypatch.setattr(loop, "train", stop)
    done = _train(config)
    assert done.exit_code == 1
    assert "vosops train: the loss of step 7 is nan" in done.stderr
