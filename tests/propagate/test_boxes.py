# SPDX-License-Identifier: Apache-2.0
"""Boxes from trackers and masks, and their smoothing."""

import io

import cv2
import numpy as np
import pytest
import torch

from vosops.data.rendered_clip import render_clip
from vosops.propagate.boxes import (
    Box,
    BoxFollower,
    MedianFlow,
    OpenCVTracker,
    SmoothBox,
    around,
    joined,
    mask_box,
    object_box,
)

FRAME = np.zeros((120, 200, 3), np.uint8)


@pytest.fixture(scope="module")
def clip():
    return render_clip(frames=11, size=(160, 288))


def mask_of(*boxes):
    mask = np.zeros((120, 200), bool)
    for left, top, width, height in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


class Scripted:
    """A tracker that says what it is told, and notes where it was started."""

    def __init__(self, *boxes):
        self.boxes = list(boxes)
        self.started = []

    def start(self, frame, box, mask):
        self.started.append(box)

    def update(self, frame):
        return self.boxes.pop(0) if self.boxes else None

    def state_dict(self):
        return {"boxes": [None if box is None else list(box) for box in self.boxes]}

    def load_state_dict(self, state):
        self.boxes = [None if box is None else Box(*box) for box in state["boxes"]]


def test_boxes():
    box = Box(10, 20, 30, 10)
    assert box.center == (25, 25)
    assert box.side == 30
    assert box.scaled(2) == Box(-5, 15, 60, 20)
    assert around((25, 25), 30, 10) == box
    assert box.iou(box) == 1
    assert box.iou(Box(25, 20, 30, 10)) == pytest.approx(1 / 3)
    assert box.iou(Box(40, 20, 30, 10)) == 0
    assert joined([box, Box(0, 25, 5, 20)]) == Box(0, 20, 40, 25)
    assert box.holds(Box(12, 20, 28, 10))
    assert not box.holds(Box(12, 20, 29, 10))


def test_the_box_of_a_mask_is_that_of_its_pixels():
    assert mask_box(mask_of((40, 30, 20, 10), (190, 100, 1, 1))) == Box(40, 30, 151, 71)
    assert mask_box(mask_of()) is None
    assert mask_box(np.asfortranarray(mask_of((3, 4, 5, 6)))) == Box(3, 4, 5, 6)


def test_specks_are_left_out_of_an_objects_box():
    mask = mask_of((40, 30, 20, 10), (63, 32, 6, 6), (150, 90, 30, 20))
    # Both parts where it is expected, as of an object behind a pole; the largest where it is not.
    assert object_box(mask, Box(42, 30, 20, 12)) == Box(40, 30, 29, 10)
    assert object_box(mask, None) == Box(150, 90, 30, 20)
    assert object_box(mask, Box(0, 100, 5, 5)) == Box(150, 90, 30, 20)
    assert object_box(mask_of(), Box(0, 0, 5, 5)) is None


def test_the_filter_follows_steady_motion_without_lag_and_takes_noise_out():
    smooth = SmoothBox(Box(10, 50, 20, 20))
    for t in range(1, 40):
        smooth = smooth.update(Box(10 + 3 * t, 50 - t, 20, 20))
    assert smooth.velocity == pytest.approx((3, -1), abs=1e-3)
    assert smooth.box == pytest.approx((127, 11, 20, 20), abs=1e-2)
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 2, 400)
    smooth, centers, sides = SmoothBox(Box(0, 0, 20, 20)), [], []
    for error in noise:
        smooth = smooth.update(around((10 + error, 10), 20 * np.exp(0.2 * error), 20))
        centers.append(smooth.box.center[0])
        sides.append(np.log(smooth.box.width / 20))
    assert np.std(centers) < 0.85 * np.std(noise)
    assert np.std(sides) < 0.5 * np.std(0.2 * noise)


def test_median_flow_follows_a_moving_object(clip):
    truth = [mask_box(mask == 2) for mask in clip.masks]
    tracker = MedianFlow()
    tracker.start(clip.frames[0], truth[0], clip.masks[0] == 2)
    for frame, box in zip(clip.frames[1:], truth[1:], strict=True):
        found = tracker.update(frame)
        assert found is not None
        assert found.iou(box) > 0.75
    assert truth[0].iou(truth[-1]) == 0


def test_median_flow_measures_growth():
    picture = cv2.resize(
        np.random.default_rng(1).integers(0, 255, (20, 20, 3), np.uint8),
        (100, 100),
        interpolation=cv2.INTER_CUBIC,
    )
    frames = [cv2.resize(picture, (round(40 * 1.1**t),) * 2, interpolation=cv2.INTER_AREA) for t in range(4)]
    tracker = MedianFlow()
    for t, small in enumerate(frames):
        frame = np.full((200, 200, 3), 90, np.uint8)
        side = len(small)
        frame[50 : 50 + side, 60 : 60 + side] = small
        if t == 0:
            box = Box(60, 50, side, side)
            tracker.start(frame, box, (frame != 90).any(2))
        else:
            found = tracker.update(frame)
    assert found is not None
    assert found.width == pytest.approx(40 * 1.1**3, rel=0.06)
    assert found.left == pytest.approx(60, abs=2)


def test_median_flow_knows_that_it_lost_the_object(clip):
    tracker = MedianFlow()
    mask = clip.masks[0] == 1
    tracker.start(clip.frames[0], mask_box(mask), mask)
    assert tracker.update(np.full_like(clip.frames[1], 128)) is None
    assert tracker.update(clip.frames[1]) is None


def test_median_flow_goes_on_exactly(clip):
    first, second = MedianFlow(), MedianFlow()
    first.start(clip.frames[0], mask_box(clip.masks[0] == 2), clip.masks[0] == 2)
    first.update(clip.frames[1])
    second.load_state_dict(saved(first))
    for frame in clip.frames[2:]:
        box = first.update(frame)
        assert box is not None
        assert box == second.update(frame)
    third = MedianFlow()
    third.load_state_dict(saved(MedianFlow()))
    assert third.update(clip.frames[0]) is None


def saved(part):
    """The state as a file gives it back."""
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_opencv_trackers_start_again_and_go_on_from_a_state(clip):
    """The interface of OpenCV's trackers, with one that comes with every OpenCV and one that stands in."""
    box = mask_box(clip.masks[0] == 1)
    tracker = OpenCVTracker("MIL")
    tracker.start(clip.frames[0], box, clip.masks[0] == 1)
    found = [tracker.update(frame) for frame in clip.frames[1:3]]
    assert all(b is not None and b.iou(box) > 0.3 for b in found)

    made = []

    class Steps:  # moves by 2 pixels a frame and loses nothing
        def __init__(self):
            made.append(self)

        def init(self, region, box):
            self.box, self.size = box, region.shape

        def update(self, region):
            assert region.shape == self.size
            self.box = (self.box[0] + 2, *self.box[1:])
            return True, self.box

    first, second = OpenCVTracker("MIL"), OpenCVTracker("MIL")
    first._make = second._make = Steps
    first.start(FRAME, Box(30, 50, 10, 8), mask_of())
    boxes = [first.update(FRAME) for _ in range(25)]
    assert boxes[-1] == Box(80, 50, 10, 8)
    assert len(made) == 3 + 1  # at the edge of the region of 50 pixels, every 8 frames
    second.load_state_dict(saved(first))
    assert [first.update(FRAME) for _ in range(20)] == [second.update(FRAME) for _ in range(20)]
    with pytest.raises(ImportError, match=r"OpenCV .* has no tracker 'Nothing'"):
        OpenCVTracker("Nothing")


def test_tracker_and_mask_that_agree_are_averaged_and_smoothed():
    follower = BoxFollower(Scripted(Box(44, 50, 20, 20)))
    follower.start(FRAME, Box(40, 50, 20, 20), mask_of((40, 50, 20, 20)))
    sighting = follower.predict(FRAME, mask_of((48, 50, 20, 20)))
    assert sighting.tracked == Box(44, 50, 20, 20)
    assert sighting.box.left == pytest.approx(40 + 0.6 * 6)


def test_where_they_disagree_the_tracker_counts_until_it_is_lost():
    tracker = Scripted(Box(42, 50, 20, 20), None)
    follower = BoxFollower(tracker)
    follower.start(FRAME, Box(40, 50, 20, 20), mask_of((40, 50, 20, 20)))
    sighting = follower.predict(FRAME, mask_of((150, 90, 20, 20)))
    assert sighting.box.left == pytest.approx(40 + 0.6 * 2)
    follower.correct(FRAME, mask_of((42, 50, 20, 20)))
    assert tracker.started[-1] == Box(42, 50, 20, 20)
    sighting = follower.predict(FRAME, mask_of((150, 90, 20, 20)))
    assert sighting.tracked is None
    assert sighting.box == Box(150, 90, 20, 20)  # and does not glide there
    follower.correct(FRAME, mask_of((150, 90, 20, 20)))
    assert tracker.started[-1] == Box(150, 90, 20, 20)


def test_an_object_that_leaves_is_lost_after_ten_frames_and_found_wherever_it_comes_back():
    tracker = Scripted(Box(45, 50, 20, 20), Box(50, 50, 20, 20))
    follower = BoxFollower(tracker)
    follower.start(FRAME, Box(40, 50, 20, 20), mask_of((40, 50, 20, 20)))
    for left in (45, 50):
        follower.predict(FRAME, mask_of((left, 50, 20, 20)))
        follower.correct(FRAME, mask_of((left, 50, 20, 20)))
    for t in range(10):
        box = follower.predict(FRAME, mask_of()).box
        assert box.center[0] > 60 + t
        assert box.center[0] < 200
        follower.correct(FRAME, mask_of())
    assert follower.predict(FRAME, mask_of()) == (None, None)
    follower.correct(FRAME, mask_of())
    assert follower.predict(FRAME, mask_of((5, 90, 12, 14))).box == Box(5, 90, 12, 14)
    follower.correct(FRAME, mask_of((5, 90, 12, 14)))
    assert tracker.started[-1] == Box(5, 90, 12, 14)


def test_a_box_that_goes_on_by_itself_stays_at_the_border():
    follower = BoxFollower(Scripted(*(Box(150 + 12 * t, 50, 20, 20) for t in range(1, 4))))
    follower.start(FRAME, Box(150, 50, 20, 20), mask_of((150, 50, 20, 20)))
    for t in range(1, 4):
        follower.predict(FRAME, mask_of((150 + 12 * t, 50, 20, 20)))
        follower.correct(FRAME, mask_of((150 + 12 * t, 50, 20, 20)))
    for _ in range(9):
        box = follower.predict(FRAME, mask_of()).box
        follower.correct(FRAME, mask_of())
        assert 0 <= box.center[0] < 210
    assert box.center[0] > 190


def test_a_follower_goes_on_exactly(clip):
    masks = [mask == 1 for mask in clip.masks]
    first, second = BoxFollower(MedianFlow()), BoxFollower(MedianFlow())
    first.start(clip.frames[0], mask_box(masks[0]), masks[0])
    for t in (1, 2):
        first.predict(clip.frames[t], masks[t])
        first.correct(clip.frames[t], masks[t])
    second.load_state_dict(saved(first))
    for t in (3, 4, 5):
        preliminary = masks[t] if t != 4 else np.zeros_like(masks[t])
        assert first.predict(clip.frames[t], preliminary) == second.predict(clip.frames[t], preliminary)
        for follower in (first, second):
            follower.correct(clip.frames[t], preliminary)
    with pytest.raises(RuntimeError, match="call start"):
        BoxFollower(MedianFlow()).predict(clip.frames[0], masks[0])
