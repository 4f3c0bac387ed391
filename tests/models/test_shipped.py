# SPDX-License-Identifier: Apache-2.0
"""Weights that come with the package: what is in the files, and that they segment real clips."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from vosops import models
from vosops.data import open_frames, read_labels
from vosops.evaluation import region_similarity
from vosops.models.registry import default_model, shipped_weights
from vosops.propagate import CopyFirstMask, Tracker

SHIPPED = [name for name in models.MODELS if shipped_weights(name)]
FILES = sorted((Path(models.__file__).parent.parent / "weights").glob("*.safetensors"))
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "propagation.json"


def test_the_default_model_is_shipped():
    assert default_model() in SHIPPED


def test_files_are_small_and_described():
    assert set(SHIPPED) <= {path.stem for path in FILES}
    assert sum(shipped_weights(name).stat().st_size for name in SHIPPED) < 16e6
    for path in FILES:
        card = path.with_suffix(".md").read_text()
        for word in ("CC BY-NC 4.0", "steps", "J&F"):
            assert word in card, (path.name, word)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_entries_are_float16_and_finite(path):
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert tensor.dtype in (torch.float16, torch.int64), name
            assert torch.isfinite(tensor.float()).all(), name


@pytest.mark.parametrize("name", SHIPPED)
def test_size_of_the_model(name):
    assert models.MODELS[name].parameters() < 5_000_000


def test_models_without_weights_say_so():
    with pytest.raises(
        ValueError, match=r"path must name a checkpoint of stcn: weights come with .*stcn_tiny"
    ):
        models.load("stcn")


@pytest.mark.parametrize("name", SHIPPED)
def test_segments_a_real_clip(name, data_root):
    frames = list(islice(open_frames(data_root / "JPEGImages/480p/soapbox"), 8))
    truth = [read_labels(data_root / f"Annotations/480p/soapbox/{stem}.png") for stem, _ in frames]
    scores = {}
    for kind, segmenter in (("model", Tracker(models.load(name))), ("copy", CopyFirstMask())):
        segmenter.add(frames[0][1], truth[0])
        found = [segmenter.step(frame).argmax(0).numpy() for _, frame in frames[1:]]
        scores[kind] = np.mean(
            [region_similarity(a == 1, b == 1) for a, b in zip(truth[1:], found, strict=True)]
        )
    assert scores["model"] > 0.8 > scores["copy"] + 0.1, scores


def test_measured_against_training_free_propagation():
    record = json.loads(RESULTS.read_text())
    means, rows = record["means"], record["rows"]
    best = means[f"{default_model()}|single"]["jf"]
    with_encoder = [m["jf"] for key, m in means.items() if "mobilenet_v2" in key and key.endswith("|single")]
    assert with_encoder
    assert best >= max(with_encoder) + 0.06
    assert best >= 0.66
    for name in SHIPPED:
        mine = {row["sequence"]: row["jf"] for row in rows if row["method"] == name and row["objects"] == 1}
        copied = {
            row["sequence"]: row["jf"]
            for row in rows
            if row["method"] == "first mask copied" and row["objects"] == 1
        }
        assert mine.keys() == copied.keys()
        assert all(mine[sequence] > copied[sequence] for sequence in mine), name
