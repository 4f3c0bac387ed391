# SPDX-License-Identifier: Apache-2.0
"""Dynamic memory frame sampling: how many frames `Balanced` holds of short and long clips, and where."""

import io

import numpy as np
import pytest
import torch

from vosops.memory import Balanced, Bounded, ByteBudget, EveryNth, MemoryBank, SharedPolicy, ThinningPolicy
from vosops.memory.policies import thinning

VALUE = torch.zeros(1, 1, 3, 1, 2)


def turned(angle: float) -> torch.Tensor:
    """A key of constant length in a direction of its own: the angle says how far it has moved."""
    return torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)[None, :, None, None].expand(
        1, 2, 1, 2
    )


def filled(policy, angles, step=1):
    """A bank that was given a frame per angle."""
    bank = MemoryBank(policy)
    for place, angle in enumerate(angles):
        bank.append(place * step, turned(angle), VALUE, [1])
    return bank


def gaps(bank):
    return np.diff(sorted(bank.frames))


@pytest.mark.parametrize(("length", "held"), [(10, 10), (100, 20), (5000, 20)])
def test_short_and_long_clips_hold_a_balanced_number_over_all_of_them(length, held):
    bank, most = MemoryBank(Balanced(20)), 0
    for frame in range(length):
        bank.append(frame, turned(0.1 * frame), VALUE, [1])
        most = max(most, len(bank))
        assert {0, frame} <= set(bank.frames)
        if frame >= 60:
            mean = frame / (len(bank) - 1)
            assert 0.4 * mean < gaps(bank)[:-1].min() <= gaps(bank).max() < 2.2 * mean
    assert most == len(bank) == held
    # Every slot holds the frame it says.
    expected = torch.stack([turned(0.1 * frame)[0, :, 0, 0] for frame in bank.frames], 1)
    assert torch.equal(bank.key[0, :, :, 0, 0], expected)


def test_faster_motion_holds_denser():
    speed = np.where((np.arange(900) >= 300) & (np.arange(900) < 600), 0.2, 0.02)
    frames = sorted(filled(Balanced(24), np.cumsum(speed)).frames)
    slow = [frame for frame in frames if frame < 300 or frame >= 600]
    fast = [frame for frame in frames if 300 <= frame < 600]
    # The fast third has 1/3 of the time and 5/6 of the motion: 7/12 of the frames; time alone gives 1/3.
    assert len(fast) > len(slow)
    still = sorted(filled(Balanced(24), np.zeros(900)).frames)
    assert 6 <= len([frame for frame in still if 300 <= frame < 600]) <= 10


def test_a_fixed_interval_holds_none_of_this():
    """What the policy is for: the same bound filled by every fifth frame keeps the video's end alone."""
    fixed, balanced = filled(Bounded(20, EveryNth(5)), np.zeros(600)), filled(Balanced(20), np.zeros(600))
    assert sorted(fixed.frames)[1] > 500
    assert sorted(balanced.frames)[1] < 70


def test_a_byte_budget_holds_and_thins_when_objects_enter():
    slot = 2 * (2 + 3) * 4  # positions * (Ck + Cv) * float32
    policy = ByteBudget(12 * slot, Balanced(100))
    bank = MemoryBank(policy)
    for frame in range(400):
        ids = [1] if frame < 300 else [1, 2]
        bank.append(frame, turned(0.1 * frame), VALUE.expand(1, len(ids), 3, 1, 2), ids)
        assert bank.nbytes <= policy.bytes
        if frame == 299:
            assert len(bank) == 12
        if frame == 300:  # fewer fit; what is left still covers the video, and the given mask is in it
            assert len(bank) == 12 * 5 // 8
            assert gaps(bank).max() < 140
        if frame > 300:
            assert {0, 300, frame} <= set(bank.frames)


def test_limits_around_it_leave_the_choice_to_it():
    for policy in (Bounded(8, Balanced(50)), SharedPolicy(Bounded(8, Balanced(50)))):
        assert thinning(policy) == Balanced(50)
        bank = filled(policy, np.zeros(200))
        assert len(bank) == 8
        assert gaps(bank).max() < 2.2 * 199 / 7
    assert thinning(Bounded(8, EveryNth(5))) is None
    assert isinstance(Balanced(5), ThinningPolicy)
    assert not isinstance(Bounded(5), ThinningPolicy)


def test_lasting_and_entry_frames_stay_and_two_slots_suffice():
    bank = MemoryBank(Balanced(5))
    for frame in range(100):
        ids = [1] if frame < 41 else [1, 2]
        value = VALUE.expand(1, len(ids), 3, 1, 2)
        bank.append(frame, turned(0.0), value, ids, lasting=frame == 17)
    assert {0, 17, 41, 99} < set(bank.frames)
    assert filled(Balanced(2), np.zeros(50)).frames == (0, 49)


def test_a_passing_frame_is_replaced_and_its_motion_counts():
    bank = MemoryBank(Balanced(6))
    for frame in range(200):
        # Every fifth frame stays, and the others are there until the next one, as in STM.
        temporary = frame - 1 if (frame - 1) % 5 else None
        bank.policy = SharedPolicy(Balanced(6), temporary=temporary)
        bank.append(frame, turned(0.1 * frame), VALUE, [1])
    held = sorted(bank.frames)
    assert held[-1] == 199
    assert all(frame % 5 == 0 for frame in held[:-1])
    travelled = dict(zip(bank.frames, bank.state_dict()["travelled"], strict=True))
    step = 2 * np.sin(0.05)  # the chord of 0.1 rad, on a circle of radius 1
    assert travelled[199] == pytest.approx(199 * step, rel=1e-4)
    assert travelled[held[1]] == pytest.approx(held[1] * step, rel=1e-4)


def test_resume_is_exact():
    generator = np.random.default_rng(0)
    angles = np.cumsum(generator.uniform(0, 0.5, 200))
    whole, part = filled(Balanced(9), angles), filled(Balanced(9), angles[:77])
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    resumed = MemoryBank(Balanced(9))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for frame in range(77, 200):
        resumed.append(frame, turned(angles[frame]), VALUE, [1])
    assert resumed.frames == whole.frames
    assert torch.equal(resumed.key, whole.key)
    with pytest.raises(
        ValueError, match=r"policy Balanced\(frames=9\), this memory has Balanced\(frames=8\)"
    ):
        MemoryBank(Balanced(8)).load_state_dict(part.state_dict())


def test_removing_objects_forgets_frames_and_goes_on():
    bank = MemoryBank(Balanced(6))
    for frame in range(60):
        ids = [1] if frame < 30 else [1, 2]
        bank.append(frame, turned(0.1 * frame), VALUE.expand(1, len(ids), 3, 1, 2), ids)
    bank.remove([1])
    assert min(bank.frames) == 30
    for frame in range(60, 120):
        bank.append(frame, turned(0.1 * frame), VALUE, [2])
    assert len(bank) == 6
    assert {30, 119} < set(bank.frames)


def test_keys_of_zero_and_of_half_precision_are_measured():
    bank = MemoryBank(Balanced(4), key_dtype=torch.bfloat16)
    for frame in range(30):
        bank.append(frame, torch.zeros(1, 2, 1, 2), VALUE, [1])
    assert bank.state_dict()["travelled"] == [0.0] * 4
    assert gaps(bank).max() <= 20


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"Balanced\.frames must be an integer, got float"):
        Balanced(2.5)
    with pytest.raises(ValueError, match=r"Balanced\.frames must be at least 2, got 1"):
        Balanced(1)
