# SPDX-License-Identifier: Apache-2.0
"""`vosops segment` on a small video: what it writes, and one clear line for every error."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.propagate.stand_in import ColourModel
from vosops.cli import app
from vosops.cli.segment import _parse_bytes
from vosops.data import davis_palette, open_frames, video_writer, write_mask
from vosops.memory import Bounded, ByteBudget
from vosops.models import MODELS, ModelInfo
from vosops.propagate import LabelPropagator, Tracker
from vosops.propagate.probabilities import SavedProbabilities
from vosops.refine.network import build_network

SIZE = (120, 192)
FRAMES = 14
MODULE = sys.modules["vosops.cli.segment"]
DATA = Path(os.environ.get("VOSOPS_DATA", "../shared/data"))


def picture(number):
    """A blue square that moves four pixels a frame over a background of stripes."""
    columns = np.arange(SIZE[1])
    frame = np.zeros((*SIZE, 3), np.uint8)
    frame[..., 0] = 120 + 100 * np.sin(columns / 8)
    frame[..., 1] = 140
    frame[30:90, 20 + 4 * number : 80 + 4 * number] = (20, 30, 220)
    return frame


def truth(number):
    mask = np.zeros(SIZE, np.uint8)
    mask[30:90, 20 + 4 * number : 80 + 4 * number] = 5
    return mask


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Frames, a video and the first mask in the current folder; propagation where no model is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MODULE, "default_model", lambda: "propagate")
    Path("clip").mkdir()
    with video_writer("clip.mp4", SIZE, fps=12) as writer:
        for number in range(FRAMES):
            Image.fromarray(picture(number)).save(f"clip/{number:05d}.png")
            writer.write(picture(number))
    write_mask("mask.png", truth(0), davis_palette())
    return tmp_path


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["segment", *map(str, arguments)])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(message, *arguments, code=2):
    """The error is one line on stderr that begins with the command and matches."""
    result = run(*arguments, code=code)
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(message, last), result.output
    assert last.startswith("vosops segment: ")
    assert "Traceback" not in result.output
    return last


def region_similarity(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("video", ["clip", "clip.mp4"])
def test_segments_a_folder_and_a_video(folder, video):
    result = run(video, "--mask", "mask.png", "--out", "out")
    assert "14 masks (objects 5) in out/masks\n" in result.stdout
    assert "overlay video out/overlay.mp4\n" in result.stdout
    assert "contact sheet out/contact_sheet.png\n" in result.stdout
    assert re.search(r"14 frames segmented now, \d+\.\d\d frames/s", result.stdout)
    assert "14/14" in result.stderr
    for number in range(FRAMES):
        labels = np.asarray(Image.open(f"out/masks/{number:05d}.png"))
        assert set(np.unique(labels)) <= {0, 5}
        assert region_similarity(labels == 5, truth(number) == 5) > 0.7, number
    assert open_frames("out/overlay.mp4").length == FRAMES
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "contact_sheet.png",
        "masks",
        "overlay.mp4",
        "run.json",
    ]


def test_options_reach_the_segmenter(folder, monkeypatch):
    made = []
    original = LabelPropagator.__init__

    def note(self, settings=None):
        made.append(settings)
        original(self, settings)

    monkeypatch.setattr(LabelPropagator, "__init__", note)
    memory = [
        "--memory-frames",
        2,
        "--memory-every",
        3,
        "--memory-bytes",
        "2MB",
        "--memory-dtype",
        "bfloat16",
    ]
    run(
        "clip", "--mask", "mask.png", "--out", "out", "--top-k", 4, *memory, "--max-size", 128, "--no-overlay"
    )
    settings = made[-1]
    assert (settings.memory_frames, settings.memory_every, settings.memory_bytes) == (2, 3, 2_000_000)
    assert (settings.memory_dtype, settings.top_k, settings.features) == (torch.bfloat16, 4, "builtin")
    assert sorted(p.name for p in Path("out").iterdir()) == ["masks", "run.json"]
    assert Image.open("out/masks/00013.png").size == SIZE[::-1]


def test_failure_exits_with_1_and_resume_gives_the_same_files(folder):
    arguments = ("clip", "--mask", "mask.png")
    run(*arguments, "--out", "whole")
    good = Path("clip/00008.png").read_bytes()
    Path("clip/00008.png").write_bytes(good[:100])
    message = r"frame 00008 \(clip/00008\.png\): cannot be read .*8 masks are in out/masks; resume \(--resume"
    fails(message, *arguments, "--out", "out", code=1)
    Path("clip/00008.png").write_bytes(good)
    fails(r"out is not empty: resume=True \(--resume on the command line\)", *arguments, "--out", "out")
    changed = r"cannot resume in out: it was begun with top_k=null \(now 3\)\. Repeat what"
    fails(changed, *arguments, "--out", "out", "--resume", "--top-k", 3)
    result = run(*arguments, "--out", "out", "--resume")
    assert "6 frames segmented now" in result.stdout
    for file in sorted(Path("whole").rglob("*.*")):
        assert (Path("out") / file.relative_to("whole")).read_bytes() == file.read_bytes(), file
    assert "nothing was left to segment" in run(*arguments, "--out", "out", "--resume").stdout


def test_interrupt_exits_with_1_and_says_how_to_go_on(folder, monkeypatch):
    step, steps = LabelPropagator.step, []

    def interrupt(self, frame):
        steps.append(frame)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, frame)

    with monkeypatch.context() as patch:
        patch.setattr(LabelPropagator, "step", interrupt)
        message = "interrupted; --resume goes on with the run in out"
        fails(message, "clip", "--mask", "mask.png", "--out", "out", code=1)
    run("clip", "--mask", "mask.png", "--out", "out", "--resume")


def test_input_and_mask_errors(folder):
    arguments = ("--mask", "mask.png", "--out", "out")
    fails(r"nowhere: no such folder or video file", "nowhere", *arguments)
    fails(r"mask\.png: is a single image", "mask.png", *arguments)
    Path("empty").mkdir()
    fails(r"empty: holds no .* frames; found nothing", "empty", *arguments)
    Path("clip/00005.png").rename("moved.png")
    fails(r"frame 00005 \(clip\): is missing", "clip", *arguments)
    Path("moved.png").rename("clip/00005.png")
    fails(r"no\.png: no such mask", "clip", "--mask", "no.png", "--out", "out")
    write_mask("small.png", truth(0)[:40])
    fails(r"small\.png: the mask is 192x40, the frame 192x120", "clip", "--mask", "small.png", "--out", "out")
    write_mask("none.png", truth(0) * 0)
    fails(r"none\.png: is empty", "clip", "--mask", "none.png", "--out", "out")
    Image.fromarray(davis_palette()[truth(0)]).save("colour.png")
    fails(r"colour\.png: is a RGB image with 2 colours", "clip", "--mask", "colour.png", "--out", "out")
    assert not Path("out").exists()


def test_option_errors(folder):
    arguments = ("clip", "--mask", "mask.png", "--out", "out")
    fails(
        r"--memory-bytes must be a size such as 512MB or 2GiB, got 'much'",
        *arguments,
        "--memory-bytes",
        "much",
    )
    fails(r"memory_frames must be at least 1, got 0", *arguments, "--memory-frames", 0)
    fails(r"top_k must be at least 1, got -2", *arguments, "--top-k", -2)
    fails(r"max_size must be at least 16 pixels, got 4", *arguments, "--max-size", 4)
    fails(r"nonsense", *arguments, "--features", "nonsense")
    fails(r"no\.pth", *arguments, "--features", "torchvision:resnet18", "--feature-weights", "no.pth")
    Path("file").write_text("")
    fails(r"cannot write to the output folder file/out: Not a directory", *arguments[:-1], "file/out")
    assert "float64" in run(*arguments, "--memory-dtype", "float64", code=2).output
    assert "--mask" in run("clip", "--out", "out", code=2).output
    assert not Path("out").exists()


class ColourInfo(ModelInfo):
    """A registered model whose checkpoint is one number."""

    def model_class(self):
        return ColourModel


@pytest.fixture
def checkpoint(folder, monkeypatch):
    monkeypatch.setitem(MODELS, "stcn", ColourInfo("stcn", "", (), "", ""))
    torch.save({"network": ColourModel().state_dict()}, "stcn.pth")
    return ("clip", "--mask", "mask.png", "--model", "stcn", "--weights", "stcn.pth", "--no-overlay")


def test_segments_with_a_model(checkpoint, monkeypatch):
    made = []
    original = Tracker.__init__

    def note(self, model, settings=None, **options):
        made.append((settings, options))
        original(self, model, settings, **options)

    monkeypatch.setattr(Tracker, "__init__", note)
    assert "14 masks (objects 5) in out/masks" in run(*checkpoint, "--out", "out").stdout
    labels = np.asarray(Image.open("out/masks/00013.png"))
    assert region_similarity(labels == 5, truth(13) == 5) > 0.8
    settings, options = made[-1]
    assert (settings.memory_every, settings.policy, settings.top_k) == (None, None, None)
    assert options == {"device": None, "dtype": torch.float32}
    memory = ["--memory-every", 3, "--memory-frames", 4, "--memory-bytes", "2MB", "--top-k", 8]
    run(*checkpoint, "--out", "out2", *memory, "--dtype", "bfloat16")
    settings, options = made[-1]
    assert (settings.memory_every, settings.top_k) == (3, 8)
    assert settings.policy == ByteBudget(2_000_000, Bounded(5))
    assert options == {"device": None, "dtype": torch.bfloat16}


def test_several_scales_and_mirrored(checkpoint):
    for name, method in (("model", checkpoint), ("propagation", (*checkpoint[:3], "--no-overlay"))):
        result = run(*method, "--out", name, "--tta", "flip,1.0,0.75")
        assert re.search(r"4 segmenters remember about \d+ MB after 14 frames\n", result.stderr)
        labels = np.asarray(Image.open(f"{name}/masks/00013.png"))
        assert region_similarity(labels == 5, truth(13) == 5) > 0.7, name
        begun = r"it was begun with .*flip=true \(now false\); scales=\[1\.0, 0\.75\] \(now \[1\.0\]\)"
        fails(begun, *method, "--out", name, "--resume")
    out = ("--out", "out")
    fails(
        r"tta must be flip and factors above 0, as flip,1\.0,1\.2; got '1;2'",
        *method,
        *out,
        "--tta",
        "1;2",
    )
    fails(r"tta must be flip and factors above 0, .* got '0'", *method, *out, "--tta", "0")
    assert not Path("out").exists()


def test_a_models_run_is_resumed_with_the_same_weights_only(checkpoint):
    run(*checkpoint, "--out", "whole")
    good = Path("clip/00008.png").read_bytes()
    Path("clip/00008.png").write_bytes(good[:100])
    fails(r"8 masks are in out/masks; resume", *checkpoint, "--out", "out", code=1)
    Path("clip/00008.png").write_bytes(good)
    Path("stcn.pth").rename("moved.pth")
    torch.save({"sharpness": torch.tensor(19.0)}, "stcn.pth")
    resumed = ("--out", "out", "--resume")
    fails(r"cannot resume in out: it was begun with weights=", *checkpoint, *resumed)
    fails(r"it was begun with .*model=\"stcn\"", *checkpoint[:3], *resumed)
    Path("moved.pth").rename("stcn.pth")
    fails(
        r"it was begun with dtype=\"float32\" \(now \"bfloat16\"\)",
        *checkpoint,
        *resumed,
        "--dtype",
        "bfloat16",
    )
    assert "6 frames segmented now" in run(*checkpoint, *resumed).stdout
    for file in Path("whole/masks").iterdir():
        assert (Path("out/masks") / file.name).read_bytes() == file.read_bytes()


def test_options_of_another_method_are_refused_by_name(checkpoint):
    mask = checkpoint[:3]
    fails(
        r"--weights, --dtype: only for a --model other than propagate",
        *mask,
        "--out",
        "out",
        "--weights",
        "stcn.pth",
        "--dtype",
        "float16",
    )
    fails(
        r"--memory-dtype, --features: only for the training-free propagation \(--model propagate\)",
        *checkpoint,
        "--out",
        "out",
        "--features",
        "builtin",
        "--memory-dtype",
        "float32",
    )
    fails(r"model stcn needs its checkpoint", *mask, "--out", "out", "--model", "stcn")
    fails(r"model must be one of stm, kmn, .*, got 'tcn'", *mask, "--out", "out", "--model", "tcn")
    fails(r"no such file: gone\.pth", *mask, "--out", "out", "--model", "stcn", "--weights", "gone.pth")
    torch.save({"other": torch.zeros(3)}, "other.pth")
    found = run(*mask, "--out", "out", "--model", "stcn", "--weights", "other.pth", code=2).stderr
    assert "vosops segment: other.pth does not fit stcn (2 misfits)" in found
    assert "missing (1): sharpness\n  unexpected (1): other" in found
    fails(r"memory_frames must be at least 1, got 0", *checkpoint, "--out", "out", "--memory-frames", 0)
    fails(r"memory_every must be at least 1, got 0", *checkpoint, "--out", "out", "--memory-every", 0)
    assert not Path("out").exists()


RECIPE = """
members:
  - {model: stcn, weights: stcn.pth}
  - {model: propagate, options: {stride: 6}}
tta: [flip]
merge: maximum
memory: {frames: 3}
max_size: 128
"""


def test_a_recipe_and_what_is_laid_over_it(checkpoint, monkeypatch):
    made = []
    original = MODULE.Pipeline

    def note(recipe):
        made.append(recipe)
        return original(recipe)

    monkeypatch.setattr(MODULE, "Pipeline", note)
    Path("recipe.yaml").write_text(RECIPE)
    method = ("clip", "--mask", "mask.png", "--no-overlay", "--ensemble", "recipe.yaml")
    result = run(*method, "--out", "out")
    assert "4 segmenters remember about" in result.stderr
    labels = np.asarray(Image.open("out/masks/00013.png"))
    assert region_similarity(labels == 5, truth(13) == 5) > 0.7
    fails(r"it was begun with max_size=128 \(now 96\)", *method, "--out", "out", "--resume", "--max-size", 96)
    good = Path("clip/00008.png").read_bytes()
    Path("clip/00008.png").write_bytes(good[:100])
    fails(r"8 masks are in cut/masks", *method, "--out", "cut", code=1)
    Path("clip/00008.png").write_bytes(good)
    run(*method, "--out", "cut", "--resume")
    for file in Path("out/masks").iterdir():
        assert (Path("cut/masks") / file.name).read_bytes() == file.read_bytes(), file
    weights = Path("boundary.pth")
    torch.save(build_network().state_dict(), weights)
    monkeypatch.setattr("vosops.refine.boundary.WEIGHTS", weights)
    changed = ["--tta", "0.75", "--memory-bytes", "2MB", "--refine", "boundary", "--zoom", "small"]
    run(*method, "--out", "out2", *changed, "--max-size", 64)
    recipe = made[-1]
    assert [member.model for member in recipe.members] == ["stcn", "propagate"]
    assert (recipe.tta, recipe.merge, recipe.zoom, recipe.max_size) == (("0.75",), "maximum", "small", 64)
    assert (recipe.memory.frames, recipe.memory.bytes) == (3, 2_000_000)
    assert recipe.refine.kind == "boundary"
    out = ("--out", "out3")
    refused = ("--model", "stcn", "--top-k", 3, "--features", "builtin")
    fails(r"--model, --top-k, --features: only for a single --model", *method, *out, *refused)
    fails(
        r"memory_every must be null where memory is balanced",
        *method,
        *out,
        "--memory-balanced",
        "--memory-every",
        2,
    )
    Path("recipe.yaml").write_text(RECIPE.replace("stcn.pth", "gone.pth"))
    fails(r"member 1: weights: no such file: gone\.pth", *method, *out)
    Path("recipe.yaml").write_text("model: stcn")
    fails(r"unknown key model; there are members, tta", *method, *out)
    fails(r"cannot read gone\.yaml", *method[:-1], "gone.yaml", *out)
    assert not Path("out3").exists()


def test_the_default_is_the_shipped_model(checkpoint, monkeypatch):
    monkeypatch.setattr(MODULE, "default_model", lambda: "stcn")
    monkeypatch.setattr("vosops.recipes.pipeline.shipped_weights", lambda name: Path("stcn.pth"))
    run(*checkpoint[:3], "--no-overlay", "--out", "default")
    run(*checkpoint, "--out", "named")
    assert Path("default/run.json").read_bytes() == Path("named/run.json").read_bytes()


def test_probabilities_are_saved_and_an_ensemble_reads_them(folder):
    mask = ("clip", "--mask", "mask.png", "--no-overlay", "--max-size", 96)
    run(*mask, "--out", "a", "--save-probabilities")
    assert len(list(Path("a/probabilities").glob("*.npz"))) == FRAMES
    assert SavedProbabilities("a/probabilities").manifest["size"] == [60, 96]
    Path("offline.yaml").write_text("members: [{probabilities: a}]")
    run(*mask, "--out", "b", "--ensemble", "offline.yaml")
    for number in range(FRAMES):
        first, second = (np.asarray(Image.open(f"{out}/masks/{number:05d}.png")) for out in "ab")
        assert (first == second).mean() > 0.999


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MB", 512_000_000), ("2 GiB", 2 << 30), ("1.5kb", 1500), ("300k", 300_000), ("4096", 4096)],
)
def test_sizes(text, expected):
    assert _parse_bytes(text) == expected


@pytest.mark.skipif(not (DATA / "JPEGImages").is_dir(), reason="needs real clips: VOSOPS_DATA")
def test_real_clip_with_three_objects(tmp_path):
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(4):
        (clip / f"{number:05d}.jpg").symlink_to(
            (DATA / f"JPEGImages/480p/soapbox/{number:05d}.jpg").resolve()
        )
    mask = DATA / "Annotations_2017_first/480p/soapbox/00000.png"
    result = run(clip, "--mask", mask, "--out", tmp_path / "out", "--max-size", 320)
    assert "4 masks (objects 1, 2, 3)" in result.stdout
    last = np.asarray(Image.open(tmp_path / "out" / "masks" / "00003.png"))
    expected = np.asarray(Image.open(DATA / "Annotations/480p/soapbox/00003.png"))
    assert region_similarity(last > 0, expected > 0) > 0.5
