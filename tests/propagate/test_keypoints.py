# SPDX-License-Identifier: Apache-2.0
"""Keypoints of objects are found again, and decide which member an object follows."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from vosops.propagate.ensemble import EnsembleSegmenter
from vosops.propagate.keypoints import Keypoints, KeypointTrail, LightGlueMatcher, SiftMatcher

SIZE = (128, 160)


def ground(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Blobs of all sizes: what SIFT finds keypoints in."""
    rng = np.random.default_rng(seed)
    noise = [
        cv2.resize(rng.uniform(0, 255, (size[0] // s, size[1] // s, 3)).astype(np.float32), size[::-1])
        for s in (4, 8, 16)
    ]
    return np.mean(noise, 0).astype(np.uint8)


def scene(shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Two textured squares, 3 moving right by `shift` and 8 down, on a still ground; and their labels."""
    frame, labels = ground(0), np.zeros(SIZE, np.int64)
    for i, row, column in ((3, 10, 10 + shift), (8, 60 + shift, 90)):
        frame[row : row + 48, column : column + 48] = ground(i, (48, 48))
        labels[row : row + 48, column : column + 48] = i
    return frame, labels


def test_keypoints_move_with_their_objects():
    matcher = SiftMatcher()
    (before, labels), (after, moved) = scene(0), scene(8)
    trail = KeypointTrail(matcher)
    trail.see(before, labels)
    followed = trail.follow(after)
    assert set(followed.owners) == {3, 8}
    assert min((followed.owners == i).sum() for i in (3, 8)) >= 10
    on = moved[tuple(followed.points.T)]
    assert (on == followed.owners).mean() > 0.95


def test_matches_are_mutual_unambiguous_and_of_the_chosen():
    matcher = SiftMatcher()
    previous, current = matcher.detect(scene(0)[0]), matcher.detect(scene(8)[0])
    everything = matcher.match(previous, current, np.arange(len(previous.points)))
    assert len(everything) > 30
    assert len(set(everything[:, 0])) == len(set(everything[:, 1])) == len(everything)
    chosen = np.arange(0, len(previous.points), 3)
    some = matcher.match(previous, current, chosen)
    # Those left out still compete: the matches are the same ones, no more.
    np.testing.assert_array_equal(some, everything[np.isin(everything[:, 0], chosen)])
    assert len(SiftMatcher(0.5).match(previous, current, chosen)) < len(some)
    # The definition, over the whole matrix.
    distance = np.linalg.norm(previous.descriptors[:, None].astype(float) - current.descriptors[None], axis=2)
    best, back = distance.argmin(1), distance.argmin(0)
    ordered = np.sort(distance, 1)
    good = (back[best] == np.arange(len(best))) & (ordered[:, 0] < 0.8 * ordered[:, 1])
    np.testing.assert_array_equal(everything, np.stack((np.flatnonzero(good), best[good]), 1))


def test_a_keypoint_that_another_one_matches_better_is_left_alone():
    """Though that one is not chosen, and the ratio test cannot tell."""

    def keypoints(*descriptors: tuple[float, float]) -> Keypoints:
        found = np.array(descriptors, np.float32)
        return Keypoints(np.zeros((len(found), 2), np.float32), found, SIZE)

    previous = keypoints((0.0, 0.0), (1.0, 0.0), (9.0, 9.0))
    current = keypoints((1.1, 0.0), (20.0, 0.0), (9.0, 9.5))
    chosen = np.array([0, 2])
    assert SiftMatcher().match(previous, current, chosen).tolist() == [[2, 2]]
    assert SiftMatcher().match(previous, current, np.arange(3)).tolist() == [[1, 0], [2, 2]]
    # Two candidates nearly as good as each other: no match.
    assert SiftMatcher().match(previous, keypoints((0.0, 0.9), (0.0, 1.0)), chosen[:1]).tolist() == []


def test_frames_without_keypoints_match_nothing():
    matcher = SiftMatcher()
    flat = np.full((*SIZE, 3), 90, np.uint8)
    nothing, something = matcher.detect(flat), matcher.detect(scene(0)[0])
    assert nothing.points.shape == (0, 2)
    for previous, current in ((nothing, something), (something, nothing), (nothing, nothing)):
        assert matcher.match(previous, current, np.arange(len(previous.points))).shape == (0, 2)
    trail = KeypointTrail(matcher)
    assert len(trail.follow(flat).owners) == 0  # nothing was seen yet
    trail.see(flat, scene(0)[1])
    assert len(trail.follow(scene(0)[0]).owners) == 0
    for ratio, error in ((0, ValueError), (1.5, ValueError), ("0.8", TypeError), (True, TypeError)):
        with pytest.raises(error, match="ratio must"):
            SiftMatcher(ratio)


def test_shares_are_those_of_the_masks():
    (before, labels), (after, moved) = scene(0), scene(8)
    trail = KeypointTrail(SiftMatcher())
    trail.see(before, np.where(labels == 3, 3, 0))
    followed = trail.follow(after)
    both = torch.stack([torch.from_numpy(moved == i).float() for i in (0, 3, 8)])
    assert followed.kept(both, [3, 8]) == {3: pytest.approx(1.0, abs=0.1)}
    half = both.clone()
    middle = int(np.median(followed.points[:, 1]))
    half[1, :, middle:] = 0
    half[0, :, middle:] = 1
    expected = (followed.points[:, 1] < middle).mean()
    assert followed.kept(half, [3, 8])[3] == pytest.approx(expected, abs=0.1)
    assert followed.kept(torch.zeros(1, *SIZE) + 1, []) == {}


class Fixed:
    """Gives masks of its own, frame by frame."""

    def __init__(self, masks: list[np.ndarray]) -> None:
        self.masks, self.index, self.object_ids = masks, 0, [3, 8]

    def add(self, frame: np.ndarray, mask: np.ndarray) -> None:
        pass

    def step(self, frame: np.ndarray) -> Tensor:
        self.index += 1
        labels = self.masks[self.index]
        return torch.stack([torch.from_numpy(labels == i).float() for i in (0, 3, 8)])

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def test_each_object_follows_the_members_that_keep_its_keypoints():
    """One member loses object 3, the other one 8: an average cannot tell, keypoints take the best of both."""
    scenes = [scene(4 * t) for t in range(4)]
    frames, masks = [frame for frame, _ in scenes], [labels for _, labels in scenes]
    lost = [[np.where(labels == i, 0, labels) for labels in masks] for i in (3, 8)]
    found = {}
    for merge in ("average", "keypoints"):
        ensemble = EnsembleSegmenter([Fixed(lost[0]), Fixed(lost[1])], merge)
        ensemble.add(frames[0], masks[0])
        for frame in frames[1:]:
            found[merge] = ensemble.step(frame)
    torch.testing.assert_close(found["average"][1:].amax(0), torch.from_numpy(masks[3] > 0) * 0.5)
    for channel, i in ((1, 3), (2, 8)):
        assert torch.equal(found["keypoints"][channel], torch.from_numpy(masks[3] == i).float())
    torch.testing.assert_close(found["keypoints"].sum(0), torch.ones(SIZE))


def test_without_keypoints_or_masks_objects_are_averaged():
    flat = [np.full((*SIZE, 3), 90 + t, np.uint8) for t in range(3)]
    frames, masks = zip(*[scene(4 * t) for t in range(3)], strict=True)
    empty = [np.zeros(SIZE, np.int64)] * 3
    cases = [
        (flat, [list(masks), empty], 0.5),  # no keypoints
        (list(frames), [empty, empty], 0.0),  # no member keeps any
    ]
    for video, answers, level in cases:
        ensemble = EnsembleSegmenter([Fixed(answer) for answer in answers], "keypoints")
        ensemble.add(video[0], masks[0])
        for t in (1, 2):
            assert torch.equal(ensemble.step(video[t])[1:].amax(0), torch.from_numpy(masks[t] > 0) * level)


def test_keypoints_are_detected_once_a_frame_and_again_after_a_resume():
    class Counting(SiftMatcher):
        seen: ClassVar[list[int]] = []

        def detect(self, frame: np.ndarray) -> Any:
            self.seen.append(int(frame[0, 0, 0]))
            return super().detect(frame)

    scenes = [scene(4 * t) for t in range(5)]
    frames, masks = [frame for frame, _ in scenes], [labels for _, labels in scenes]
    for t, frame in enumerate(frames):
        frame[0, 0] = t
    lost = [[np.where(labels == i, 0, labels) for labels in masks] for i in (3, 8)]

    def make() -> EnsembleSegmenter:
        return EnsembleSegmenter([Fixed(lost[0]), Fixed(lost[1])], "keypoints", matcher=Counting())

    first, second = make(), make()
    first.add(frames[0], masks[0])
    for frame in frames[1:3]:
        first.step(frame)
    assert Counting.seen == [0, 1, 2]
    second.load_state_dict(first.state_dict())
    for frame in frames[3:]:
        assert torch.equal(second.step(frame), first.step(frame))
    assert Counting.seen == [0, 1, 2, 2, 3, 3, 4, 4]
    other = EnsembleSegmenter([Fixed(lost[0]), Fixed(lost[1])], "keypoints", matcher=SiftMatcher(0.7))
    with pytest.raises(ValueError, match=r"matcher .*0\.8.* this ensemble has SiftMatcher\(ratio=0\.7\)"):
        other.load_state_dict(first.state_dict())


class KorniaDisk(torch.nn.Module):
    """A stand-in of kornia.feature.DISK: a list of features per image, found here by SIFT."""

    @classmethod
    def from_pretrained(cls, checkpoint: str = "depth", device: Any = "cpu") -> KorniaDisk:
        assert checkpoint == "depth"
        return cls()

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in 0..1
        n: int | None = None,
        window_size: int = 5,
        score_threshold: float = 0.0,
        pad_if_not_divisible: bool = False,
    ) -> list[SimpleNamespace]:
        assert images.shape[1] == 3
        assert images.max() <= 1
        assert pad_if_not_divisible  # the real one refuses sides that are no multiples of 16 without it
        frame = (images[0].permute(1, 2, 0) * 255).round().byte().numpy()
        points, descriptors, _ = SiftMatcher().detect(frame)
        return [
            SimpleNamespace(
                keypoints=torch.from_numpy(points)[:n], descriptors=torch.from_numpy(descriptors)[:n]
            )
        ]


class KorniaLightGlue(torch.nn.Module):
    """A stand-in of kornia.feature.LightGlueMatcher: (distances (M, 1), indices (M, 2))."""

    def __init__(self, feature_name: str = "disk") -> None:
        super().__init__()
        assert feature_name == "disk"

    def forward(
        self, desc1: Tensor, desc2: Tensor, lafs1: Tensor, lafs2: Tensor, hw1: Any = None, hw2: Any = None
    ) -> tuple[Tensor, Tensor]:
        assert hw1 == hw2 == SIZE
        for descriptors, lafs in ((desc1, lafs1), (desc2, lafs2)):
            assert lafs.shape == (1, len(descriptors), 2, 3)
        distances = torch.cdist(desc1, desc2)
        best, back = distances.argmin(1), distances.argmin(0)
        mutual = torch.nonzero(back[best] == torch.arange(len(best)))[:, 0]
        pairs = torch.stack((mutual, best[mutual]), 1)
        return distances[pairs[:, 0], pairs[:, 1]][:, None], pairs


def frames_of_points(xy: Tensor) -> Tensor:
    """A stand-in of kornia.feature.laf_from_center_scale_ori, with its default scale and orientation."""
    assert xy.ndim == 3
    assert xy.shape[2] == 2
    shape = torch.eye(2).expand(*xy.shape[:2], 2, 2)
    return torch.cat((shape, xy[..., None]), 3)


@pytest.fixture
def kornia(monkeypatch):
    module, feature = ModuleType("kornia"), ModuleType("kornia.feature")
    module.feature = feature
    feature.DISK, feature.LightGlueMatcher = KorniaDisk, KorniaLightGlue
    feature.laf_from_center_scale_ori = frames_of_points
    monkeypatch.setitem(sys.modules, "kornia", module)
    monkeypatch.setitem(sys.modules, "kornia.feature", feature)


def test_lightglue_of_kornia(kornia):
    matcher = LightGlueMatcher()
    (before, labels), (after, moved) = scene(0), scene(8)
    trail = KeypointTrail(matcher)
    trail.see(before, labels)
    followed = trail.follow(after)
    assert set(followed.owners) == {3, 8}
    assert (moved[tuple(followed.points.T)] == followed.owners).mean() > 0.9
    nothing = matcher.detect(np.full((*SIZE, 3), 90, np.uint8))
    something = matcher.detect(before)
    for previous, current in ((nothing, something), (something, nothing)):
        assert matcher.match(previous, current, np.arange(len(previous.points))).shape == (0, 2)
    ensemble = EnsembleSegmenter([Fixed([labels, moved])], "keypoints", matcher=matcher)
    ensemble.add(before, labels)
    assert torch.equal(ensemble.step(after)[1], torch.from_numpy(moved == 3).float())


def test_without_kornia_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.feature", None)
    with pytest.raises(ImportError, match="LightGlueMatcher needs kornia, which is not installed"):
        LightGlueMatcher()
