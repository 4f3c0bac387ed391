# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vosops.data import write_mask


@pytest.fixture(scope="session")
def train_data() -> Path:
    """Folder of real training data: VOSOPS_TRAIN_DATA, or ../shared/data_train beside the project."""
    default = Path(__file__).parents[3] / "shared" / "data_train"
    root = Path(os.environ.get("VOSOPS_TRAIN_DATA", default))
    if not root.is_dir():
        pytest.skip(f"training data are absent (VOSOPS_TRAIN_DATA, {root.name})")
    return root


@pytest.fixture(scope="session")
def small_sets(tmp_path_factory) -> Path:
    """Three little data sets: `davis` (2 sequences), `youtube` (labels on every second frame), `regions`."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    backgrounds = [np.repeat(np.repeat(rng.integers(0, 255, (12, 16, 3)), 10, 0), 10, 1) for _ in range(4)]
    for layout, folder, every in (("davis", "480p/", 1), ("youtube", "", 2)):
        for number, name in enumerate(("left", "right")):
            images, masks = (
                root / layout / kind / f"{folder}{name}" for kind in ("JPEGImages", "Annotations")
            )
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for frame in range(8):
                picture = backgrounds[number].astype(np.uint8)
                labels = np.zeros(picture.shape[:2], np.uint8)
                x = 10 + 8 * (frame if number else 7 - frame)
                labels[30:70, x : x + 40] = 1
                labels[80:100, 100:130] = 2 if frame > 3 else 0
                picture[labels == 1], picture[labels == 2] = (250, 20, 20), (20, 20, 250)
                Image.fromarray(picture).save(images / f"{frame:05d}.jpg", quality=95)
                if frame % every == 0:
                    write_mask(masks / f"{frame:05d}.png", labels)
    (root / "davis" / "ImageSets" / "2017").mkdir(parents=True)
    (root / "davis" / "ImageSets" / "2017" / "train.txt").write_text("left\n")
    for kind in ("images", "regions"):
        (root / "regions" / kind).mkdir(parents=True)
    for number in range(3):
        labels = np.ones((120, 160), np.uint8)
        labels[20:60, 20:70], labels[70:110, 80:140], labels[:3, :3] = 2, 3, 4
        colours = np.array([[0, 0, 0], [90, 90, 90], [250, 20, 20], [20, 20, 250], [20, 250, 20]], np.uint8)
        Image.fromarray(colours[labels]).save(root / "regions" / "images" / f"{number}.jpg", quality=95)
        write_mask(root / "regions" / "regions" / f"{number}.png", labels)
    return root
