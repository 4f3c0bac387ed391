# SPDX-License-Identifier: Apache-2.0
"""The random changes, against their definitions and torchvision's kernels."""

import cv2
import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from vosops.training.transforms import RandomColour, RandomWarp, _affine_map, _hue_map, hide, seeded


def picture(height=60, width=90):
    y, x = np.mgrid[:height, :width]
    image = np.stack((x * 2, y * 4, (x + y)), 0).astype(np.uint8)
    return tv_tensors.Image(torch.from_numpy(image))


def test_image_and_mask_are_warped_alike():
    mask = torch.zeros(60, 90, dtype=torch.uint8)
    mask[20:40, 30:60] = 1
    image = tv_tensors.Image(mask.repeat(3, 1, 1) * 200)
    for seed in range(10):
        with seeded(np.random.default_rng(seed)):
            warped, moved = RandomWarp(48, affine=True, flip=0.5)(image, tv_tensors.Mask(mask))
        assert type(warped) is tv_tensors.Image
        assert warped.shape == (3, 48, 48)
        assert moved.shape == (48, 48)
        assert ((warped[0] > 100) == (moved == 1)).float().mean() > 0.99


def test_without_affine_map_it_is_a_resized_crop():
    image = picture()
    warp = RandomWarp(48, affine=False, flip=0.0)
    with seeded(np.random.default_rng(0)):
        box = warp._crop.make_params([image])
    with seeded(np.random.default_rng(0)):
        warped = warp(image)
    expected = functional.resized_crop(image, **box, size=[48, 48], antialias=False)
    assert (warped.float() - expected.float()).abs().max() <= 2
    with seeded(np.random.default_rng(0)):
        flipped = RandomWarp(48, affine=False, flip=1.0)(image)
    assert (flipped.flip(-1).float() - expected.float()).abs().max() <= 2


def test_the_affine_map_is_torchvisions():
    image = picture()
    arguments = {"angle": 15.0, "translate": (6, -4), "scale": 1.1, "shear": (7.0, 0.0)}
    matrix = _affine_map(centre=(44.5, 29.5), **arguments)
    # Its shear has the other sign, which does not matter to a symmetric range.
    bilinear = functional.InterpolationMode.BILINEAR
    expected = functional.affine(image, **{**arguments, "shear": [-7.0, 0.0]}, interpolation=bilinear)
    warped = cv2.warpAffine(image.permute(1, 2, 0).numpy(), matrix[:2], (90, 60))
    inner = np.s_[15:45, 20:70]
    assert np.abs(warped[inner].astype(int) - expected.permute(1, 2, 0).numpy()[inner].astype(int)).mean() < 1


def test_colours_change_within_their_range_and_masks_do_not():
    frames = tv_tensors.Image(torch.full((2, 3, 8, 8), 100, dtype=torch.uint8))
    frames[:, 0] = 120
    mask = tv_tensors.Mask(torch.ones(2, 8, 8, dtype=torch.uint8))
    seen = []
    for seed in range(40):
        with seeded(np.random.default_rng(seed)):
            changed, same = RandomColour(strong=False)(frames, mask)
        assert torch.equal(same, mask)
        assert type(changed) is tv_tensors.Image
        assert torch.equal(changed[0], changed[1])  # all frames alike
        seen.append(changed[0, :, 0, 0].tolist())
    seen = np.array(seen)
    assert 85 <= seen.min() < seen.max() <= 140
    assert seen.std(0).min() > 3


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation"])
def test_each_colour_change_is_torchvisions(change, monkeypatch):
    rng = np.random.default_rng(0)
    frames = tv_tensors.Image(torch.from_numpy(rng.integers(60, 180, (1, 3, 16, 16), np.uint8)))
    draws = {"brightness": 0, "contrast": 1, "saturation": 2}
    values = torch.full((4,), 0.5)
    values[draws[change]] = 0.9  # 2 * 0.9 - 1 = 0.8 of the range
    answers = iter((torch.full((3,), 0.5), values))
    monkeypatch.setattr(torch, "rand", lambda *size: next(answers))
    changed = RandomColour(strong=False)(frames)
    expected = getattr(functional, f"adjust_{change}")(frames, 1.08)
    assert (changed.float() - expected.float()).abs().max() <= 2


def test_strong_colours_give_grey_and_blurred_frames():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (1, 3, 32, 32), np.uint8))
    grey = blurred = 0
    for seed in range(200):
        with seeded(np.random.default_rng(seed)):
            changed = RandomColour(strong=True)(tv_tensors.Image(noise)).float()
        grey += bool((changed.amax(1) - changed.amin(1)).max() <= 1)
        blurred += bool(changed.diff(dim=-1).abs().mean() < 0.5 * noise.float().diff(dim=-1).abs().mean())
    assert 24 <= grey <= 58  # 40 expected
    assert 25 <= blurred <= 80


def test_hue_turns_keep_grey():
    turn = _hue_map(0.2)
    assert np.allclose(turn @ np.ones(3), 1)
    assert np.allclose(turn @ turn.T, np.eye(3))
    assert np.allclose(np.linalg.matrix_power(turn, 5), np.eye(3))
    assert np.allclose(_hue_map(1 / 3) @ [1, 0, 0], [0, 1, 0])  # red becomes green


def test_hide_covers_frames_and_labels():
    frames, labels = torch.rand(3, 3, 64, 64), torch.ones(3, 64, 64, dtype=torch.uint8)
    hidden, left = hide(frames, labels, np.random.default_rng(0))
    covered = left == 0
    assert 0.2 < covered.float().mean() < 0.8
    assert torch.equal(hidden.permute(0, 2, 3, 1)[~covered], frames.permute(0, 2, 3, 1)[~covered])
    assert not torch.equal(left[0], left[1])  # each frame has cells of its own
    again = hide(frames, labels, np.random.default_rng(0))
    assert torch.equal(again[0], hidden)
