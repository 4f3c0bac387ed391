# SPDX-License-Identifier: Apache-2.0
"""Frames come one at a time, named, in order; what cannot be read is named with the reason."""

import os
import struct
import weakref
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from vosops.data import FrameError, open_frames, video_writer

SIZE = (36, 64)


def picture(number, size=SIZE):
    """A smooth picture that tells its number by its brightness."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([rows * 3, columns * 2, np.full(size, 8 * number)], -1).clip(0, 255).astype(np.uint8)


def write_folder(folder, names, suffix=".png"):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(picture(number)).save(folder / f"{name}{suffix}")
    return folder


def write_video(path, count=12, size=SIZE):
    with video_writer(path, size, fps=25) as writer:
        for number in range(count):
            writer.write(picture(number, size))
    return path


def test_folder_yields_every_frame_by_name(tmp_path):
    source = open_frames(write_folder(tmp_path / "clip", [f"{n:05d}" for n in range(4)]))
    assert (source.length, source.size, source.fps) == (4, SIZE, None)
    frames = list(source)
    assert [name for name, _ in frames] == ["00000", "00001", "00002", "00003"]
    for number, (_, frame) in enumerate(frames):
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, picture(number))


def test_folder_is_in_natural_order_and_skips_other_files(tmp_path):
    folder = write_folder(tmp_path / "clip", [f"frame{n}" for n in range(8, 12)], ".jpg")
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame8.jpg").write_bytes(b"left by a file manager")
    assert [name for name, _ in open_frames(folder)] == ["frame8", "frame9", "frame10", "frame11"]


def test_start_skips_without_reading(tmp_path):
    folder = write_folder(tmp_path / "clip", ["00000", "00001", "00002"])
    source = open_frames(folder)
    (folder / "00001.png").write_bytes(b"broken")
    assert [name for name, _ in source.frames(2)] == ["00002"]


def test_numbering_in_even_steps_is_accepted(tmp_path):
    folder = write_folder(tmp_path / "clip", ["00010", "00015", "00020"])
    assert open_frames(folder).length == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["00000", "00001", "00003"],
            r"frame 00002 .*is missing; missing in all: 00002\. Add or renumber frames",
        ),
        (["00000", "00005", "00015"], r"frame 00010 .*is missing \(the others are numbered in steps of 5\)"),
        (["a1", "a2", "a10"], r"frame a3 .*missing in all: a3, a4, a5, a6, a7 and 2 more"),
        (["1", "01", "2"], r"two frames have the number 1: 0?1 is one of them"),
        (["1", "2", "4000000000"], r"frame 3 .*missing in all: 3, 4, 5, 6, 7 and 3999999992 more"),
    ],
)
def test_gap_in_the_numbering_is_a_missing_frame(tmp_path, names, message):
    with pytest.raises(FrameError, match=message):
        open_frames(write_folder(tmp_path / "clip", names))


def test_two_images_of_one_name(tmp_path):
    write_folder(tmp_path / "clip", ["first", "last"], ".jpg")
    with pytest.raises(FrameError, match=r"two frames have the name last: last\.\w+ and last\.\w+"):
        open_frames(write_folder(tmp_path / "clip", ["last"], ".png"))


def test_folder_without_frames(tmp_path):
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(FrameError, match=r"holds no \.jpg/\.jpeg/\.png frames; found readme\.txt"):
        open_frames(tmp_path)


def test_missing_path_and_single_image(tmp_path):
    with pytest.raises(FrameError, match="nowhere: no such folder or video file"):
        open_frames(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "clip", ["00000"])
    with pytest.raises(FrameError, match="is a single image: pass the folder of frames"):
        open_frames(folder / "00000.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_frame_is_named_after_the_frames_before_it(tmp_path, suffix):
    folder = write_folder(tmp_path / "clip", ["00000", "00001", "00002"], suffix)
    broken = folder / f"00001{suffix}"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    frames = open_frames(folder).frames()
    assert next(frames)[0] == "00000"
    with pytest.raises(
        FrameError, match=rf"frame 00001 \(.*00001{suffix}\): cannot be read \(.+\)"
    ) as raised:
        next(frames)
    assert raised.value.frame == "00001"
    assert raised.value.path == broken


def test_frame_that_vanishes_is_named(tmp_path):
    folder = write_folder(tmp_path / "clip", ["00000", "00001"])
    source = open_frames(folder)
    (folder / "00001.png").unlink()
    with pytest.raises(FrameError, match=r"frame 00001 \(.*\): is missing"):
        list(source)


def test_frame_of_another_size_is_named(tmp_path):
    folder = write_folder(tmp_path / "clip", ["00000", "00001"])
    Image.fromarray(picture(1, (40, 64))).save(folder / "00001.png")
    with pytest.raises(FrameError, match=r"frame 00001 .*is 64x40, the frames before it are 64x36"):
        list(open_frames(folder))


def test_sixteen_bit_frame_says_what_to_do(tmp_path):
    Image.fromarray(np.zeros(SIZE, np.uint16)).save(tmp_path / "00000.png")
    with pytest.raises(FrameError, match="has I;16 pixels: save it with 8 bits per channel"):
        open_frames(tmp_path)


def test_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(picture(0)).save(tmp_path / "00000.jpg", exif=exif)
    assert open_frames(tmp_path).size == SIZE[::-1]


def test_video_yields_numbered_frames(tmp_path):
    source = open_frames(write_video(tmp_path / "clip.mp4"))
    assert (source.length, source.size, source.fps) == (12, SIZE, 25.0)
    frames = list(source)
    assert [name for name, _ in frames] == [f"{n:05d}" for n in range(12)]
    for number, (_, frame) in enumerate(frames):
        assert np.abs(frame.astype(int) - picture(number)).mean() < 4  # lossy, but the right frame
    later = list(source.frames(7))
    assert [name for name, _ in later] == [f"{n:05d}" for n in range(7, 12)]
    for (_, again), (_, frame) in zip(later, frames[7:], strict=True):
        np.testing.assert_array_equal(again, frame)


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_frames_are_not_kept(tmp_path, kind):
    names = [f"{n:05d}" for n in range(12)]
    path = write_folder(tmp_path / "clip", names) if kind == "folder" else write_video(tmp_path / "clip.mp4")
    seen = []
    for _, frame in open_frames(path):
        seen.append(weakref.ref(frame))
        assert sum(reference() is not None for reference in seen) <= 2
    assert len(seen) == 12


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)],
)
def test_video_is_turned_upright(tmp_path, matrix, turn):
    path = write_video(tmp_path / "clip.mp4", count=2)
    flat = next(iter(open_frames(path)))[1]
    content = bytearray(path.read_bytes())
    # The display matrix of the track header: x' = a x + c y, y' = b x + d y, 16.16 fixed point.
    position = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    content[position : position + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    source = open_frames(path)
    upright = np.rot90(flat, turn)
    assert source.size == upright.shape[:2]
    np.testing.assert_array_equal(next(iter(source))[1], upright)


def test_video_without_an_index_has_no_length(tmp_path):
    with av.open(tmp_path / "clip.mkv", "w") as container:
        encode(container, range(10))
    source = open_frames(tmp_path / "clip.mkv")
    assert source.length is None
    assert len(list(source)) == 10


def encode(container, numbers, size=SIZE):
    stream = container.add_stream("mpeg4", rate=25)
    stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    for number in numbers:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")))
    container.mux(stream.encode())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_truncated_video_is_an_error_not_a_shorter_video(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    with av.open(path, "w", options=options) as container:
        encode(container, range(200))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(FrameError, match=r"frame 00\d\d\d .*(truncated|damaged|cannot be decoded)"):
        list(open_frames(path))


def test_damaged_packet_names_the_frame(tmp_path):
    path = write_video(tmp_path / "clip.mp4", count=30)
    with av.open(path) as container:
        entry = container.streams.video[0].index_entries[20]
        position, length = entry.pos, entry.size
    content = bytearray(path.read_bytes())
    content[position : position + length] = os.urandom(length)
    path.write_bytes(content)
    names = []
    with pytest.raises(FrameError, match=r"frame 000(1\d|20) .*cannot be decoded \(Invalid data") as raised:
        names += [name for name, _ in open_frames(path)]
    assert raised.value.frame is not None


def test_video_whose_size_changes(tmp_path):
    parts = []
    for number, size in enumerate([SIZE, (48, 64)]):
        with av.open(tmp_path / f"{number}.m4v", "w", format="m4v") as container:
            encode(container, range(5), size)
        parts.append((tmp_path / f"{number}.m4v").read_bytes())
    (tmp_path / "clip.m4v").write_bytes(b"".join(parts))
    with pytest.raises(FrameError, match=r"frame 0000[45] .*is 64x48, the frames before it are 64x36"):
        list(open_frames(tmp_path / "clip.m4v"))


def test_files_that_are_no_video(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(FrameError, match=r"clip\.mp4: cannot be opened as a video \(Invalid data"):
        open_frames(tmp_path / "clip.mp4")
    with av.open(tmp_path / "sound.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(FrameError, match=r"sound\.wav: holds no video stream"):
        open_frames(tmp_path / "sound.wav")


def test_fingerprint_follows_the_first_frames_only(tmp_path):
    folder = write_folder(tmp_path / "clip", ["00000", "00001", "00002"])
    before = open_frames(folder).fingerprint(2)
    (folder / "00002.png").write_bytes(b"mended later")
    assert open_frames(folder).fingerprint(2) == before
    (folder / "00001.png").write_bytes(b"another frame")
    assert open_frames(folder).fingerprint(2) != before


@pytest.mark.skipif(
    not Path(os.environ.get("VOSOPS_DATA", "../shared/data"), "JPEGImages").is_dir(),
    reason="needs real clips: VOSOPS_DATA",
)
def test_real_clip():
    source = open_frames(Path(os.environ.get("VOSOPS_DATA", "../shared/data"), "JPEGImages/480p/soapbox"))
    assert (source.length, source.size) == (45, (480, 854))
    name, frame = next(source.frames(44))
    reference = cv2.imread(str(source.path / f"{name}.jpg"))[..., ::-1]
    assert np.abs(frame.astype(int) - reference).max() <= 3  # two JPEG decoders
