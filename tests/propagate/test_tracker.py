# SPDX-License-Identifier: Apache-2.0
"""The inference engine: objects come and go, memory stays bounded, states are exact, bad input is refused."""

import gc
import io
import warnings

import numpy as np
import pytest
import torch

from tests.propagate.stand_in import ColourModel
from vosops.data import FrameSource
from vosops.data.rendered_clip import render_clip
from vosops.memory import Bounded, ByteBudget, EveryNth
from vosops.models import SessionSettings
from vosops.propagate import Tracker
from vosops.propagate.run import segment_video

SIZE = (43, 61)  # no multiples of the stride
COLOURS = {1: (250, 20, 20), 4: (20, 250, 20), 9: (20, 20, 250)}


pytestmark = pytest.mark.usefixtures("one_thread")


def mask_of(number, ids):
    """Squares that move two pixels a frame, one row of the frame each."""
    mask = np.zeros(SIZE, np.int32)
    for row, i in enumerate(COLOURS):
        if i in ids:
            mask[14 * row : 14 * row + 12, 4 + 2 * number : 20 + 2 * number] = i
    return mask


def picture(number):
    frame = np.full((*SIZE, 3), 128, np.uint8)
    frame[..., 0] += np.uint8(number)  # no two frames are equal
    for i, colour in COLOURS.items():
        frame[mask_of(number, [i]) == i] = colour
    return frame


def tracker(**settings):
    return Tracker(ColourModel(stride=4), SessionSettings(**settings))


def overlap(probabilities, ids, number, object_id):
    labels = np.array([0, *ids])[probabilities.argmax(0).numpy()] == object_id
    truth = mask_of(number, [object_id]) > 0
    return (labels & truth).sum() / (labels | truth).sum()


def test_follows_objects_under_any_ids():
    follow = tracker()
    follow.add(picture(0), mask_of(0, [9, 4]))
    assert follow.object_ids == [4, 9]
    for number in range(1, 10):
        probabilities = follow.step(picture(number))
        assert probabilities.shape == (3, *SIZE)
        assert probabilities.dtype == torch.float32
        assert torch.allclose(probabilities.sum(0), torch.ones(SIZE), atol=1e-5)
        for i in (4, 9):
            assert overlap(probabilities, follow.object_ids, number, i) > 0.6
    assert torch.equal(probabilities, follow.probabilities)
    probabilities.zero_()
    assert follow.probabilities.sum() > 0


def test_order_of_calls_and_lazy_memory():
    follow = tracker()
    follow.add(picture(0), mask_of(0, [1]))
    follow.step(picture(1))
    follow.add(picture(1), mask_of(1, [4]))
    follow.step(picture(2))
    assert follow._session.calls == [
        "encode",
        ("remember", 0, (1,), True),
        "encode",
        "segment",
        ("remember", 1, (1, 4), True),
        "encode",
        "segment",
    ]


def test_a_new_object_takes_its_mask_and_the_others_give_way():
    follow = tracker()
    follow.add(picture(0), mask_of(0, [1]))
    before = follow.step(picture(1))
    new = mask_of(1, [4])
    new[2:6, 10:20] = 4  # inside of object 1
    follow.add(picture(1), new)
    after = follow.probabilities
    assert follow.object_ids == [1, 4]
    inside = torch.from_numpy(new == 4)
    assert after[2][inside].min() > 0.999
    assert after[1][inside].max() < 1e-3
    assert after[2][~inside].max() < 1e-3
    # Where nothing was given the others keep what they had, aggregated once more.
    expected = torch.cat((torch.prod(1 - before[1:], 0)[None], before[1:])).clamp(1e-7, 1 - 1e-7)
    expected = torch.log(expected / (1 - expected)).softmax(0)
    torch.testing.assert_close(after[:2][:, ~inside], expected[:, ~inside], atol=1e-5, rtol=0)
    assert follow.step(picture(2)).shape == (3, *SIZE)


def test_a_mask_on_the_next_frame_steps_to_it_first():
    follow, other = tracker(), tracker()
    for each in (follow, other):
        each.add(picture(0), mask_of(0, [1]))
    follow.add(picture(1), mask_of(1, [4]))
    other.step(picture(1))
    other.add(picture(1), mask_of(1, [4]))
    assert torch.equal(follow.step(picture(2)), other.step(picture(2)))


def test_a_corrected_object_keeps_its_memory():
    """The corrected frame is remembered as given, beside what was remembered before."""
    follow = tracker(memory_every=100)
    follow.add(picture(0), mask_of(0, [1, 4]))
    for number in range(1, 4):
        follow.step(picture(number))
    correction = mask_of(3, [1])
    correction[:, :18] = 0  # the user takes the left part away
    follow.add(picture(3), correction)
    assert follow.object_ids == [1, 4]
    assert torch.equal(follow.probabilities[1] > 0.5, torch.from_numpy(correction == 1))
    follow.step(picture(4))
    assert follow.object_ids == [1, 4]
    (group,) = follow._session.bank.groups
    assert group.object_ids == (1, 4)
    assert follow._session.bank.frames == (0, 3)
    remembered = group.value[0, 0, 0] > 0.5  # [T, h, w] of object 1
    assert remembered[0].sum() > remembered[1].sum() > 0
    assert follow._session.calls[-3] == ("remember", 3, (1, 4), True)


def test_a_correction_and_a_new_object_in_one_mask():
    follow = tracker()
    follow.add(picture(0), mask_of(0, [4, 9]))
    follow.add(picture(1), mask_of(1, [1, 9]))
    assert follow.object_ids == [4, 9, 1]
    assert [group.object_ids for group in follow._session.bank.groups] == [(4, 9)]
    probabilities = follow.step(picture(2))
    assert [group.object_ids for group in follow._session.bank.groups] == [(4, 9), (1,)]
    for i in (1, 4, 9):
        assert overlap(probabilities, follow.object_ids, 2, i) > 0.6


def test_masks_of_one_frame_may_come_one_by_one():
    follow = tracker()
    follow.add(picture(0), mask_of(0, [4]))
    follow.add(picture(0), mask_of(0, [1]))
    follow.add(picture(0), mask_of(0, [4]))
    assert follow.object_ids == [4, 1]
    together = tracker()
    together.add(picture(0), mask_of(0, [1, 4]))
    torch.testing.assert_close(follow.probabilities[[0, 2, 1]], together.probabilities, atol=1e-5, rtol=0)


def test_removed_objects_become_background_and_free_their_memory():
    follow, without = tracker(), tracker()
    follow.add(picture(0), mask_of(0, [1, 4, 9]))
    without.add(picture(0), mask_of(0, [1, 9]))
    follow.step(picture(1))
    bytes_before = follow.memory_nbytes
    before = follow.probabilities
    follow.remove([4])
    assert follow.object_ids == [1, 9]
    assert follow.memory_nbytes < bytes_before
    after = follow.probabilities
    assert torch.equal(after[1:], before[[1, 3]])
    torch.testing.assert_close(after[0], before[0] + before[2], atol=1e-6, rtol=0)
    assert follow.step(picture(2)).shape == (3, *SIZE)
    follow.remove(iter([9]))
    follow.remove([1])
    for number in (3, 4):
        nothing = follow.step(picture(number))
        assert torch.equal(nothing, torch.ones(1, *SIZE))
    assert follow.memory_nbytes == 0
    follow.add(picture(4), mask_of(4, [4]) * 10)
    assert overlap(follow.step(picture(5)) * 1, [4], 5, 4) > 0.6
    assert follow.object_ids == [40]


def test_errors_leave_the_tracker_unchanged():
    follow = tracker()
    with pytest.raises(RuntimeError, match=r"step needs objects to follow: call add\(frame, mask\)"):
        follow.step(picture(0))
    with pytest.raises(RuntimeError, match="there is no frame yet"):
        _ = follow.probabilities
    bad = [
        (picture(0), mask_of(0, []), ValueError, "mask must hold at least one object"),
        (picture(0), mask_of(0, [1]) - 1, ValueError, "mask must hold ids of at least 0, got -1"),
        (picture(0), mask_of(0, [1])[1:], ValueError, r"frame's size \[43, 61\], got \[42, 61\]"),
        (picture(0), mask_of(0, [1]) * 1.0, TypeError, "mask must be an array .* integer ids, got float64"),
        (picture(0) / 255, mask_of(0, [1]), TypeError, "frame must have dtype uint8, got float64"),
        (picture(0)[..., :2], mask_of(0, [1]), ValueError, r"frame must have shape \(H, W, 3\)"),
        (torch.zeros(3), mask_of(0, [1]), TypeError, "frame must be an array .* got Tensor"),
    ]
    for frame, mask, kind, message in bad:
        with pytest.raises(kind, match=message):
            follow.add(frame, mask)
    assert follow.object_ids == []
    follow.add(picture(0), mask_of(0, [1, 4]))
    with pytest.raises(ValueError, match=r"keep the size of the frames before, \[43, 61\], got \[61, 43\]"):
        follow.step(picture(1).transpose(1, 0, 2))
    follow.step(picture(1))
    for ids in ([2], [1, 1], [1, 2]):
        with pytest.raises(ValueError, match=r"object_ids must be distinct ids of \[1, 4\], got"):
            follow.remove(ids)
    follow.remove([4])
    calls = list(follow._session.calls)
    with pytest.raises(ValueError, match=r"ids that were removed: \[4\].* give what comes back a new id"):
        follow.add(picture(2), mask_of(2, [4, 9]))
    assert follow._session.calls == calls
    assert follow.object_ids == [1]


def test_frames_in_any_memory_order_and_ids_of_numpy():
    plain, turned = tracker(), tracker()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that it must not write to
        for number in range(3):
            frame, bgr = picture(number), np.ascontiguousarray(picture(number)[..., ::-1])
            frame.setflags(write=False)
            if number == 0:
                plain.add(frame, mask_of(0, [1, 4]))
                turned.add(
                    bgr[..., ::-1], np.asfortranarray(mask_of(0, [1, 4])[::-1])[::-1].astype(np.uint16)
                )
            else:
                assert torch.equal(plain.step(frame), turned.step(bgr[..., ::-1]))
    turned.remove(np.array([4], np.int64))
    assert turned.object_ids == [1]
    for ids in (1, [1.0], ["1"]):
        with pytest.raises(TypeError, match="object_ids must be integers, got"):
            turned.remove(ids)


def test_bad_options():
    with pytest.raises(TypeError, match="model must be a VideoModel, got Linear"):
        Tracker(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must have float32 weights, got torch.bfloat16: call"):
        Tracker(ColourModel().bfloat16())
    with pytest.raises(TypeError, match="settings must be SessionSettings, got dict"):
        Tracker(ColourModel(), {})
    with pytest.raises(ValueError, match="dtype must be one of torch.float32.*, got torch.float64"):
        Tracker(ColourModel(), dtype=torch.float64)
    with pytest.raises(TypeError, match="channels_last must be a bool or None, got 'yes'"):
        Tracker(ColourModel(), channels_last="yes")
    for name, value, kind in (
        ("memory_every", 0, ValueError),
        ("memory_every", 2.5, TypeError),
        ("top_k", -1, ValueError),
        ("include_previous", "no", TypeError),
        ("policy", Bounded, TypeError),
    ):
        with pytest.raises(kind, match=name):
            SessionSettings(**{name: value})


@pytest.mark.parametrize("add_last", [False, True])
def test_a_resumed_tracker_is_bit_identical(add_last):
    settings = {"memory_every": 2, "policy": Bounded(3)}
    follow = tracker(**settings)
    follow.add(picture(0), mask_of(0, [1, 9]))
    for number in range(1, 6):
        follow.step(picture(number))
    follow.remove([9])
    if add_last:
        follow.add(picture(5), mask_of(5, [4]))
    file = io.BytesIO()
    torch.save(follow.state_dict(), file)
    file.seek(0)
    other = tracker(**settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.object_ids == follow.object_ids
    for number in range(6, 12):
        assert torch.equal(other.step(picture(number)), follow.step(picture(number)))
    assert other.memory_nbytes == follow.memory_nbytes
    with pytest.raises(ValueError, match=r"removed: \[9\]"):
        other.add(picture(12), mask_of(12, [9]))


def test_a_state_of_other_options_is_refused():
    follow = tracker()
    state = follow.state_dict()
    with pytest.raises(ValueError, match="state was saved with settings .*this tracker has .*memory_every=3"):
        tracker(memory_every=3).load_state_dict(state)
    with pytest.raises(ValueError, match="state was saved with dtype torch.float32"):
        Tracker(ColourModel(), dtype=torch.bfloat16).load_state_dict(state)
    with pytest.raises(KeyError):
        follow.load_state_dict({})
    tracker().load_state_dict(state)


def live_bytes():
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):  # not the fake ones of compiled code
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("policy", "frames", "most"),
    [(Bounded(8, EveryNth(5)), 2000, 8 * 24 * (3 + 30) * 4), (ByteBudget(60_000), 500, 60_000)],
)
def test_thirty_objects_over_thousands_of_frames_keep_a_bounded_memory(policy, frames, most):
    """Objects come on two frames, three leave; memory and live tensors stay where they were."""
    generator = np.random.default_rng(0)
    size, ids = (32, 48), list(range(5, 65, 2))
    follow = Tracker(ColourModel(), SessionSettings(policy=policy))
    mask = np.zeros(size, np.int32)
    for place, i in enumerate(ids):
        row, column = divmod(place, 6)
        mask[6 * row : 6 * row + 6, 8 * column : 8 * column + 8] = i
    held, tensors = [], []
    for number in range(frames):
        frame = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        if number in (0, 40):
            follow.add(frame, np.where(np.isin(mask, ids[number // 40 :: 2]), mask, 0))
        else:
            probabilities = follow.step(frame)
        if number == 90:
            follow.remove(ids[:3])
        if number % (frames // 5) == 99:
            held.append(follow.memory_nbytes)
            tensors.append(live_bytes())
    assert probabilities.shape == (28, *size)
    assert len(set(held[1:])) == 1
    assert max(held) <= most
    assert max(tensors[2:]) <= tensors[1]


def test_runs_behind_the_command_lines_loop(tmp_path):
    """`segment_video` takes a tracker, and a resumed run gives the same files."""
    clip = render_clip(frames=6, size=(64, 96))
    folder = tmp_path / "clip"
    folder.mkdir()
    from PIL import Image

    from vosops.data import open_frames

    for number, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(folder / f"{number:05d}.png")
    source: FrameSource = open_frames(folder)
    whole = segment_video(
        Tracker(ColourModel()), source, clip.masks[0], tmp_path / "whole", write_overlay=False
    )
    assert whole.object_ids == [1, 2]
    broken = Tracker(ColourModel())
    step, steps = broken.step, []

    def fail(frame):
        steps.append(frame)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(frame)

    broken.step = fail
    with pytest.raises(KeyboardInterrupt):
        segment_video(broken, source, clip.masks[0], tmp_path / "out", write_overlay=False, save_every=2)
    segment_video(
        Tracker(ColourModel()), source, clip.masks[0], tmp_path / "out", write_overlay=False, resume=True
    )
    for file in (tmp_path / "whole").rglob("*.png"):
        assert (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()
