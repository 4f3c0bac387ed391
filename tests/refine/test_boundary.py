# SPDX-License-Identifier: Apache-2.0
"""Boundary refinement around networks whose result is known."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from vosops.evaluation import region_similarity
from vosops.models import CheckpointError
from vosops.refine import BoundaryRefiner, PatchSettings
from vosops.refine.network import NETWORKS, build_network
from vosops.training.checkpoint import write_weights

from .stand_in import Bright, Same, certain, disk, picture

SETTINGS = PatchSettings(size=24, margin=4)


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.dilate(mask, np.ones((3, 3), np.uint8), iterations=pixels)


def test_a_wrong_boundary_is_mended_and_the_rest_is_not_touched() -> None:
    truth = disk(120, 160, 60, 80, 40)
    wrong = certain(_grown(truth, 5))
    found = BoundaryRefiner(Bright(), SETTINGS)(picture(truth), wrong)
    assert region_similarity(truth == 1, wrong.argmax(0).numpy() == 1) < 0.85
    assert np.array_equal(found.argmax(0).numpy(), truth)
    torch.testing.assert_close(found.sum(0), torch.ones(120, 160))
    same = (found == wrong).all(0)
    assert same[60, 80]  # its middle
    assert same[:3].all()  # beyond all patches
    assert 0.3 < same.float().mean() < 0.8


def test_a_mask_that_the_network_confirms_stays() -> None:
    masks = disk(96, 128, 40, 40, 20), disk(96, 128, 60, 90, 15)
    before = certain(*masks, sure=0.8)
    found = BoundaryRefiner(Same(), SETTINGS)(picture(*masks), before)
    assert torch.equal(found.argmax(0), before.argmax(0))
    assert (found[1:] > 0.95).any()


def test_objects_are_refined_apart_and_combined() -> None:
    """Two bright halves of a disk: both claim the other's side near their common boundary."""
    whole = disk(96, 128, 48, 64, 30)
    left, right = whole.copy(), whole.copy()
    left[:, 64:], right[:, :64] = 0, 0
    before = certain(left, right)
    found = BoundaryRefiner(Bright(), SETTINGS)(picture(whole), before)
    torch.testing.assert_close(found.sum(0), torch.ones(96, 128))
    assert (found >= 0).all()
    # Where both claim a pixel they share it; nobody's is the background's.
    assert torch.equal(found.argmax(0) > 0, torch.from_numpy(whole) > 0)
    torch.testing.assert_close(found[1, 48, 64], found[2, 48, 64])
    assert found[1, 48, 64] > 0.49


def test_one_object_keeps_the_networks_probability() -> None:
    truth = disk(64, 64, 32, 32, 16)
    found = BoundaryRefiner(Same(), SETTINGS)(picture(truth), certain(truth, sure=0.6))
    sure = torch.tensor(9.0).sigmoid()
    torch.testing.assert_close(found[1, 32, 17], sure)
    torch.testing.assert_close(found[1, 32, 15], 1 - sure)


def test_batches_bound_the_work_and_change_nothing() -> None:
    truth = disk(360, 640, 180, 320, 150)
    wrong = certain(_grown(truth, 3))
    network = Bright()
    found = [
        BoundaryRefiner(network, PatchSettings(size=32, margin=4, batch=batch))(picture(truth), wrong)
        for batch in (3, 64)
    ]
    assert torch.equal(*found)
    assert max(network.batches[:-1]) == 3
    assert sum(network.batches[:-1]) == network.batches[-1] > 30


def test_nothing_to_refine() -> None:
    refiner = BoundaryRefiner(Bright(), SETTINGS)
    empty = torch.stack((torch.ones(40, 50), torch.zeros(40, 50)))
    frame = picture(disk(40, 50, 20, 20, 9))
    assert refiner(frame, empty) is empty
    alone = torch.ones(1, 40, 50)
    assert refiner(frame, alone) is alone


def test_a_frame_smaller_than_a_patch() -> None:
    truth = disk(20, 17, 10, 8, 6)
    found = BoundaryRefiner(Bright(), SETTINGS)(picture(truth), certain(_grown(truth, 2)))
    assert np.array_equal(found.argmax(0).numpy(), truth)


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_come_from_files(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(kind)
    file = tmp_path / "boundary_refiner.safetensors"
    write_weights(file, network.state_dict(), half=True, about={"model": "boundary_refiner"})
    assert file.stat().st_size < 8e6
    first, second = BoundaryRefiner.load(file), BoundaryRefiner.load(file, PatchSettings(size=48, batch=5))
    assert type(first.network) is NETWORKS[kind]
    assert first.settings["weights"] == second.settings["weights"]
    assert first.settings["weights"] != BoundaryRefiner(network).settings["weights"]  # float16
    assert first.settings["size"] == 64
    assert "batch" not in second.settings


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    write_weights(file, torch.nn.Linear(2, 2).state_dict(), half=True, about={})
    with pytest.raises(CheckpointError, match=r"other.safetensors does not fit boundary_refiner"):
        BoundaryRefiner.load(file)
    with pytest.raises(FileNotFoundError, match=r"none.safetensors"):
        BoundaryRefiner.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_take_any_size_and_begin_with_the_mask(kind: str) -> None:
    torch.manual_seed(0)
    network = build_network(kind).eval()
    images, masks = torch.rand(2, 3, 50, 70), (torch.rand(2, 1, 50, 70) > 0.5).float()
    with torch.no_grad():
        found = network.refine(images, masks)
        clip = network(images[:, None].expand(-1, 3, -1, -1, -1), torch.cat((masks, 1 - masks), 1))
    assert found.shape == masks.shape
    assert torch.equal(found > 0, masks > 0)
    assert not torch.equal(found, found.round())  # it has an opinion of its own
    assert clip.shape == (2, 2, 3, 50, 70)  # [B, T-1, 1+O, H, W]
    assert torch.equal(clip[:, :, 0], torch.zeros(2, 2, 50, 70))
    for frame in range(2):
        torch.testing.assert_close(clip[:, frame, 1], found[:, 0], rtol=1e-4, atol=1e-5)
        assert torch.equal(clip[:, frame, 2] > 0, masks[:, 0] == 0)


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(ValueError, match="network must be one of mobilenet, hrnet, got 'vgg'"):
        build_network("vgg")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 8}, ValueError, "size must be at least 16, got 8"),
        ({"size": 64.0}, TypeError, "size must be an integer, got float"),
        ({"margin": -1}, ValueError, "margin must be at least 0, got -1"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"overlap": 1.0}, ValueError, r"overlap must lie in \[0, 1\), got 1.0"),
        ({"overlap": "much"}, TypeError, "overlap must be a number, got str"),
    ],
)
def test_bad_settings_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchSettings(**options)


def test_bad_arguments_are_named() -> None:
    refiner = BoundaryRefiner(Bright(), SETTINGS)
    truth = disk(40, 50, 20, 20, 9)
    frame, probabilities = picture(truth), certain(truth)
    with pytest.raises(TypeError, match=r"frame must be an array \(H, W, 3\) uint8 RGB, got float64"):
        refiner(frame / 255, probabilities)
    with pytest.raises(ValueError, match=r"frame must have shape \(H, W, 3\), RGB, got \[40, 50\]"):
        refiner(frame[..., 0], probabilities)
    with pytest.raises(TypeError, match=r"probabilities must be a float32 tensor .* got torch.float64"):
        refiner(frame, probabilities.double())
    with pytest.raises(
        ValueError, match=r"probabilities must have shape \['1 \+ O', 40, 50\], got \[2, 39, 50\]"
    ):
        refiner(frame, probabilities[:, 1:])
    with pytest.raises(TypeError, match="network must be a PatchNetwork, got Linear"):
        BoundaryRefiner(torch.nn.Linear(1, 1))
