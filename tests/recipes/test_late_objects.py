# SPDX-License-Identifier: Apache-2.0
"""Objects that enter later: given on their frame, followed from there, exactly resumable."""

import numpy as np
import pytest
import torch

from vosops.propagate import AugmentedSegmenter, LabelPropagator
from vosops.recipes import LateObjects

from .clips import SIZE, labels, picture

COUNT = 7
FIRST = np.where(labels(0) == 2, 2, 0).astype(np.uint8)
LATE = {3: np.where(labels(3) == 1, 1, 0).astype(np.uint8)}


def start(masks=LATE, make=LabelPropagator):
    segmenter = LateObjects(make(), masks)
    segmenter.add(picture(0), FIRST)
    return segmenter


@pytest.mark.parametrize("make", [LabelPropagator, lambda: AugmentedSegmenter(LabelPropagator, flip=True)])
def test_enters_on_its_frame_and_is_followed(make):
    segmenter = start(make=make)
    for number in range(1, COUNT):
        found = segmenter.step(picture(number))
        ids = segmenter.object_ids
        assert ids == ([2] if number < 3 else [2, 1])
        assert found.shape == (1 + len(ids), *SIZE)
        torch.testing.assert_close(found.sum(0), torch.ones(SIZE))
        named = np.array([0, *ids])[found.argmax(0).numpy()]
        for object_id in ids:
            expected = labels(number) == object_id
            overlap = ((named == object_id) & expected).sum() / ((named == object_id) | expected).sum()
            assert overlap > (0.99 if number == 3 and object_id == 1 else 0.6), (number, object_id)


def test_before_it_enters_nothing_changes():
    late, plain = start(), LabelPropagator()
    plain.add(picture(0), FIRST)
    for number in (1, 2):
        assert torch.equal(late.step(picture(number)), plain.step(picture(number)))


def test_a_given_mask_of_another_size_is_resized():
    large = np.kron(LATE[3], np.ones((2, 2), np.uint8))
    ours, expected = start({3: large}), start()
    for number in range(1, 5):
        assert torch.equal(ours.step(picture(number)), expected.step(picture(number)))
    dot = np.zeros((10 * SIZE[0], 10 * SIZE[1]), np.uint8)
    dot[3, 3] = 9
    segmenter = start({1: dot})
    with pytest.raises(ValueError, match=r"frame number 1: objects \[9\] of its mask vanish at size"):
        segmenter.step(picture(1))


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_goes_on_exactly(stop):
    whole, first = start(), start()
    for number in range(1, stop + 1):
        whole.step(picture(number))
        first.step(picture(number))
    second = LateObjects(LabelPropagator(), LATE)
    second.load_state_dict(first.state_dict())
    for number in range(stop + 1, COUNT):
        assert torch.equal(second.step(picture(number)), whole.step(picture(number)))
    assert second.object_ids == whole.object_ids


def test_mistakes():
    with pytest.raises(ValueError, match="frames from 1 on; got frame 0"):
        LateObjects(LabelPropagator(), {0: LATE[3]})
    with pytest.raises(ValueError, match=r"got frame 2 with objects \[\]"):
        LateObjects(LabelPropagator(), {2: 0 * LATE[3]})
    other = LateObjects(LabelPropagator(), {4: LATE[3]})
    with pytest.raises(ValueError, match=r"saved with masks on frames \[3\], this segmenter has \[4\]"):
        other.load_state_dict(start().state_dict())
