# SPDX-License-Identifier: Apache-2.0
"""Recipes made to work: which parts lie in which, what reaches them, and what is refused before any work."""

import json
from pathlib import Path

import pytest
import torch

from tests.propagate.stand_in import ColourModel
from vosops.memory import Balanced, Bounded, ByteBudget, EveryNth
from vosops.models import MODELS, ModelInfo
from vosops.propagate import AugmentedSegmenter, LabelPropagator, Tracker
from vosops.propagate.augment import estimate_memory
from vosops.propagate.ensemble import EnsembleSegmenter
from vosops.propagate.probabilities import ProbabilitiesError, SavingSegmenter
from vosops.propagate.zoom import ZoomSegmenter
from vosops.recipes import Member, Memory, Pipeline, Recipe, Refinement, pipeline
from vosops.refine import BoundaryRefiner, FrameRefiner, RefinedSegmenter
from vosops.refine.network import build_network

from .clips import SIZE, labels, picture

PROPAGATE = Member("propagate")


class ColourInfo(ModelInfo):
    """A registered model whose checkpoint is one number."""

    def model_class(self):
        return ColourModel


@pytest.fixture
def colour(monkeypatch, tmp_path):
    """A member with a checkpoint of its own, and a registered model with shipped weights."""
    monkeypatch.setitem(MODELS, "stcn", ColourInfo("stcn", "", (), "", ""))
    monkeypatch.setitem(MODELS, "kmn", ColourInfo("kmn", "", (), "", ""))
    path = tmp_path / "colour.pth"
    torch.save(ColourModel().state_dict(), path)
    monkeypatch.setattr(pipeline, "shipped_weights", lambda name: path if name == "kmn" else None)
    return Member("stcn", weights=path)


@pytest.fixture
def refiner(monkeypatch, tmp_path):
    """Weights of a boundary refiner where the shipped ones would be."""
    path = tmp_path / "boundary.pth"
    torch.save(build_network().state_dict(), path)
    monkeypatch.setattr("vosops.refine.boundary.WEIGHTS", path)
    return path


def follow(segmenter, count=4, first=0):
    if first == 0:
        segmenter.add(picture(0), labels(0))
    return [segmenter.step(picture(number)) for number in range(first + 1, count)]


def test_one_member_alone_is_itself(colour):
    assert type(Pipeline(Recipe((PROPAGATE,)))()) is LabelPropagator
    assert type(Pipeline(Recipe((colour,), tta=(1.0,)))()) is Tracker


def test_parts_lie_in_parts(colour, refiner):
    recipe = Recipe(
        (colour, Member("propagate", tta=(), weight=2.0)),
        tta=("flip", 0.75),
        merge="weighted",
        zoom="small",
        refine=Refinement("boundary"),
    )
    made = Pipeline(recipe)
    refined = made()
    assert type(refined) is RefinedSegmenter
    assert type(refined._refiner) is BoundaryRefiner
    assert type(refined._segmenter) is ZoomSegmenter
    ensemble = refined._segmenter._segmenter
    assert type(ensemble) is EnsembleSegmenter
    assert (ensemble._merge, list(ensemble._weights)) == ("weighted", [1.0, 2.0])
    augmented, propagator = ensemble._members
    assert type(augmented) is AugmentedSegmenter
    assert [(v.scale, v.mirrored) for v in augmented._variants] == [(0.75, False), (0.75, True)]
    assert type(propagator) is LabelPropagator
    assert type(refined._segmenter._make()) is Tracker
    # Models are shared, memories are not.
    assert augmented._segmenters[0].model is augmented._segmenters[1].model
    assert made()._segmenter._segmenter._members[0] is not augmented

    whole = follow(refined, 5)
    for found in whole:
        torch.testing.assert_close(found.sum(0), torch.ones(SIZE))
    first, second = made(), made()
    follow(first, 3)
    second.load_state_dict(first.state_dict())
    for ours, expected in zip(follow(second, 5, first=2), whole[2:], strict=True):
        assert torch.equal(ours, expected)


def test_options_reach_the_members(colour):
    memory = Memory(every=3, frames=4, bytes=2_000_000)
    member = Member("propagate", options={"stride": 7, "memory_dtype": "bfloat16"}, top_k=5)
    settings = Pipeline(Recipe((member,), memory=memory))().settings
    assert (settings.stride, settings.top_k, settings.memory_dtype) == (7, 5, torch.bfloat16)
    assert settings.policy() == ByteBudget(2_000_000, Bounded(5, EveryNth(3)))
    model = Member("stcn", weights=colour.weights, top_k=8, dtype="bfloat16", options={"stride": 4})
    tracker = Pipeline(Recipe((model,), memory=memory))()
    assert tracker.model.stride == 4
    assert tracker.dtype is torch.bfloat16
    assert (tracker.settings.memory_every, tracker.settings.top_k) == (3, 8)
    assert tracker.settings.policy == ByteBudget(2_000_000, Bounded(5))
    published = Pipeline(Recipe((colour,)))().settings
    assert (published.memory_every, published.policy, published.top_k) == (None, None, None)


def test_a_balanced_memory(colour):
    memory = Memory(frames=4, balanced=True)
    tracker = Pipeline(Recipe((colour,), memory=memory))()
    assert (tracker.settings.memory_every, tracker.settings.policy) == (1, Balanced(5))
    propagator = Pipeline(Recipe((PROPAGATE,), memory=memory))()
    assert propagator.settings.policy() == Balanced(5)
    follow(propagator, 12)
    assert len(propagator._bank) == 5
    budget = Memory(frames=4, bytes=10**6, balanced=True)
    assert Pipeline(Recipe((PROPAGATE,), memory=budget))().settings.policy() == ByteBudget(10**6, Balanced(5))


def test_shipped_weights_are_found():
    shipped = [name for name in MODELS if pipeline.shipped_weights(name)]
    for name in shipped:
        assert type(Pipeline(Recipe((Member(name),)))()) is Tracker


def test_settings_are_json_and_name_files_by_content(colour, refiner, tmp_path):
    recipe = Recipe((colour, Member("kmn")), tta=("flip",), refine=Refinement("boundary"))
    settings = Pipeline(recipe).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["member_1"]["weights"] == settings["member_2"]["weights"]
    assert settings["tta"] == {"scales": [1.0], "flip": True}
    moved = Path(colour.weights).rename(tmp_path / "moved.pth")
    torch.save({"sharpness": torch.tensor(3.0)}, colour.weights)
    named = Recipe((Member("stcn", weights=moved), colour), tta=("flip", 1.0), refine=recipe.refine)
    other = Pipeline(named).settings
    assert other["member_1"]["weights"] == settings["member_1"]["weights"] != other["member_2"]["weights"]
    assert other["tta"] == settings["tta"]


def test_memory_is_foreseen(colour):
    assert Pipeline(Recipe((colour,))).describe(SIZE, 2, 9) is None
    recipe = Recipe((colour, PROPAGATE), tta=("flip", 1.0, 0.75), max_size=SIZE[1] // 2)
    made = Pipeline(recipe)
    half = (SIZE[0] // 2, SIZE[1] // 2)
    expected = sum(estimate_memory(make, half, 2, 9, scales=(1.0, 0.75), flip=True) for make in made._members)
    assert made.describe(SIZE, 2, 9) == f"8 segmenters remember about {expected / 1e6:.0f} MB after 9 frames"
    zoomed = Pipeline(Recipe((PROPAGATE,), tta=("flip",), zoom="small"))
    note = zoomed.describe(SIZE, 1, None)
    assert note is not None
    assert note.endswith("after 100 frames; zoom adds one for each small object")


def test_an_offline_ensemble_is_the_online_one(colour, tmp_path):
    """Saved runs as members give what the members give, but for the rounding."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for member, folder in zip((colour, PROPAGATE), folders, strict=True):
        follow(SavingSegmenter(Pipeline(Recipe((member,)))(), folder / "clip" / "probabilities", {}), 6)
    online = follow(Pipeline(Recipe((colour, PROPAGATE), merge="maximum"))(), 6)
    saved = Recipe(tuple(Member(probabilities=folder) for folder in folders), merge="maximum")
    offline = follow(Pipeline(saved)("clip"), 6)
    for ours, expected in zip(offline, online, strict=True):
        torch.testing.assert_close(ours, expected, atol=0.02, rtol=0)
    with pytest.raises(ProbabilitiesError, match=r"dog/probabilities holds no probabilities\.json"):
        Pipeline(saved)("dog")


def test_the_mask_refiner_of_scm(tmp_path):
    from vosops.models.refine import MaskRefiner

    path = tmp_path / "refine.pth"
    torch.save(MaskRefiner().state_dict(), path)
    made = Pipeline(Recipe((PROPAGATE,), refine=Refinement("mask", path)))()
    assert type(made._refiner) is FrameRefiner


@pytest.mark.parametrize(
    ("members", "rest", "error", "message"),
    [
        ((Member("tcn"),), {}, ValueError, "model must be one of stm, .* got 'tcn'"),
        ((Member("stm"),), {}, ValueError, "model stm needs its checkpoint: vosops ships no weights of it"),
        ((Member("stm", weights=Path("no.pth")),), {}, FileNotFoundError, r"^weights: no such file: no\.pth"),
        ((PROPAGATE, Member("stm")), {}, ValueError, "^member 2: model stm needs"),
        ((PROPAGATE, Member("stm", weights=Path("no.pth"))), {}, FileNotFoundError, "^member 2: weights"),
        ((Member("propagate", options={"strides": 3}),), {}, ValueError, "options: .*strides"),
        ((Member("propagate", options={"top_k": 3}),), {}, ValueError, "options must not hold top_k"),
        ((Member("propagate", options={"memory_dtype": "int8"}),), {}, ValueError, "options.memory_dtype mu"),
        ((Member("propagate", options={"feature_weights": "no.pth"}),), {}, FileNotFoundError, "feature_wei"),
        ((Member("propagate", top_k=-2),), {}, ValueError, "top_k must be at least 1, got -2"),
        ((PROPAGATE,), {"refine": Refinement("mask")}, ValueError, "refine.weights must name a checkpoint"),
        ((PROPAGATE,), {"refine": Refinement("boundary", Path("no"))}, FileNotFoundError, "refine.weights"),
        ((Member(probabilities=Path("a")),), {"zoom": "small"}, ValueError, "zoom must be null without a"),
    ],
)
def test_mistakes_cost_nothing(monkeypatch, members, rest, error, message):
    monkeypatch.setattr(pipeline, "load", None)
    with pytest.raises(error, match=message):
        Pipeline(Recipe(members, **rest))


def test_options_that_the_model_does_not_have(colour):
    with pytest.raises(ValueError, match="^member 2: options: .*strude"):
        Pipeline(Recipe((colour, Member("stcn", weights=colour.weights, options={"strude": 2}))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model or probabilities must be given"),
        ({"model": "stm", "probabilities": Path("a")}, "only one of them"),
        ({"probabilities": Path("a"), "tta": ()}, "probabilities must stand alone"),
        ({"probabilities": Path("a"), "options": {"a": 1}}, "probabilities must stand alone"),
    ],
)
def test_members_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Member(**arguments)


def test_masks_follow_the_objects(colour):
    """The whole chain segments: an ensemble with augmentation finds both squares."""
    segmenter = Pipeline(Recipe((colour, PROPAGATE), tta=("flip", 1.0)))()
    last = follow(segmenter, 6)[-1].argmax(0).numpy()
    assert segmenter.object_ids == [1, 2]
    for channel in (1, 2):
        mask, truth = last == channel, labels(5) == channel
        assert (mask & truth).sum() / (mask | truth).sum() > 0.7
