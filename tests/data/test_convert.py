# SPDX-License-Identifier: Apache-2.0
"""Other data sets in the layout of YouTube-VOS."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from vosops.data import read_labels
from vosops.data.check import check_dataset
from vosops.data.convert import ConvertError, convert
from vosops.data.convert_sources import vspw_videos, youtube_vis_videos
from vosops.data.rle import decode_segmentation, run_lengths

HEIGHT, WIDTH = 6, 8


def box(top, left, height, width):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def runs(mask):
    """COCO's uncompressed run lengths, by definition."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": [HEIGHT, WIDTH], "counts": counts}


@pytest.fixture
def youtube_vis(tmp_path):
    """Two videos of three frames; in the first a small object lies on a large one, and a crowd appears."""
    root = tmp_path / "vis"
    videos = []
    for number, name in ((3, "0a1b"), (7, "2c3d")):
        folder = root / "train" / "JPEGImages" / name
        folder.mkdir(parents=True)
        for frame in range(3):
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * frame, np.uint8)).save(
                folder / f"{frame:05d}.jpg"
            )
        names = [f"{name}/{frame:05d}.jpg" for frame in range(3)]
        videos.append({"id": number, "height": HEIGHT, "width": WIDTH, "file_names": names})
    small, large, crowd = box(1, 1, 2, 2), box(0, 0, 5, 5), box(5, 5, 1, 3)
    annotations = [
        {"id": 1, "video_id": 3, "category_id": 9, "segmentations": [runs(small), None, runs(small)]},
        {"id": 2, "video_id": 3, "category_id": 4, "segmentations": [runs(large), runs(large), None]},
        {"id": 5, "video_id": 3, "category_id": 4, "iscrowd": 1, "segmentations": [None, runs(crowd), None]},
        {
            "id": 8,
            "video_id": 7,
            "category_id": 4,
            "segmentations": [[[1, 1, 5, 1, 5, 4, 1, 4]], None, runs(box(0, 0, 0, 0))],
        },
    ]
    content = {
        "videos": videos,
        "annotations": annotations,
        "categories": [{"id": 4, "name": "dog"}, {"id": 9, "name": "ball"}],
    }
    (root / "instances.json").write_text(json.dumps(content))
    return root


def change(root, edit):
    path = root / "instances.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_youtube_vis_becomes_youtube_vos(youtube_vis, tmp_path):
    calls = []
    out = tmp_path / "out"
    report = convert(youtube_vis_videos(youtube_vis), out, lambda *call: calls.append(call))
    assert (report.videos, report.masks, report.written) == (2, 6, 6)
    assert calls == [(1, 2), (2, 2)]
    first, second, third = (read_labels(out / f"Annotations/0a1b/{frame:05d}.png") for frame in range(3))
    assert (first[1:3, 1:3] == 1).all()  # the smaller one is in front
    assert (first == 2).sum() == 25 - 4
    assert (second[:5, :5] == 2).all()
    assert (second[5, 5:] == 255).all()
    assert (third == 1).sum() == 4
    assert (read_labels(out / "Annotations/2c3d/00000.png") == box(1, 1, 3, 4)).all()
    objects = json.loads((out / "meta.json").read_text())["videos"]["0a1b"]["objects"]
    assert objects == {
        "1": {"category": "ball", "frames": ["00000", "00002"]},
        "2": {"category": "dog", "frames": ["00000", "00001"]},
    }
    assert os.stat(out / "JPEGImages/0a1b/00001.jpg").st_nlink == 2
    assert check_dataset(out).problems == ()


def test_a_stopped_conversion_goes_on(youtube_vis, tmp_path):
    out = tmp_path / "out"
    convert(youtube_vis_videos(youtube_vis), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    gone = out / "Annotations/0a1b/00001.png"
    gone.unlink()
    (out / "meta.json").unlink()
    (out / "Annotations/0a1b/.00001.png.tmp.png").write_bytes(b"half")
    report = convert(youtube_vis_videos(youtube_vis), out)
    assert report.written == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert all(path.stat().st_mtime_ns == times[path] for path in times if path != gone)


def test_frames_are_copied_where_links_are_impossible(youtube_vis, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    convert(youtube_vis_videos(youtube_vis), tmp_path / "out")
    copy = tmp_path / "out/JPEGImages/0a1b/00001.jpg"
    assert copy.read_bytes() == (youtube_vis / "train/JPEGImages/0a1b/00001.jpg").read_bytes()


def test_vspw_and_panoptic_masks(tmp_path):
    rng = np.random.default_rng(0)
    grey = np.zeros((HEIGHT, WIDTH), np.uint8)
    grey[:, :3], grey[0, 0], grey[:, 3:5] = 124, 254, 17
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rgb[:, :3], rgb[:, 3:6] = (5, 0, 1), (4, 2, 0)
    for name, mask in (("grey", grey), ("panoptic", rgb)):
        origin, masks = tmp_path / "vspw/data" / name / "origin", tmp_path / "vspw/data" / name / "mask"
        origin.mkdir(parents=True)
        masks.mkdir()
        for frame in range(2):
            Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(
                origin / f"{frame:08d}.jpg"
            )
        Image.fromarray(mask if name == "grey" else mask[:, ::-1]).save(masks / "00000001.png")
        Image.fromarray(mask).save(masks / "00000000.png")
    out = tmp_path / "out"
    report = convert(vspw_videos(tmp_path / "vspw"), out)
    assert (report.videos, report.masks) == (2, 4)
    labels = read_labels(out / "Annotations/grey/00000000.png")
    assert labels[1].tolist() == [124, 124, 124, 17, 17, 255, 255, 255]
    assert labels[0, 0] == 255
    first, second = (read_labels(out / f"Annotations/panoptic/0000000{frame}.png") for frame in range(2))
    assert sorted(set(first[0].tolist())) == [1, 2, 255]
    assert (second == first[:, ::-1]).all()  # one id for one segment, in all frames
    # A call that goes on numbers as the first one did.
    (out / "Annotations/panoptic/00000001.png").unlink()
    convert(vspw_videos(tmp_path / "vspw"), out)
    assert (read_labels(out / "Annotations/panoptic/00000001.png") == second).all()
    assert check_dataset(out).problems == ()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c["annotations"][0]["segmentations"][0].update(size=[3, 3]),
            "0a1b, frame 00000, annotation 1",
        ),
        (
            lambda c: c["annotations"][1]["segmentations"][1]["counts"].append(4),
            "add up to 52, the frame has 48",
        ),
        (lambda c: c["videos"][1].update(file_names=["2c3d/9.jpg"] * 3), "9.jpg: no such frame, though"),
        (lambda c: c["videos"][0].update(file_names=["x/0.jpg"] * 3), "its first frame x/0.jpg is in none"),
        (lambda c: c.pop("videos"), "is not the JSON of YouTube-VIS"),
        (lambda c: c["annotations"][0].update(video_id=99), r"is not the JSON of YouTube-VIS .*KeyError: 99"),
        (lambda c: c.update(annotations=c["annotations"] * 100), "0a1b has 300 instances, 254 fit"),
        (lambda c: c["videos"].append(c["videos"][0]), "0a1b comes 2 times"),
    ],
)
def test_what_cannot_be_converted_is_named(youtube_vis, tmp_path, edit, message):
    change(youtube_vis, edit)

    def run():
        convert(youtube_vis_videos(youtube_vis), tmp_path / "out")

    with pytest.raises(ConvertError, match=message):
        run()


def test_sources_that_are_not_there(youtube_vis, tmp_path):
    with pytest.raises(ConvertError, match="gone: no such folder or JSON file"):
        youtube_vis_videos(tmp_path / "gone")
    shutil.copy(youtube_vis / "instances.json", youtube_vis / "more.json")
    with pytest.raises(ConvertError, match=r"exactly one JSON .* found instances.json, more.json"):
        youtube_vis_videos(youtube_vis)
    assert len(youtube_vis_videos(youtube_vis / "more.json")) == 2
    with pytest.raises(ConvertError, match="holds no video in VSPW's layout"):
        vspw_videos(youtube_vis)


def test_damaged_masks_in_the_target_are_named(youtube_vis, tmp_path):
    out = tmp_path / "out"
    convert(youtube_vis_videos(youtube_vis), out)
    (out / "Annotations/2c3d/00002.png").write_bytes(b"half a file")
    with pytest.raises(ConvertError, match="00002.png: .*; remove it, and convert again"):
        convert(youtube_vis_videos(youtube_vis), out)


def test_run_lengths_in_text():
    # Made by pycocotools 2.0.11.
    mask = np.zeros((7, 9), bool)
    mask[2:5, 3:8] = mask[6, 0] = mask[0, 8] = True
    decoded = decode_segmentation({"size": [7, 9], "counts": "61`02D0000000NN4"}, 7, 9)
    assert (decoded == mask).all()
    assert sum(run_lengths("61`02D0000000NN4")) == 63


def as_text(counts):
    """COCO's text of run lengths, by its definition."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            group, value = value & 31, value >> 5
            done = value == (-1 if group & 16 else 0)
            text += chr(48 + group + (0 if done else 32))
            if done:
                break
    return text


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_random_masks_come_back_from_both_forms(share):
    rng = np.random.default_rng(0)
    for _ in range(10):
        mask = rng.random((HEIGHT, WIDTH)) < share
        coded = runs(mask)
        assert (decode_segmentation(coded, HEIGHT, WIDTH) == mask).all()
        assert run_lengths(as_text(coded["counts"])) == coded["counts"]
    long = [0, 70_000, 3, 5, 123_456, 1]
    assert run_lengths(as_text(long)) == long


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [6, 8], "counts": "0~"}, "'~', which is no run length"),
        ({"size": [6, 8], "counts": "`"}, "end within a number"),
        ({"size": [6, 8], "counts": 3}, "counts must be a list or a text, got int"),
        ({"size": [6, 8], "counts": [50, -2]}, "add up to 48"),
        ({"counts": []}, "its size is [], the frame's [H, W] is [6, 8]"),
        ([[1, 2, 3]], "at least three points x, y, got 3 numbers"),
        ("text", "expected run lengths or polygons, got str"),
    ],
)
def test_segmentations_that_are_none(segmentation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_segmentation(segmentation, 6, 8)
