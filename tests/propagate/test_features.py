# SPDX-License-Identifier: Apache-2.0
"""Features describe cells, project to unit keys, and say clearly what is missing."""

import builtins

import numpy as np
import pytest
import torch
import torchvision

from vosops.data.rendered_clip import render_clip
from vosops.propagate import LabelPropagator, PropagationSettings
from vosops.propagate.features import BuiltinFeatures, FeatureMap, KeyProjection, make_features
from vosops.propagate.motion import dense_flow, warp_back

GRID = (20, 36)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def frame():
    return render_clip(frames=2, size=(160, 288)).frames[0]


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict(), path)
    return path


def test_builtin_maps_lie_on_the_grid(frame):
    maps = BuiltinFeatures()(frame, GRID)
    assert all(m.values.shape[:2] == GRID and m.values.dtype == np.float32 for m in maps)
    assert all(np.isfinite(m.values).all() for m in maps)


def test_builtin_features_of_a_uniform_frame_are_finite():
    grey = np.full((64, 96, 3), 128, np.uint8)
    projection = KeyProjection(32, 0.5)
    maps = BuiltinFeatures()(grey, (8, 12))
    projection.fit(maps)
    assert torch.isfinite(projection(maps)).all()


def test_keys_are_unit_vectors_stored_by_position(frame):
    maps = BuiltinFeatures()(frame, GRID)
    projection = KeyProjection(48, 0.5)
    projection.fit(maps)
    keys = projection(maps)
    assert keys.shape == (1, 48, *GRID)
    assert keys.stride(1) == 1
    assert torch.allclose(keys.norm(dim=1), torch.ones(1, *GRID), atol=1e-5)


def test_a_cell_matches_itself_after_a_shift(frame):
    extractor, projection = BuiltinFeatures(), KeyProjection(48, 0.5)
    maps = extractor(frame, GRID)
    projection.fit(maps)
    moved = projection(extractor(np.roll(frame, 8, axis=1), GRID))[0].flatten(1)  # one cell to the right
    best = (moved.T @ projection(maps)[0].flatten(1)).argmax(1).view(GRID)
    expected = torch.arange(GRID[0] * GRID[1]).view(GRID).roll(1, 1)
    inner = (slice(3, -3), slice(4, -4))
    assert (best[inner] == expected[inner]).float().mean() > 0.95


def test_every_map_has_its_weight_in_the_key():
    rng = np.random.default_rng(0)
    large = FeatureMap(1000 * rng.standard_normal((8, 12, 3)).astype(np.float32), 1.0)
    small = FeatureMap(rng.standard_normal((8, 12, 5)).astype(np.float32), 0.5)
    projection = KeyProjection(8, 0.0)
    projection.fit([large, small])
    matrix = projection.state_dict()["matrix"].double()
    rows = torch.from_numpy(np.concatenate([large.values, small.values], -1).reshape(96, 8)).double()
    rows = rows - rows.mean(0)
    shares = [
        (rows[:, part] @ matrix[part]).square().sum(1).mean().sqrt() for part in (slice(3), slice(3, 8))
    ]
    assert float(shares[0]) == pytest.approx(1.0, rel=1e-3)
    assert float(shares[1]) == pytest.approx(0.5, rel=1e-3)


def test_the_projection_goes_on_from_its_state(frame):
    maps = BuiltinFeatures()(frame, GRID)
    fitted, restored = KeyProjection(16, 0.5), KeyProjection(16, 0.5)
    with pytest.raises(RuntimeError, match="call fit first"):
        restored(maps)
    fitted.fit(maps)
    restored.load_state_dict(fitted.state_dict())
    assert torch.equal(fitted(maps), restored(maps))


def test_a_backbone_with_a_weight_file_describes_cells_and_propagates(weight_file, frame):
    extractor = make_features("builtin+torchvision:mobilenet_v3_small", weight_file)
    maps = extractor(frame, GRID)
    assert len(maps) == len(BuiltinFeatures()(frame, GRID)) + 2
    assert all(m.values.shape[:2] == GRID for m in maps)
    settings = PropagationSettings(
        features="torchvision:mobilenet_v3_small", feature_weights=weight_file, stride=8
    )
    mask = np.zeros(frame.shape[:2], np.uint8)
    mask[40:120, 60:160] = 1
    propagator = LabelPropagator(settings)
    propagator.add(frame, mask)
    assert (propagator.step(frame).argmax(0).numpy() == mask).mean() > 0.98


def test_a_timm_backbone_with_a_safetensors_file(tmp_path, frame):
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), path)
    assert len(make_features("timm:resnet10t", path)(frame, GRID)) == 2


@pytest.mark.parametrize("name", ["sift", "builtin:x", "timm:", "", "builtin+builtin", "torchvision"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=r"features must be 'builtin'.*got"):
        LabelPropagator(PropagationSettings(features=name))


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="torchvision has no classification model named 'resnet19'"):
        make_features("torchvision:resnet19")


def test_a_missing_weight_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"feature_weights: no such file: .*none\.pth"):
        make_features("torchvision:mobilenet_v2", tmp_path / "none.pth")


def test_weights_that_do_not_fit_are_refused(weight_file, tmp_path):
    with pytest.raises(RuntimeError, match=r"backbone\.pth does not fit torchvision:mobilenet_v2"):
        make_features("torchvision:mobilenet_v2", weight_file)
    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    with pytest.raises(RuntimeError, match="missing"):
        make_features("torchvision:mobilenet_v2", empty)


def test_a_weight_file_that_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "odd.pth"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"odd\.pth must hold a state dict, got list"):
        make_features("torchvision:mobilenet_v2", path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a weight file")
    with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read"):
        make_features("torchvision:mobilenet_v2", broken)


def test_weights_without_a_backbone_are_refused(weight_file):
    with pytest.raises(ValueError, match="feature_weights needs features with one backbone"):
        make_features("builtin", weight_file)


def test_a_failed_download_says_to_give_a_file(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(RuntimeError, match=r"could not be downloaded.*no route.*give a weight file"):
        make_features("torchvision:mobilenet_v2")


def test_a_missing_library_names_the_package(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs timm: pip install 'vosops\[apps\]'"):
        make_features("timm:resnet18")


def test_flow_carries_a_map_with_a_shift(frame):
    moved = np.roll(frame, (4, 6), (0, 1))
    flow = dense_flow(frame, moved)
    inner = flow[30:-30, 40:-40]
    assert np.abs(np.median(inner, (0, 1)) - [6, 4]).max() < 0.5
    brightness = frame.mean(-1).astype(np.float32)
    warped = warp_back(brightness, dense_flow(moved, frame))
    difference = np.abs(warped - moved.mean(-1))[30:-30, 40:-40]
    assert difference.mean() < 0.1 * brightness.std()


def test_flow_of_a_tiny_frame_has_its_size():
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 255, (17, 28, 3), dtype=np.uint8)
    assert dense_flow(tiny, np.roll(tiny, 1, 1)).shape == (17, 28, 2)
