# SPDX-License-Identifier: Apache-2.0
"""Objects of one clip pasted into another."""

from dataclasses import replace

import numpy as np
import torch
from torchvision import tv_tensors

from vosops.training.merge import merge_clips
from vosops.training.sources import as_sample


def sample(colour, boxes, size=80, name="a"):
    """Three frames of one colour; boxes (id, top, left, height, width) move down by two pixels a frame."""
    frames = np.full((3, size, size, 3), colour, np.uint8)
    labels = np.zeros((3, size, size), np.uint8)
    for t in range(3):
        for number, top, left, height, width in boxes:
            labels[t, top + 2 * t : top + 2 * t + height, left : left + width] = number
        frames[t][labels[t] > 0] = colour // 2
    return as_sample(frames, labels, name)


def test_the_upper_objects_get_new_ids_and_keep_their_motion():
    below = sample(100, [(1, 5, 5, 20, 20), (4, 40, 5, 20, 20)])
    above = sample(140, [(1, 30, 40, 25, 25), (255, 0, 0, 3, 3)], name="b")
    merged = merge_clips(below, above, np.random.default_rng(0))
    assert merged is not None
    assert merged.name == "a + b"
    labels = merged.labels.numpy()
    for t in range(3):
        assert (labels[t][below.labels[t].numpy() == 4] == 4).all()
        assert (labels[t] == 2).sum() == 25 * 25
        assert (labels[t][30 + 2 * t : 55 + 2 * t, 40:65] == 2).all()
    assert set(np.unique(labels)) == {0, 1, 2, 4}  # the upper clip's void is not pasted
    frames = merged.frames[:, 0].numpy()
    assert (frames[:, 38:50, 44:60] == 70).all()
    assert (frames[0, 40:50, 28:40] == 100).all()  # no rim of the upper clip's background
    edge = frames[0, 40, 38:44].tolist()
    assert edge == sorted(edge, reverse=True)
    assert 70 < edge[2] < 100
    assert below.labels.max() == 4
    assert (below.frames[0, :, 40, 50] == 100).all()  # the arguments stay as they are


def test_objects_that_would_hide_others_are_moved():
    below = sample(100, [(1, 20, 20, 30, 30)])
    above = sample(200, [(1, 20, 20, 30, 30)])
    moved = 0
    for seed in range(10):
        merged = merge_clips(below, above, np.random.default_rng(seed))
        if merged is None:
            continue
        counts = np.bincount(merged.labels[0].flatten(), minlength=3)
        assert min(counts[1:3]) >= 450
        shift = np.argwhere(merged.labels[1].numpy() == 2).min(0) - np.argwhere(
            merged.labels[0].numpy() == 2
        ).min(0)
        assert shift[0] in (0, 2)  # 0 where the upper border cuts it
        moved += 1
    assert moved >= 7


def test_no_place_gives_none():
    everywhere = sample(100, [(1, 0, 0, 74, 80)])
    assert merge_clips(everywhere, everywhere, np.random.default_rng(0)) is None
    empty = sample(100, [])
    assert merge_clips(everywhere, empty, np.random.default_rng(0)) is None


def test_ids_that_run_out_give_none():
    many = torch.zeros(3, 80, 80, dtype=torch.uint8)
    many[:, :40] = (torch.arange(40 * 80, dtype=torch.int32) % 254 + 1).view(40, 80).byte()
    below = replace(sample(100, []), labels=tv_tensors.Mask(many))
    assert merge_clips(below, sample(200, [(1, 45, 20, 30, 30)]), np.random.default_rng(0)) is None
