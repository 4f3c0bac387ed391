# SPDX-License-Identifier: Apache-2.0
"""All models by name: `create` with random weights, `load` with those of a published checkpoint."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import adapted, compare, load_weights, read_state_dict
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
        options: of the class's constructor that make it this model.
    """

    name: str
    source: str
    operators: tuple[str, ...]
    checkpoint: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

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

    def build(self, state: Mapping[str, Tensor] | None = None, **options: Any) -> VideoModel:
        """A model with random weights.

        Args:
            state: weights that will be loaded; models whose files differ in dimensions take them from it.
            options: of the constructor, over the model's own.

        Raises:
            ImportError: as of `model_class`.
        """
        kind, options = self.model_class(), {**self.options, **options}
        from_state_dict = getattr(kind, "from_state_dict", None)
        if state is None or from_state_dict is None:
            return kind(**options)
        model: VideoModel = from_state_dict(state, **options)
        return model

    @functools.cached_property
    def entries(self) -> Mapping[str, Tensor]:
        """The state dict, without storage."""
        with torch.device("meta"):
            return self.build().state_dict()

    def parameters(self) -> int:
        """Number of parameters, counted on a model without storage."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())


_STM_FILE = "STM_weights.pth of the STM authors"
_AOT_FILE = "{} of the AOT authors"
_LSTT = ("attention", "local_attention", "identity_embedding")


def _aot(
    name: str, file: str, encoder: str, layers: int, every: int | None = None, kind: str = "AOT"
) -> ModelInfo:
    """A published AOT or DeAOT: `every` is the distance of frames in its long-term memory at test time."""
    options = {"encoder": encoder, "layers": layers, "memory_every": every}
    source = "Yang et al., NeurIPS 2021" if kind == "AOT" else "Yang and Yang, NeurIPS 2022"
    return ModelInfo(name, source, _LSTT, _AOT_FILE.format(file), f"aot:{kind}", options)


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
        _aot("aott", "AOTT_*.pth", "mobilenetv2", 1),
        _aot("aots", "AOTS_*.pth", "mobilenetv2", 2),
        _aot("aotb", "AOTB_*.pth", "mobilenetv2", 3),
        _aot("aotl", "AOTL_*.pth", "mobilenetv2", 3, 5),
        _aot("r50_aotl", "R50_AOTL_*.pth", "resnet50", 3, 5),
        _aot("r101_aotl", "R101_AOTL_*.pth", "resnet101", 3, 5),
        _aot("rs101_aotl", "RS101_AOTL_*.pth", "resnest101", 3, 5),
        _aot("swinb_aotl", "SwinB_AOTL_*.pth", "swin_base", 3, 5),
        _aot("deaott", "DeAOTT_*.pth", "mobilenetv2", 1, None, "DeAOT"),
        _aot("deaots", "DeAOTS_*.pth", "mobilenetv2", 2, None, "DeAOT"),
        _aot("deaotb", "DeAOTB_*.pth", "mobilenetv2", 3, None, "DeAOT"),
        _aot("deaotl", "DeAOTL_*.pth", "mobilenetv2", 3, 5, "DeAOT"),
        _aot("r50_deaotl", "R50_DeAOTL_*.pth", "resnet50", 3, 5, "DeAOT"),
        _aot("swinb_deaotl", "SwinB_DeAOTL_*.pth", "swin_base", 3, 5, "DeAOT"),
        ModelInfo(
            "aotl_v2",
            "LSTT block V2, 5th place of the 4th LSVOS challenge",
            _LSTT,
            "its own, none is published",
            "aot:AOT",
            {"encoder": "swin_base", "layers": 3, "block": 2, "memory_every": 5, "top_k": 32},
        ),
        ModelInfo(
            "stcn_tiny",
            "STCN with a MobileNetV2",
            ("memory_read", "soft_aggregate"),
            "of vosops train",
            "stcn_tiny:STCNTiny",
        ),
        ModelInfo(
            "aot_tiny",
            "AOT with half the channels",
            _LSTT,
            "of vosops train",
            "aot:AOT",
            {"encoder": "mobilenetv2_96", "layers": 2, "channels": 128, "memory_every": 5},
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
    return find(name).build(**options).eval()


def load(name: str, path: str | Path | None = None, **options: Any) -> VideoModel:
    """A model with the weights of a file, in evaluation mode.

    Args:
        name: of `MODELS`.
        path: .pth, .pt or .safetensors, as `read_state_dict` takes them; by default the weights that come
            with the package. Dimensions that a model's files differ in (XMem) are taken from the weights.
        options: of its constructor.

    Raises:
        ValueError: no such model, or none of its weights come with the package.
        FileNotFoundError: no such file.
        CheckpointError: the file is no checkpoint, or does not fit: names every entry that is missing,
            unexpected or of another shape, and the model that the file looks like.

    Note:
        Cost: the file is read once into memory beside the model.
    """
    info = find(name)
    path = path or shipped_weights(name)
    if path is None:
        shipped = ", ".join(model for model in MODELS if shipped_weights(model)) or "no model"
        raise ValueError(f"path must name a checkpoint of {name}: weights come with {shipped} only")
    state = read_state_dict(path)
    model = info.build(state, **options)
    load_weights(model, state, name=name, file=Path(path).name)
    return model.eval()


def shipped_weights(name: str) -> Path | None:
    """The weights of a model that come with the package; None where the project has trained none."""
    path = Path(__file__).parent.parent / "weights" / f"{name}.safetensors"
    return path if path.is_file() else None


def default_model() -> str:
    """What segments where no model is named: one with shipped weights, "propagate" without any."""
    return "propagate" if shipped_weights("stcn_tiny") is None else "stcn_tiny"


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
        Cost: every model is built once in a process, without storage; some seconds.
    """
    scores: dict[str, float] = {}
    for name, info in MODELS.items():
        try:
            own = info.entries
            if hasattr(info.model_class(), "from_state_dict"):
                with torch.device("meta"):
                    own = info.build(state).state_dict()
        except ImportError:
            continue  # a model whose packages are missing cannot be asked
        except (KeyError, ValueError):
            continue  # dimensions cannot be told from the weights: no file of this model
        misfits = len(compare(adapted(state, own), own))
        scores[name] = 1 - misfits / max(len(own), len(state))
    best = max(scores.values(), default=0.0)
    return [name for name, score in scores.items() if score == best and score > 0.8]
