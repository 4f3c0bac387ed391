# SPDX-License-Identifier: Apache-2.0
"""Clips from still images."""

import numpy as np
import pytest
from PIL import Image

from vosops.training.clips import DataError
from vosops.training.sources import Phase, read_label_map, read_photograph
from vosops.training.static import StaticSource, choose_regions


def draw(source, seed=0, frames=4, crop=64):
    return source.draw(np.random.default_rng(seed), frames=frames, crop=crop, phase=Phase())


def test_masks_move_with_the_image(small_sets):
    source = StaticSource(small_sets / "regions", "regions")
    red, blue = np.array([250, 20, 20]), np.array([20, 20, 250])
    checked = 0
    for seed in range(12):
        sample = draw(source, seed)
        frames, labels = sample.frames.permute(0, 2, 3, 1).numpy().astype(int), sample.labels.numpy()
        assert frames.shape == (4, 64, 64, 3)
        for frame, mask in zip(frames, labels, strict=True):
            for number in set(np.unique(mask)) - {0}:
                picture = frame[mask == number]
                near = [np.abs(picture - colour).max(-1) < 90 for colour in (red, blue)]
                # The grey region is no object: it covers more than half of the image.
                assert max(part.mean() for part in near) > 0.75
                checked += 1
    assert checked > 40


def test_frames_differ_and_the_first_is_not_turned(small_sets):
    sample = draw(StaticSource(small_sets / "regions", "regions"))
    assert not (sample.frames[0] == sample.frames[1]).all()
    rows = [np.flatnonzero((mask > 0).any(1)) for mask in sample.labels[:1].numpy()]
    assert (np.diff(rows[0]) >= 1).all()


def test_regions_are_chosen_by_their_size():
    labels = np.ones((100, 100), np.uint8)
    labels[:10, :10], labels[20:40, 20:40], labels[50:70, 50:70], labels[99, :20] = 2, 3, 4, 255
    labels[90, :30] = 5  # 0.3 %
    chosen, most = set(), 0
    for seed in range(40):
        objects = choose_regions(labels, np.random.default_rng(seed))
        most = max(most, objects[objects < 255].max())
        assert (objects[labels == 255] == 255).all()
        chosen |= set(np.unique(labels[(objects > 0) & (objects < 255)]))
    assert chosen == {2, 3, 4}
    assert most == 3


def test_saliency_masks_are_cut_at_half(tmp_path):
    for folder in ("DUTS-TR-Image", "DUTS-TR-Mask"):
        (tmp_path / folder).mkdir()
    picture = np.full((90, 120, 3), 40, np.uint8)
    picture[20:70, 30:90] = 200
    grey = np.zeros((90, 120), np.uint8)
    grey[20:70, 30:90], grey[19, 30:90] = 255, 100
    Image.fromarray(picture).save(tmp_path / "DUTS-TR-Image" / "a.jpg")
    Image.fromarray(grey).save(tmp_path / "DUTS-TR-Mask" / "a.png")
    Image.fromarray(picture).save(tmp_path / "DUTS-TR-Image" / "b.jpg")
    Image.fromarray(grey > 127).save(tmp_path / "DUTS-TR-Mask" / "b.png")  # one bit a pixel
    source = StaticSource(tmp_path, "saliency")
    for seed in range(4):
        sample = draw(source, seed)
        assert set(np.unique(sample.labels)) == {0, 1}
        bright = sample.frames.float().mean(1).numpy() > 120
        assert (bright == sample.labels.numpy()).mean() > 0.97


def test_large_images_are_brought_down_first(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (600, 800, 3), np.uint8)).save(
        tmp_path / "images" / "a.jpg", quality=95
    )
    mask = np.zeros((600, 800), np.uint8)
    mask[200:400, 200:600] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    sample = draw(StaticSource(tmp_path, "saliency"))
    # White noise averaged over 7.8 pixels a side: without that the standard deviation would stay at 70.
    assert sample.frames[0].float().std() < 35


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="has no folders images/ and regions/"):
        StaticSource(tmp_path, "regions")
    for folder in ("images", "regions"):
        (tmp_path / folder).mkdir()
    with pytest.raises(DataError, match="holds no .jpg"):
        StaticSource(tmp_path, "regions")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(DataError, match="regions/a.png: no such mask; 1 of 1"):
        StaticSource(tmp_path, "regions")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "regions" / "a.png")
    with pytest.raises(DataError, match="show no object"):
        draw(StaticSource(tmp_path, "regions"))


def test_files_that_cannot_be_decoded_are_named(tmp_path):
    picture = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    picture.save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a.jpg: is 60x40, its mask 30x40 \(WxH\)"):
        read_photograph(tmp_path / "a.jpg", (40, 30))
    (tmp_path / "b.jpg").write_bytes(b"no image")
    (tmp_path / "c.png").write_bytes(b"")
    for name in ("b.jpg", "c.png"):
        with pytest.raises(DataError, match=f"{name}: cannot be decoded as an image"):
            read_photograph(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: cannot be decoded as a mask"):
            read_label_map(tmp_path / name)
    with pytest.raises(DataError, match="a.jpg: is JPEG with mode RGB, expected an indexed or grey PNG"):
        read_label_map(tmp_path / "a.jpg")
    for read in (read_photograph, read_label_map):
        with pytest.raises(DataError, match="missing.png"):
            read(tmp_path / "missing.png")


def test_reduced_decoding_keeps_the_colours(tmp_path):
    picture = np.zeros((50, 63, 3), np.uint8)
    picture[...] = (200, 100, 30)
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95)
    for reduction, size in ((1, (50, 63)), (2, (25, 32)), (4, (13, 16)), (8, (7, 8))):
        decoded = read_photograph(tmp_path / "a.jpg", (50, 63), reduction)
        assert decoded.shape[:2] == size
        assert np.abs(decoded.astype(int) - picture[0, 0]).max() <= 3
