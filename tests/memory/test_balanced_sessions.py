# SPDX-License-Identifier: Apache-2.0
"""`Balanced` as the policy of the models' sessions and of label propagation."""

import io

import cv2
import numpy as np
import pytest
import torch

from vosops.memory import Balanced, ByteBudget
from vosops.models import SessionSettings, create
from vosops.propagate import LabelPropagator, PropagationSettings, Tracker

HELD = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def clip(frames):
    """Frames of 64 x 96 that pan over a smooth picture, and a mask of two objects."""
    picture = np.random.default_rng(0).integers(0, 255, (12, 30, 3), np.uint8)
    picture = cv2.resize(picture, (240, 96), interpolation=cv2.INTER_CUBIC)
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 10:40], mask[20:60, 50:80] = 1, 2
    return [np.ascontiguousarray(picture[:64, 3 * t : 3 * t + 96]) for t in range(frames)], mask


def make(name, model, policy):
    if name == "propagate":
        return LabelPropagator(PropagationSettings(memory_frames=HELD - 1, memory_balanced=True))
    return Tracker(model, SessionSettings(memory_every=1, policy=policy))


def banks(state):
    """The states of all banks inside of a state."""
    if isinstance(state, dict):
        if "travelled" in state:
            return [state]
        return [bank for part in state.values() for bank in banks(part)]
    return [bank for part in state for bank in banks(part)] if isinstance(state, list) else []


@pytest.mark.parametrize("name", ["stcn_tiny", "stm", "xmem", "aott", "propagate"])
def test_sessions_hold_frames_of_all_of_the_video_and_go_on_exactly(name):
    frames, mask = clip(13)
    torch.manual_seed(0)
    model = None if name == "propagate" else create(name)
    first, second = (make(name, model, Balanced(HELD)) for _ in range(2))
    first.add(frames[0], mask)
    for frame in frames[1:7]:
        first.step(frame)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    full = first.memory_nbytes
    for frame in frames[7:]:
        assert torch.equal(first.step(frame), second.step(frame))
    assert first.memory_nbytes == full
    found = banks(first.state_dict())
    assert found
    for bank in found:
        held = sorted(bank["frames"])
        assert len(held) == HELD
        # A session may keep the previous frame outside of its bank or as the newest one in it.
        assert held[0] == 0
        assert held[-1] in (11, 12)
        assert np.diff(held)[:-1].min() >= 2
        assert sorted(bank["travelled"])[-1] > 0


def test_objects_that_enter_share_the_byte_budget():
    frames, mask = clip(12)
    torch.manual_seed(0)
    model = create("stm")
    tracker = make("stm", model, Balanced(HELD))
    tracker.add(frames[0], np.where(mask == 1, 1, 0))
    for frame in frames[1:4]:
        tracker.step(frame)
    budget = tracker.memory_nbytes
    tracker = make("stm", model, ByteBudget(budget, Balanced(100)))
    tracker.add(frames[0], np.where(mask == 1, 1, 0))
    for t, frame in enumerate(frames[1:], 1):
        tracker.step(frame)
        if t == 6:
            tracker.add(frame, np.where(mask == 2, 2, 0))
        assert tracker.memory_nbytes <= budget
    assert [sorted(bank["frames"])[0] for bank in banks(tracker.state_dict())] == [0, 6]
