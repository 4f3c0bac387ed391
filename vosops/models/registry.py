# SPDX-License-Identifier: Apache-2.0
"""All models by name: `create` with random weights, `load` with those of a published checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import compare, load_weights, read_state_dict, widened
from .session import VideoModel


@dataclass(frozen=True)
class ModelInfo:
    """One model of the table.

    Attributes:
        name: under which `create`, `load` and the command line know it.
        source: its paper.
        operators: of vosops that its inference calls.
        checkpoint: which published files it reads.
        target: "module:class" inside vosops.models, imported when asked for.
    """

    name: str
    source: str
    operators: tuple[str, ...]
    checkpoint: str
    target: str

    def model_class(self) -> type[VideoModel]:
        """The model's class.

        Raises:
            ImportError: a package that it builds on is not installed.
        """
        module, _, name = self.target.partition(":")
        try:
            found = getattr(importlib.import_module(f".{module}", __package__), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("vosops"):
                raise
            raise ImportError(
                f"model {self.name} needs the package '{error.name}': pip install 'vosops[apps]'"
            ) from error
        assert issubclass(found, VideoModel)
        return found

    def parameters(self) -> int:
        """Number of parameters, counted on a model without storage."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.model_class()().parameters())


_STM_FILE = "STM_weights.pth of the STM authors"

MODELS = {
    info.name: info
    for info in (
        ModelInfo(
            "stm",
            "Oh et al., ICCV 2019",
            ("memory_read", "soft_aggregate"),
            _STM_FILE,
            "stm:STM",
        ),
        ModelInfo(
            "kmn",
            "Seong et al., ECCV 2020",
            ("memory_read with KernelPrior", "soft_aggregate"),
            f"{_STM_FILE} (the network is the same)",
            "kmn:KMN",
        ),
        ModelInfo(
            "scm",
            "spatially constrained STM, Media AI challenge",
            ("memory_read with MaskPrior", "soft_aggregate"),
            "its own, none is published",
            "scm:SCM",
        ),
        ModelInfo(
            "stcn",
            "Cheng et al., NeurIPS 2021",
            ("memory_read", "soft_aggregate"),
            "stcn.pth and training checkpoints of the STCN authors",
            "stcn:STCN",
        ),
        ModelInfo(
            "xmem",
            "Cheng and Schwing, ECCV 2022",
            ("memory_read with usage", "soft_aggregate"),
            "XMem.pth, XMem-s012.pth, XMem-no-sensory.pth of the XMem authors",
            "xmem:XMem",
        ),
    )
}
"""Every model, by name."""


def create(name: str, **options: Any) -> VideoModel:
    """A model with random weights, in evaluation mode. Nothing is downloaded.

    Args:
        name: of `MODELS`.
        options: of its constructor.

    Raises:
        ValueError: no such model.
        ImportError: a package that it builds on is not installed.
    """
    return find(name).model_class()(**options).eval()


def load(name: str, path: str | Path, **options: Any) -> VideoModel:
    """A model with the weights of a published file, in evaluation mode.

    Args:
        name: of `MODELS`.
        path: .pth, .pt or .safetensors, as `read_state_dict` takes them. Dimensions that a model's files
            differ in (XMem) are taken from the weights.
        options: of its constructor.

    Raises:
        ValueError: no such model.
        FileNotFoundError: no such file.
        CheckpointError: the file is no checkpoint, or does not fit: names every entry that is missing,
            unexpected or of another shape, and the model that the file looks like.

    Note:
        Cost: the file is read once into memory beside the model.
    """
    info = find(name)
    state = read_state_dict(path)
    kind = info.model_class()
    build = getattr(kind, "from_state_dict", None)
    model: VideoModel = kind(**options) if build is None else build(state, **options)
    load_weights(model, state, name=name, file=Path(path).name)
    return model.eval()


def find(name: str) -> ModelInfo:
    """The table's entry.

    Raises:
        ValueError: no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]


def recognise(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the models that a state dict fits best, in names and shapes; empty if none fits nearly.

    Note:
        Cost: every model is built once, without storage.
    """
    scores: dict[str, float] = {}
    for name, info in MODELS.items():
        try:
            kind = info.model_class()
        except ImportError:
            continue  # a model whose packages are missing cannot be asked
        build = getattr(kind, "from_state_dict", None)
        with torch.device("meta"):
            try:
                own = (kind() if build is None else build(state)).state_dict()
            except (KeyError, ValueError):
                continue  # dimensions cannot be told from the weights: no file of this model
        misfits = len(compare(widened(state, own), own))
        scores[name] = 1 - misfits / max(len(own), len(state))
    best = max(scores.values(), default=0.0)
    return [name for name, score in scores.items() if score == best and score > 0.8]
