# SPDX-License-Identifier: Apache-2.0
"""What a cell of a frame looks like: the descriptors that label propagation matches, projected to keys.

An extractor gives several maps on the cell grid; `KeyProjection`, fitted on the first frame, puts them on
one scale and reduces them to the channels of a key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbone import BackboneFeatures, FeatureMap

Frame = NDArray[np.uint8]
FloatMap = NDArray[np.float32]

_ORIENTATIONS = 8
# Below this gradient energy (Lab lightness over 50, per pixel) orientation is noise.
_QUIET = 0.02
# Variance of Lab (in the units below) that is noise: keeps the contrast of flat regions small.
_FLAT = 1e-3


class FeatureExtractor(Protocol):
    """Describes the cells of a frame."""

    def __call__(self, frame: Frame, grid: tuple[int, int]) -> list[FeatureMap]:
        """Maps of a frame (H, W, 3) uint8 RGB on the grid (h, w)."""


def make_features(name: str, weights: str | Path | None = None) -> FeatureExtractor:
    """The extractor of a name.

    Args:
        name: "builtin", "torchvision:MODEL", "timm:MODEL", or two of them joined by "+", as in
            "builtin+torchvision:mobilenet_v2".
        weights: file of the backbone's weights, .safetensors or .pth (read with weights_only); None lets
            torchvision or timm download its own.

    Raises:
        ValueError: unknown name, or weights for "builtin", which has none.
        FileNotFoundError: no such weight file.
        ImportError: torchvision or timm is not installed.
        RuntimeError: the weights do not fit the model, or could not be downloaded.
    """
    parts = name.split("+") if isinstance(name, str) else []
    kinds = [part.partition(":")[0] for part in parts]
    models = [part.partition(":")[2] for part in parts]
    known = all(
        not model if kind == "builtin" else kind in ("timm", "torchvision") and model
        for kind, model in zip(kinds, models, strict=True)
    )
    if not parts or not known or len(set(kinds)) < len(kinds):
        raise ValueError(
            "features must be 'builtin', 'torchvision:MODEL', 'timm:MODEL' or two of these joined by '+', "
            f"got {name!r}"
        )
    backbones = sum(kind != "builtin" for kind in kinds)
    if weights is not None and backbones != 1:
        raise ValueError(f"feature_weights needs features with one backbone, got features={name!r}")
    extractors = [
        BuiltinFeatures() if kind == "builtin" else BackboneFeatures(kind, model, weights)
        for kind, model in zip(kinds, models, strict=True)
    ]
    return extractors[0] if len(extractors) == 1 else JoinedFeatures(extractors)


class JoinedFeatures:
    """The maps of several extractors, one list after the other."""

    def __init__(self, extractors: Sequence[FeatureExtractor]) -> None:
        self.extractors = tuple(extractors)

    def __call__(self, frame: Frame, grid: tuple[int, int]) -> list[FeatureMap]:
        return [described for extractor in self.extractors for described in extractor(frame, grid)]


class BuiltinFeatures:
    """A descriptor without weights: colour, its spread and contrast, colour around the cell, orientations.

    Maps, each with a weight of its own: mean CIE Lab of the cell and of a blurred neighbourhood; Lab of the
    eight cells around; standard deviation of Lab within the cell; Lab against its surroundings, in their
    standard deviations; orientation histograms (8 signed directions, soft-assigned, square-rooted,
    normalised by local energy) of the cell and of its neighbourhood.

    Note:
        Cost: about 12 ms for 854x480 at stride 6 on one core. Sources: the orientation histogram is HOG
        (Dalal and Triggs, CVPR 2005), its square root RootSIFT (Arandjelovic and Zisserman, CVPR 2012).
    """

    def __call__(self, frame: Frame, grid: tuple[int, int]) -> list[FeatureMap]:
        """Maps (h, w, D) float32 of `frame` (H, W, 3) uint8 RGB: D = 3, 3, 24, 3, 3, 8, 8."""
        pixels = _halve(frame).astype(np.float32) / 255
        lab = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB), np.float32)
        lab *= np.array([0.02, 0.04, 0.04], np.float32)  # the chroma of real video spans half the lightness
        mean = _to_grid(lab, grid)
        spread = np.sqrt(np.maximum(_to_grid(lab * lab, grid) - mean * mean, 0))
        histogram = _orientations(np.ascontiguousarray(cv2.GaussianBlur(lab, (0, 0), 1.0)[..., 0]), grid)
        return [
            FeatureMap(mean, 1.0),
            FeatureMap(_blur(mean, 1.5), 0.7),
            FeatureMap(_around(mean, 1), 0.7),
            FeatureMap(spread, 0.5),
            FeatureMap(_contrast(mean, 2.0), 0.7),
            FeatureMap(_normalised(_blur(histogram, 0.7)), 0.7),
            FeatureMap(_normalised(_blur(histogram, 2.0)), 0.5),
        ]


def _halve(frame: Frame) -> Frame:
    """Half the size: finer detail is noise to a cell, and costs four times as much."""
    height, width = frame.shape[:2]
    size = (max(1, width // 2), max(1, height // 2))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)


def _to_grid(image: FloatMap, grid: tuple[int, int]) -> FloatMap:
    return np.asarray(cv2.resize(image, grid[::-1], interpolation=cv2.INTER_AREA), np.float32)


def _blur(image: FloatMap, sigma: float) -> FloatMap:
    parts = [image[..., i : i + 4] for i in range(0, image.shape[-1], 4)]  # OpenCV filters up to 4 channels
    blurred = [
        cv2.GaussianBlur(np.ascontiguousarray(part), (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        for part in parts
    ]
    return np.concatenate([b.reshape(part.shape) for b, part in zip(blurred, parts, strict=True)], -1)


def _contrast(image: FloatMap, sigma: float) -> FloatMap:
    """Difference from the surroundings' mean, in their standard deviations."""
    mean = _blur(image, sigma)
    variance = np.maximum(_blur(image * image, sigma) - mean * mean, 0)
    return np.asarray((image - mean) / np.sqrt(variance + _FLAT), np.float32)


def _around(image: FloatMap, distance: int) -> FloatMap:
    """The eight neighbours at `distance` cells, one after the other in the channels."""
    padded = np.pad(image, ((distance, distance), (distance, distance), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    steps = (0, distance, 2 * distance)
    corners = [(y, x) for y in steps for x in steps if (y, x) != (distance, distance)]
    return np.concatenate([padded[y : y + height, x : x + width] for y, x in corners], -1)


def _orientations(lightness: FloatMap, grid: tuple[int, int]) -> FloatMap:
    """(h, w, 8) mean gradient magnitude per direction, each gradient split between its two nearest bins."""
    dx = cv2.Sobel(lightness, cv2.CV_32F, 1, 0)
    dy = cv2.Sobel(lightness, cv2.CV_32F, 0, 1)
    magnitude, angle = cv2.cartToPolar(dx, dy)
    position = angle * np.float32(_ORIENTATIONS / (2 * math.pi))
    lower = np.floor(position)
    share = position - lower
    first = lower.astype(np.int32) % _ORIENTATIONS
    bins = []
    for i in range(_ORIENTATIONS):
        weight = (first == i) * (1 - share) + ((first + 1) % _ORIENTATIONS == i) * share
        bins.append(_to_grid((magnitude * weight).astype(np.float32), grid))
    return np.stack(bins, -1)


def _normalised(histogram: FloatMap) -> FloatMap:
    energy = np.sqrt((histogram * histogram).sum(-1, keepdims=True) + _QUIET)
    return np.asarray(np.sqrt(histogram / energy), np.float32)


class KeyProjection:
    """Maps of an extractor to keys of unit length: one scale, principal components, partial whitening.

    Fitted on one frame: every map is centred and brought to its weight as total standard deviation; the
    principal components of all maps together are divided by a power of their standard deviations, and keys
    are brought to unit length, so that their dot product is a cosine.

    Args:
        channels: of the keys; fewer if the maps together have fewer.
        whitening: that power: 0 keeps the components' variances, 1 makes them equal.
    """

    def __init__(self, channels: int, whitening: float) -> None:
        self.channels = channels
        self.whitening = whitening
        self._mean: Tensor | None = None  # [D]
        self._matrix: Tensor | None = None  # [D, Ck]

    @property
    def fitted(self) -> bool:
        """Whether `fit` or `load_state_dict` has been called."""
        return self._matrix is not None

    def fit(self, maps: Sequence[FeatureMap]) -> None:
        """Takes mean, scale and components from one frame's maps.

        Note:
            Cost: one eigendecomposition of D x D, in float64. The components' signs cancel in every dot
            product; they are fixed all the same (largest entry positive), so that keys can be compared.
        """
        rows = _rows(maps)
        mean = rows.mean(0)
        widths = [m.values.shape[-1] for m in maps]
        deviation = torch.split((rows - mean).square().mean(0), widths)  # per channel
        scales = [m.weight / (d.sum().sqrt() + 1e-6) for m, d in zip(maps, deviation, strict=True)]
        scale = torch.cat([s.expand(w) for s, w in zip(scales, widths, strict=True)])
        scaled = (rows - mean) * scale
        variances, vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
        variances = variances.flip(0)[: self.channels].clamp(min=0)
        vectors = vectors.flip(1)[:, : self.channels]
        largest = vectors.abs().argmax(0)
        vectors = vectors * vectors.gather(0, largest[None]).sign()
        whitened = vectors / (variances + 1e-3 * variances[0] + 1e-12) ** (self.whitening / 2)
        self._mean, self._matrix = mean.float(), (scale[:, None] * whitened).float().contiguous()

    def __call__(self, maps: Sequence[FeatureMap]) -> Tensor:
        """Keys (1, Ck, h, w) float32 of unit length, position-major in storage.

        Raises:
            RuntimeError: not fitted.
        """
        if self._mean is None or self._matrix is None:
            raise RuntimeError("the projection is not fitted: call fit first")
        height, width = maps[0].values.shape[:2]
        keys = (_rows(maps).float() - self._mean) @ self._matrix
        keys = torch.nn.functional.normalize(keys, dim=1)
        return keys.view(1, height, width, -1).permute(0, 3, 1, 2)

    def state_dict(self) -> dict[str, Tensor]:
        """Mean and matrix; empty when not fitted."""
        if self._mean is None or self._matrix is None:
            return {}
        return {"mean": self._mean.clone(), "matrix": self._matrix.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes a state back, exactly."""
        self._mean = state["mean"].clone() if state else None
        self._matrix = state["matrix"].clone() if state else None


def _rows(maps: Sequence[FeatureMap]) -> Tensor:
    """All maps side by side.  # [h * w, D] float64"""
    stacked = np.concatenate([m.values.reshape(-1, m.values.shape[-1]) for m in maps], 1)
    return torch.from_numpy(stacked).double()
