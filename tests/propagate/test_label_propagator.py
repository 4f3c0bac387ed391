# SPDX-License-Identifier: Apache-2.0
"""Label propagation follows objects, goes on exactly from a state, and refuses bad input."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from vosops.data import open_frames, read_labels
from vosops.data.rendered_clip import render_clip
from vosops.evaluation import region_similarity
from vosops.propagate import CopyFirstMask, LabelPropagator, PropagationSettings, WarpPreviousMask

DATA = Path(os.environ.get("VOSOPS_DATA", "../shared/data"))
SMALL = PropagationSettings(stride=8, sigma=4.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip():
    return render_clip(frames=11, size=(160, 288))


def propagate(propagator, frames, mask):
    propagator.add(frames[0], mask)
    return [propagator.step(frame) for frame in frames[1:]]


def ids_of(propagator, probabilities):
    return np.array([0, *propagator.object_ids])[probabilities.argmax(0).numpy()]


def j_of(labels, truth, object_id):
    return region_similarity(truth == object_id, labels == object_id)


def test_follows_two_objects_of_a_rendered_clip(clip):
    propagator = LabelPropagator()
    found = propagate(propagator, clip.frames, clip.masks[0])
    assert propagator.object_ids == [1, 2]
    for probabilities in found:
        assert probabilities.shape == (3, 160, 288)
        assert probabilities.dtype == torch.float32
        assert torch.allclose(probabilities.sum(0), torch.ones(160, 288), atol=1e-5)
        assert probabilities.min() >= 0
        assert probabilities.max() <= 1
    labels = ids_of(propagator, found[-1])
    assert min(j_of(labels, clip.masks[-1], i) for i in (1, 2)) > 0.8


def test_beats_both_baselines(clip):
    scores = {}
    for method in (LabelPropagator, CopyFirstMask, WarpPreviousMask):
        propagator = method()
        labels = ids_of(propagator, propagate(propagator, clip.frames, clip.masks[0])[-1])
        scores[method] = np.mean([j_of(labels, clip.masks[-1], i) for i in (1, 2)])
    assert scores[LabelPropagator] > scores[WarpPreviousMask] > scores[CopyFirstMask]


def test_ids_need_not_be_consecutive(clip):
    mask = np.array([0, 7, 201])[clip.masks[0]]
    propagator = LabelPropagator(SMALL)
    plain = LabelPropagator(SMALL)
    found = propagate(propagator, clip.frames[:3], mask)
    assert propagator.object_ids == [7, 201]
    assert torch.equal(found[-1], propagate(plain, clip.frames[:3], clip.masks[0])[-1])


def disc_clip(places, size=(96, 160)):
    """A red disc on a textured ground at the given columns; None: not in the frame."""
    rng = np.random.default_rng(0)
    ground = cv2.resize(rng.integers(40, 160, (24, 40, 3), dtype=np.uint8), size[::-1])
    frames, masks = [], []
    for place in places:
        frame, mask = ground.copy(), np.zeros(size, np.uint8)
        if place is not None:
            cv2.circle(frame, (place, 48), 18, (220, 30, 30), -1)
            cv2.circle(mask, (place, 48), 18, 1, -1)
        frames.append(frame)
        masks.append(mask)
    return frames, masks


def test_an_object_that_leaves_is_gone_and_found_again_when_it_returns():
    places = [60, 66, 72, 78] + [None] * 6 + [72, 66, 60]
    frames, masks = disc_clip(places)
    propagator = LabelPropagator(SMALL)
    found = [None, *propagate(propagator, frames, masks[0])]
    assert j_of(ids_of(propagator, found[3]), masks[3], 1) > 0.8
    assert ids_of(propagator, found[8]).sum() < 0.1 * masks[0].sum()
    assert j_of(ids_of(propagator, found[-1]), masks[-1], 1) > 0.8


def test_an_object_added_later_is_followed_and_the_first_one_goes_on(clip):
    first = np.where(clip.masks[0] == 1, 1, 0)
    propagator = LabelPropagator(SMALL)
    propagate(propagator, clip.frames[:4], first)
    propagator.add(clip.frames[3], np.where(clip.masks[3] == 2, 5, 0))
    assert propagator.object_ids == [1, 5]
    for frame in clip.frames[4:]:
        probabilities = propagator.step(frame)
    labels = ids_of(propagator, probabilities)
    assert j_of(labels == 1, clip.masks[-1] == 1, True) > 0.75
    assert j_of(labels == 5, clip.masks[-1] == 2, True) > 0.75


def test_adding_with_the_next_frame_equals_stepping_to_it_first(clip):
    later = np.where(clip.masks[2] == 2, 2, 0)
    first = np.where(clip.masks[0] == 1, 1, 0)
    stepped, direct = LabelPropagator(SMALL), LabelPropagator(SMALL)
    propagate(stepped, clip.frames[:3], first)
    propagate(direct, clip.frames[:2], first)
    stepped.add(clip.frames[2], later)
    direct.add(clip.frames[2], later)
    assert torch.equal(stepped.step(clip.frames[3]), direct.step(clip.frames[3]))


def test_a_correction_replaces_what_was_believed(clip):
    wrong = np.roll(clip.masks[0], 40, axis=1)
    propagator = LabelPropagator(SMALL)
    propagate(propagator, clip.frames[:3], wrong)
    propagator.add(clip.frames[2], clip.masks[2])
    labels = ids_of(propagator, propagator.step(clip.frames[3]))
    assert propagator.object_ids == [1, 2]
    assert min(j_of(labels, clip.masks[3], i) for i in (1, 2)) > 0.8


@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_state_goes_on_to_the_same_bits(clip, at):
    settings = PropagationSettings(stride=8, memory_frames=2, memory_dtype=torch.bfloat16)
    whole = LabelPropagator(settings)
    expected = propagate(whole, clip.frames, clip.masks[0])
    begun = LabelPropagator(settings)
    propagate(begun, clip.frames[: at + 1], clip.masks[0])
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed = LabelPropagator(settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.object_ids == [1, 2]
    for frame, probabilities in zip(clip.frames[at + 1 :], expected[at:], strict=True):
        assert torch.equal(resumed.step(frame), probabilities)


def test_a_state_does_not_follow_what_comes_after_it(clip):
    propagator = LabelPropagator(SMALL)
    propagate(propagator, clip.frames[:3], clip.masks[0])
    state = propagator.state_dict()
    expected = propagator.step(clip.frames[3])
    propagator.add(clip.frames[3], clip.masks[0])
    propagator.load_state_dict(state)
    assert torch.equal(propagator.step(clip.frames[3]), expected)


def test_a_state_of_other_settings_is_refused_and_nothing_changes(clip):
    propagator = LabelPropagator(SMALL)
    propagate(propagator, clip.frames[:2], clip.masks[0])
    other = LabelPropagator(PropagationSettings(stride=8, sigma=5.0))
    with pytest.raises(ValueError, match=r"sigma=4\.0, this propagator has 5\.0"):
        other.load_state_dict(propagator.state_dict())
    with pytest.raises(RuntimeError, match="call add"):
        other.step(clip.frames[1])


def test_the_memory_is_bounded(clip):
    settings = PropagationSettings(stride=16, memory_frames=2)
    propagator = LabelPropagator(settings)
    propagate(propagator, clip.frames[:5], clip.masks[0])
    size = propagator.memory_nbytes
    for frame in clip.frames[5:]:
        propagator.step(frame)
    assert propagator.memory_nbytes == size
    budget = PropagationSettings(stride=16, memory_frames=6, memory_bytes=size)
    tight = LabelPropagator(budget)
    propagate(tight, clip.frames, clip.masks[0])
    assert tight.memory_nbytes <= size


def test_a_budget_too_small_for_two_frames_is_refused_at_once(clip):
    propagator = LabelPropagator(PropagationSettings(stride=16, memory_bytes=10_000))
    with pytest.raises(
        ValueError, match=r"memory_bytes must be at least \d+, two frames .* 2 objects, got 10000"
    ):
        propagator.add(clip.frames[0], clip.masks[0])


def test_writing_to_a_result_changes_nothing(clip):
    written, plain = LabelPropagator(SMALL), LabelPropagator(SMALL)
    for propagator in (written, plain):
        propagate(propagator, clip.frames[:1], clip.masks[0])
    written.step(clip.frames[1]).zero_()
    plain.step(clip.frames[1])
    assert torch.equal(written.step(clip.frames[2]), plain.step(clip.frames[2]))


def test_two_runs_give_the_same_bits(clip):
    runs = [propagate(LabelPropagator(), clip.frames[:4], clip.masks[0])[-1] for _ in range(2)]
    assert torch.equal(*runs)


def test_void_is_background(clip):
    mask = clip.masks[0].copy()
    mask[:10] = 255
    propagator = LabelPropagator(SMALL)
    propagator.add(clip.frames[0], mask)
    assert propagator.object_ids == [1, 2]


def test_a_tiny_frame_works():
    frames, masks = disc_clip([8, 9], size=(96, 160))
    small = [cv2.resize(frame, (28, 17)) for frame in frames]
    mask = cv2.resize(masks[0], (28, 17), interpolation=cv2.INTER_NEAREST)
    mask[4:12, 4:14] = 1
    assert propagate(LabelPropagator(), small, mask)[0].shape == (2, 17, 28)


FRAME, MASK = np.zeros((64, 96, 3), np.uint8), np.ones((64, 96), np.uint8)


@pytest.mark.parametrize(
    ("frame", "mask", "error", "message"),
    [
        (FRAME.astype(np.float32), MASK, TypeError, "frame must have dtype uint8, got float32"),
        (torch.zeros(64, 96, 3), MASK, TypeError, "frame must be an array .* got Tensor"),
        (FRAME[..., 0], MASK, ValueError, r"frame must have shape \(H, W, 3\), RGB, got \[64, 96\]"),
        (FRAME[:8], MASK[:8], ValueError, r"frame must have at least 16 pixels a side, got \[8, 96\]"),
        (FRAME, MASK[:32], ValueError, r"mask must have the frame's size \[64, 96\], got \[32, 96\]"),
        (FRAME, MASK.astype(np.float32), TypeError, "mask must be an array .* integer ids, got float32"),
        (FRAME, MASK * 0, ValueError, "mask must hold at least one object"),
        (FRAME, -MASK.astype(np.int32), ValueError, "mask must hold ids of at least 0, got -1"),
    ],
)
def test_bad_input_is_refused_before_any_work(frame, mask, error, message):
    propagator = LabelPropagator(SMALL)
    with pytest.raises(error, match=message):
        propagator.add(frame, mask)
    assert propagator.object_ids == []


def test_a_frame_of_another_size_is_refused_and_the_run_goes_on(clip):
    propagator = LabelPropagator(SMALL)
    propagator.add(clip.frames[0], clip.masks[0])
    with pytest.raises(ValueError, match=r"first frame's shape \[160, 288, 3\], got \[64, 96, 3\]"):
        propagator.step(FRAME)
    assert propagator.step(clip.frames[1]).shape == (3, 160, 288)


def test_a_step_before_add_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"call add\(frame, mask\)"):
        LabelPropagator().step(FRAME)
    with pytest.raises(RuntimeError, match=r"call add\(frame, mask\)"):
        WarpPreviousMask().step(FRAME)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer, got float"),
        ({"sigma": -1}, ValueError, "sigma must be finite and above 0, got -1"),
        ({"whitening": 2.0}, ValueError, r"whitening must lie in \[0, 1\]"),
        ({"memory_frames": 0}, ValueError, "memory_frames must be at least 1"),
        ({"memory_dtype": torch.float64}, ValueError, "memory_dtype must be"),
        ({"features": 3}, TypeError, "features must be a name, got int"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        PropagationSettings(**options)


def test_real_clip():
    folder = DATA / "JPEGImages/480p/camel"
    if not folder.is_dir():
        pytest.skip(f"no real clips: VOSOPS_DATA={DATA} has no JPEGImages/480p/camel")
    size = (240, 427)
    frames, masks = [], []
    for name, frame in open_frames(folder):
        frames.append(cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA))
        labels = read_labels(DATA / f"Annotations/480p/camel/{name}.png")
        masks.append(cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT))
        if len(frames) == 8:
            break
    propagator = LabelPropagator()
    found = propagate(propagator, frames, masks[0])
    assert j_of(ids_of(propagator, found[-1]), masks[-1], 1) > 0.85


@pytest.mark.parametrize("baseline", [CopyFirstMask, WarpPreviousMask])
def test_a_baseline_goes_on_from_its_state(clip, baseline):
    whole, resumed = baseline(), baseline()
    expected = propagate(whole, clip.frames[:4], clip.masks[0])
    begun = baseline()
    propagate(begun, clip.frames[:2], clip.masks[0])
    resumed.load_state_dict(begun.state_dict())
    assert resumed.object_ids == [1, 2]
    for frame, probabilities in zip(clip.frames[2:4], expected[1:], strict=True):
        assert torch.equal(resumed.step(frame), probabilities)
