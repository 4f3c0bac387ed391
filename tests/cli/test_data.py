# SPDX-License-Identifier: Apache-2.0
"""`vosops data`: what it prints, exit codes; `check_dataset` finds each kind of fault."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vosops.cli import app
from vosops.data import write_mask


@pytest.fixture
def davis(tmp_path):
    for name in ("bear", "bus"):
        images, masks = (tmp_path / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for frame in range(3):
            Image.fromarray(np.full((30, 40, 3), 99, np.uint8)).save(images / f"{frame:05d}.jpg")
            labels = np.zeros((30, 40), np.uint8)
            labels[5:20, 5:20] = 1
            write_mask(masks / f"{frame:05d}.png", labels)
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "train.txt").write_text("bear\nbus\n")
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["data", *(str(argument) for argument in arguments)])


def test_a_sound_set(davis):
    result = invoke("check", davis)
    assert result.exit_code == 0, result.output
    assert result.stdout == "6 images and 6 masks of 2 sequences: no problems\n"


def test_every_fault_is_named(davis):
    images, masks = davis / "JPEGImages/480p", davis / "Annotations/480p"
    cut = images / "bear/00001.jpg"
    cut.write_bytes(cut.read_bytes()[:-40])
    (images / "bear/00002.jpg").unlink()
    (masks / "bus/00000.png").unlink()
    (masks / "bus/00001.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(masks / "bus/00002.png")
    write_mask(masks / "bear/00000.png", np.ones((20, 40), np.uint8))
    (images / "only").mkdir()
    (masks / "alone").mkdir()
    (davis / "ImageSets/train.txt").write_text("bear gone")
    result = invoke("check", davis)
    assert result.exit_code == 1
    *lines, summary = result.stdout.splitlines()
    assert summary == f"5 images and 5 masks of 2 sequences: {len(lines)} problems"
    text = result.stdout
    for expected in (
        f"{cut}: cannot be decoded (",
        f"{masks}/bear/00002.png: is a mask without an image",
        f"{images}/bus/00000.jpg: has no mask in {masks}/bus",
        f"{masks}/bus/00001.png: cannot be decoded (cannot identify image file",
        f"{masks}/bus/00002.png: is PNG with mode RGB, expected an indexed or grey PNG of ids",
        f"{images}/bear/00000.jpg: is 40x30, its mask 40x20",
        f"{images}/only: has no masks",
        f"{masks}/alone: has no images",
        f"{masks}/bus: no mask shows an object",
        f"{davis}/ImageSets/train.txt: names gone, which is not in {images}",
    ):
        assert expected in text
    assert len(lines) == 10


def test_frames_of_two_sizes(davis):
    for kind, name in (("JPEGImages", "00002.jpg"), ("Annotations", "00002.png")):
        path = davis / kind / "480p/bus" / name
        Image.open(path).resize((20, 15)).save(path)
    result = invoke("check", davis)
    assert result.exit_code == 1
    assert "bus/00002.jpg: is 20x15, the frames before it are 40x30" in result.stdout


def test_sparse_labels_and_meta_of_youtube_vos(davis, tmp_path_factory):
    root = tmp_path_factory.mktemp("youtube")
    for kind in ("JPEGImages", "Annotations"):
        (davis / kind / "480p").rename(root / kind)
    (root / "Annotations/bus/00001.png").unlink()
    assert invoke("check", root).exit_code == 0
    videos = {"bear": {"objects": {"1": {}, "2": {}}}, "gone": {"objects": {}}}
    (root / "meta.json").write_text(json.dumps({"videos": videos}))
    lines = invoke("check", root).stdout.splitlines()
    assert lines[:3] == [
        f"{root}/meta.json: gives bear the objects [1, 2], its masks show [1]",
        f"{root}/meta.json: does not name bus",
        f"{root}/meta.json: names gone, which has no masks",
    ]
    (root / "meta.json").write_text("[]")
    assert "is not YouTube-VOS's meta.json (TypeError" in invoke("check", root).stdout


def test_still_images(tmp_path):
    for kind in ("images", "regions"):
        (tmp_path / kind).mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "images" / f"{name}.jpg")
    write_mask(tmp_path / "regions" / "a.png", np.ones((30, 40), np.uint8))
    result = invoke("check", tmp_path)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{tmp_path}/images/b.jpg: has no mask in {tmp_path}/regions",
        "2 images and 1 mask: 1 problem",
    ]


def test_what_is_no_data_set(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        result = invoke("check", folder)
        assert result.exit_code == 2
        assert f"vosops data check: {folder}" in result.stderr


def test_convert(davis, tmp_path):
    source = tmp_path / "vspw/data/bear"
    source.mkdir(parents=True)
    (davis / "JPEGImages/480p/bear").rename(source / "origin")
    (davis / "Annotations/480p/bear").rename(source / "mask")
    for kept in (0, 3):
        result = invoke("convert", "--from", "vspw", tmp_path / "vspw", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"1 video, 3 masks ({kept} already there) in {tmp_path / 'out'}\n"
    result = invoke("convert", "--from", "ovis", tmp_path / "vspw", tmp_path / "out")
    assert result.exit_code == 2
    assert "vosops data convert:" in result.stderr
    assert "expected exactly one JSON of annotations, found none" in result.stderr


def test_render(tmp_path):
    result = invoke("render", tmp_path / "set", "--clips", "1", "--frames", "2")
    assert result.exit_code == 0, result.output
    assert invoke("check", tmp_path / "set").stdout.startswith("2 images and 2 masks of 1 sequence: no")


def test_show(davis, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run: {tmp_path}/run\nmodel: {{name: stcn_tiny}}\n"
        f"data: {{sources: [{{layout: davis, path: {davis}}}], merge: 0}}\ncrop: 64\nframes: 2\n"
    )
    result = invoke("show", config, tmp_path / "clips.png", "crop=32", "--clips", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"2 clips in {tmp_path / 'clips.png'}\n"
    with Image.open(tmp_path / "clips.png") as sheet:
        assert sheet.size == (2 * 36 + 4, 2 * (32 + 18 + 4) + 4)
    result = invoke("show", config, tmp_path / "clips.png", "data.sources=[{layout: davis, path: gone}]")
    assert result.exit_code == 2
    assert "gone: no such folder of training data" in result.stderr
