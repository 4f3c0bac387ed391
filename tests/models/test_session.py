# SPDX-License-Identifier: Apache-2.0
"""What all models share: the checks of a training clip, padding, and what a correction does to a memory."""

import numpy as np
import pytest
import torch

from tests.models.weights import KINDS, fill
from vosops.models import MODELS, SessionSettings, VideoModel
from vosops.models.xmem import XMem
from vosops.propagate import Tracker


class Padded(VideoModel):
    def forward(self, frames, first_mask):
        raise NotImplementedError

    def open_session(self, settings):
        raise NotImplementedError


@pytest.fixture(scope="module", params=list(KINDS))
def unallocated(request):
    with torch.device("meta"):
        return MODELS[request.param].build()


@pytest.mark.parametrize(
    ("frames", "masks", "error", "message"),
    [
        ((1, 1, 3, 32, 32), (1, 1, 32, 32), ValueError, r"frames must have shape .* T >= 2, got \[1, 1, 3"),
        ((1, 2, 4, 32, 32), (1, 1, 32, 32), ValueError, r"frames must have shape \(B, T, 3, H, W\)"),
        ((2, 3, 32, 32), (1, 1, 32, 32), ValueError, r"frames must have shape .*got \[2, 3, 32, 32\]"),
        ((1, 2, 3, 32, 32), (1, 0, 32, 32), ValueError, r"first_mask must have shape .*'O >= 1'"),
        ((1, 2, 3, 32, 32), (1, 1, 32, 48), ValueError, r"first_mask must have shape .*got \[1, 1, 32, 48\]"),
        ((2, 2, 3, 32, 32), (1, 1, 32, 32), ValueError, r"first_mask must have shape"),
        ("uint8", (1, 1, 32, 32), TypeError, r"frames must be a floating-point tensor.*uint8"),
        ((1, 2, 3, 32, 32), "none", TypeError, r"first_mask must be a floating-point tensor.*NoneType"),
    ],
)
def test_bad_clips_are_named_before_work_starts(unallocated, frames, masks, error, message):
    frames = torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8) if frames == "uint8" else torch.zeros(frames)
    masks = None if masks == "none" else torch.zeros(masks)
    with pytest.raises(error, match=message):
        unallocated(frames, masks)


@pytest.mark.parametrize("name", ["stcn", "xmem"])
def test_clips_that_do_not_fit_the_stride_are_refused_where_the_model_does_not_pad(name):
    with torch.device("meta"):
        model = MODELS[name].build()
    with pytest.raises(ValueError, match=r"frames must have sides that are multiples of 16, got \[32, 40\]"):
        model(torch.zeros(1, 2, 3, 32, 40), torch.zeros(1, 1, 32, 40))


@pytest.mark.parametrize(("height", "width"), [(480, 854), (17, 33), (853, 481), (1, 16)])
def test_frames_are_padded_in_the_middle_and_come_back(height, width):
    model = Padded()
    frame = torch.rand(1, 3, height, width)
    prepared = model.prepare(frame)
    assert prepared.shape[-2] % 16 == prepared.shape[-1] % 16 == 0
    assert prepared.shape[-2] - height < 16 > prepared.shape[-1] - width
    assert torch.equal(model.restore(prepared, (height, width)), frame)
    assert model.prepare_mask(frame[:, :2]).shape == (1, 2, *prepared.shape[-2:])
    left, right, top, bottom = model.padding(height, width)
    assert 0 <= right - left <= 1
    assert 0 <= bottom - top <= 1


def test_a_correction_is_remembered_beside_what_was():
    """As XMem's published code has it: no object of the memory restarts."""
    model = fill(XMem(8, 16, 8), {"gain": 1.0}).eval()
    frames = list(np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8))
    mask = np.zeros((32, 48), int)
    mask[:16, :20], mask[16:, 24:] = 1, 2
    tracker = Tracker(model, SessionSettings(memory_every=100))
    tracker.add(frames[0], mask)
    for frame in frames[1:4]:
        tracker.step(frame)
    correction = np.zeros_like(mask)
    correction[8:24, 8:24] = 1
    tracker.add(frames[3], correction)
    assert (tracker.probabilities[1][correction == 1] > 0.99).all()
    assert (tracker.probabilities[1][correction == 0] < 0.01).all()
    sensory = tracker._session._hidden.clone()
    tracker.step(frames[4])
    memory = tracker._session._memory
    assert memory.frames == (0, 3)
    assert [(group.object_ids, group.start) for group in memory._groups] == [([1, 2], 0)]
    assert tracker._session._hidden.shape == sensory.shape
    assert not torch.equal(tracker._session._hidden, sensory)
