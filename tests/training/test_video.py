# SPDX-License-Identifier: Apache-2.0
"""Clips from annotated videos."""

import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from vosops.data import write_mask
from vosops.training.clips import DataError
from vosops.training.sources import Phase
from vosops.training.video import VideoSource, find_sequences, frame_numbers


def draw(source, seed=0, progress=1.0, frames=3, crop=64):
    return source.draw(np.random.default_rng(seed), frames=frames, crop=crop, phase=Phase(progress))


def numbers_of(sample):
    return [int(frame) for frame in sample.name.split("/")[1].split(",")]


def test_the_layouts_of_davis_and_youtube_vos(small_sets):
    davis = find_sequences(small_sets / "davis", "davis", None)
    assert [(s.name, len(s.frames)) for s in davis] == [("left", 8), ("right", 8)]
    assert davis[0].files[3] == "00003.jpg"
    listed = find_sequences(small_sets / "davis", "davis", "2017/train.txt")
    assert [s.name for s in listed] == ["left"]
    sparse = find_sequences(small_sets / "youtube", "youtube", None)
    assert sparse[0].frames == ("00000", "00002", "00004", "00006")


def test_masks_are_cut_and_turned_with_the_frames(small_sets):
    source = VideoSource(find_sequences(small_sets / "davis", "davis", None), 3)
    for seed in range(20):
        sample = draw(source, seed)
        frames, labels = sample.frames.permute(0, 2, 3, 1).numpy().astype(int), sample.labels.numpy()
        assert frames.shape == (3, 64, 64, 3)
        for number, colour in ((1, (250, 20, 20)), (2, (20, 20, 250))):
            if (labels == number).sum() > 50:
                near = np.abs(frames[labels == number] - colour).max(-1) < 90
                assert near.mean() > 0.85


def test_the_first_frame_shows_an_object_and_mostly_all_later_ones(small_sets):
    source = VideoSource(find_sequences(small_sets / "davis", "davis", None), 5)
    unknown = 0
    for seed in range(60):
        labels = draw(source, seed).labels.numpy()
        assert (np.bincount(labels[0].ravel(), minlength=3)[1:] >= 100).any()
        # The second object enters in frame 4; a crop may cut it out of the first frame, too.
        unknown += numbers_of(draw(source, seed))[0] <= 3 and max(numbers_of(draw(source, seed))) > 3
    # Of all choices 28 % begin before it enters and end after; five tries leave few.
    assert unknown <= 6


def test_gaps_grow_with_the_progress(small_sets):
    source = VideoSource(find_sequences(small_sets / "davis", "davis", None), 5)
    for progress, most in ((0.0, 1), (0.25, 3), (0.5, 5), (1.0, 5)):
        gaps = set()
        for seed in range(60):
            chosen = np.abs(np.diff(numbers_of(draw(source, seed, progress))))
            gaps |= set(chosen.tolist())
        assert max(gaps) == most


def test_frames_may_be_warped_each_on_its_own(small_sets):
    source = VideoSource(find_sequences(small_sets / "davis", "davis", None), 1)
    for seed in range(5):
        plain, warped = (
            source.draw(np.random.default_rng(seed), frames=3, crop=64, phase=Phase(warp=warp))
            for warp in (0.0, 1.0)
        )
        assert (plain.labels[0] == warped.labels[0]).all()
        assert (plain.frames[0] == warped.frames[0]).all()
        assert not (plain.frames[1] == warped.frames[1]).all()
        red = warped.frames[:, 0].int() - warped.frames[:, 1].int() > 90
        assert red[warped.labels == 1].float().mean() > 0.85


def test_frame_numbers_turn_at_the_ends():
    forwards = 0
    for seed in range(300):
        numbers = frame_numbers(5, 4, 3, np.random.default_rng(seed))
        assert all(0 <= n < 5 for n in numbers)
        assert all(abs(a - b) <= 3 for a, b in pairwise(numbers))
        forwards += numbers[1] > numbers[0]
    assert 110 <= forwards <= 190  # half of them run backwards
    assert frame_numbers(1, 3, 4, np.random.default_rng(0)) == [0, 0, 0]
    assert set(map(tuple, (frame_numbers(2, 3, 1, np.random.default_rng(s)) for s in range(20)))) == {
        (0, 1, 0),
        (1, 0, 1),
    }


def test_crops_keep_a_small_object(tmp_path):
    images, masks = (tmp_path / kind / "a" for kind in ("JPEGImages", "Annotations"))
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for frame in range(3):
        labels = np.zeros((240, 800), np.uint8)
        labels[100:125, 760:790] = 1
        Image.fromarray(np.stack([labels * 200] * 3, -1)).save(images / f"{frame}.jpg")
        write_mask(masks / f"{frame}.png", labels)
    source = VideoSource(find_sequences(tmp_path, "youtube", None), 1)
    for seed in range(20):
        # A random crop holds the object in one clip of ten.
        assert (draw(source, seed).labels[0] == 1).sum() > 20


def test_long_frames_are_decoded_at_a_fraction(tmp_path):
    images, masks = (tmp_path / kind / "a" for kind in ("JPEGImages", "Annotations"))
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for frame in range(2):
        labels = np.zeros((401, 603), np.uint8)
        top, left = rng.integers(0, 200, 2)
        labels[top : top + 180, left : left + 300] = 1
        Image.fromarray(np.stack([labels * 200] * 3, -1)).save(images / f"{frame}.jpg", quality=95)
        write_mask(masks / f"{frame}.png", labels)
    source = VideoSource(find_sequences(tmp_path, "youtube", None), 1)
    for seed in range(10):
        sample = draw(source, seed, crop=48)  # decoded at a quarter: still in place to a pixel
        assert ((sample.frames[:, 1] > 100) == (sample.labels == 1)).float().mean() > 0.97


def test_what_is_missing_is_named(small_sets, tmp_path):
    with pytest.raises(DataError, match="JPEGImages: no such folder, though"):
        find_sequences(tmp_path, "youtube", None)
    with pytest.raises(DataError, match="2016/val.txt: no such list"):
        find_sequences(small_sets / "davis", "davis", "2016/val.txt")
    shutil.copytree(small_sets / "davis", tmp_path / "davis")
    (tmp_path / "davis/ImageSets/2017/train.txt").write_text("left gone")
    with pytest.raises(DataError, match="gone: no such sequence"):
        find_sequences(tmp_path / "davis", "davis", "2017/train.txt")
    (tmp_path / "davis/JPEGImages/480p/left/00002.jpg").unlink()
    with pytest.raises(DataError, match=r"left/00002.png: has no image in .*left \(1 of 8 have none\)"):
        find_sequences(tmp_path / "davis", "davis", None)
    for name in ("720p", "1080p"):
        (tmp_path / "two/Annotations" / name).mkdir(parents=True)
        (tmp_path / "two/JPEGImages" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="expected a folder 480p, or one resolution only"):
        find_sequences(tmp_path / "two", "davis", None)
    (tmp_path / "none/Annotations").mkdir(parents=True)
    (tmp_path / "none/JPEGImages").mkdir()
    with pytest.raises(DataError, match="holds no sequence with masks"):
        find_sequences(tmp_path / "none", "youtube", None)


def test_files_that_do_not_fit_are_named(small_sets, tmp_path):
    shutil.copytree(small_sets / "youtube", tmp_path / "set")
    sequences = find_sequences(tmp_path / "set", "youtube", None)
    masks = sorted((tmp_path / "set/Annotations").rglob("*.png"))
    for mask in masks[1:]:
        write_mask(mask, np.ones((60, 80), np.uint8))
    with pytest.raises(DataError, match=re.escape("(WxH)")):
        _ = [draw(VideoSource(sequences, 3), seed) for seed in range(9)]
    for mask in masks:
        write_mask(mask, np.zeros((120, 160), np.uint8))
    with pytest.raises(DataError, match="20 random sequences show no object"):
        draw(VideoSource(sequences, 3))
