# SPDX-License-Identifier: Apache-2.0
"""The rendered clips: exact masks, occlusion, determinism, and the files they are written to."""

import socket

import numpy as np
import pytest
from PIL import Image

from vosops.data import rendered_clip
from vosops.data.rendered_clip import render_clip, write_clip
from vosops.evaluation import evaluate_folders


@pytest.fixture(scope="module")
def passing():
    return render_clip()


def areas(clip, label):
    return (clip.masks == label).sum((1, 2))


def test_shapes_and_labels(passing):
    assert passing.frames.shape == (40, 240, 432, 3)
    assert passing.masks.shape == (40, 240, 432)
    assert passing.frames.dtype == passing.masks.dtype == np.uint8
    assert np.unique(passing.masks).tolist() == [0, 1, 2]
    assert np.unique(render_clip(8, (120, 216), scene="pillar").masks).tolist() == [0, 1]


@pytest.mark.parametrize("scene", ["passing", "pillar"])
@pytest.mark.parametrize("size", [(120, 216), (64, 64), (160, 96)])
def test_every_object_is_seen_first_and_partly_hidden_later(scene, size):
    for seed in range(4):
        clip = render_clip(24, size, seed, scene)
        for label in range(1, clip.masks.max() + 1):
            assert areas(clip, label)[0] > 0.002 * size[0] * size[1]
        astronaut = areas(clip, 1)
        hidden = astronaut[6:18].min()
        assert 0 < hidden < 0.8 * min(astronaut[:4].max(), astronaut[-4:].max())


def test_objects_move_and_the_camera_pans(passing):
    x = [[np.nonzero(mask == label)[1].mean() for mask in passing.masks] for label in (1, 2)]
    assert x[0][-1] - x[0][0] > 100
    assert x[1][0] - x[1][-1] > 150
    still = (passing.masks[0] == 0) & (passing.masks[-1] == 0)
    change = np.abs(passing.frames[0].astype(int) - passing.frames[-1])[still]
    assert change.mean() > 20  # far above the noise: the background moved


def test_the_mask_follows_the_outline_to_the_pixel(monkeypatch):
    """A plain red sprite on a plain blue photograph: red prevails exactly where the mask says so."""
    colours = {"garage": (0, 0, 200), "astronaut": (200, 0, 0), "coffee": (200, 0, 0)}
    monkeypatch.setattr(
        rendered_clip, "_photograph", lambda name: np.full((512, 768, 3), colours[name], np.uint8)
    )
    monkeypatch.setattr(rendered_clip, "_NOISE", 0.0)
    passing = rendered_clip._SCENES["passing"]

    def one_object(*arguments):
        background, layers = passing(*arguments)
        return background, layers[:1]

    monkeypatch.setitem(rendered_clip._SCENES, "passing", one_object)
    clip = render_clip(10, (120, 216), seed=3)
    red, blue = clip.frames[..., 0].astype(int), clip.frames[..., 2].astype(int)
    shown = clip.masks > 0
    half = np.abs(red - blue) <= 2  # a half cover rounds either way
    assert half.mean() < 0.001
    np.testing.assert_array_equal((red > blue)[~half], shown[~half])


def test_the_seed_decides_everything():
    first, again, other = (render_clip(4, (96, 160), seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.frames, again.frames)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert (first.masks != other.masks).any()


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network connection was asked for")

    rendered_clip._photograph.cache_clear()
    monkeypatch.setattr(socket, "socket", refuse)
    for scene in ("passing", "pillar"):
        render_clip(2, (64, 64), scene=scene)


def test_written_clips_are_a_davis_root(tmp_path):
    clip = render_clip(6, (96, 160))
    images, annotations = write_clip(clip, tmp_path)
    assert images == tmp_path / "JPEGImages" / "480p" / "passing"
    assert [path.name for path in sorted(images.iterdir())] == [f"{index:05d}.jpg" for index in range(6)]
    for index, mask in enumerate(clip.masks):
        image = Image.open(annotations / f"{index:05d}.png")
        assert image.mode == "P"
        assert image.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]
        np.testing.assert_array_equal(np.asarray(image), mask)
        frame = np.asarray(Image.open(images / f"{index:05d}.jpg")).astype(int)
        assert np.abs(frame - clip.frames[index]).mean() < 6
    report = evaluate_folders(tmp_path / "Annotations" / "480p", tmp_path)
    assert report.jf_mean == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"frames": 1}, ValueError, "frames must be at least 2, got 1"),
        ({"frames": 2.5}, TypeError, "frames must be an integer, got 2.5"),
        ({"size": (32, 100)}, ValueError, r"size must be \(H, W\) with both at least 64 pixels"),
        ({"size": (240, 432, 3)}, ValueError, r"size must be \(H, W\)"),
        ({"seed": -1}, ValueError, "seed must not be negative"),
        ({"scene": "zoo"}, ValueError, "scene must be one of passing, pillar, got 'zoo'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        render_clip(**arguments)
