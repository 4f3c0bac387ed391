# SPDX-License-Identifier: Apache-2.0
"""`vosops demo`: what it leaves, on which clip, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from vosops.cli.demo import demo
from vosops.data.rendered_clip import RenderedClip, render_clip, write_clip
from vosops.recipes import Pipeline

MODULE = sys.modules["vosops.cli.demo"]
SIZE = (64, 96)


class FirstMask:
    """A segmenter in place of LabelPropagator: says every time what it was given first."""

    def add(self, frame, mask):
        self.object_ids = [int(number) for number in range(1, mask.max() + 1)]
        self.mask = torch.from_numpy(mask).long()

    def step(self, frame):
        return torch.stack([(self.mask == number).float() for number in (0, *self.object_ids)])

    def state_dict(self):
        return {"mask": self.mask, "object_ids": self.object_ids}

    def load_state_dict(self, state):
        self.mask, self.object_ids = state["mask"], state["object_ids"]


class FirstMaskPipeline:
    """Any recipe, made with `FirstMask`."""

    def __init__(self, recipe):
        self.recipe = recipe

    def __call__(self):
        return FirstMask()


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A short clip, a quick segmenter and a small benchmark, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VOSOPS_DATA", raising=False)
    monkeypatch.setattr(MODULE, "render_clip", lambda size: render_clip(4, SIZE))
    monkeypatch.setattr(MODULE, "Pipeline", FirstMaskPipeline)
    monkeypatch.setattr(MODULE, "_SHAPE", "stcn-240p-t5-o1")
    monkeypatch.setattr(MODULE, "_REPEATS", 1)


def _demo(*arguments: str):
    app = typer.Typer()
    app.command()(demo)
    return CliRunner().invoke(app, list(arguments))


def test_rendered_clip():
    done = _demo()
    assert done.exit_code == 0, done.output
    assert "passing, 4 frames of 96x64: rendered from photographs" in done.output
    assert "frames/s" in done.output
    assert "J&F" in done.output
    left = {path.name for path in Path("demo").iterdir()}
    assert left == {"masks", "overlay.mp4", "contact_sheet.png", "benchmark.png", "demo.json", "clip"}
    assert len(list(Path("demo/masks").iterdir())) == 4
    record = json.loads(Path("demo/demo.json").read_text())
    assert 0 < record["j_and_f"] < 1
    assert [row["implementation"] for row in record["benchmark"]] == ["vosops", "eager", "smart_eager"]
    assert all(row["correct"] for row in record["benchmark"])


@pytest.mark.parametrize("model", ["stcn_tiny", "propagate"])
def test_models(monkeypatch, model):
    monkeypatch.setattr(MODULE, "Pipeline", Pipeline)
    monkeypatch.setattr(MODULE, "_benchmark", lambda out, console: [])
    done = _demo(*(() if model == "stcn_tiny" else ("--model", model)))
    assert done.exit_code == 0, done.output
    assert f"from the first mask, {model}:" in done.output
    record = json.loads(Path("demo/demo.json").read_text())
    assert record["model"] == model
    assert 0 < record["j_and_f"] <= 1  # the clip is far smaller than what the model was trained on


def test_a_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr(MODULE, "Pipeline", Pipeline)
    done = _demo("--model", "nothing")
    assert done.exit_code == 2
    assert "nothing" in done.output


def test_real_clip(monkeypatch):
    folder = Path("davis")
    clip = render_clip(4, SIZE)
    write_clip(RenderedClip("camel", clip.frames, clip.masks), folder)
    monkeypatch.setenv("VOSOPS_DATA", str(folder))
    monkeypatch.setattr(MODULE, "_benchmark", lambda out, console: [])
    done = _demo("--out", "result")
    assert done.exit_code == 0, done.output
    assert "camel, 4 frames of 96x64: DAVIS" in done.output
    assert not Path("result/clip").exists()


def test_without_the_checkout_the_benchmark_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["vosops.cli.bench"], "_ROOT", tmp_path)
    done = _demo()
    assert done.exit_code == 0, done.output
    assert "benchmark     skipped: the benchmarks come with the source" in done.output
    assert Path("demo/overlay.mp4").exists()
    assert not Path("demo/benchmark.png").exists()


def test_a_second_demo_replaces_the_first_and_nothing_else(monkeypatch):
    monkeypatch.setattr(MODULE, "_benchmark", lambda out, console: [])
    assert _demo().exit_code == 0
    Path("demo/masks/stale.png").touch()
    Path("demo/notes.txt").touch()
    assert _demo().exit_code == 0
    assert not Path("demo/masks/stale.png").exists()
    assert Path("demo/notes.txt").exists()


def test_refuses_a_folder_of_something_else():
    Path("demo").mkdir()
    Path("demo/thesis.txt").write_text("unfinished")
    done = _demo()
    assert done.exit_code == 2
    assert "--out demo must be new, empty or of an earlier demo: it holds other files" in done.output
    assert [path.name for path in Path("demo").iterdir()] == ["thesis.txt"]


def test_refuses_a_file():
    Path("demo").touch()
    done = _demo()
    assert done.exit_code == 2
    assert "must be a folder, it is a file" in done.output


def test_data_folder_without_the_clip(monkeypatch):
    monkeypatch.setenv("VOSOPS_DATA", "nowhere")
    done = _demo()
    assert done.exit_code == 2
    assert "VOSOPS_DATA=nowhere must hold JPEGImages/480p/camel" in done.output
    assert not Path("demo").exists()


def test_a_failure_in_the_middle_is_one_line(monkeypatch):
    def step(self, frame):
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(FirstMask, "step", step)
    done = _demo()
    assert done.exit_code == 1
    assert "frame 00001 of passing: out of ideas" in done.output
    assert "Traceback" not in done.output
