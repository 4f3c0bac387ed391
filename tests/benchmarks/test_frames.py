# SPDX-License-Identifier: Apache-2.0
"""Whole-frame benchmark: peers give vosops' probabilities, every stage is timed, the file says where."""

import json

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks import frames
from benchmarks.frames import FrameCase


@pytest.fixture(autouse=True)
def small(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = {
        "stcn": FrameCase("stcn", (60, 90), 2, 3),
        "xmem": FrameCase("xmem", (60, 90), 2, 4, 50),
        "stm": FrameCase("stm", (60, 90), 1, 2),
    }
    monkeypatch.setattr(frames, "CASES", cases)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["stcn", "xmem"])
def test_peers_agree_and_all_stages_are_timed(name):
    rows = frames.measure_case(name, repeats=1)
    assert [row["implementation"] for row in rows] == ["vosops", "eager_read", "published"]
    assert rows[0]["positions"] == {"stcn": 3 * 24, "xmem": 50 + 4 * 24}[name]
    for row in rows:
        assert all(row[f"{stage}_ms"] > 0 for stage in frames.STAGES)
        assert row["error"] < 1e-4
        assert 0 < row["read_share"] < 1
    assert frames.table(rows).row_count == 3


def test_a_peer_with_other_numbers_is_not_timed(monkeypatch):
    def silent(model, read, features):
        return torch.full((1, 3, 64, 96), torch.nan)

    monkeypatch.setattr(frames.stcn_frame, "stcn_decode", silent)
    with pytest.raises(RuntimeError, match="stcn: published differs from vosops by nan"):
        frames.measure_case("stcn", repeats=1)


def test_command_writes_a_file_for_any_registered_model(tmp_path):
    app = Typer()
    app.command()(frames.main)
    target = tmp_path / "frames.json"
    result = CliRunner().invoke(app, ["--case", "stm", "--repeats", "1", "--json", str(target)])
    assert result.exit_code == 0, result.output
    record = json.loads(target.read_text())
    assert [row["implementation"] for row in record["rows"]] == ["vosops"]
    assert record["environment"]["torch"] == torch.__version__
    assert CliRunner().invoke(app, ["--case", "none"]).exit_code == 2
