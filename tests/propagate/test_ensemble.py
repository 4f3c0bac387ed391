# SPDX-License-Identifier: Apache-2.0
"""Ensembles merge by id, each member keeping its own memory; resumed they go on exactly."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.propagate.stand_in import ColourModel
from vosops.data import open_frames, read_labels
from vosops.data.rendered_clip import render_clip
from vosops.evaluation import evaluate_sequence
from vosops.models import SessionSettings
from vosops.models import load as load_model
from vosops.models.registry import shipped_weights
from vosops.propagate import AugmentedSegmenter, CopyFirstMask, LabelPropagator, PropagationSettings, Tracker
from vosops.propagate.ensemble import EnsembleSegmenter
from vosops.propagate.run import VideoSegmenter

DATA = Path(os.environ.get("VOSOPS_DATA", "../shared/data"))
SMALL = PropagationSettings(stride=8, sigma=4.0)
FINE = PropagationSettings(stride=3)  # for real clips reduced to a third of their size
SIZE = (48, 64)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip():
    return render_clip(frames=7, size=(96, 160))


class Says:
    """Gives the probabilities that it is told, for the objects that it knows of the mask."""

    def __init__(self, answers: dict[int, Any], background: Any = None) -> None:
        self.answers = {i: torch.as_tensor(a, dtype=torch.float32).expand(SIZE) for i, a in answers.items()}
        self.object_ids: list[int] = []
        self.calls: list[str] = []
        self.memory_nbytes = 7

    def add(self, frame: np.ndarray, mask: np.ndarray) -> None:
        self.calls.append("add")
        self.object_ids = list(self.answers)

    def step(self, frame: np.ndarray) -> Tensor:
        self.calls.append("step")
        objects = torch.stack([self.answers[i] for i in self.object_ids] or [torch.zeros(SIZE)])
        objects = objects[: len(self.object_ids)]
        return torch.cat((1 - objects.sum(0, keepdim=True), objects))

    def state_dict(self) -> dict[str, Any]:
        return {"object_ids": list(self.object_ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.object_ids = list(state["object_ids"])


class Removes(Says):
    def remove(self, ids: list[int]) -> None:
        self.object_ids = [i for i in self.object_ids if i not in ids]


def texture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def first_mask(*ids: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    for column, i in enumerate(ids):
        mask[10:40, 20 * column : 20 * column + 18] = i
    return mask


def merged(members: list[Says], **options: Any) -> tuple[list[int], list[float]]:
    """Ids and the probabilities, the same at all pixels."""
    ensemble = EnsembleSegmenter(members, **options)
    ensemble.add(texture(), first_mask(1, 2, 3))
    found = ensemble.step(texture())
    assert found.shape == (1 + len(ensemble.object_ids), *SIZE)
    assert (found == found[:, :1, :1]).all()
    return ensemble.object_ids, found[:, 0, 0].tolist()


def test_average_weighted_and_maximum_of_members_that_know_the_same():
    def members() -> list[Says]:
        return [Says({1: 0.8, 2: 0.2}), Says({2: 0.5, 1: 0.3})]

    ids, found = merged(members())
    assert ids == [1, 2]
    assert found == pytest.approx([0.1, 0.55, 0.35])
    assert merged(members(), merge="weighted", weights=[3, 1])[1] == pytest.approx([0.05, 0.675, 0.275])
    scores = [0.2, 0.8, 0.5]
    assert merged(members(), merge="maximum")[1] == pytest.approx([s / sum(scores) for s in scores])
    assert merged(members()[:1], merge="maximum")[1] == pytest.approx([0.0, 0.8, 0.2])


def test_an_object_is_not_averaged_from_members_that_do_not_know_it():
    ids, found = merged([Says({1: 0.6, 5: 0.4}), Says({1: 0.2})])
    assert ids == [1, 5]
    assert found == pytest.approx([0.2, 0.4, 0.4])  # 5 keeps what the one that knows it says
    # Together the objects may pass 1: then they are scaled to it.
    assert merged([Says({1: 0.5, 5: 0.5}), Says({1: 1.0})])[1] == pytest.approx([0, 0.6, 0.4])
    # What a member takes for background may be an object that it does not know.
    scores = [0.1, 0.9]
    ids, found = merged([Says({5: 0.9}), Says({}), Says({})], merge="maximum")
    assert ids == [5]
    assert found == pytest.approx([s / sum(scores) for s in scores])
    assert merged([Says({2: 0.7}), Says({1: 0.4})])[0] == [2, 1]


@pytest.mark.parametrize("merge", ["average", "maximum", "keypoints"])
def test_all_objects_gone_leaves_background(merge):
    ensemble = EnsembleSegmenter([Removes({1: 0.6, 2: 0.3}), Removes({1: 0.5})], merge)
    ensemble.add(texture(), first_mask(1, 2))
    with pytest.raises(ValueError, match=r"ids of \[1, 2\], got \[3\]"):
        ensemble.remove([3])
    ensemble.remove([1])
    assert ensemble.object_ids == [2]
    assert ensemble.step(texture()).shape == (2, *SIZE)
    ensemble.remove([2])
    assert torch.equal(ensemble.step(texture()), torch.ones(1, *SIZE))


def test_members_of_different_kinds_keep_their_own_memory(clip):
    """An ensemble leaves its members what they are alone, and gives the mean of what they give."""

    def members() -> list[VideoSegmenter]:
        return [
            LabelPropagator(SMALL),
            Tracker(ColourModel(stride=4)),
            AugmentedSegmenter(lambda: Tracker(ColourModel(stride=16)), (1.0, 0.5), flip=True),
        ]

    alone, ensemble = members(), EnsembleSegmenter(members())
    follower: VideoSegmenter = ensemble
    follower.add(clip.frames[0], clip.masks[0])
    for member in alone:
        member.add(clip.frames[0], clip.masks[0])
    for frame in clip.frames[1:5]:
        expected = torch.stack([member.step(frame) for member in alone]).mean(0)
        torch.testing.assert_close(ensemble.step(frame), expected, rtol=0, atol=1e-5)
    assert ensemble.object_ids == [1, 2]
    assert ensemble.memory_nbytes == sum(member.memory_nbytes for member in alone)


@pytest.mark.parametrize("merge", ["average", "keypoints"])
def test_objects_may_enter_on_the_present_and_on_the_next_frame(clip, merge):
    late = np.where(clip.masks[2] == 2, 9, 0).astype(np.uint8)
    found = []
    for stepped in (True, False):
        ensemble = EnsembleSegmenter([LabelPropagator(SMALL), Tracker(ColourModel(4))], merge)
        ensemble.add(clip.frames[0], np.where(clip.masks[0] == 1, 1, 0))
        ensemble.step(clip.frames[1])
        if stepped:
            ensemble.step(clip.frames[2])
        ensemble.add(clip.frames[2], late)
        found.append(ensemble.step(clip.frames[3]))
        assert ensemble.object_ids == [1, 9]
    assert torch.equal(*found)
    assert found[0].argmax(0).eq(2).any()


@pytest.mark.parametrize("merge", ["average", "maximum", "weighted", "keypoints"])
def test_resume_is_exact(clip, merge):
    weights = (1.0, 2.5) if merge == "weighted" else None

    def make() -> EnsembleSegmenter:
        tracker = Tracker(ColourModel(4), SessionSettings(memory_every=2))
        return EnsembleSegmenter([LabelPropagator(SMALL), tracker], merge, weights)

    first, second = make(), make()
    first.add(clip.frames[0], clip.masks[0])
    for frame in clip.frames[1:3]:
        first.step(frame)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for frame in clip.frames[3:]:
        assert torch.equal(first.step(frame), second.step(frame))


def test_a_state_of_other_options_is_refused():
    state = EnsembleSegmenter([Says({1: 0.5}), Says({1: 0.5})], "weighted", [1, 2]).state_dict()
    for options, message in (
        ({"merge": "weighted", "weights": [2, 1]}, r"weights \[1.0, 2.0\], this ensemble has \[2.0, 1.0\]"),
        ({}, "merge weighted, this ensemble has average"),
    ):
        with pytest.raises(ValueError, match=message):
            EnsembleSegmenter([Says({1: 0.5}), Says({1: 0.5})], **options).load_state_dict(state)
    with pytest.raises(ValueError, match="state was saved with members .*CopyFirstMask"):
        EnsembleSegmenter([Says({}), CopyFirstMask()], "weighted", [1, 2]).load_state_dict(state)


def test_bad_arguments_are_named():
    one, other = Says({1: 0.5}), Says({1: 0.5})
    for arguments, error, message in (
        (([],), ValueError, "members must be one or more"),
        (([one, one],), ValueError, "each of them once"),
        (([one, CopyFirstMask],), TypeError, "members must be segmenters"),
        (([one], "median"), ValueError, "merge must be one of average, maximum, weighted, keypoints"),
        (([one, other], "weighted"), ValueError, "weights go with merge='weighted'"),
        (([one, other], "average", [1, 1]), ValueError, "weights go with merge='weighted'"),
        (([one, other], "weighted", [1]), ValueError, "weights must be 2, one per member, got 1"),
        (([one, other], "weighted", [1, 0]), ValueError, "finite and above 0, got 0"),
        (([one, other], "weighted", [1, "2"]), TypeError, "weights must be numbers"),
        (([one, other], "weighted", 2.0), TypeError, "weights must be a sequence"),
        (([one], "average", None, object()), ValueError, "matcher goes with merge='keypoints'"),
    ):
        with pytest.raises(error, match=message):
            EnsembleSegmenter(*arguments)
    ensemble = EnsembleSegmenter([one, other])
    with pytest.raises(RuntimeError, match="step needs objects to follow"):
        ensemble.step(texture())
    with pytest.raises(ValueError, match="mask must hold at least one object"):
        ensemble.add(texture(), first_mask())
    assert one.calls == []
    ensemble.add(texture(), first_mask(1))
    with pytest.raises(ValueError, match=r"first frame's size \[48, 64\]"):
        ensemble.step(texture()[1:])
    assert one.calls == ["add"]
    other.answers[1] = torch.zeros(10, 10)
    with pytest.raises(ValueError, match=r"member 1 \(Says\) must return .*\[2, 48, 64\], got \[2, 10, 10\]"):
        ensemble.step(texture())
    with pytest.raises(TypeError, match="Says cannot remove objects"):
        ensemble.remove([1])


def score(segmenter: VideoSegmenter, frames: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """J&F in points."""
    labels = [masks[0]]
    segmenter.add(frames[0], masks[0])
    for frame in frames[1:]:
        labels.append(np.array([0, *segmenter.object_ids])[segmenter.step(frame).argmax(0).numpy()])
    return 100 * evaluate_sequence(masks, labels).jf_mean


def load(sequence: str, count: int, size: tuple[int, int] = (144, 256)) -> tuple[list, list]:
    folder = DATA / "JPEGImages/480p" / sequence
    if not folder.is_dir():
        pytest.skip(f"no real clips: VOSOPS_DATA={DATA} has no JPEGImages/480p/{sequence}")
    frames, masks = [], []
    for name, frame in open_frames(folder):
        frames.append(cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA))
        labels = read_labels(DATA / f"Annotations/480p/{sequence}/{name}.png")
        masks.append(cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT))
        if len(frames) == count:
            return frames, masks
    raise AssertionError(f"{sequence} is too short")


def test_on_real_clips_an_ensemble_is_as_good_as_its_best_member():
    """Mean over clips, of members of like quality: at least the best one minus 0.3 J&F."""
    options = (FINE, replace(FINE, sigma=9.0), replace(FINE, top_k=20, memory_frames=3))
    clips = [load(sequence, 8) for sequence in ("soapbox", "dance-twirl")]
    alone = [np.mean([score(LabelPropagator(option), *clip) for clip in clips]) for option in options]
    for merge in ("average", "keypoints"):
        ensembles = [EnsembleSegmenter([LabelPropagator(o) for o in options], merge) for _ in clips]
        together = np.mean([score(e, *clip) for e, clip in zip(ensembles, clips, strict=True)])
        assert together >= max(alone) - 0.3


def test_on_real_clips_the_shipped_models_are_as_good_together():
    """Mean over clips: the average of stcn_tiny and aot_tiny is at least the better one minus 0.3 J&F."""
    weights = {name: shipped_weights(name) for name in ("stcn_tiny", "aot_tiny")}
    if None in weights.values():
        pytest.skip("vosops/weights lacks stcn_tiny or aot_tiny")
    models = [load_model(name, path) for name, path in weights.items()]
    clips = [load(sequence, 8, (240, 427)) for sequence in ("soapbox", "dance-twirl")]
    alone = [np.mean([score(Tracker(model), *clip) for clip in clips]) for model in models]
    together = np.mean([score(EnsembleSegmenter([Tracker(m) for m in models]), *clip) for clip in clips])
    assert together >= max(alone) - 0.3
