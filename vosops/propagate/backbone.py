# SPDX-License-Identifier: Apache-2.0
"""Intermediate features of an image backbone of torchvision or timm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Frame = NDArray[np.uint8]
FloatMap = NDArray[np.float32]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as both libraries normalise
_STRIDES = (8, 16)
_PROBE = 224  # pixels; every backbone takes this size


class FeatureMap(NamedTuple):
    """One map of a descriptor.

    values: (h, w, D) float32.
    weight: its share in the key, as a standard deviation; the projection brings it there.
    """

    values: FloatMap
    weight: float


class BackboneFeatures:
    """The last maps of a backbone at strides 8 and 16, resampled to the cell grid.

    Args:
        library: "torchvision" or "timm".
        model: name of the model there.
        weights: .safetensors or .pth file (read with weights_only) of the model's state dict; None lets the
            library download its own.

    Raises:
        ValueError: the library has no such model, or the model has no map at stride 8 or 16.
        FileNotFoundError: no such weight file.
        ImportError: the library is not installed.
        RuntimeError: the weights do not fit the model, or could not be downloaded.

    Note:
        Cost: one forward pass of the backbone at the frame's size.
        Source of matching such features without training: Wang et al., Learning Correspondence from the
        Cycle-Consistency of Time, CVPR 2019, sec. 4.
    """

    def __init__(self, library: str, model: str, weights: str | Path | None) -> None:
        name = f"{library}:{model}"
        state = None if weights is None else _read_weights(Path(weights))
        network = _build(library, model, pretrained=weights is None)
        if state is not None:
            _load(network, state, name, Path(weights or ""))
        self._network = network.eval().requires_grad_(False)
        self._modules = _choose_modules(self._network, name)
        # timm says how a model's input is normalised; all of torchvision's classifiers have ImageNet's.
        config = getattr(network, "pretrained_cfg", {})
        self._normalisation = (tuple(config.get("mean", _MEAN)), tuple(config.get("std", _STD)))

    @torch.no_grad()
    def __call__(self, frame: Frame, grid: tuple[int, int]) -> list[FeatureMap]:
        """One map (h, w, D) float32 per stride, of a frame (H, W, 3) uint8 RGB."""
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 255
        height, width = frame.shape[:2]
        # Whole strides, so that the maps cover the frame without a remainder.
        size = tuple(max(2, round(side / _STRIDES[-1])) * _STRIDES[-1] for side in (height, width))
        if size != (height, width):
            pixels = nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in self._normalisation)
        maps = _forward(self._network, self._modules, (pixels - mean) / std)
        return [FeatureMap(_resample(found[0], grid), 0.7) for found in maps]


def _build(library: str, model: str, pretrained: bool) -> nn.Module:
    try:
        if library == "timm":
            import timm

            known = timm.is_model(model.partition(".")[0])
            create: Any = lambda: timm.create_model(model, pretrained=pretrained, num_classes=0)  # noqa: E731
        else:
            import torchvision

            known = model in torchvision.models.list_models(module=torchvision.models)
            weights = "DEFAULT" if pretrained else None
            create = lambda: torchvision.models.get_model(model, weights=weights)  # noqa: E731
    except ImportError as error:
        raise ImportError(
            f"features='{library}:{model}' needs {library}: pip install 'vosops[apps]'"
        ) from error
    if not known:
        raise ValueError(f"features: {library} has no classification model named {model!r}")
    if not pretrained:
        return create()  # type: ignore[no-any-return]
    try:
        return create()  # type: ignore[no-any-return]
    except Exception as error:  # urllib, requests and huggingface_hub each raise errors of their own
        raise RuntimeError(
            f"features='{library}:{model}': its weights could not be downloaded "
            f"({type(error).__name__}: {error}). Without network, give a weight file (feature_weights)"
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"feature_weights: no such file: {path}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"feature_weights must be a .safetensors, .pth or .pt file, got {path.name}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError("a .safetensors file needs safetensors: pip install safetensors") from error
    except Exception as error:  # each format raises errors of its own for a damaged file
        raise ValueError(f"feature_weights: {path.name} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"feature_weights: {path.name} must hold a state dict, got {type(state).__name__}")
    return state


def _load(network: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Loads what the features need; a classifier may be missing or left over."""
    try:
        missing, unexpected = network.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in state.items()},
            strict=False,
        )
    except RuntimeError as error:
        raise RuntimeError(f"feature_weights: {path.name} does not fit {name}: {error}") from error
    heads = ("classifier", "fc.", "head", "heads.", "norm.", "fc_norm")
    lacking = [
        key for key in missing if not key.endswith("num_batches_tracked") and not key.startswith(heads)
    ]
    foreign = [key for key in unexpected if not key.startswith(heads)]
    if lacking or foreign:
        raise RuntimeError(
            f"feature_weights: {path.name} does not fit {name}: missing {lacking[:3]}, unknown {foreign[:3]}"
        )


def _choose_modules(network: nn.Module, name: str) -> list[str]:
    """The last block whose output has each of the strides."""
    # Blocks lie at most two names deep ("layer2.3", "features.6"); deeper modules are a block's inside.
    names = [n for n, _ in network.named_modules() if n and n.count(".") <= 1]
    with _recorded(network, names) as outputs, torch.no_grad():
        network(torch.zeros(1, 3, _PROBE, _PROBE))
    chosen = []
    for stride in _STRIDES:
        found = [n for n, out in outputs.items() if out.shape[-1] == out.shape[-2] == _PROBE // stride]
        chosen += found[-1:]
    if not chosen:
        raise ValueError(f"features: {name} has no feature map at stride 8 or 16; choose a convolutional one")
    return chosen


def _forward(network: nn.Module, names: list[str], image: Tensor) -> list[Tensor]:
    with _recorded(network, names) as outputs:
        network(image)
    return [outputs[n] for n in names]


@contextmanager
def _recorded(network: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs (1, D, h, w) of the named modules in the forward passes within, in the order they ran."""
    outputs: dict[str, Tensor] = {}
    modules = dict(network.named_modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                outputs[name] = output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _resample(feature: Tensor, grid: tuple[int, int]) -> FloatMap:
    """(D, h', w') to (h, w, D), bilinear."""
    resized = nn.functional.interpolate(feature[None].float(), grid, mode="bilinear", align_corners=False)
    values = resized[0].permute(1, 2, 0).contiguous().numpy()
    return np.asarray(values, np.float32)
