# SPDX-License-Identifier: Apache-2.0
"""What a recipe says: members, augmentation, merge, zoom, refinement and memory, as YAML has it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vosops.training.settings import ConfigError, build, override, plain, read_yaml

__all__ = ["ConfigError", "Member", "Memory", "Recipe", "Refinement", "dump", "load_recipe", "parse_tta"]

PROPAGATE = "propagate"
"""The model name of the training-free `LabelPropagator`."""


@dataclass(frozen=True)
class Member:
    """One segmenter of the ensemble: a model, or what one found before.

    Attributes:
        model: of `vosops.models.MODELS`, or "propagate" for `LabelPropagator`.
        weights: its checkpoint; null for the weights that vosops ships for it. A path that is not absolute
            starts at the current folder.
        options: of the model's constructor, or of `PropagationSettings`.
        dtype: of the model's convolutions (autocast below float32).
        top_k: memory positions that each query keeps; null as published.
        tta: its own, in place of the recipe's.
        weight: its share in a weighted merge, above 0.
        probabilities: in place of a model, the --out folder of an earlier run with --save-probabilities on
            the same frames at the same max_size.
    """

    model: str | None = None
    weights: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    top_k: int | None = None
    tta: tuple[Any, ...] | None = None
    weight: float = 1.0
    probabilities: Path | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.probabilities is None):
            raise ValueError("model or probabilities must be given, and only one of them")
        own = (self.weights, self.top_k, self.tta, self.options or None)
        if self.probabilities is not None and any(value is not None for value in own):
            raise ValueError("probabilities must stand alone: weights, options, top_k and tta were the run's")
        if self.tta is not None:
            parse_tta(self.tta)
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight must be finite and above 0, got {self.weight}")
        if self.model == PROPAGATE and self.weights is not None:
            raise ValueError("weights must be null for propagate: it has options.feature_weights")
        if self.model == PROPAGATE and self.dtype != "float32":
            raise ValueError("dtype must be float32 for propagate: it has options.memory_dtype")


@dataclass(frozen=True)
class Memory:
    """What every member remembers; null is as published.

    Attributes:
        every: distance of remembered frames.
        frames: most frames held besides the first.
        bytes: most bytes of keys and values of one member at one scale.
        balanced: the interval follows motion and the length of the video (`vosops.memory.Balanced`); `frames`
            is then the number that it aims at.
    """

    every: int | None = None
    frames: int | None = None
    bytes: int | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "frames", "bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.balanced and self.frames is None:
            raise ValueError("frames must be given where memory is balanced")
        if self.balanced and self.every is not None:
            raise ValueError(f"every must be null where memory is balanced, got {self.every}")


@dataclass(frozen=True)
class Refinement:
    """What corrects the masks of every frame, after all else; the members do not see it.

    Attributes:
        kind: "boundary": patches along the boundary (`BoundaryRefiner`); "mask": SCM's refinement of whole
            masks (`MaskRefiner`).
        weights: of the refiner; null for the shipped ones.
    """

    kind: Literal["boundary", "mask"]
    weights: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """An inference recipe, from the outside in: refine(zoom(merge(tta(member), tta(member), ...))).

    Attributes:
        members: one or more; they share nothing but the frames.
        tta: "flip" and factors on the frame's sides, as (flip, 1.0, 1.2); () looks once.
        merge: of the members' probabilities (`EnsembleSegmenter`).
        zoom: "small" segments objects that are small in the frame once more in an enlarged crop, with the
            first member, without augmentation (`ZoomSegmenter`).
        refine: what corrects the masks.
        memory: what the members remember.
        max_size: longer side, pixels, of the frames that all this sees; larger frames are shrunk to it.
    """

    members: tuple[Member, ...]
    tta: tuple[Any, ...] = ()
    merge: Literal["average", "maximum", "weighted", "keypoints"] = "average"
    zoom: Literal["small"] | None = None
    refine: Refinement | None = None
    memory: Memory = field(default_factory=Memory)
    max_size: int | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("members must hold at least one member, got none")
        parse_tta(self.tta)
        if self.zoom is not None and all(member.model is None for member in self.members):
            raise ValueError("zoom must be null without a member that is a model: one segments the crops")
        if self.merge != "weighted" and any(member.weight != 1 for member in self.members):
            raise ValueError(f"merge must be weighted where members have a weight, got {self.merge}")


def parse_tta(text: str | Iterable[Any]) -> tuple[tuple[float, ...], bool]:
    """Scales and flip of an augmentation.

    Args:
        text: "flip,1.0,1.2", or its parts as YAML has them.

    Returns:
        The factors on the frame's sides, (1.0,) if none is named, and whether to look mirrored as well.

    Raises:
        ValueError: a part that is neither "flip" nor a number above 0, or that comes twice.
    """
    parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else list(text)
    scales = []
    for part in parts:
        if part == "flip":
            continue
        try:
            scale = float(part) if not isinstance(part, bool) else math.nan
        except (TypeError, ValueError):
            scale = math.nan
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"tta must be flip and factors above 0, as flip,1.0,1.2; got {part!r}")
        scales.append(scale)
    if len(set(scales)) < len(scales) or parts.count("flip") > 1:
        raise ValueError(f"tta must name everything once, got {','.join(map(str, parts))}")
    return tuple(scales) or (1.0,), "flip" in parts


def load_recipe(path: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with assignments KEY=VALUE over it, as tta=[flip] or members.0.top_k=30.

    Raises:
        ConfigError: the file cannot be read; a key is unknown or missing; a value is of another type or out
            of its range. The message names the key.
    """
    return build(Recipe, override(read_yaml(Path(path)), assignments))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every value written out; `load_recipe` reads it back."""
    return yaml.safe_dump(plain(recipe), sort_keys=False)
