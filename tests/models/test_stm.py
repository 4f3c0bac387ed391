# SPDX-License-Identifier: Apache-2.0
"""STM's session, forward and helpers on small frames."""

from __future__ import annotations

import math

import pytest
import torch

import vosops
from vosops.memory import Bounded, ByteBudget, EveryNth
from vosops.models.session import SessionSettings
from vosops.models.stm import STM, clamped_others, merge_slots
from vosops.models.stm_session import STMSession, masks_on_frame
from vosops.propagate.tracker import Tracker

from .stm_helpers import boxes, check_resume, clip, filled, labels, pictures, run

FRAME_BYTES = 3 * 5 * (128 + 512) * 4  # of one object's keys and values on a frame of 48 x 80


@pytest.fixture(scope="module")
def model() -> STM:
    return filled(STM())


def _frames(session: STMSession, object_id: int) -> list[int]:
    return session.state_dict()["banks"][object_id]["frames"]


def test_memory_is_every_nth_and_the_previous(model: STM) -> None:
    session = model.open_session(SessionSettings(memory_every=3))
    held = []
    for _ in run(session, clip(9), boxes(1), [5]):
        held.append(_frames(session, 5))
    assert held == [[0], [0, 1], [0, 2], [0, 3], [0, 3, 4], [0, 3, 5], [0, 3, 6], [0, 3, 6, 7]]


def test_without_the_previous_frame_others_are_not_encoded(model: STM) -> None:
    session = model.open_session(SessionSettings(memory_every=3, include_previous=False))
    calls = []
    hook = model.Encoder_M.register_forward_hook(lambda *_: calls.append(1))
    for _ in run(session, clip(9), boxes(1), [5]):
        pass
    hook.remove()
    assert _frames(session, 5) == [0, 3, 6]
    assert len(calls) == 3


def test_a_given_mask_is_always_remembered(model: STM) -> None:
    session = model.open_session(SessionSettings(memory_every=100))
    frames, masks = clip(4), boxes(1)
    with torch.no_grad():
        for t in range(4):
            features = session.encode(frames[t : t + 1])
            session.remember(t, frames[t : t + 1], features, masks, [5], given=t in (0, 2))
    assert _frames(session, 5) == [0, 2, 3]


@pytest.mark.parametrize("policy", [Bounded(3), Bounded(3, EveryNth(2))])
def test_a_policy_bounds_the_memory_and_keeps_the_previous_frame(
    model: STM, policy: vosops.memory.Policy
) -> None:
    session = model.open_session(SessionSettings(memory_every=2, policy=policy))
    for t, _ in enumerate(run(session, clip(9), boxes(2), [1, 2])):
        assert {0, t} <= set(_frames(session, 1))
        assert session.memory_nbytes <= 2 * 3 * FRAME_BYTES
    assert sorted(_frames(session, 2)) == [0, 6, 7]


def test_objects_share_a_byte_budget(model: STM) -> None:
    budget = 8 * FRAME_BYTES
    tracker = Tracker(model, SessionSettings(memory_every=1, policy=ByteBudget(budget)))
    images, masks = pictures(clip(14)), labels(boxes(3), [1, 2, 3])
    tracker.add(images[0], masks * (masks == 1))
    for t, image in enumerate(images[1:], 1):
        if t == 7:
            tracker.add(image, masks * (masks > 1))
        else:
            tracker.step(image)
        assert tracker.memory_nbytes <= budget
    held = {i: bank["frames"] for i, bank in tracker.state_dict()["memory"]["banks"].items()}
    assert {i: len(frames) for i, frames in held.items()} == {1: 2, 2: 2, 3: 2}
    assert 0 in held[1]
    assert 7 in held[3]


def test_a_budget_too_small_is_refused_before_anything_changes(model: STM) -> None:
    session = model.open_session(SessionSettings(policy=ByteBudget(3 * FRAME_BYTES)))
    frames, masks = clip(2), boxes(2)
    with torch.no_grad(), pytest.raises(ValueError, match="memory needs two"):
        session.remember(0, frames[:1], session.encode(frames[:1]), masks, [1, 2], given=True)
    assert session.object_ids == []


def test_twelve_objects_have_no_empty_slots(model: STM) -> None:
    ids = [3 * i + 2 for i in range(12)]
    session = model.open_session(SessionSettings())
    for probabilities in run(session, clip(3), boxes(12), ids):
        assert probabilities.shape == (1, 13, 48, 80)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 48, 80))
    assert session.object_ids == ids


def test_objects_are_read_apart(model: STM) -> None:
    """Removing an object leaves what another one reads and decodes as it was."""
    frames, masks = clip(3), boxes(2)
    session = model.open_session(SessionSettings())
    decoded: list[torch.Tensor] = []
    hook = model.Decoder.register_forward_hook(lambda _, given, logits: decoded.append(logits))
    with torch.no_grad():
        features = session.encode(frames[:1])
        session.remember(0, frames[:1], features, masks, [1, 2], given=True)
        following = session.encode(frames[1:2])
        assert session.segment(following).shape == (1, 3, 48, 80)
        session.remove([1])
        assert session.segment(following).shape == (1, 2, 48, 80)
        session.remove([2])
        assert session.segment(following).shape == (1, 1, 48, 80)
    hook.remove()
    assert session.object_ids == []
    assert session.memory_nbytes == 0
    torch.testing.assert_close(decoded[1][0], decoded[0][1])
    with pytest.raises(ValueError, match=r"object_ids: \[1\]"):
        session.remove([1])


def test_removed_and_late_objects_follow_their_own_memory(model: STM) -> None:
    """An object remembers frames from the one it entered on."""
    frames, masks = clip(6), boxes(2)
    one = labels(masks, [4, 9])
    tracker = Tracker(model, SessionSettings(memory_every=2))
    images = pictures(frames)
    tracker.add(images[0], one * (one == 4))
    tracker.step(images[1])
    tracker.add(images[2], one * (one == 9))
    assert tracker.object_ids == [4, 9]
    assert tracker.step(images[3]).shape[0] == 3
    tracker.remove([4])
    assert tracker.step(images[4]).shape[0] == 2
    assert tracker.step(images[5]).shape[0] == 2
    banks = tracker.state_dict()["memory"]["banks"]
    assert {i: bank["frames"] for i, bank in banks.items()} == {9: [2, 4]}


def test_resume_is_exact(model: STM) -> None:
    check_resume(lambda: Tracker(model, SessionSettings(memory_every=2)), clip(6), boxes(2), [1, 7])


@pytest.mark.parametrize("policy", [Bounded(3), ByteBudget(7 * FRAME_BYTES)])
def test_resume_under_a_limit_is_exact(model: STM, policy: vosops.memory.Policy) -> None:
    settings = SessionSettings(memory_every=1, policy=policy)
    check_resume(lambda: Tracker(model, settings), clip(8), boxes(2), [1, 7])


def test_a_state_of_other_settings_is_refused(model: STM) -> None:
    state = model.open_session(SessionSettings(memory_every=2)).state_dict()
    with pytest.raises(ValueError, match="memory_every 2, this session has 5"):
        model.open_session(SessionSettings()).load_state_dict(state)


def test_backends_agree(model: STM, cpu_backend: None) -> None:
    def segment() -> torch.Tensor:
        session = model.open_session(SessionSettings(memory_every=2))
        return torch.cat(list(run(session, clip(5), boxes(2), [1, 2])))

    compiled = segment()
    with vosops.use_backend("reference"):
        torch.testing.assert_close(segment(), compiled, rtol=1e-4, atol=2e-5)


def test_top_k_over_the_whole_memory_is_the_dense_read(model: STM) -> None:
    frames, masks = clip(4), boxes(1)
    dense = list(run(model.open_session(SessionSettings(top_k=0)), frames, masks, [1]))
    whole = list(run(model.open_session(SessionSettings(top_k=15 * 4)), frames, masks, [1]))
    few = list(run(model.open_session(SessionSettings(top_k=2)), frames, masks, [1]))
    torch.testing.assert_close(torch.cat(whole), torch.cat(dense))
    assert not torch.allclose(torch.cat(few), torch.cat(dense), atol=1e-4)


def test_masks_are_cut_to_the_frame(model: STM) -> None:
    frame = clip(1, 40, 64)
    image = model.prepare(frame)
    assert image.shape == (1, 4, 48, 64)
    masks = masks_on_frame(image, torch.ones(1, 3, 48, 64))
    assert masks.shape == (1, 2, 48, 64)
    assert masks.sum() == 2 * 40 * 64
    torch.testing.assert_close(model.restore(masks, (40, 64)), torch.ones(1, 2, 40, 64))


def test_forward_trains_everything_but_batch_norm() -> None:
    model = STM().train()
    norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    before = [norm.running_mean.clone() for norm in norms]
    frames = torch.stack((clip(3, 40, 56, seed=1), clip(3, 40, 56, seed=2)))
    masks = boxes(2, 40, 56)[:, 1:].repeat(2, 1, 1, 1)
    logits = model(frames, masks)
    assert logits.shape == (2, 2, 3, 40, 56)
    target = boxes(2, 40, 56).argmax(1).repeat(4, 1, 1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any("bn" in name for name in trained)
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


def test_forward_gives_what_a_session_gives(model: STM) -> None:
    """Training and inference are one network: memory_every=1 remembers what forward reads."""
    frames, masks = clip(4), boxes(2)
    with torch.no_grad():
        trained = merge_slots(model(frames[None], masks[:, 1:])[0])
    session = model.open_session(SessionSettings(memory_every=1))
    torch.testing.assert_close(
        torch.cat(list(run(session, frames, masks, [1, 2]))), trained, rtol=1e-4, atol=2e-5
    )


def test_empty_slots_take_part_up_to_ten_objects() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0])[None, :, None, None]
    empty = math.log(1e-7 / (1 - 1e-7))
    expected = torch.tensor([0.5, -1.0, 2.0] + 8 * [empty]).softmax(0)[:3]
    torch.testing.assert_close(merge_slots(logits)[0, :, 0, 0], expected, rtol=0, atol=1e-7)
    many = torch.randn(1, 14, 2, 2)
    torch.testing.assert_close(merge_slots(many), many.softmax(1))


def test_others_are_at_most_one() -> None:
    masks = torch.tensor([0.8, 0.7, 0.1]).view(1, 3, 1, 1)
    torch.testing.assert_close(clamped_others(masks).flatten(), torch.tensor([0.8, 0.9, 1.0]))


def test_bad_input_is_named(model: STM) -> None:
    frames, masks = clip(2), boxes(1)
    session = model.open_session(SessionSettings())
    features = session.encode(frames[:1])
    with pytest.raises(ValueError, match="object_ids must be 1 distinct ids"):
        session.remember(0, frames[:1], features, masks, [1, 2], given=True)
    with torch.no_grad():
        session.remember(0, frames[:1], features, masks, [1], given=True)
    with pytest.raises(ValueError, match=r"object_ids lacks \[1\]"):
        session.remember(1, frames[1:], features, masks, [2], given=True)
    with pytest.raises(ValueError, match="frames must have shape"):
        model(frames[None, :1], masks[:, 1:])
    with pytest.raises(ValueError, match="first_mask must have shape"):
        model(frames[None], masks[:, 1:, :40])
    with pytest.raises(TypeError, match=r"frames must be a floating-point tensor.*uint8"):
        model((frames[None] * 255).byte(), masks[:, 1:])
