# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run: one dataclass, of which the YAML files in configs/ are instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .dataset import DataConfig
from .settings import ConfigError, build, override, plain, read_yaml

__all__ = ["ConfigError", "TrainConfig", "dump", "load_config"]


def _check(settings: object, *, positive: Sequence[str] = (), share: Sequence[str] = ()) -> None:
    for name in positive:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    for name in share:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(settings, name)}")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        name: of `vosops.models.MODELS`, or boundary_refiner.
        options: of its constructor.
        weights: a checkpoint of this model to start from, as the run of the stage before wrote it.
        encoder_weights: an ImageNet file to start the MobileNetV2 encoder from (`load_mobilenet`).
        freeze: names of modules that are not trained, such as encoder.features.0.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    encoder_weights: Path | None = None
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights is not None and self.encoder_weights is not None:
            raise ValueError("weights must be null where encoder_weights are given: both fill the encoder")


@dataclass(frozen=True)
class LossConfig:
    """What is minimised; see `vosops.training.losses`.

    Attributes:
        kind: "aot": half bootstrapped cross-entropy, half soft Jaccard; "stcn": cross-entropy of hard pixels.
        hard_from, hard_to: shares of the training between which the fraction of pixels that count goes from
            1 to `hard_fraction`.
        hard_fraction: of the pixels, those of greatest loss, at the end.
    """

    kind: Literal["aot", "stcn"] = "aot"
    hard_from: float = 0.0
    hard_to: float = 0.5
    hard_fraction: float = 0.15

    def __post_init__(self) -> None:
        _check(self, positive=("hard_fraction",), share=("hard_from", "hard_to", "hard_fraction"))
        if self.hard_from > self.hard_to:
            raise ValueError(f"hard_from must not exceed hard_to, {self.hard_to}, got {self.hard_from}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; see `vosops.training.optim`.

    Attributes:
        lr, min_lr: learning rate after the warm-up and at the end.
        encoder_lr: the encoder's learning rate is min_lr + encoder_lr * (lr - min_lr).
        weight_decay: of matrices; biases, norms and a few named tensors have none.
        warmup: share of the steps over which the learning rate rises from min_lr.
        power: of the polynomial decay.
        clip: greatest norm of the gradient; null for any.
        ema: share of the steps over which weights are averaged; null for no average.
    """

    lr: float = 2e-4
    min_lr: float = 1e-5
    encoder_lr: float = 0.1
    weight_decay: float = 0.07
    warmup: float = 0.05
    power: float = 0.9
    clip: float | None = 5.0
    ema: float | None = 0.1

    def __post_init__(self) -> None:
        _check(self, positive=("lr", "clip", "ema", "power"), share=("warmup", "encoder_lr"))
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must lie in [0, lr = {self.lr}], got {self.min_lr}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")


@dataclass(frozen=True)
class AOTConfig:
    """What only AOT's training has.

    Attributes:
        shuffle: every clip's objects take random identities.
        sequential_from: share of the training from which memories are written with the predicted labels and
            the identity bank is fixed; before, with the true labels. 1 for never.
        reference: share of the training over which the loss of the first frame's own segmentation counts,
            with a weight that falls from 1 to 0.
    """

    shuffle: bool = True
    sequential_from: float = 0.5
    reference: float = 1.0

    def __post_init__(self) -> None:
        _check(self, share=("sequential_from", "reference"))


@dataclass(frozen=True)
class HeldOutConfig:
    """Clips that the run is judged by and never trained on.

    Attributes:
        data: where they come from.
        clips: how many.
        frames: of each.
        every: steps between two judgements.
    """

    data: DataConfig
    clips: int = 8
    frames: int = 6
    every: int = 1000

    def __post_init__(self) -> None:
        _check(self, positive=("clips", "every"))
        if self.frames < 2:
            raise ValueError(f"frames must be at least 2, got {self.frames}")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        run: folder that it writes.
        model, data, loss, optim, aot, held_out: see there.
        steps: of the optimizer.
        batch: clips per step, over all processes together.
        frames: per clip.
        crop: side of the square clips, pixels: a multiple of 32 for stcn_tiny, best 16 n + 1 for aot_tiny.
        max_objects: per clip.
        seed: of everything random.
        precision: "no" float32; "bf16" autocast; "fp16" autocast with a scaled loss, on a GPU.
        workers: processes that load data, per training process; 0 loads in the training process.
        threads: of torch in every process; null for torch's choice.
        recompute: less memory for more time (`recompute_blocks`).
        log_every, overlay_every, checkpoint_every: steps.
        half: the final file holds float16.
    """

    run: Path
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    aot: AOTConfig = field(default_factory=AOTConfig)
    held_out: HeldOutConfig | None = None
    steps: int = 10_000
    batch: int = 4
    frames: int = 3
    crop: int = 384
    max_objects: int = 3
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    workers: int = 1
    threads: int | None = None
    recompute: bool = False
    log_every: int = 10
    overlay_every: int = 500
    checkpoint_every: int = 200
    half: bool = True

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "max_objects", "threads")
        _check(self, positive=(*positive, "log_every", "overlay_every", "checkpoint_every"))
        if self.frames < 2:
            raise ValueError(f"frames must be at least 2, got {self.frames}")
        if self.crop < 32:
            raise ValueError(f"crop must be at least 32 pixels, got {self.crop}")
        if self.workers < 0 or self.seed < 0:
            raise ValueError(f"workers and seed must not be negative, got {self.workers} and {self.seed}")


def load_config(path: Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a YAML file, with assignments KEY=VALUE over it.

    Raises:
        ConfigError: the file cannot be read; a key is unknown or missing; a value is of another type or out
            of its range. The message names the key.
    """
    return build(TrainConfig, override(read_yaml(path), assignments))


def dump(config: TrainConfig) -> str:
    """The configuration as YAML, every value written out; `load_config` reads it back."""
    return yaml.safe_dump(plain(config), sort_keys=False)
