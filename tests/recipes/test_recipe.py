# SPDX-License-Identifier: Apache-2.0
"""Recipes in YAML: what they mean, and every mistake by its key."""

import re
from pathlib import Path

import pytest

from vosops.recipes import ConfigError, Member, Memory, Recipe, load_recipe, parse_tta
from vosops.recipes.recipe import dump

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs/recipes").glob("*.yaml"))

RECIPE = """
members:
  - model: stcn
    weights: stcn.pth
    top_k: 30
  - {model: propagate, options: {stride: 6}, tta: [], weight: 2}
tta: [flip, 1.2, 1]
merge: weighted
zoom: small
refine: {kind: boundary}
memory: {frames: 10, bytes: 1000000}
max_size: 480
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_means_what_it_says(file, tmp_path):
    recipe = load_recipe(file, ["members.0.top_k=20", "tta=[flip]"])
    first, second = recipe.members
    assert first == Member("stcn", Path("stcn.pth"), top_k=20)
    assert second == Member("propagate", options={"stride": 6}, tta=(), weight=2.0)
    assert (recipe.tta, recipe.merge, recipe.zoom) == (("flip",), "weighted", "small")
    assert recipe.refine is not None
    assert (recipe.refine.kind, recipe.refine.weights) == ("boundary", None)
    assert recipe.memory == Memory(None, 10, 1_000_000)
    assert recipe.max_size == 480
    again = tmp_path / "again.yaml"
    again.write_text(dump(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_recipes(path):
    recipe = load_recipe(path)
    assert load_recipe(path, ["merge=maximum"]).members == recipe.members


def test_the_documentation_names_the_presets_and_its_recipe_is_one(tmp_path):
    text = (ROOT / "docs/inference.md").read_text()
    assert set(re.findall(r"^\| `(\w+\.yaml)` \|", text, re.MULTILINE)) == {path.name for path in PRESETS}
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (len(recipe.members), recipe.merge, recipe.memory.balanced) == (3, "keypoints", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flip", ((1.0,), True)),
        ("flip,1.0, 1.2", ((1.0, 1.2), True)),
        ("0.75", ((0.75,), False)),
        (["flip", 1, 1.5], ((1.0, 1.5), True)),
        ([], ((1.0,), False)),
    ],
)
def test_augmentations(text, expected):
    assert parse_tta(text) == expected


@pytest.mark.parametrize("text", ["", "flop", "1.0,", "0", "-1", "inf", "nan", [True], [None], [[1.0]]])
def test_augmentations_that_are_none(text):
    with pytest.raises(ValueError, match="tta must be flip and factors above 0"):
        parse_tta(text)


@pytest.mark.parametrize("text", ["1,1.0", "flip,flip"])
def test_augmentations_named_twice(text):
    with pytest.raises(ValueError, match="everything once"):
        parse_tta(text)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("tta=[flop]", "tta must be flip and factors above 0, as flip,1.0,1.2; got 'flop'"),
        ("members.1.tta=[2, 2]", r"members\.1\.tta must name everything once"),
        ("members=[]", "members must hold at least one member"),
        ("members.0.weigth=1", r"unknown key members\.0\.weigth; there are members\.0\.model,"),
        ("members.0.weight=0", r"members\.0\.weight must be finite and above 0"),
        ("members.0.dtype=float64", r"members\.0\.dtype must be one of float32, bfloat16, float16"),
        ("members.1.weights=a.pth", r"members\.1\.weights must be null for propagate"),
        ("members.1.dtype=float16", r"members\.1\.dtype must be float32 for propagate"),
        ("merge=average", "merge must be weighted where members have a weight"),
        ("merge=vote", "merge must be one of average, maximum, weighted, keypoints"),
        ("zoom=large", "zoom must be one of small"),
        ("refine=boundary", "refine must be a mapping"),
        ("refine.kind=edge", r"refine\.kind must be one of boundary, mask"),
        ("memory.frames=0", r"memory\.frames must be at least 1"),
        ("memory={balanced: true}", r"memory\.frames must be given where memory is balanced"),
        ("memory={balanced: true, frames: 5, every: 2}", r"memory\.every must be null where memory is bala"),
        ("max_size=big", "max_size must be an integer, got"),
    ],
)
def test_mistakes_name_their_key(file, assignment, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(file, [assignment])


def test_members_are_needed(tmp_path):
    (tmp_path / "none.yaml").write_text("tta: [flip]\n")
    with pytest.raises(ConfigError, match="key members is missing: a list of"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="at least one member"):
        Recipe(())
