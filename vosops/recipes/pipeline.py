# SPDX-License-Identifier: Apache-2.0
"""A recipe made to work: weights read once, and a new segmenter, parts inside parts, for every video."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vosops.memory import Balanced, Bounded, ByteBudget, Policy
from vosops.models import CheckpointError, SessionSettings, load
from vosops.models.registry import find, shipped_weights
from vosops.propagate.augment import AugmentedSegmenter, estimate_memory
from vosops.propagate.ensemble import EnsembleSegmenter
from vosops.propagate.label_propagator import LabelPropagator, PropagationSettings
from vosops.propagate.probabilities import SavedProbabilities
from vosops.propagate.run import VideoSegmenter
from vosops.propagate.tracker import Tracker
from vosops.propagate.zoom import ZoomSegmenter
from vosops.training.settings import plain

from .recipe import PROPAGATE, Member, Memory, Recipe, Refinement, parse_tta

PROBABILITIES = "probabilities"
"""Folder of a run's --out that --save-probabilities writes."""

_FORESEEN = 100  # most frames for which memory is estimated: it takes a small video of as many
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Pipeline:
    """Makes a recipe's segmenter, a new one at every call; the models are loaded once and shared.

    Args:
        recipe: what to make.
        device: of the models; that of their weights, the CPU, by default. `LabelPropagator` always runs on
            the CPU.

    Raises:
        ValueError, TypeError: no such model or option, or values that do not go together; of several members
            the one at fault is named.
        FileNotFoundError, CheckpointError: weights that are not there, or do not fit.
        ImportError: a package is missing.

    Attributes:
        recipe: as given.
        settings: what a resumed run must repeat, as JSON values; weights count by content, wherever they lie.

    Example:
        >>> pipeline = Pipeline(load_recipe("configs/recipes/small.yaml"))
        >>> summary = segment_video(pipeline(), source, mask, "out", settings=pipeline.settings)
    """

    def __init__(self, recipe: Recipe, device: torch.device | str | None = None) -> None:
        self.recipe = recipe
        # Files are looked for before any is read: an ensemble takes a while to load.
        self.settings: dict[str, Any] = _settings(recipe)
        self._members = [
            None if member.model is None else _in_member(recipe, number, partial(self._load, member, device))
            for number, member in enumerate(recipe.members)
        ]
        self._refined = None if recipe.refine is None else _refined(recipe.refine, device)
        self._zoomed = next((make for make in self._members if make is not None), None)

    def __call__(self, sequence: str | None = None) -> VideoSegmenter:
        """A new segmenter, before its first `add`.

        Args:
            sequence: name of the video in a run over a data set: where saved probabilities lie.

        Raises:
            ProbabilitiesError: a member's folder holds none.
        """
        recipe, found = self.recipe, list[VideoSegmenter]()
        for make, member in zip(self._members, recipe.members, strict=True):
            if make is None:
                assert member.probabilities is not None
                folder = member.probabilities / (sequence or "") / PROBABILITIES
                found.append(SavedProbabilities(folder))
                continue
            scales, flip = self._tta(member)
            once = scales == (1.0,) and not flip
            found.append(make() if once else AugmentedSegmenter(make, scales, flip))
        segmenter = found[0]
        if len(found) > 1:
            weights = [member.weight for member in recipe.members] if recipe.merge == "weighted" else None
            segmenter = EnsembleSegmenter(found, recipe.merge, weights)
        if recipe.zoom is not None:
            assert self._zoomed is not None
            segmenter = ZoomSegmenter(segmenter, self._zoomed)
        return segmenter if self._refined is None else self._refined(segmenter)

    def describe(self, size: tuple[int, int], objects: int, frames: int | None) -> str | None:
        """How much memory the recipe's segmenters will hold, in words; None for a single one.

        Args:
            size: (H, W) of the video's frames.
            objects: in its first mask.
            frames: of the video, None if unknown; at most the first 100 are foreseen.

        Raises:
            ValueError: a segmenter refuses frames of this size.

        Note:
            Cost: that of `estimate_memory`, for each member.
        """
        looks = [
            (make, *self._tta(member))
            for make, member in zip(self._members, self.recipe.members, strict=True)
            if make is not None
        ]
        count = sum(len(scales) * (1 + flip) for _, scales, flip in looks)
        if count < 2:
            return None
        factor = min(1.0, (self.recipe.max_size or max(size)) / max(size))
        height, width = (max(1, round(side * factor)) for side in size)
        foreseen = max(2, min(frames or _FORESEEN, _FORESEEN))
        total = sum(
            estimate_memory(make, (height, width), objects, foreseen, scales=scales, flip=flip)
            for make, scales, flip in looks
        )
        more = "" if self.recipe.zoom is None else "; zoom adds one for each small object"
        return f"{count} segmenters remember about {total / 1e6:.0f} MB after {foreseen} frames{more}"

    def _tta(self, member: Member) -> tuple[tuple[float, ...], bool]:
        return parse_tta(self.recipe.tta if member.tta is None else member.tta)

    def _load(self, member: Member, device: torch.device | str | None) -> Callable[[], VideoSegmenter]:
        return _member(member, self.recipe.memory, device)


def _in_member(recipe: Recipe, number: int, act: Callable[[], Any]) -> Any:
    """What `act` returns; its errors say which of several members is at fault."""
    try:
        return act()
    except CheckpointError:
        raise  # its text names model and file
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        if len(recipe.members) == 1:
            raise
        # Not type(error): subclasses such as UnicodeDecodeError are made otherwise.
        kinds = (FileNotFoundError, ImportError, TypeError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"member {number + 1}: {error}") from error


def _member(
    member: Member, memory: Memory, device: torch.device | str | None
) -> Callable[[], VideoSegmenter]:
    """What makes one member's segmenter, without augmentation."""
    if member.model == PROPAGATE:
        return partial(LabelPropagator, _propagation(member, memory))
    assert member.model is not None
    try:
        model = load(member.model, _weights(member), **member.options)
    except TypeError as error:
        raise ValueError(f"options: {error}") from error
    every = 1 if memory.balanced else memory.every
    settings = SessionSettings(memory_every=every, policy=_policy(memory), top_k=member.top_k)
    return partial(Tracker, model, settings, device=device, dtype=_DTYPES[member.dtype])


def _propagation(member: Member, memory: Memory) -> PropagationSettings:
    options = dict(member.options)
    if "memory_dtype" in options:
        name = options["memory_dtype"]
        if name not in _DTYPES:
            raise ValueError(f"options.memory_dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
        options["memory_dtype"] = _DTYPES[name]
    given = {
        "memory_frames": memory.frames,
        "memory_every": memory.every,
        "memory_bytes": memory.bytes,
        "memory_balanced": memory.balanced or None,
        "top_k": member.top_k,
    }
    twice = sorted(given.keys() & options.keys())
    if twice:
        raise ValueError(f"options must not hold {', '.join(twice)}: the recipe has keys for that")
    options |= {name: value for name, value in given.items() if value is not None}
    try:
        return PropagationSettings(**options)
    except TypeError as error:
        raise ValueError(f"options: {error}") from error


def _policy(memory: Memory) -> Policy | None:
    """The policy of a model's memory; None as published."""
    policy: Policy | None = None
    if memory.frames is not None:
        policy = (Balanced if memory.balanced else Bounded)(1 + memory.frames)
    if memory.bytes is not None:
        policy = ByteBudget(memory.bytes) if policy is None else ByteBudget(memory.bytes, policy)
    return policy


def _refined(
    refinement: Refinement, device: torch.device | str | None
) -> Callable[[VideoSegmenter], VideoSegmenter]:
    """What puts a refiner around a segmenter."""
    # Imported here: timm, which its networks are of, takes seconds, and most runs have no refiner.
    from vosops.refine import BoundaryRefiner, FrameRefiner, RefinedSegmenter

    path = _refiner_weights(refinement)
    refiner: BoundaryRefiner | FrameRefiner
    refiner = BoundaryRefiner.load(path) if refinement.kind == "boundary" else FrameRefiner.load(path)
    refiner.network.to(device or "cpu")
    return partial(RefinedSegmenter, refiner=refiner)


def _refiner_weights(refinement: Refinement) -> Path:
    """The refiner's file.

    Raises:
        ValueError: none is named, and none is shipped.
        FileNotFoundError: no such file.
    """
    path = refinement.weights
    if path is None:
        if refinement.kind == "mask":
            raise ValueError("refine.weights must name a checkpoint of SCM or of its refiner for kind mask")
        from vosops.refine.boundary import WEIGHTS

        path = WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"refine.weights: no such file: {path}")
    return path


def _weights(member: Member) -> Path:
    """The checkpoint of a member that is a model.

    Raises:
        ValueError: no such model, or neither weights nor shipped ones.
        FileNotFoundError: no such file.
    """
    assert member.model is not None
    find(member.model)
    path = shipped_weights(member.model) if member.weights is None else member.weights
    if path is None:
        raise ValueError(f"model {member.model} needs its checkpoint: vosops ships no weights of it")
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    return path


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON values, every file by its content."""
    found: dict[str, Any] = {
        "merge": recipe.merge,
        "zoom": recipe.zoom,
        "refine": None,
        "memory": plain(recipe.memory),
        "tta": _looks(recipe.tta),
    }
    for number, member in enumerate(recipe.members):
        found[f"member_{number + 1}"] = _in_member(recipe, number, partial(_member_settings, member))
    if recipe.refine is not None:
        found["refine"] = {**plain(recipe.refine), "weights": _digest(_refiner_weights(recipe.refine))}
    return found


def _member_settings(member: Member) -> dict[str, Any]:
    found: dict[str, Any] = plain(member)
    found["tta"] = None if member.tta is None else _looks(member.tta)
    if member.model is None:
        return found
    if member.model != PROPAGATE:
        found["weights"] = _digest(_weights(member))
    elif member.options.get("feature_weights") is not None:
        path = Path(member.options["feature_weights"])
        if not path.is_file():
            raise FileNotFoundError(f"options.feature_weights: no such file: {path}")
        found["options"] = {**found["options"], "feature_weights": _digest(path)}
    return found


def _looks(tta: tuple[Any, ...]) -> dict[str, Any]:
    scales, flip = parse_tta(tta)
    return {"scales": list(scales), "flip": flip}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
