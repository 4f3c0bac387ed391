# SPDX-License-Identifier: Apache-2.0
"""A run streams, keeps what it wrote, and goes on after any stop to the same bytes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vosops.data import davis_palette, open_frames, video_writer, write_mask
from vosops.propagate.run import RunError, RunRefusedError, Summary, segment_video

SIZE = (36, 48)
FRAMES = 25


class Drifting:
    """Moves the objects one column right per frame and lets the frame's brightness decide at their edges.

    Its answer depends on every frame before, so a state that is not exact shows.
    """

    def __init__(self, fail_at=None, delay=0.0):
        self.object_ids, self.fail_at, self.delay = [], fail_at, delay
        self.steps, self.belief, self.seen = 0, torch.zeros(0), 0.0

    def add(self, frame, mask):
        self.object_ids = [int(label) for label in np.unique(mask) if label]
        labels = torch.from_numpy(np.asarray(mask))
        self.belief = torch.stack([labels == label for label in (0, *self.object_ids)]).float()
        self.seen = float(frame.mean())

    def step(self, frame):
        time.sleep(self.delay)
        self.steps += 1
        self.belief = 0.9 * self.belief.roll(1, -1) + 0.1 * self.belief
        if self.steps == self.fail_at:
            raise ValueError("the model has no more memory")
        self.seen = 0.7 * self.seen + 0.3 * float(frame.mean())
        bright = torch.from_numpy(frame).float().mean(-1) / 255
        self.belief[1:] += 0.02 * bright * (self.seen / 128)
        return (self.belief / self.belief.sum(0)).clone()

    def state_dict(self):
        return {"object_ids": self.object_ids, "steps": self.steps, "belief": self.belief, "seen": self.seen}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)


def picture(number):
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    grey = 128 + 100 * np.sin(rows / 5 + number / 3) * np.cos(columns / 7 - number / 4)
    return np.stack([grey, grey[::-1], 255 - grey], -1).astype(np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros(SIZE, np.uint8)
    mask[8:20, 5:15] = 2
    mask[15:30, 20:30] = 7
    mask[:2] = 255
    return mask


@pytest.fixture
def clip(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(FRAMES):
        Image.fromarray(picture(number)).save(folder / f"{number:05d}.png")
    return folder


@pytest.fixture
def movie(tmp_path):
    with video_writer(tmp_path / "clip.mp4", SIZE, fps=10) as writer:
        for number in range(FRAMES):
            writer.write(picture(number))
    return tmp_path / "clip.mp4"


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["clip", "movie"])
def test_whole_run(request, tmp_path, mask, kind):
    source = open_frames(request.getfixturevalue(kind))
    progress = []
    summary = segment_video(
        Drifting(), source, mask, tmp_path / "out", on_progress=lambda *args: progress.append(args)
    )
    assert isinstance(summary, Summary)
    assert (summary.frames, summary.segmented, summary.object_ids) == (FRAMES, FRAMES, [2, 7])
    assert summary.fps == pytest.approx(FRAMES / summary.seconds)
    assert progress == [(stage, n + 1, FRAMES) for stage in ("segment", "overlay") for n in range(FRAMES)]
    masks = [f"masks/{number:05d}.png" for number in range(FRAMES)]
    assert sorted(content(tmp_path / "out")) == ["contact_sheet.png", *masks, "overlay.mp4", "run.json"][
        :1
    ] + sorted([*masks, "overlay.mp4", "run.json"])
    first = Image.open(summary.masks / "00000.png")
    np.testing.assert_array_equal(np.asarray(first), np.where(mask == 255, 0, mask))
    np.testing.assert_array_equal(np.reshape(first.getpalette(), (-1, 3)), davis_palette())
    last = np.asarray(Image.open(summary.masks / "00024.png"))
    assert set(np.unique(last)) == {0, 2, 7}
    assert open_frames(summary.overlay).length == FRAMES
    assert open_frames(summary.overlay).fps == (10 if kind == "movie" else 24)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["complete"], record["frames"]) == (True, FRAMES)


def test_without_overlay(tmp_path, clip, mask):
    summary = segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out", write_overlay=False)
    assert (summary.overlay, summary.contact_sheet) == (None, None)
    assert not (tmp_path / "out" / "overlay.mp4").exists()


def test_failure_in_a_step_keeps_the_masks_and_resume_gives_the_same_files(tmp_path, clip, mask):
    source = open_frames(clip)
    segment_video(Drifting(), source, mask, tmp_path / "whole")
    message = r"frame 00015: the model has no more memory\. 15 masks are .* goes on from frame number 10"
    with pytest.raises(RunError, match=message) as raised:
        segment_video(Drifting(fail_at=15), source, mask, tmp_path / "out")
    assert raised.value.frame == "00015"
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 15
    summary = segment_video(Drifting(), source, mask, tmp_path / "out", resume=True)
    assert (summary.frames, summary.segmented) == (FRAMES, 15)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["clip", "movie"])
def test_broken_frame_goes_on_from_that_frame_once_mended(request, tmp_path, mask, kind):
    path = request.getfixturevalue(kind)
    segment_video(Drifting(), open_frames(path), mask, tmp_path / "whole")
    source = open_frames(path)
    file = path / "00013.png" if kind == "clip" else path
    good = file.read_bytes()
    file.write_bytes(good[: len(good) * 8 // 10 if kind == "movie" else 200])
    message = r"frame 000(\d\d) .*\. (\d+) masks are in .*goes on from frame number (\d+)"
    with pytest.raises(RunError, match=message) as raised:
        segment_video(Drifting(), source, mask, tmp_path / "out")
    frame, written, number = map(int, re.search(message, str(raised.value)).groups())
    assert raised.value.frame == f"{frame:05d}"
    assert frame == written == number
    assert frame == 13 or (kind == "movie" and 0 < frame < FRAMES)
    file.write_bytes(good)
    summary = segment_video(Drifting(), open_frames(path), mask, tmp_path / "out", resume=True)
    assert summary.segmented == FRAMES - frame
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_write_error_names_the_file_and_resume_writes_it(tmp_path, clip, mask):
    source = open_frames(clip)
    segment_video(Drifting(), source, mask, tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(stage, done, total):
        if done == 13:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    try:
        message = r"frame 00013: .*00013\.png: File too.*number 10; cannot write .*state\.pt: File too"
        with pytest.raises(RunError, match=message):
            segment_video(Drifting(), source, mask, tmp_path / "out", on_progress=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").rglob(".*"))
    segment_video(Drifting(), source, mask, tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_mask_that_could_not_be_written_comes_from_the_saved_state(tmp_path, clip, mask, monkeypatch):
    source = open_frames(clip)
    segment_video(Drifting(), source, mask, tmp_path / "whole")
    replace = os.replace

    def fail(a, b):
        if Path(b).name == "00013.png":
            raise PermissionError(13, "Permission denied")
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(
            RunError, match=r"cannot write .*00013\.png: Permission denied\. 13 masks .* number 14"
        ):
            segment_video(Drifting(), source, mask, tmp_path / "out")
    assert segment_video(Drifting(), source, mask, tmp_path / "out", resume=True).segmented == 11
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_interrupt_keeps_the_state(tmp_path, clip, mask):
    def interrupt(stage, done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out", on_progress=interrupt)
    summary = segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out", resume=True)
    assert summary.segmented == FRAMES - 7


def test_failed_overlay_keeps_all_masks(tmp_path, clip, mask):
    def vanish(stage, done, total):
        if stage == "segment" and done == FRAMES:
            (tmp_path / "out" / "masks" / "00003.png").rename(tmp_path / "moved.png")

    with pytest.raises(RunError, match=r"all 25 masks are in .*, but .*00003\.png: no such mask"):
        segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out", on_progress=vanish)
    (tmp_path / "moved.png").rename(tmp_path / "out" / "masks" / "00003.png")
    summary = segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out", resume=True)
    assert (summary.segmented, summary.fps) == (0, 0.0)
    assert summary.overlay.exists()


KILLED = """
import sys
sys.path[:0] = {path!r}
from test_run import Drifting
from vosops.data import open_frames, read_mask
from vosops.propagate.run import segment_video
mask, palette = read_mask({mask!r})
segment_video(Drifting(delay=0.05), open_frames({clip!r}), mask, {out!r}, palette=palette)
"""


def test_killed_run_loses_at_most_ten_frames(tmp_path, clip, mask):
    segment_video(Drifting(), open_frames(clip), mask, tmp_path / "whole")
    write_mask(tmp_path / "mask.png", mask)
    out = tmp_path / "out"
    script = KILLED.format(
        path=[str(Path(__file__).parent), *sys.path],
        mask=str(tmp_path / "mask.png"),
        clip=str(clip),
        out=str(out),
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 60
        while not (out / "masks" / "00016.png").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    written = len(list((out / "masks").glob("[0-9]*.png")))
    assert written < FRAMES
    (out / "masks" / ".00020.png.tmp.png").write_bytes(b"half a mask")
    summary = segment_video(Drifting(), open_frames(clip), mask, out, resume=True)
    assert FRAMES - written <= summary.segmented <= FRAMES - written + 10
    assert content(out) == content(tmp_path / "whole")


def test_resume_of_a_complete_run_does_nothing(tmp_path, clip, mask):
    segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out")
    before = content(tmp_path / "out")
    summary = segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out", resume=True)
    assert (summary.frames, summary.segmented) == (FRAMES, 0)
    assert content(tmp_path / "out") == before
    Image.fromarray(picture(FRAMES)).save(clip / f"{FRAMES:05d}.png")
    with pytest.raises(RunRefusedError, match=r"complete with 25 frames, .* now has 26"):
        segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out", resume=True)


def test_resume_in_an_empty_folder_begins(tmp_path, clip, mask):
    summary = segment_video(
        Drifting(), open_frames(clip), mask, tmp_path / "out", resume=True, write_overlay=False
    )
    assert summary.segmented == FRAMES


def test_folder_that_is_not_empty_is_refused(tmp_path, clip, mask):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(
        RunRefusedError, match=r"out is not empty: resume=True \(--resume on the command line\)"
    ):
        segment_video(Drifting(), open_frames(clip), mask, out)
    with pytest.raises(RunRefusedError, match=r"holds no run\.json, so no run of vosops"):
        segment_video(Drifting(), open_frames(clip), mask, out, resume=True)
    assert content(out) == {"thesis.txt": b"mine"}


def test_folder_that_cannot_be_written_is_refused_before_work(tmp_path, clip, mask):
    (tmp_path / "file").write_text("")
    segmenter = Drifting()
    with pytest.raises(
        RunRefusedError, match=r"cannot write to the output folder .*file/out: Not a directory"
    ):
        segment_video(segmenter, open_frames(clip), mask, tmp_path / "file" / "out")
    assert segmenter.object_ids == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused(tmp_path, clip, mask):
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(RunRefusedError, match=r"cannot write to the output folder .*out: Permission denied"):
        segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out")


class Other(Drifting):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"top_k": 30}}, r"begun with top_k=20 \(now 30\)\. Repeat what"),
        ({"max_size": 40}, r"begun with max_size=null \(now 40\)"),
        ({"mask": 3}, "begun with another mask"),
        ({"input": 3}, "begun with another input"),
        ({"segmenter": Other()}, r'begun with segmenter="Drifting" \(now "Other"\)'),
        ({"earlier": 3}, r"frames of .*clip before 00011 have changed"),
    ],
)
def test_resume_of_another_run_is_refused(tmp_path, clip, mask, change, message):
    settings = {"top_k": 20, "features": "builtin"}
    with pytest.raises(RunError):
        segment_video(
            Drifting(fail_at=12), open_frames(clip), mask, tmp_path / "out", settings=settings, save_every=4
        )
    state = torch.load(tmp_path / "out" / "state.pt")
    assert state["next_frame"] == 12
    if "mask" in change:
        mask[20, 2] = 2
    if "input" in change or "earlier" in change:
        Image.fromarray(255 - picture(3)).resize(SIZE[::-1]).save(
            clip / ("00000.png" if "input" in change else "00005.png"), compress_level=0
        )
    with pytest.raises(RunRefusedError, match=message):
        segment_video(
            change.get("segmenter", Drifting()),
            open_frames(clip),
            mask,
            tmp_path / "out",
            resume=True,
            max_size=change.get("max_size"),
            settings={**settings, **change.get("settings", {})},
        )


@pytest.mark.parametrize("file", ["run.json", "state.pt"])
def test_damaged_files_of_a_run_are_refused(tmp_path, clip, mask, file):
    with pytest.raises(RunError):
        segment_video(Drifting(fail_at=12), open_frames(clip), mask, tmp_path / "out")
    (tmp_path / "out" / file).write_bytes(b"{")
    with pytest.raises(RunRefusedError, match=rf"cannot resume: .*{file} (is damaged|cannot be read)"):
        segment_video(Drifting(), open_frames(clip), mask, tmp_path / "out", resume=True)


class Sized(Drifting):
    def step(self, frame):
        self.worked_at = frame.shape[:2]
        return super().step(frame)


def test_max_size_works_smaller_and_writes_full_masks(tmp_path, clip, mask):
    segmenter = Sized()
    summary = segment_video(segmenter, open_frames(clip), mask, tmp_path / "out", max_size=24)
    assert segmenter.worked_at == (18, 24)
    assert Image.open(summary.masks / "00024.png").size == SIZE[::-1]
    segment_video(segmenter := Sized(), open_frames(clip), mask, tmp_path / "large", max_size=480)
    assert segmenter.worked_at == SIZE  # never enlarged


def test_bad_arguments_are_named_before_work(tmp_path, clip, mask):
    source, out = open_frames(clip), tmp_path / "out"
    small = np.zeros(SIZE, np.uint8)
    small[5, 5] = 4
    for error, message, arguments in [
        (
            TypeError,
            r"mask must be an array \(H, W\) of integer ids, got float64 \[36, 48\]",
            {"mask": mask * 1.0},
        ),
        (TypeError, r"mask must be an array \(H, W\) of integer ids, got str", {"mask": "mask.png"}),
        (ValueError, r"mask must have the frames' size \[36, 48\], got \[36, 40\]", {"mask": mask[:, :40]}),
        (ValueError, "mask must hold ids from 0 to 255, got 0 to 25500", {"mask": mask.astype(int) * 100}),
        (ValueError, "mask must hold at least one object", {"mask": (mask == 255) * np.uint8(255)}),
        (ValueError, r"palette must be \(256, 3\) uint8", {"palette": davis_palette()[:9]}),
        (ValueError, "save_every must be at least 1, got 0", {"save_every": 0}),
        (ValueError, "max_size must be at least 16 pixels, got 8", {"max_size": 8}),
        (
            ValueError,
            r"max_size=16 is too small for the mask: objects \[4\] vanish",
            {"mask": small, "max_size": 16},
        ),
        (TypeError, "settings must be JSON values", {"settings": {"device": torch.device("cpu")}}),
    ]:
        with pytest.raises(error, match=message):
            segment_video(
                **{"segmenter": Drifting(), "source": source, "mask": mask, "out_dir": out, **arguments}
            )
    assert not out.exists()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(2, *SIZE), r"step must return probabilities \(3, 36, 48\), got \(2, 36, 48\)"),
        (torch.full((3, *SIZE), torch.nan), "step returned probabilities that are not finite"),
    ],
)
def test_wrong_answer_of_a_segmenter_names_the_frame(tmp_path, clip, mask, answer, message):
    segmenter = Drifting()
    segmenter.step = lambda frame: answer
    with pytest.raises(RunError, match=rf"frame 00001: {message}\. 1 masks are in .*\(--resume\) "):
        segment_video(segmenter, open_frames(clip), mask, tmp_path / "out")
