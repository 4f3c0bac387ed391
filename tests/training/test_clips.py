# SPDX-License-Identifier: Apache-2.0
"""Clips, batches, and the data set that draws them."""

import re
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vosops.training.clips import Clip, DataError, collate, first_frame_objects
from vosops.training.dataset import DataConfig, SourceConfig, build_dataset, open_source


def clip(objects=1, size=8, name="a"):
    return Clip(torch.rand(3, 3, size, size), torch.ones(3, size, size, dtype=torch.uint8), objects, name)


def config(root, *layouts, **options):
    sources = tuple(SourceConfig(layout, str(root / layout)) for layout in layouts)
    return DataConfig(sources, clips_per_epoch=12, **options)


def same(a, b):
    equal = torch.equal(a.frames, b.frames) and torch.equal(a.labels, b.labels)
    return equal and (a.objects, a.name) == (b.objects, b.name)


def test_collate_stacks_clips_and_refuses_different_sizes():
    batch = collate([clip(1), clip(2, name="b")])
    assert batch.frames.shape == (2, 3, 3, 8, 8)
    assert batch.labels.shape == (2, 3, 8, 8)
    assert batch.objects.tolist() == [1, 2]
    assert batch.objects.dtype == torch.int64
    assert batch.names == ("a", "b")
    with pytest.raises(ValueError, match=r"one shape .* \(a\).*\(b\)"):
        collate([clip(), clip(size=4, name="b")])
    with pytest.raises(ValueError, match="at least one clip"):
        collate([])


def test_only_objects_of_the_first_frame_stay():
    labels = torch.zeros(2, 10, 10, dtype=torch.uint8)
    labels[:, :5, :5], labels[:, 9, :3], labels[1, 6, 6], labels[:, 0, 9] = 7, 3, 9, 255
    found, objects = first_frame_objects(labels, max_objects=4, min_pixels=10, rng=np.random.default_rng(0))
    assert objects == 1
    assert (found[labels == 7] == 1).all()
    assert (found[labels == 3] == 255).all()  # a sliver in the first frame: neither followed nor blamed
    assert (found[labels == 9] == 0).all()  # appears later
    assert (found[labels == 255] == 255).all()


def test_more_objects_than_allowed_are_background():
    labels = torch.arange(5, dtype=torch.uint8).repeat_interleave(20).view(1, 10, 10)
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found, objects = first_frame_objects(labels, max_objects=2, min_pixels=5, rng=rng)
        assert objects == 2
        assert set(found.unique().tolist()) == {0, 1, 2}
        seen |= set(labels[found > 0].unique().tolist())
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("layouts", [("regions",), ("davis",), ("youtube", "regions")])
def test_items_hold_what_a_clip_promises(small_sets, layouts):
    data = build_dataset(config(small_sets, *layouts, merge=0.5), frames=4, crop=64, max_objects=3, seed=0)
    assert len(data) == 12
    for index in range(len(data)):
        item = data[index]
        assert item.frames.shape == (4, 3, 64, 64)
        assert item.frames.dtype == torch.float32
        assert item.frames.is_contiguous()
        assert 0 <= item.frames.min() < item.frames.max() <= 1
        assert item.labels.shape == (4, 64, 64)
        assert item.labels.dtype == torch.uint8
        ids = set(item.labels[0].unique().tolist()) - {0, 255}
        assert ids == set(range(1, item.objects + 1))
        assert set(item.labels.unique().tolist()) <= ids | {0, 255}
        assert type(item.frames) is type(item.labels) is torch.Tensor


def test_an_item_depends_on_seed_epoch_progress_and_index_alone(small_sets):
    def build(seed=0):
        options = {"merge": 0.5, "colour": "strong", "hide": 0.5}
        chosen = config(small_sets, "davis", "regions", **options)
        return build_dataset(chosen, frames=3, crop=64, max_objects=3, seed=seed)

    data = build()
    data.set_epoch(2)
    data.set_progress(0.5)
    first = [data[i] for i in range(4)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = build()
    again.set_epoch(2)
    again.set_progress(0.5)
    assert all(same(again[i], first[i]) for i in reversed(range(4)))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are the caller's
    assert not same(build(1)[0], build()[0])
    again.set_epoch(3)
    assert not same(again[0], first[0])


def test_workers_give_the_same_clips_in_every_epoch(small_sets):
    data = build_dataset(config(small_sets, "davis"), frames=2, crop=64, max_objects=2, seed=0)
    loader = DataLoader(data, 4, collate_fn=collate, num_workers=2, persistent_workers=True)
    for epoch, progress in ((0, 0.0), (1, 1.0)):
        data.set_epoch(epoch)
        data.set_progress(progress)
        from_workers = torch.cat([batch.frames for batch in loader])
        assert torch.equal(from_workers, torch.stack([data[i].frames for i in range(len(data))]))


def test_ratios_choose_the_sources(small_sets):
    sources = (
        SourceConfig("davis", str(small_sets / "davis"), ratio=9),
        SourceConfig("regions", str(small_sets / "regions"), ratio=1),
    )
    data = build_dataset(
        DataConfig(sources, clips_per_epoch=150, merge=0), frames=2, crop=32, max_objects=1, seed=0
    )
    videos = sum("/" in data[i].name for i in range(150))
    assert 120 <= videos <= 146  # 135 expected, sigma 3.7


def test_some_objects_are_not_asked_for(small_sets):
    def objects(**options):
        chosen = config(small_sets, "regions", merge=1.0, **options)
        data = build_dataset(chosen, frames=2, crop=96, max_objects=4, seed=0)
        return [data[i].objects for i in range(12)]

    every, some = objects(distract=0.0), objects(distract=1.0)
    assert all(a >= b for a, b in zip(every, some, strict=True))
    assert sum(some) < sum(every)


def test_strong_changes_end_before_the_training(small_sets):
    calm = config(small_sets, "davis", hide=1.0, colour="strong", merge=0.0, calm_from=0.8)
    data = build_dataset(calm, frames=2, crop=64, max_objects=2, seed=0)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)

    def hidden(index):
        return float((data[index].frames - mean).abs().amax(1).lt(1e-6).float().mean())

    assert hidden(0) > 0.2
    data.set_progress(0.8)
    assert hidden(0) == 0


def test_an_error_in_a_worker_names_the_file(small_sets, tmp_path):
    shutil.copytree(small_sets / "davis", tmp_path / "davis")
    for broken in (tmp_path / "davis/JPEGImages/480p").rglob("*.jpg"):
        broken.write_bytes(broken.read_bytes()[:2000])
    data = build_dataset(config(tmp_path, "davis"), frames=2, crop=64, max_objects=2, seed=0)
    loader = DataLoader(data, 2, collate_fn=collate, num_workers=1)
    with pytest.raises(DataError, match=r"JPEGImages/480p/\w+/\d{5}.jpg: is a truncated JPEG \(2000 bytes"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 1}, "frames must be at least 2, got 1"),
        ({"crop": 16}, "crop must be at least 32, got 16"),
        ({"max_objects": 255}, "max_objects must be at least 1 and at most 254, got 255"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"frames": 2.0}, "frames must be an integer, got float"),
    ],
)
def test_bad_arguments(small_sets, change, message):
    arguments = {"frames": 2, "crop": 64, "max_objects": 2, "seed": 0} | change
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        build_dataset(config(small_sets, "davis"), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourceConfig("coco"), "layout must be one of regions, saliency, davis, youtube, got 'coco'"),
        (lambda: SourceConfig("davis", ratio=0), "ratio must be above 0"),
        (lambda: SourceConfig("davis", max_gap=0), "max_gap must be at least 1"),
        (lambda: DataConfig(()), "at least one data set"),
        (lambda: DataConfig((SourceConfig("davis"),), merge=2), r"merge must lie in [0, 1], got 2"),
        (lambda: DataConfig((SourceConfig("davis"),), colour="red"), "colour must be one of light, strong"),
        (
            lambda: DataConfig((SourceConfig("davis"),), clips_per_epoch=0),
            "clips_per_epoch must be at least 1",
        ),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_sources_may_be_mappings_and_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VOSOPS_TRAIN_DATA", str(tmp_path))
    chosen = DataConfig([{"layout": "davis", "path": "nowhere", "ratio": 2}])
    assert chosen.sources == (SourceConfig("davis", "nowhere", 2),)
    with pytest.raises(DataError, match=r"nowhere: no such folder of training data \(VOSOPS_TRAIN_DATA"):
        build_dataset(chosen, frames=2, crop=64, max_objects=1, seed=0)


def test_progress_and_epoch_out_of_range(small_sets):
    data = build_dataset(config(small_sets, "davis"), frames=2, crop=64, max_objects=2, seed=0)
    with pytest.raises(ValueError, match="fraction must lie in"):
        data.set_progress(1.5)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        data.set_epoch(-1)
    with pytest.raises(IndexError, match="index must lie in"):
        data[12]


def test_real_data_give_clips(train_data):
    sources = (
        SourceConfig("davis", str(train_data), sequences="2017/train.txt"),
        SourceConfig("regions", str(train_data / "static_bsds500")),
    )
    data = build_dataset(DataConfig(sources, merge=1.0), frames=3, crop=192, max_objects=3, seed=0)
    objects = [data[i].objects for i in range(10)]
    assert sum(count > 1 for count in objects) >= 7


def test_sequences_to_take_and_to_leave_out(small_sets):
    def names(**options):
        source = SourceConfig("davis", str(small_sets / "davis"), **options)
        return {s.name for s in open_source(source).sequences}

    assert names() == {"left", "right"}
    assert names(only=("left",)) == {"left"}
    assert names(without=("left",)) == {"right"}
    with pytest.raises(DataError, match="has no sequence 'middle' to take or leave out"):
        names(without=("middle",))
    with pytest.raises(DataError, match="only and without leave no sequence"):
        names(only=("left",), without=("left",))
