# SPDX-License-Identifier: Apache-2.0
"""`vosops models` lists every model."""

from typer.testing import CliRunner

from vosops.cli import app
from vosops.models import MODELS


def test_lists_every_model():
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [*lines[0].split()[:3]] == ["model", "source", "parameters"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert list(rows) == list(MODELS)
    for name, info in MODELS.items():
        for text in (info.source, info.checkpoint, ", ".join(info.operators)):
            assert text in rows[name]
    assert "54.4 M" in rows["stcn"]


def test_says_which_package_a_model_needs(monkeypatch):
    def missing(self):
        raise ImportError("model scm needs the package 'timm': pip install 'vosops[apps]'")

    monkeypatch.setattr(type(MODELS["scm"]), "model_class", missing)
    result = CliRunner().invoke(app, ["models"])
    assert "needs the package 'timm'" in result.stdout
