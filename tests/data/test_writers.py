# SPDX-License-Identifier: Apache-2.0
"""Overlays show objects in their colours; the video plays; the sheet shows names."""

import resource

import av
import numpy as np
import pytest
from PIL import Image

from vosops.data import WriteError, davis_palette, evenly_spaced, overlay, video_writer, write_contact_sheet


@pytest.fixture
def frame():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def test_overlay_blends_objects_and_leaves_the_rest(frame):
    labels = np.zeros((48, 64), np.uint8)
    labels[10:30, 10:40] = 2
    labels[40:, :] = 255
    before = frame.copy()
    result = overlay(frame, labels, davis_palette())
    np.testing.assert_array_equal(frame, before)
    np.testing.assert_array_equal(result[labels != 2], frame[labels != 2])
    np.testing.assert_array_equal(result[10, 10:40], np.broadcast_to([0, 128, 0], (30, 3)))  # contour
    inside = frame[15:25, 15:35].astype(int)
    assert np.abs(result[15:25, 15:35].astype(int) - (inside + np.array([0, 128, 0])) / 2).max() <= 1
    with pytest.raises(ValueError, match=r"labels must have the frame's size \[48, 64\], got \[48, 60\]"):
        overlay(frame, labels[:, :60], davis_palette())


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_video_plays_everywhere(tmp_path, frame, size):
    frame = frame[: size[0], : size[1]]
    with video_writer(tmp_path / "overlay.mp4", size, fps=12.5) as writer:
        for _ in range(7):
            writer.write(frame)
    with av.open(tmp_path / "overlay.mp4") as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.codec_context.name in ("h264", "mpeg4")
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 12.5
        assert (stream.height, stream.width) == (48, 64)
    assert len(frames) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["overlay.mp4"]


def test_same_frames_give_the_same_file(tmp_path):
    rows, columns = np.mgrid[:36, :48]
    files = set()
    for _ in range(12):
        with video_writer(tmp_path / "a.mp4", (36, 48)) as writer:
            for number in range(25):
                grey = 128 + 100 * np.sin(rows / 5 + number / 3) * np.cos(columns / 7 - number / 4)
                writer.write(np.stack([grey, grey[::-1], 255 - grey], -1).astype(np.uint8))
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_video_errors(tmp_path, frame):
    with (
        pytest.raises(ValueError, match="fps must be above 0, got 0"),
        video_writer(tmp_path / "a.mp4", (8, 8), 0),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"frame must have shape \[48, 60, 3\], got \[48, 64, 3\]"),
        video_writer(tmp_path / "a.mp4", (48, 60)) as writer,
    ):
        writer.write(frame)
    with (
        pytest.raises(WriteError, match=r"cannot write .*missing/a\.mp4: No such file"),
        video_writer(tmp_path / "missing" / "a.mp4", (48, 64)),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_full_disk_names_the_video(tmp_path, frame):
    def write():
        with video_writer(tmp_path / "a.mp4", (48, 64)) as writer:
            for _ in range(50):
                writer.write(frame)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*a\.mp4: File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [(10, 4, [0, 3, 6, 9]), (3, 12, [0, 1, 2]), (1, 5, [0]), (0, 5, []), (100, 2, [0, 99])],
)
def test_evenly_spaced(length, count, expected):
    assert evenly_spaced(length, count) == expected


def test_contact_sheet_has_rows_of_captioned_pictures(tmp_path, frame):
    pictures = [(f"{n:05d}", frame) for n in range(5)]
    write_contact_sheet(tmp_path / "sheet.png", pictures, columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (48 + 18 + 4) + 4, 3 * 68 + 4, 3)
    np.testing.assert_array_equal(sheet[22 : 22 + 48, 4:68], frame)
    assert (sheet[4:22, 4:68] < 128).any()  # the name
    assert (sheet[74:, 140:] == 255).all()  # no sixth picture
    write_contact_sheet(tmp_path / "small.png", pictures[:1], width=32)
    assert Image.open(tmp_path / "small.png").size == (40, 24 + 18 + 8)


def test_contact_sheet_errors(tmp_path, frame):
    with pytest.raises(ValueError, match="pictures must hold at least one picture, got none"):
        write_contact_sheet(tmp_path / "sheet.png", [])
    with pytest.raises(WriteError, match=r"cannot write .*missing/sheet\.png: No such file"):
        write_contact_sheet(tmp_path / "missing" / "sheet.png", [("00000", frame)])
