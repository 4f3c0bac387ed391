# SPDX-License-Identifier: Apache-2.0
"""stcn_tiny: training and tracking are one network, whatever the size, and clips of a batch stay apart."""

import numpy as np
import pytest
import torch

from tests.models.weights import fill
from vosops.models import SessionSettings, create
from vosops.models.stcn_tiny import MEMORY_FRAMES
from vosops.propagate import Tracker


@pytest.fixture(scope="module")
def model():
    return fill(create("stcn_tiny"), {"gain": 1.0})


@pytest.fixture(scope="module")
def clip():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (4, 8, 12, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)  # [4, 64, 96, 3]


def masks_of(mask, objects):
    return torch.stack([torch.from_numpy(mask == i) for i in range(1, 1 + objects)])[None].float()


def test_training_is_tracking(model, clip):
    mask = np.zeros((64, 96), np.uint8)
    mask[8:40, 8:50], mask[30:60, 50:90] = 1, 2
    tracker = Tracker(model, SessionSettings(memory_every=1, top_k=0))
    tracker.add(clip[0], mask)
    expected = torch.stack([tracker.step(frame) for frame in clip[1:]])
    assert expected[:, 1:].std() > 0.005  # the masks matter
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2)[None].float() / 255
    with torch.no_grad():
        logits = model(pixels, masks_of(mask, 2))
    torch.testing.assert_close(logits[0].softmax(1), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(64, 96), (50, 77), (33, 65)])
def test_frames_of_any_size(model, size):
    frames = np.random.default_rng(1).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[5:30, 5:30] = 1
    tracker = Tracker(model)
    tracker.add(frames[0], mask)
    for frame in frames[1:]:
        found = tracker.step(frame)
        assert found.shape == (2, *size)
        assert found.isfinite().all()
    assert tracker._session._bank.groups[0].key.shape[-2:] == tuple(-(-side // 32) * 4 for side in size)


def test_memory_is_bounded_and_holds_the_previous_frame(model):
    frames = np.random.default_rng(2).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[5:20, 5:20] = 1
    tracker = Tracker(model)
    tracker.add(frames[0], mask)
    for number, frame in enumerate(frames[1:], start=1):
        tracker.step(frame)
        held = tracker._session._bank.frames
        assert {0, number - 1} <= set(held)
        assert len(held) == min(number, 1 + (number - 1) // 5 + ((number - 1) % 5 > 0), MEMORY_FRAMES)


def test_an_object_that_is_not_there_changes_nothing(model, clip):
    """Beside a clip of two objects, a clip of one is as it is alone."""
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2)[None].float() / 255
    mask = np.zeros((64, 96), np.uint8)
    mask[8:40, 8:50] = 1
    with torch.no_grad():
        alone = model(pixels, masks_of(mask, 1))
        beside = model(pixels, masks_of(mask, 2))
    torch.testing.assert_close(beside[:, :, :2], alone, atol=1e-4, rtol=1e-3)
    assert (beside[:, :, 2] < -15).all()


def test_training_reaches_every_weight():
    torch.manual_seed(0)
    model = create("stcn_tiny").train()
    masks = torch.zeros(2, 2, 64, 64)
    masks[:, 0, 8:30, 8:30], masks[:, 1, 20:45, 34:60] = 1, 1
    logits = model(torch.rand(2, 3, 3, 64, 64), masks)
    assert logits.shape == (2, 2, 3, 64, 64)
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


def test_sides_must_be_multiples_of_32(model):
    with pytest.raises(ValueError, match=r"sides that are multiples of 32, got \[48, 64\]"):
        model(torch.rand(1, 2, 3, 48, 64), torch.ones(1, 1, 48, 64))
