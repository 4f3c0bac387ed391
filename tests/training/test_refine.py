# SPDX-License-Identifier: Apache-2.0
"""Patches with degraded masks, and runs of the boundary refiner in the training loop."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vosops.data import read_labels, write_mask
from vosops.data.masks import VOID
from vosops.refine import BoundaryRefiner
from vosops.refine.network import build_network
from vosops.refine.patches import boundary
from vosops.training.clips import DataError, collate
from vosops.training.config import ConfigError, load_config
from vosops.training.dataset import DataConfig, SourceConfig, build_dataset, open_source
from vosops.training.judge import first_masks
from vosops.training.losses import clip_loss
from vosops.training.refine import degrade
from vosops.training.settings import build, override
from vosops.training.sources import Phase

from .runs import loop, losses, train


@pytest.fixture
def config(small_sets, tmp_path):
    """A refiner's run of some seconds on the little DAVIS."""

    def make(run, *assignments):
        values = {
            "run": str(tmp_path / run),
            "model": {"name": "boundary_refiner"},
            "data": {
                "sources": [{"layout": "davis", "path": str(small_sets / "davis")}],
                "patches": True,
                "clips_per_epoch": 12,
                "merge": 0.0,
                "distract": 0.0,
            },
            "loss": {"hard_fraction": 1.0},
            "optim": {"lr": 2e-3},
            "steps": 6,
            "batch": 4,
            "frames": 2,
            "crop": 32,
            "max_objects": 1,
            "workers": 0,
            "threads": 1,
            "log_every": 1,
            "overlay_every": 1000,
            "checkpoint_every": 3,
        }
        return build(loop.TrainConfig, override(values, assignments))

    return make


def _source(folder, layout="davis", **options):
    return open_source(SourceConfig(layout, str(folder), **options), patches=True)


def _draws(source, count, crop=48):
    return [
        source.draw(np.random.default_rng(seed), frames=2, crop=crop, phase=Phase()) for seed in range(count)
    ]


def test_degraded_masks_are_wrong_near_the_boundary_alone():
    rows, columns = np.mgrid[:200, :200]
    truth = ((rows - 100) ** 2 + (columns - 100) ** 2 < 60**2).astype(np.uint8)
    rng, wrong, far = np.random.default_rng(0), [], []
    distance = cv2.distanceTransform(truth, cv2.DIST_L2, 3) + cv2.distanceTransform(1 - truth, cv2.DIST_L2, 3)
    for _ in range(60):
        found = degrade(truth, rng)
        assert found.dtype == np.uint8
        assert set(np.unique(found)) <= {0, 1}
        wrong.append(np.mean(found != truth))
        far.append(distance[found != truth].max(initial=0))
    assert max(wrong) < 0.4
    assert np.mean(wrong) > 0.01
    assert np.median(far) < 30
    assert len(set(wrong)) > 40  # they differ
    again = degrade(truth, np.random.default_rng(3))
    assert np.array_equal(again, degrade(truth, np.random.default_rng(3)))


@pytest.mark.parametrize("layout", ["davis", "youtube", "regions"])
def test_patches_show_a_boundary_of_one_object(layout, small_sets):
    for sample in _draws(_source(small_sets / layout, layout), 12):
        assert sample.frames.shape == (2, 3, 48, 48)
        assert torch.equal(sample.frames[0], sample.frames[1])
        assert set(sample.labels.unique().tolist()) <= {0, 1, VOID}
        assert 0 < (sample.labels[0] == 1).float().mean() < 1


def test_image_and_true_mask_stay_together(small_sets):
    """Objects of the little set are saturated, its backgrounds are not: colours tell the truth."""
    agree = []
    for sample in _draws(_source(small_sets / "davis"), 12):
        image, truth = sample.frames[1].float(), sample.labels[1] == 1
        saturated = (image.amax(0) > 215) & (image.amin(0) < 60)
        agree.append((saturated[truth].float().mean() if truth.any() else torch.tensor(1.0)).item())
    assert np.mean(agree) > 0.8


def test_predictions_take_the_place_of_degraded_masks(small_sets, tmp_path):
    """Predictions that are shifted by 9 pixels are met in about half of the patches."""
    masks = small_sets / "davis" / "Annotations" / "480p"
    for file in masks.glob("*/*.png"):
        labels = read_labels(file)
        target = tmp_path / "shifted" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_mask(target, np.roll(labels, 40, axis=1))
    source = _source(small_sets / "davis", predictions=(str(tmp_path / "shifted"),))
    assert all(len(still.predictions) == 1 for still in source.stills)
    shifted = 0
    for sample in _draws(source, 40):
        wrong, truth = (sample.labels[i].numpy() == 1 for i in (0, 1))
        shifted += np.mean(wrong != truth) > 0.3
    assert 10 <= shifted <= 32


def test_a_predictions_folder_must_fit(small_sets, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder of predictions"):
        _source(small_sets / "davis", predictions=("/nowhere",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no mask <sequence>/<frame>.png of the frames"):
        _source(small_sets / "davis", predictions=(str(tmp_path / "empty"),))
    (tmp_path / "small" / "left").mkdir(parents=True)
    write_mask(tmp_path / "small" / "left" / "00000.png", np.ones((4, 4), np.uint8))
    source = _source(small_sets / "davis", predictions=(str(tmp_path / "small"),))
    with pytest.raises(DataError, match=r"small/left/00000.png: has another size than its true mask"):
        _draws(source, 400)


def test_items_depend_on_seed_epoch_and_number_alone(config):
    settings = config("run").data
    one, other = (build_dataset(settings, frames=2, crop=32, max_objects=1, seed=4) for _ in range(2))
    assert torch.equal(one[3].frames, other[3].frames)
    assert torch.equal(one[3].labels, other[3].labels)
    assert one[3].objects == 1
    other.set_epoch(1)
    assert not torch.equal(one[3].frames, other[3].frames)


def test_a_run_stopped_after_every_step_goes_on_bit_for_bit(config):
    whole = config("whole")
    outcome = train(whole)
    assert outcome.step == 6
    refiner = BoundaryRefiner.load(outcome.weights)
    assert refiner.settings["kind"] == "boundary_refiner"
    assert outcome.weights.stat().st_size < 8e6
    cut = config("cut")
    assert train(cut, minutes=1e-9).weights is None
    while train(cut, resume=True, minutes=1e-9).weights is None:
        pass
    assert losses(cut.run) == losses(whole.run)
    ours, expected = load_file(cut.run / "model.safetensors"), load_file(outcome.weights)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_the_loss_falls_and_held_out_masks_are_scored(config):
    source = config("x").data.sources[0].path
    held = f"{{sources: [{{layout: davis, path: {source}}}], patches: true, merge: 0.0}}"
    run = config(
        "learns",
        *("steps=50", "batch=8", "optim.lr=4e-3", "optim.ema=null", "half=false"),
        "model.options.network=hrnet",
        f"held_out={{data: {held}, clips: 6, frames: 2, every: 50}}",
    )
    torch.manual_seed(run.seed)
    before = _mean_loss(loop.build_model(run), run)
    outcome = train(run)
    trained = build_network("hrnet")
    trained.load_state_dict(load_file(outcome.weights))
    assert _mean_loss(trained, run) < 0.8 * before
    (score,) = (float(j) for (j,) in losses(run.run, "held_out_j") if j)
    assert 0.5 < score <= 1


@torch.no_grad()
def _mean_loss(model, run):
    """Over the patches of an epoch: single steps differ by their patches more than by what was learnt."""
    data = build_dataset(run.data, frames=2, crop=run.crop, max_objects=1, seed=0)
    batch = collate([data[number] for number in range(len(data))])
    logits = model.eval()(batch.frames, first_masks(batch.labels, 1))
    return clip_loss(logits, batch.labels[:, 1:], batch.objects, run.loss, 0.0).total.item()


@pytest.mark.parametrize(("network", "learnt"), [("mobilenet", False), ("hrnet", True)])
def test_batch_statistics_are_learnt_by_hrnet_alone(config, network, learnt):
    model = loop.build_model(config("run", f"model.options.network={network}"))
    norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert any(norm.training for norm in norms) == learnt


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["data.patches=false"], "data.patches must be true for boundary_refiner and for no other model"),
        (["model.name=stcn_tiny"], "data.patches must be true for boundary_refiner and for no other model"),
        (["model.options.layers=2"], "model: .*unexpected keyword argument 'layers'"),
        (["model.options.network=vgg"], "model: network must be one of mobilenet, hrnet, got 'vgg'"),
    ],
)
def test_bad_runs_do_not_begin(config, assignments, message):
    run = config("bad", *assignments)
    with pytest.raises(ConfigError, match=message):
        train(run)
    assert not run.run.exists()


def test_bad_data_settings_are_named():
    source = SourceConfig("davis", predictions=("there",))
    with pytest.raises(ValueError, match="merge must be 0 where clips are patches, got 0.5"):
        DataConfig((source,), patches=True)
    with pytest.raises(ValueError, match="predictions of a source are for patches: true alone"):
        DataConfig((source,))


def test_the_shipped_configuration_is_one(train_data, monkeypatch):
    monkeypatch.setenv("VOSOPS_TRAIN_DATA", str(train_data))
    shipped = load_config(Path(__file__).parents[2] / "configs" / "boundary_refiner.yaml")
    data = build_dataset(
        shipped.data, frames=shipped.frames, crop=shipped.crop, max_objects=shipped.max_objects, seed=0
    )
    clips = [data[number] for number in range(6)]
    assert {clip.frames.shape for clip in clips} == {(2, 3, shipped.crop, shipped.crop)}
    assert all(len(boundary((clip.labels[0] == 1).byte().numpy())) for clip in clips)
