# SPDX-License-Identifier: Apache-2.0
"""Pictures of clips."""

import torch
from PIL import Image

from vosops.training.clips import Clip, collate
from vosops.training.sheet import clip_overlays, write_clip_sheet


def batch():
    labels = torch.zeros(3, 40, 50, dtype=torch.uint8)
    labels[:, 5:20, 5:20], labels[:, 30:, 30:] = 1, 255
    return collate([Clip(torch.full((3, 3, 40, 50), 0.2), labels, 1, name) for name in ("bear", "bus")])


def test_overlays_show_objects_and_void():
    pictures = clip_overlays(batch())
    assert pictures.shape == (2, 3, 40, 50, 3)
    assert (pictures[0, 0, 25, 25] == 51).all()
    assert (pictures[0, 0, 12, 12, 0] > pictures[0, 0, 12, 12, 1]).all()  # the first DAVIS colour is red
    assert (pictures[0, 0, 35, 40] == 128 + 25).all()


def test_a_sheet_has_a_row_per_clip(tmp_path):
    write_clip_sheet(tmp_path / "sheet.png", batch())
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 54 + 4, 2 * (40 + 18 + 4) + 4)
