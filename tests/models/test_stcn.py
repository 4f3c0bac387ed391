# SPDX-License-Identifier: Apache-2.0
"""STCN trains, remembers as asked, and does not depend on the backend."""

import numpy as np
import pytest
import torch

import vosops
from tests.models.weights import Golden, fill
from vosops.memory import Bounded, ByteBudget
from vosops.models import SessionSettings
from vosops.models.stcn import STCN
from vosops.ops import backends
from vosops.propagate import Tracker


@pytest.fixture(scope="module")
def golden():
    return Golden("STCN")


@pytest.fixture(scope="module")
def model(golden):
    return fill(STCN(), golden.config)


@pytest.fixture(scope="module")
def clip(golden):
    """Six frames of 48x64 and their first mask."""
    return golden.arrays["frames"][:6, :48, 40:104], golden.arrays["mask0"][:48, 40:104]


def follow(model, clip, settings=None, **options):
    tracker = Tracker(model, settings, **options)
    tracker.add(clip[0][0], clip[1])
    return tracker, [tracker.step(frame) for frame in clip[0][1:]]


def test_trains_over_three_frames():
    torch.manual_seed(0)
    model = STCN().train()
    frames = torch.rand(2, 3, 3, 32, 48)
    masks = torch.zeros(2, 2, 32, 48)
    masks[:, 0, :16], masks[:, 1, 16:, :24] = 1, 1
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    logits = model(frames, masks)
    assert logits.shape == (2, 2, 3, 32, 48)
    truth = torch.cat((1 - masks.sum(1, keepdim=True), masks), 1).argmax(1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), truth.repeat_interleave(2, 0))
    loss.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".bn" in name or "downsample.1" in name for name in frozen)
    for name, parameter in model.named_parameters():
        if name not in frozen:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
    for name, value in model.named_buffers():
        assert torch.equal(value, statistics[name]), name


def test_a_batch_trains_as_its_clips_alone(model):
    frames = torch.rand(2, 3, 3, 32, 32)
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :16], masks[1, :, :, 8:] = 1, 1
    with torch.no_grad():
        both = model(frames, masks)
        alone = torch.cat([model(frames[i : i + 1], masks[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(
    not vosops.backend_report()["cpu"].startswith("available"), reason="the C++ operators are not built"
)
def test_backends_agree(model, clip):
    with backends.use_backend("reference"):
        _, expected = follow(model, clip)
    with backends.use_backend("cpu"):
        _, found = follow(model, clip)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_objects_that_enter_together_are_read_at_once(model, clip, monkeypatch):
    calls = []
    read = vosops.memory_read

    def count(*args, **options):
        calls.append(args[2].shape[1])
        return read(*args, **options)

    monkeypatch.setattr("vosops.memory.bank.memory_read", count)
    follow(model, clip)
    assert calls == [3] * 5


@pytest.mark.parametrize(
    ("settings", "frames"),
    [
        (SessionSettings(), (0,)),
        (SessionSettings(memory_every=2), (0, 2, 4)),
        (SessionSettings(memory_every=3, include_previous=True), (0, 3, 4)),
        (SessionSettings(memory_every=1, policy=Bounded(2)), (0, 4)),
        (SessionSettings(memory_every=2, include_previous=True, policy=Bounded(2)), (0, 4)),
        (SessionSettings(memory_every=1, policy=ByteBudget(3 * 12 * (64 + 3 * 512) * 4)), (0, 3, 4)),
    ],
)
def test_remembers_what_the_settings_say(model, clip, settings, frames):
    tracker, results = follow(model, clip, settings)
    assert sorted(tracker._session._bank.frames) == list(frames)
    assert torch.allclose(results[-1].sum(0), torch.ones(48, 64), atol=1e-5)


def test_top_k(model, clip):
    _, some = follow(model, clip, SessionSettings(top_k=3, memory_every=1))
    _, dense = follow(model, clip, SessionSettings(top_k=0, memory_every=1))
    _, all_of_them = follow(model, clip, SessionSettings(top_k=10**6, memory_every=1))
    assert (some[-1] - dense[-1]).abs().max() > 1e-3
    torch.testing.assert_close(all_of_them[-1], dense[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [SessionSettings(memory_every=2, include_previous=True)])
def test_goes_on_exactly_from_a_state(model, clip, settings):
    tracker = Tracker(model, settings)
    tracker.add(clip[0][0], clip[1])
    for frame in clip[0][1:4]:
        tracker.step(frame)
    other = Tracker(model, settings)
    other.load_state_dict(tracker.state_dict())
    for frame in clip[0][4:]:
        assert torch.equal(tracker.step(frame), other.step(frame))


def test_bfloat16_and_layouts_are_near_float32(model, clip):
    _, expected = follow(model, clip, channels_last=False)
    _, found = follow(model, clip, channels_last=True)
    torch.testing.assert_close(found[-1], expected[-1], atol=2e-5, rtol=0)
    _, low = follow(model, clip, dtype=torch.bfloat16)
    assert low[-1].dtype == torch.float32
    assert (low[-1] - expected[-1]).abs().mean() < 0.02


def test_many_objects_are_encoded_and_decoded_in_chunks(model, clip, monkeypatch):
    frames, mask = clip
    many = np.zeros_like(mask)
    for i in range(12):
        many[4 * i : 4 * i + 3] = 10 + i
    _, whole = follow(model, (frames[:3], many))
    monkeypatch.setattr("vosops.models.blocks._CHUNK_ELEMENTS", 5 * 256 * 12 * 16)
    tracker, chunked = follow(model, (frames[:3], many))
    assert tracker.object_ids == list(range(10, 22))
    torch.testing.assert_close(chunked[-1], whole[-1], atol=1e-5, rtol=0)


def test_a_budget_too_small_for_new_objects_leaves_a_tracker_that_goes_on(model, clip):
    frames, mask = clip
    settings = SessionSettings(include_previous=True, policy=ByteBudget(2 * 12 * (64 + 512) * 4))
    tracker = Tracker(model, settings)
    tracker.add(frames[0], np.where(mask > 0, 1, 0))
    tracker.step(frames[1])
    tracker.step(frames[2])
    new = np.zeros_like(mask)
    new[:8, :8] = 9
    tracker.add(frames[2], new)
    with pytest.raises(ValueError, match=r"ByteBudget.* a memory needs two"):
        tracker.step(frames[3])
    tracker.remove([9])
    other = Tracker(model, settings)
    other.load_state_dict(tracker.state_dict())
    assert torch.equal(tracker.step(frames[3]), other.step(frames[3]))
