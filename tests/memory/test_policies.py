# SPDX-License-Identifier: Apache-2.0
"""What each policy keeps, frame by frame."""

import pytest
import torch

from vosops.memory import Bounded, ByteBudget, EveryNth, MemoryBank, Policy, SharedPolicy


def run(policy: Policy, frames: range, late: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """`frames` of a bank after each append; one more object enters on each frame of `late`."""
    bank, history, ids = MemoryBank(policy), [], [1]
    for frame in frames:
        ids += [10 + frame] if frame in late else []
        bank.append(frame, torch.full((1, 2, 1, 2), float(frame)), torch.zeros(1, len(ids), 3, 1, 2), ids)
        history.append(bank.frames)
        # Every slot holds the frame it says.
        assert bank.key[0, 0, :, 0, 0].tolist() == list(bank.frames)
    return history


def test_every_nth_keeps_first_multiples_and_previous():
    history = run(EveryNth(5), range(13))
    assert history[0] == (0,)
    assert history[3] == (0, 3)
    assert history[4] == (0, 4)
    assert history[5] == (0, 5)
    assert history[9] == (0, 5, 9)
    assert history[12] == (0, 5, 10, 12)


def test_every_nth_counts_from_the_first_frame_and_bears_gaps():
    assert run(EveryNth(5), range(7, 20))[-1] == (7, 12, 17, 19)
    assert run(EveryNth(5), range(0, 21, 3))[-1] == (0, 6, 12, 15, 18)


def test_every_first_keeps_all():
    assert run(EveryNth(1), range(30))[-1] == tuple(range(30))


def test_entry_frames_stay():
    assert run(EveryNth(5), range(18), late=(13,))[-1] == (0, 5, 10, 13, 15, 17)
    assert sorted(run(Bounded(5), range(40), late=(13,))[-1]) == [0, 13, 37, 38, 39]


def test_entry_frames_give_way_when_nothing_else_is_left():
    history = run(Bounded(3), range(12), late=(2, 4, 5))
    assert all(len(frames) <= 3 and 0 in frames for frames in history)
    assert all(frames[-1] == 11 or 11 in frames for frames in history[-1:])


def test_bounded_replaces_the_oldest_in_place():
    history = run(Bounded(4), range(8))
    assert history[3] == (0, 1, 2, 3)
    assert history[4] == (0, 4, 2, 3)
    assert history[5] == (0, 4, 5, 3)
    assert history[7] == (0, 7, 5, 6)


def test_bounded_of_every_nth():
    assert sorted(run(Bounded(4, EveryNth(5)), range(33))[-1]) == [0, 25, 30, 32]
    assert sorted(run(Bounded(4, EveryNth(5)), range(36))[-1]) == [0, 25, 30, 35]


def test_byte_budget_holds_what_fits():
    slot = 2 * (2 + 3) * 4  # positions * (Ck + Cv) * float32
    assert sorted(run(ByteBudget(4 * slot + slot - 1), range(20))[-1]) == [0, 17, 18, 19]
    assert sorted(run(ByteBudget(10**9, Bounded(3)), range(20))[-1]) == [0, 18, 19]


@pytest.mark.parametrize(
    "policy",
    [
        Bounded(2),
        Bounded(7),
        Bounded(5, EveryNth(3)),
        ByteBudget(1000),
        ByteBudget(1000, EveryNth(5)),
        ByteBudget(400, Bounded(8, EveryNth(2))),
    ],
)
def test_bounded_for_2000_frames(policy):
    bank, most = MemoryBank(policy), 0
    for frame in range(2000):
        ids = [1, 2] if frame >= 700 else [1]
        bank.append(frame, torch.zeros(1, 2, 1, 2), torch.zeros(1, len(ids), 3, 1, 2), ids)
        most = max(most, bank.nbytes)
        assert {0, frame} <= set(bank.frames)
        if isinstance(policy, ByteBudget):
            assert bank.nbytes <= policy.bytes
    assert len(bank) <= policy.limit(2 * (2 + 6) * 4)
    assert most <= 1000


@pytest.mark.parametrize("policy", [Bounded, ByteBudget])
def test_bad_policies(policy):
    with pytest.raises(TypeError, match=rf"{policy.__name__}\.\w+ must be an integer, got float"):
        policy(2.5)
    with pytest.raises(ValueError, match=r"must be at least \d, got 0"):
        policy(0)
    with pytest.raises(TypeError, match=r"inner must be a policy such as EveryNth\(5\), got 'all'"):
        policy(100, "all")
    with pytest.raises(TypeError, match="inner must be a policy"):
        policy(100, EveryNth)


def test_bad_every_nth():
    with pytest.raises(ValueError, match=r"EveryNth\.n must be at least 1, got 0"):
        EveryNth(0)
    with pytest.raises(TypeError, match=r"EveryNth\.n must be an integer, got bool"):
        EveryNth(True)


def test_a_custom_policy_must_choose_a_slot_there_is():
    class Wrong:
        def slot(self, frame, frames, entries):
            return len(frames) + 1

        def limit(self, slot_bytes):
            return None

    bank = MemoryBank(Wrong())
    bank.append(0, torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 3, 1, 2), [1])
    with pytest.raises(ValueError, match="chose slot 2 of 1 for frame 1"):
        bank.append(1, torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 3, 1, 2), [1])
    assert bank.frames == (0,)


def test_banks_that_share_a_limit_and_a_passing_frame():
    policy = SharedPolicy(ByteBudget(1000, EveryNth(2)), banks=4, temporary=7)
    assert policy.limit(50) == 5
    assert SharedPolicy(EveryNth(2)).limit(50) is None
    assert policy.slot(9, (0, 7, 5), ()) == 1
    assert policy.slot(9, (0, 2, 5), ()) == EveryNth(2).slot(9, (0, 2, 5), ())
    assert SharedPolicy(Bounded(3)).slot(9, (0, 7, 5), ()) == 3
    with pytest.raises(TypeError, match=r"SharedPolicy\.inner must be a policy .*got 5"):
        SharedPolicy(5)
    with pytest.raises(ValueError, match=r"SharedPolicy\.banks must be at least 1, got 0"):
        SharedPolicy(EveryNth(1), banks=0)
