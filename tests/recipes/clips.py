# SPDX-License-Identifier: Apache-2.0
"""Small data sets in the layouts of DAVIS and YouTube-VOS: squares that move over a pattern."""

import numpy as np
from PIL import Image

from vosops.data import write_mask

SIZE = (72, 112)


def labels(number, ids=(1, 2)):
    """The label map of frame `number`: squares of 24 pixels that go right for 20 frames, then back."""
    mask = np.zeros(SIZE, np.uint8)
    shift = 2 * min(number % 40, 40 - number % 40)
    for place, object_id in enumerate(ids):
        top, left = 8 + 32 * place, 6 + shift + 30 * place
        mask[top : top + 24, left : left + 24] = object_id
    return mask


def picture(number, ids=(1, 2)):
    rows, columns = np.indices(SIZE)
    frame = np.stack((120 + 90 * np.sin(columns / 5), 120 + 90 * np.cos(rows / 4), 90 + 0 * rows), -1)
    mask = labels(number, ids)
    for object_id, colour in zip(ids, ((230, 30, 30), (30, 30, 230), (240, 240, 40)), strict=False):
        frame[mask == object_id] = colour
    return frame.astype(np.uint8)


def write_davis(root, clips):
    """DAVIS's layout with a mask on every frame; `clips` is {name: number of frames}."""
    for name, count in clips.items():
        images, masks = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(picture(number)).save(images / f"{number:05d}.png")
            write_mask(masks / f"{number:05d}.png", labels(number))
    return root


def write_youtube(root, name="0a49f5265b", count=8, given=None):
    """YouTube-VOS's layout: `given` is {frame: ids that its mask shows}."""
    images, masks = root / "JPEGImages" / name, root / "Annotations" / name
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(picture(number)).save(images / f"{5 * number:05d}.png")
    for number, ids in (given or {0: (1,)}).items():
        shown = np.where(np.isin(labels(number), ids), labels(number), 0).astype(np.uint8)
        write_mask(masks / f"{5 * number:05d}.png", shown)
    return root
