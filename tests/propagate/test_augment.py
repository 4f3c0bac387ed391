# SPDX-License-Identifier: Apache-2.0
"""Multi-scale and flip inference around any segmenter."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.propagate.stand_in import ColourModel
from tests.propagate.test_ensemble import FINE, load, score
from vosops.memory import Bounded, ByteBudget, EveryNth
from vosops.memory.policies import Policy
from vosops.models import SessionSettings, create
from vosops.models import load as load_model
from vosops.models.registry import shipped_weights
from vosops.propagate import CopyFirstMask, LabelPropagator, Tracker
from vosops.propagate.augment import AugmentedSegmenter, estimate_memory
from vosops.propagate.run import VideoSegmenter


class Colour:
    """Segments by brightness alone, and notes what it was given: what a variant sees can be told exactly."""

    def __init__(self) -> None:
        self.given: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.ids: list[int] = []
        self.memory_nbytes = 10

    @property
    def object_ids(self) -> list[int]:
        return self.ids

    def add(self, frame: np.ndarray, mask: np.ndarray) -> None:
        self.given.append((frame, mask))
        self.ids = self.ids + [int(i) for i in np.unique(mask) if i not in (0, 255, *self.ids)]

    def step(self, frame: np.ndarray) -> Tensor:
        self.given.append((frame, None))
        found = torch.from_numpy(frame[..., 0].copy()).float() / 255
        return torch.stack((1 - found, found))

    def remove(self, ids: list[int]) -> None:
        self.ids = [i for i in self.ids if i not in ids]

    def state_dict(self) -> dict[str, Any]:
        return {"ids": list(self.ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ids = list(state["ids"])


def _clip(frames: int = 4, height: int = 60, width: int = 96) -> tuple[list[np.ndarray], np.ndarray]:
    """A bright square that moves over a smooth ground."""
    ground = np.linspace(20, 90, width, dtype=np.float32)[None, :, None] + np.zeros(
        (height, 1, 3), np.float32
    )
    pictures = []
    for t in range(frames):
        picture = ground.astype(np.uint8)
        picture[20:44, 16 + 4 * t : 40 + 4 * t] = (220, 180, 60)
        pictures.append(picture)
    mask = np.zeros((height, width), np.uint8)
    mask[20:44, 16:40] = 3
    return pictures, mask


def test_one_scale_without_flip_changes_no_bit() -> None:
    frames, mask = _clip()
    plain, same = LabelPropagator(), AugmentedSegmenter(LabelPropagator)
    follower: VideoSegmenter = same
    plain.add(frames[0], mask)
    follower.add(frames[0], mask)
    for frame in frames[1:]:
        torch.testing.assert_close(same.step(frame), plain.step(frame), rtol=0, atol=0)
    assert same.object_ids == plain.object_ids == [3]
    assert same.memory_nbytes == plain.memory_nbytes


def test_every_variant_sees_frames_and_masks_alike() -> None:
    made: list[Colour] = []
    augmented = AugmentedSegmenter(lambda: made.append(Colour()) or made[-1], scales=(1.0, 0.5), flip=True)
    frames, mask = _clip()
    augmented.add(frames[0], mask)
    assert [v.given[0][0].shape for v in made] == [(60, 96, 3), (60, 96, 3), (30, 48, 3), (30, 48, 3)]
    for segmenter in made:
        frame, small = segmenter.given[0]
        assert small is not None
        assert small.shape == frame.shape[:2]
        assert np.array_equal(small == 3, frame[..., 0] > 150)
    assert np.array_equal(made[1].given[0][0], frames[0][:, ::-1])
    assert np.array_equal(made[3].given[0][1], made[2].given[0][1][:, ::-1])
    assert augmented.memory_nbytes == 40


def test_the_result_is_the_mean_at_the_frames_size() -> None:
    frames, mask = _clip()
    augmented = AugmentedSegmenter(Colour, scales=(0.5, 1.0, 1.5), flip=True)
    augmented.add(frames[0], mask)
    found = augmented.step(frames[1])
    assert found.shape == (2, 60, 96)
    torch.testing.assert_close(found.sum(0), torch.ones(60, 96))
    # All variants see the same colours, back in place: away from edges the mean is the frame itself.
    exact = torch.from_numpy(frames[1][..., 0].copy()).float() / 255
    difference = (found[1] - exact).abs()
    assert difference[24:40, 24:40].max() < 0.01
    assert difference[:, 52:90].max() < 0.01
    single = [AugmentedSegmenter(Colour, scales=(s,)) for s in (0.5, 1.0, 1.5)]
    parts = []
    for segmenter in single:
        segmenter.add(frames[0], mask)
        parts.append(segmenter.step(frames[1]))
    unflipped = AugmentedSegmenter(Colour, scales=(0.5, 1.0, 1.5))
    unflipped.add(frames[0], mask)
    torch.testing.assert_close(unflipped.step(frames[1]), torch.stack(parts).mean(0))


def test_mirrored_video_gives_mirrored_results_with_flip() -> None:
    frames, mask = _clip()
    results = []
    for turn in (slice(None), slice(None, None, -1)):
        augmented = AugmentedSegmenter(LabelPropagator, flip=True)
        augmented.add(np.ascontiguousarray(frames[0][:, turn]), np.ascontiguousarray(mask[:, turn]))
        results.append(augmented.step(np.ascontiguousarray(frames[1][:, turn])))
    torch.testing.assert_close(results[1].flip(-1), results[0], rtol=0, atol=1e-4)


def test_resume_is_exact() -> None:
    frames, mask = _clip(5)
    first, second = (AugmentedSegmenter(LabelPropagator, (0.75, 1.0), flip=True) for _ in range(2))
    first.add(frames[0], mask)
    first.step(frames[1])
    second.load_state_dict(first.state_dict())
    for frame in frames[2:]:
        torch.testing.assert_close(first.step(frame), second.step(frame), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"state was saved with \(scale, mirrored\)"):
        AugmentedSegmenter(LabelPropagator, (0.75, 1.0)).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="first frame's size"):
        second.step(frames[0][:50])


def test_objects_are_removed_where_segmenters_can() -> None:
    frames, mask = _clip()
    augmented = AugmentedSegmenter(Colour, flip=True)
    mask[0:8, 60:80] = 7
    augmented.add(frames[0], mask)
    augmented.remove([3])
    assert augmented.object_ids == [7]
    with pytest.raises(TypeError, match="CopyFirstMask cannot remove objects"):
        AugmentedSegmenter(CopyFirstMask).remove([1])


def test_variants_with_different_objects_are_not_averaged() -> None:
    made: list[Colour] = []
    augmented = AugmentedSegmenter(lambda: made.append(Colour()) or made[-1], flip=True)
    frames, mask = _clip()
    augmented.add(frames[0], mask)
    made[1].ids = [5]
    with pytest.raises(RuntimeError, match="variants follow different objects"):
        augmented.step(frames[1])


def test_an_object_that_vanishes_at_a_scale_is_refused_before_anything_changes() -> None:
    made: list[Colour] = []
    augmented = AugmentedSegmenter(lambda: made.append(Colour()) or made[-1], scales=(1.0, 0.5))
    frames, mask = _clip()
    mask[2, 2] = 9
    with pytest.raises(ValueError, match=r"scale 0.5 is too small for the mask: objects \[9\] vanish"):
        augmented.add(frames[0], mask)
    assert not any(segmenter.given for segmenter in made)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scales": ()}, ValueError, "one or more distinct"),
        ({"scales": (1.0, 1.0)}, ValueError, "one or more distinct"),
        ({"scales": (0.0,)}, ValueError, "finite and above 0"),
        ({"scales": (float("nan"),)}, ValueError, "finite and above 0"),
        ({"scales": 1.0}, TypeError, "scales must be a sequence"),
        ({"scales": ("1",)}, TypeError, "scales must be numbers"),
        ({"flip": 1}, TypeError, "flip must be a bool"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AugmentedSegmenter(CopyFirstMask, **options)


def test_bad_frames_are_named() -> None:
    frames, mask = _clip()
    augmented = AugmentedSegmenter(CopyFirstMask, (1.0, 0.25))
    with pytest.raises(TypeError, match=r"frame must be an array.*float32"):
        augmented.add(frames[0].astype(np.float32), mask)
    with pytest.raises(ValueError, match="16 pixels a side at every scale, got 15"):
        augmented.add(frames[0], mask)
    with pytest.raises(TypeError, match="mask must be an array.*float64"):
        AugmentedSegmenter(CopyFirstMask).add(frames[0], mask.astype(float))
    with pytest.raises(ValueError, match=r"mask must have the frame's size \[60, 96\], got \[30, 96\]"):
        AugmentedSegmenter(CopyFirstMask).add(frames[0], mask[:30])
    same = CopyFirstMask()
    with pytest.raises(ValueError, match="the same one twice"):
        AugmentedSegmenter(lambda: same, flip=True)
    with pytest.raises(TypeError, match="make_segmenter must be a function"):
        AugmentedSegmenter(CopyFirstMask())


def _held_after(segmenter: AugmentedSegmenter, size: tuple[int, int], objects: int, frames: int) -> int:
    """Bytes of memory after a video of noise with so many objects."""
    rng = np.random.default_rng(1)
    mask = np.zeros(size, np.uint8)
    for i in range(1, objects + 1):
        mask[:, 12 * i : 12 * i + 10] = i
    for number in range(frames):
        frame = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        if number == 0:
            segmenter.add(frame, mask)
        else:
            segmenter.step(frame)
    return segmenter.memory_nbytes


@pytest.mark.parametrize(
    "policy",
    [None, EveryNth(3), Bounded(6), ByteBudget(200_000)],
    ids=["every frame", "every third", "bounded", "budget"],
)
@pytest.mark.parametrize("frames", [2, 21])
def test_the_memory_of_all_variants_is_told_before(policy: Policy | None, frames: int) -> None:
    """Exact, whether the memory grows or not, at sizes that are no multiples of the stride."""

    def make() -> Tracker:
        return Tracker(ColourModel(stride=8), SessionSettings(policy=policy))

    size, options = (70, 101), {"scales": (1.0, 0.75, 1.5), "flip": True}
    told = estimate_memory(make, size, 2, frames, **options)
    assert told == _held_after(AugmentedSegmenter(make, **options), size, 2, frames)
    if policy is None and frames > 2:
        assert told > 2 * estimate_memory(make, size, 2, 8, **options)


@pytest.mark.parametrize("kind", ["stcn_tiny", "aot_tiny", "propagation"])
def test_the_memory_of_real_segmenters_is_told_before(kind: str) -> None:
    torch.set_num_threads(1)
    model = None if kind == "propagation" else create(kind)

    def make() -> VideoSegmenter:
        return LabelPropagator() if model is None else Tracker(model, SessionSettings(memory_every=2))

    size = (64, 104)
    told = estimate_memory(make, size, 3, 12, flip=True)
    held = _held_after(AugmentedSegmenter(make, flip=True), size, 3, 12)
    assert told == held


def test_memory_that_does_not_follow_the_size_is_told_too() -> None:
    """Of every frame something in proportion to its pixels, and something that every frame takes."""

    class Keeps(CopyFirstMask):
        memory_nbytes = 0

        def step(self, frame: np.ndarray) -> Tensor:
            self.memory_nbytes += frame.nbytes + 1000
            return super().step(frame)

    options = {"scales": (1.0, 0.5), "flip": True}
    expected = 2 * 19 * (3 * 60 * 96 + 3 * 30 * 48 + 2 * 1000)
    assert _held_after(AugmentedSegmenter(Keeps, **options), (60, 96), 2, 20) == expected
    assert estimate_memory(Keeps, (60, 96), 2, 20, **options) == expected


def test_what_memory_cannot_be_told_of() -> None:
    with pytest.raises(TypeError, match="CopyFirstMask does not tell its memory"):
        estimate_memory(CopyFirstMask, (60, 96), 1, 10)
    for arguments, error, message in (
        (((60, 96), 0, 10), ValueError, "objects must be at least 1, got 0"),
        (((60, 96), 1, 1), ValueError, "frames must be at least 2, got 1"),
        (((60, 96), 1, 5.0), TypeError, "frames must be an integer, got float"),
    ):
        with pytest.raises(error, match=message):
            estimate_memory(LabelPropagator, *arguments)
    with pytest.raises(ValueError, match="one or more distinct"):
        estimate_memory(LabelPropagator, (60, 96), 1, 10, scales=())


@pytest.mark.parametrize("kind", ["propagation", "stcn_tiny", "aot_tiny"])
def test_on_real_clips_flip_is_not_worse(kind: str) -> None:
    """Mean over clips; a tenth of a point is less than what a pixel's width at the border makes."""
    if kind == "propagation":
        size, make = (144, 256), partial(LabelPropagator, FINE)
    else:
        weights = shipped_weights(kind)
        if weights is None:
            pytest.skip(f"vosops/weights lacks {kind}")
        size, make = (240, 427), partial(Tracker, load_model(kind, weights))
    clips = [load(sequence, 8, size) for sequence in ("soapbox", "dance-twirl")]
    plain = np.mean([score(make(), *clip) for clip in clips])
    flipped = np.mean([score(AugmentedSegmenter(make, flip=True), *clip) for clip in clips])
    assert flipped >= plain - 0.1
