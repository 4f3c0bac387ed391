# SPDX-License-Identifier: Apache-2.0
"""Where patches lie, and that cutting and assembling undo each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from vosops.refine.patches import Assembly, boundary, choose_patches, cut_patches, padded

from .stand_in import disk


def test_the_boundary_is_the_rim_inside_of_the_mask() -> None:
    mask = np.zeros((10, 12), np.uint8)
    mask[3:7, 4:9] = 1
    rim = {(r, c) for r in range(3, 7) for c in range(4, 9) if r in (3, 6) or c in (4, 8)}
    assert {tuple(p) for p in boundary(mask).tolist()} == rim


def test_the_border_of_the_frame_is_no_boundary() -> None:
    mask = np.zeros((10, 12), np.uint8)
    mask[:, :5] = 1
    assert boundary(mask).tolist() == [[row, 4] for row in range(10)]
    assert len(boundary(np.ones((10, 12), np.uint8))) == 0
    assert choose_patches(np.ones((40, 40), np.uint8), 16, 0.25).shape == (0, 2)
    assert choose_patches(np.zeros((40, 40), np.uint8), 16, 0.25).shape == (0, 2)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(20, 90),
    st.integers(20, 140),
    st.integers(3, 60),
    st.sampled_from([16, 24, 32]),
    st.integers(0, 99),
)
def test_patches_stay_in_the_frame_apart_and_along_the_boundary(row, column, radius, size, seed) -> None:
    rng = np.random.default_rng(seed)
    mask = disk(110, 160, row, column, radius) | disk(110, 160, *rng.uniform(0, 110, 2), 9)
    corners = choose_patches(mask, size, 0.25)
    edge = boundary(mask)
    assert (len(corners) > 0) == (len(edge) > 0)
    assert corners.min() >= 0
    assert (corners + size <= torch.tensor(mask.shape)).all()
    boxes = torch.cat((corners, corners + size), 1).float()
    overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
    assert overlaps.max() <= 0.25 + 1e-6
    # What was suppressed lies close by: above 0.25 overlap the shift is below 0.6 of the size.
    candidates = torch.from_numpy(edge - size // 2).clamp(min=0)
    candidates = candidates.minimum(torch.tensor(mask.shape) - size)
    shifts = (candidates[:, None] - corners).abs().amax(-1).amin(1)
    assert shifts.max() < 0.6 * size
    assert len(choose_patches(mask, size, 0.6)) >= len(corners)


@pytest.mark.parametrize("frame", [(50, 70), (50, 20), (12, 9)])
def test_patches_put_back_are_the_map(frame: tuple[int, int]) -> None:
    size, margin = 24, 6
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, *frame, generator=generator)
    mask = disk(*frame, frame[0] / 2, frame[1] / 2, min(frame) / 3)
    corners = choose_patches(mask, size, 0.5)
    patches = cut_patches(padded(maps, size, margin), corners, size, margin)
    assert patches.shape == (len(corners), 2, size + 2 * margin, size + 2 * margin)
    for channel in (0, 1):
        assembly = Assembly(*frame, size)
        assembly.add(patches[:, channel, margin:-margin, margin:-margin], corners)
        mean, covered = assembly.mean()
        torch.testing.assert_close(mean, maps[channel] * covered)
        assert covered[tuple(boundary(mask).T)].all()


def test_overlapping_patches_are_averaged() -> None:
    assembly = Assembly(8, 8, 4)
    patches = torch.stack([torch.full((4, 4), v) for v in (1.0, 2.0, 6.0)])
    assembly.add(patches[:2], torch.tensor([[0, 0], [0, 2]]))
    assembly.add(patches[2:], torch.tensor([[0, 2]]))
    mean, covered = assembly.mean()
    assert mean[0].tolist() == [1, 1, 3, 3, 4, 4, 0, 0]
    assert covered.sum() == 4 * 6


def test_the_margin_repeats_the_edge() -> None:
    maps = torch.arange(12.0).view(1, 3, 4)
    grown = padded(maps, 2, 2)
    assert grown.shape == (1, 7, 8)
    assert grown[0, 0, 0] == maps[0, 0, 0]
    assert grown[0, -1, -1] == maps[0, -1, -1]
    assert torch.equal(grown[:, 2:-2, 2:-2], maps)
    assert padded(maps.byte(), 2, 1).dtype == torch.uint8
