# SPDX-License-Identifier: Apache-2.0
"""The recipes in configs/recipes: each builds and runs, with random weights in place of published ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vosops.models import create
from vosops.recipes import Pipeline, load_recipe, pipeline
from vosops.refine import BoundaryRefiner
from vosops.refine.network import build_network

PRESETS = sorted((Path(__file__).parents[2] / "configs/recipes").glob("*.yaml"))
PUBLISHED = [path for path in PRESETS if path.stem != "small"]
SIZE = (48, 64)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_builds_and_runs(path, monkeypatch, tmp_path):
    made = []

    def random(name, weights, **options):
        made.append((name, options))
        return create(name, **options)

    weights = tmp_path / "any.pth"
    weights.write_bytes(b"any")
    monkeypatch.setattr(pipeline, "load", random)
    monkeypatch.setattr(pipeline, "_weights", lambda member: weights)
    monkeypatch.setattr(pipeline, "_refiner_weights", lambda refinement: weights)
    monkeypatch.setattr(BoundaryRefiner, "load", lambda weights: BoundaryRefiner(build_network()))
    torch.manual_seed(0)
    recipe = load_recipe(path)
    whole = Pipeline(recipe)
    whole()  # all that the recipe has; two looks are enough to run it
    whole.recipe = replace(recipe, tta=recipe.tta[:2])
    segmenter = whole()
    assert [name for name, _ in made] == [member.model for member in recipe.members]
    frames = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    mask[10:20, 10:30] = 1
    mask[24:44, 30:60] = 2
    segmenter.add(frames[0], mask)
    found = segmenter.step(frames[1])
    assert segmenter.object_ids == [1, 2]
    assert found.shape == (3, *SIZE)
    torch.testing.assert_close(found.sum(0), torch.ones(SIZE))


def test_the_small_one_needs_no_files():
    (path,) = (path for path in PRESETS if path.stem == "small")
    recipe = load_recipe(path)
    Pipeline(recipe)()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_weights_that_are_not_there_are_named(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="weights: no such file: weights/"):
        Pipeline(load_recipe(path))
