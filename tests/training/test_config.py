# SPDX-License-Identifier: Apache-2.0
"""Configurations: values from YAML and from the command line, and what every mistake says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from vosops.models import MODELS
from vosops.refine.network import NAME as REFINER
from vosops.training.config import ConfigError, dump, load_config
from vosops.training.settings import build, differences, override, plain

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()
    table: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = field(default_factory=Inner)
    parts: tuple[Inner, ...] = ()
    mode: Literal["no", "yes"] = "no"
    folder: Path | None = None
    flag: bool = False


def test_values_and_defaults():
    assert build(Outer, {"count": 3}) == Outer(3)
    values = {
        "count": 3,
        "inner": {"rate": "1e-4", "names": ["a", "b"], "table": {"x": 1}},
        "parts": [{"rate": 2}, {}],
        "mode": False,  # how YAML reads a bare no
        "folder": "runs/a",
        "flag": True,
    }
    expected = Outer(
        3, Inner(1e-4, ("a", "b"), {"x": 1}), (Inner(2.0), Inner()), "no", Path("runs/a"), flag=True
    )
    assert build(Outer, values) == expected
    assert build(Outer, yaml.safe_load(yaml.safe_dump(plain(expected)))) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"key count is missing: an integer"),
        ({"count": 1, "cuont": 2}, r"unknown key cuont; there are count, inner, parts, mode, folder, flag"),
        ({"count": 1, "inner": {"rat": 1}}, r"unknown key inner.rat; there are inner.rate, inner.names"),
        ({"count": 1, "parts": [{}, {"x": 1}]}, r"unknown key parts.1.x; there are parts.1.rate"),
        ({"count": 1.5}, r"count must be an integer, got 1.5"),
        ({"count": True}, r"count must be an integer, got True"),
        ({"count": 1, "flag": 1}, r"flag must be true or false, got 1"),
        ({"count": 1, "inner": 3}, r"inner must be a mapping, got 3"),
        ({"count": 1, "parts": {}}, r"parts must be a list of a mapping, got {}"),
        ({"count": 1, "inner": {"rate": "fast"}}, r"inner.rate must be a number, got 'fast'"),
        ({"count": 1, "inner": {"rate": -1}}, r"inner.rate must not be negative, got -1.0"),
        ({"count": 1, "inner": {"names": [1]}}, r"inner.names.0 must be text, got 1"),
        ({"count": 1, "inner": {"table": {"x": "1"}}}, r"inner.table.x must be an integer, got '1'"),
        ({"count": 1, "mode": "maybe"}, r"mode must be one of no, yes, got 'maybe'"),
        ({"count": 1, "folder": 3}, r"folder must be a path, got 3"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


def test_assignments():
    values = {"count": 1, "parts": [{"rate": 1}, {"rate": 2}], "inner": None}
    changed = override(values, ["count=5", "parts.1.rate=3e-1", "inner.names=[a, b]", "folder="])
    assert values["parts"][1] == {"rate": 2}  # the caller's stay
    assert build(Outer, changed) == Outer(5, Inner(names=("a", "b")), (Inner(1.0), Inner(0.3)))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("count", r"'count' must be KEY=VALUE"),
        ("=3", r"'=3' must be KEY=VALUE"),
        ("count.x=3", r"count.x: count is a value, it has no entry 'x'"),
        ("parts.2.rate=3", r"parts.2.rate: parts is a list of 1, it has no entry '2'"),
        ("parts.x=3", r"parts is a list of 1, it has no entry 'x'"),
        ("count=[", r"the value of count is no YAML"),
    ],
)
def test_assignments_that_cannot_be(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override({"count": 1, "parts": [{}]}, [assignment])


def test_differences():
    first, second = plain(Outer(1)), plain(Outer(2, Inner(names=("a",))))
    assert differences(first, second) == ["count: 1, 2", "inner.names: [], ['a']"]
    assert differences(first, first) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_project(path, tmp_path):
    config = load_config(path)
    assert config.run == Path("runs") / path.stem
    assert config.model.name in (*MODELS, REFINER)
    assert path.stem.startswith(config.model.name)
    written = tmp_path / "config.yaml"
    written.write_text(dump(config))
    assert load_config(written) == config
    assert load_config(path, ["steps=7", "data.sources.0.ratio=2"]).steps == 7


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {
        f"{model}_{stage}" for model in ("stcn_tiny", "aot_tiny") for stage in ("static", "video")
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps=0", r"steps must be above 0, got 0"),
        ("frames=1", r"frames must be at least 2, got 1"),
        ("crop=16", r"crop must be at least 32 pixels, got 16"),
        ("workers=-1", r"workers and seed must not be negative"),
        ("optim.lr=0", r"optim.lr must be above 0, got 0"),
        ("optim.min_lr=1", r"optim.min_lr must lie in \[0, lr = 0.0005\], got 1.0"),
        ("optim.warmup=2", r"optim.warmup must lie in \[0, 1\], got 2.0"),
        ("optim.weight_decay=-1", r"optim.weight_decay must not be negative"),
        ("loss.kind=dice", r"loss.kind must be one of aot, stcn, got 'dice'"),
        ("loss.hard_fraction=0", r"loss.hard_fraction must be above 0, got 0"),
        ("loss.hard_from=0.9", r"loss.hard_from must not exceed hard_to, 0.6, got 0.9"),
        ("aot.reference=2", r"aot.reference must lie in"),
        ("held_out={clips: 2}", r"key held_out.data is missing: a mapping"),
        ("precision=fp8", r"precision must be one of no, bf16, fp16, got 'fp8'"),
        ("data.merge=2", r"data.merge must lie in \[0, 1\], got 2"),
        ("data.sources.0.layout=coco", r"data.sources.0.layout must be one of regions, .*got 'coco'"),
        ("model.weights=a.pth", r"model.weights must be null where encoder_weights are given"),
        ("optim.rate=1", r"unknown key optim.rate; there are optim.lr, optim.min_lr"),
    ],
)
def test_values_that_make_no_sense(assignment, message):
    (path,) = (path for path in CONFIGS if path.stem == "stcn_tiny_static")
    with pytest.raises(ConfigError, match=message):
        load_config(path, [assignment])


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    for content, message in (
        ("[1]", "must be a mapping of keys to values, got list"),
        ("a: [", "is no YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError, match=rf"bad.yaml {message}"):
            load_config(tmp_path / "bad.yaml")
