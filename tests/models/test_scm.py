# SPDX-License-Identifier: Apache-2.0
"""SCM: each of its parts switches on and off, and changes what it should and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import vosops
from vosops.memory import Bounded
from vosops.models.kmn import KMN
from vosops.models.scm import SCM, SpatialSession
from vosops.models.session import SessionSettings
from vosops.models.stm import STM
from vosops.models.stm_session import STMSession
from vosops.propagate.augment import AugmentedSegmenter
from vosops.propagate.tracker import Tracker

from .stm_helpers import boxes, check_resume, clip, filled, labels, pictures, run


@pytest.fixture(scope="module")
def stm() -> STM:
    return filled(STM())


@pytest.fixture(scope="module")
def prior(stm: STM) -> SCM:
    """The spatially constrained reader alone, with STM's weights."""
    return _with_weights_of(stm, aspp=False, refine=False)


@pytest.fixture(scope="module")
def full() -> SCM:
    torch.manual_seed(0)
    return SCM().eval()


def _with_weights_of(stm: STM, **switches: bool) -> SCM:
    torch.manual_seed(0)
    model = SCM("resnet50", **switches).eval()
    missing, unexpected = model.load_state_dict(stm.state_dict(), strict=False)
    assert unexpected == []
    parts = [part for part in ("aspp", "refine") if switches.get(part, True)]
    assert {name.split(".")[0] for name in missing} == set(parts)
    return model


def _logits(model: STM) -> Tensor:
    with torch.no_grad():
        return model(clip(3)[None], boxes(2)[:, 1:])


def _segmented(model: STM, **settings: object) -> Tensor:
    session = model.open_session(SessionSettings(memory_every=2, **settings))
    return torch.cat(list(run(session, clip(4), boxes(2), [1, 2])))


def test_with_every_part_off_it_is_stm(stm: STM) -> None:
    model = _with_weights_of(stm, aspp=False, refine=False, prior=False)
    assert list(model.state_dict()) == list(stm.state_dict())
    assert torch.equal(_logits(model), _logits(stm))
    assert type(model.open_session(SessionSettings())) is STMSession
    assert torch.equal(_segmented(model), _segmented(stm))


def test_the_prior_changes_sessions_and_not_training(stm: STM, prior: SCM) -> None:
    assert list(prior.state_dict()) == list(stm.state_dict())
    assert torch.equal(_logits(prior), _logits(stm))
    assert type(prior.open_session(SessionSettings())) is SpatialSession
    assert not torch.allclose(_segmented(prior), _segmented(stm), atol=1e-3)


@pytest.mark.parametrize(("part", "last"), [("aspp", "aspp.expand"), ("refine", "refine.correct")])
def test_a_part_changes_the_masks_by_its_last_convolution(stm: STM, part: str, last: str) -> None:
    off = {"aspp": False, "refine": False, "prior": False}
    model = _with_weights_of(stm, **{**off, part: True})
    expected, found = _logits(stm), _logits(model)
    assert not torch.equal(found, expected)  # close, since the part starts close to the identity
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5)
    torch.nn.init.zeros_(model.get_submodule(last).weight)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=1e-5)
    torch.nn.init.normal_(model.get_submodule(last).weight, std=0.5)
    assert (_logits(model) - expected).abs().max() > 0.1


def test_the_backbone_is_behind_the_same_keys_and_decoder(full: SCM, stm: STM) -> None:
    shapes = {name: entry.shape for name, entry in full.state_dict().items()}
    shared = {n: e.shape for n, e in stm.state_dict().items() if not n.startswith("Encoder")}
    assert shared.items() <= shapes.items()
    image = clip(1)
    with torch.no_grad():
        maps = full.Encoder_Q(image)
        memory = full.Encoder_M(image, boxes(2)[0, 1:, None], boxes(2)[0, [2, 1], None])
    assert [tuple(m.shape[1:]) for m in maps] == [(1024, 3, 5), (512, 6, 10), (256, 12, 20)]
    assert memory.f16.shape == (2, 1024, 3, 5)
    assert not torch.allclose(memory.f16[0], memory.f16[1])  # it sees the mask
    with pytest.raises(ValueError, match="backbone must be 'resnest101e' or 'resnet50', got 'vgg16'"):
        SCM("vgg16")


def test_the_whole_model_trains(full: SCM) -> None:
    model = full.train()
    norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    logits = model(clip(3, 48, 64)[None], boxes(2, 48, 64)[:, 1:])
    assert logits.shape == (1, 2, 3, 48, 64)
    target = boxes(2, 48, 64).argmax(1).repeat(2, 1, 1)
    torch.nn.functional.cross_entropy(logits[0], target).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} >= {"Encoder_M", "Encoder_Q", "aspp", "refine", "Decoder"}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    model.zero_grad()
    model.eval()


def test_the_whole_model_runs_in_a_tracker(full: SCM) -> None:
    check_resume(
        lambda: Tracker(full, SessionSettings(memory_every=2, policy=Bounded(3))), clip(6), boxes(2), [3, 8]
    )


def test_several_scales_and_flips_share_one_model(full: SCM) -> None:
    images, ids = pictures(clip(3)), labels(boxes(2), [3, 8])
    augmented = AugmentedSegmenter(lambda: Tracker(full), scales=(0.8, 1.0), flip=True)
    single = Tracker(full)
    for segmenter in (augmented, single):
        segmenter.add(images[0], ids)
    found, plain = augmented.step(images[1]), single.step(images[1])
    assert found.shape == plain.shape == (3, 48, 80)
    torch.testing.assert_close(found.sum(0), torch.ones(48, 80))
    assert not torch.allclose(found, plain)
    assert 3.5 < augmented.memory_nbytes / single.memory_nbytes < 4
    augmented.remove([3])
    assert augmented.object_ids == [8]
    assert augmented.step(images[2]).shape == (2, 48, 80)


# The prior ------------------------------------------------------------------------------------------------


def _steps(model: STM, previous: Tensor) -> Iterator[Tensor]:
    """Frame 2, which remembers frame 0 alone and whose previous masks are `previous`."""
    session = model.open_session(SessionSettings(memory_every=100, include_previous=False))
    frames, masks = clip(3, seed=4), boxes(2)
    with torch.no_grad():
        features = session.encode(frames[:1])
        session.remember(0, frames[:1], features, masks, [1, 2], given=True)
        features = session.encode(frames[1:2])
        session.remember(1, frames[1:2], features, previous, [1, 2], given=False)
        features = session.encode(frames[2:])
        yield session.segment(features)


def test_an_empty_previous_mask_leaves_the_kernel(stm: STM, prior: SCM) -> None:
    kernel = KMN().eval()
    kernel.load_state_dict(stm.state_dict())
    empty = torch.cat((torch.ones(1, 1, 48, 80), torch.zeros(1, 2, 48, 80)), 1)
    constrained, kernelized = next(_steps(prior, empty)), next(_steps(kernel, empty))
    assert torch.equal(constrained, kernelized)
    present = boxes(2)
    assert torch.equal(next(_steps(kernel, present)), kernelized)
    assert not torch.allclose(next(_steps(prior, present)), kernelized, atol=1e-4)


def test_only_the_objects_own_cells_are_corrected(prior: SCM) -> None:
    """The read of a session is `memory_read` with the definition's prior, object by object."""
    session = prior.open_session(SessionSettings(memory_every=1))
    assert isinstance(session, SpatialSession)
    frames, masks = clip(4), boxes(2)
    decoded: list[Tensor] = []
    hook = prior.Decoder.register_forward_hook(lambda _, given, out: decoded.append(given[0]))
    results = list(run(session, frames, masks, [1, 2]))
    hook.remove()
    state = session.state_dict()  # after frame 2 was remembered, as frame 3 was read
    pool = torch.nn.functional.avg_pool2d
    seen = [pool(p[:, 1:], 16)[0] for p in (masks, *results[:2])]  # [O, h, w] of frames 0, 1, 2
    for row, object_id in enumerate((1, 2)):
        bank = state["banks"][object_id]
        assert bank["frames"] == [0, 1, 2]
        expected = vosops.memory_read(
            prior.encode_query(frames[3:]).key,
            bank["key"],
            bank["groups"][0]["value"][:, None],
            prior=vosops.MaskPrior(seen[2][None, row], torch.stack([s[row] for s in seen])[None]),
        )
        torch.testing.assert_close(decoded[-1][row, :512], expected[0, 0], rtol=1e-4, atol=1e-4)


def test_masks_follow_the_slots_of_a_full_memory(prior: SCM) -> None:
    session = prior.open_session(SessionSettings(memory_every=1, policy=Bounded(3)))
    assert isinstance(session, SpatialSession)
    frames, masks = clip(7), boxes(2)
    results = [masks, *run(session, frames, masks, [1, 2])]
    held = session.state_dict()["banks"][2]["frames"]
    assert held != sorted(held)  # overwritten in place
    cells = [torch.nn.functional.avg_pool2d(results[frame][:, 2], 16) for frame in held]
    state = session.state_dict()
    assert list(state["memory_masks"][2]) == held
    for mask, expected in zip(state["memory_masks"][2].values(), cells, strict=True):
        torch.testing.assert_close(mask, expected[0])
    torch.testing.assert_close(
        state["previous_mask"][2], torch.nn.functional.avg_pool2d(results[5][:, 2], 16)[0]
    )
    bank_bytes = 2 * 3 * 15 * 640 * 4
    assert bank_bytes < session.memory_nbytes <= bank_bytes + 2 * 4 * 15 * 4


def test_objects_enter_late_and_leave(prior: SCM) -> None:
    images, ids = pictures(clip(6)), labels(boxes(2), [4, 9])
    tracker = Tracker(prior, SessionSettings(memory_every=2))
    tracker.add(images[0], ids * (ids == 4))
    tracker.step(images[1])
    tracker.add(images[2], ids * (ids == 9))
    assert tracker.step(images[3]).shape[0] == 3
    tracker.remove([4])
    assert tracker.step(images[4]).shape[0] == 2
    state = tracker.state_dict()["memory"]
    assert list(state["previous_mask"]) == [9]
    assert {i: list(masks) for i, masks in state["memory_masks"].items()} == {9: [2, 3]}
    assert tracker.step(images[5]).isfinite().all()


def test_resume_is_exact(prior: SCM) -> None:
    check_resume(lambda: Tracker(prior, SessionSettings(memory_every=2)), clip(6), boxes(2), [1, 7])


def test_backends_agree(prior: SCM, cpu_backend: None) -> None:
    compiled = _segmented(prior)
    with vosops.use_backend("reference"):
        torch.testing.assert_close(_segmented(prior), compiled, rtol=1e-4, atol=5e-5)
