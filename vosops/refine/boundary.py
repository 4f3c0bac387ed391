# SPDX-License-Identifier: Apache-2.0
"""Boundary patch refinement: patches along the boundary of every mask, looked at again by a small network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import vosops
from vosops.models.checkpoint import load_weights, read_state_dict

from .network import NAME, PatchNetwork, build_network, fingerprint, recognise
from .patches import Assembly, choose_patches, cut_patches, padded
from .segmenter import Frame, check_frame, combine

WEIGHTS = Path(vosops.__file__).parent / "weights" / f"{NAME}.safetensors"
"""The weights that come with the package."""


@dataclass(frozen=True)
class PatchSettings:
    """Which patches a `BoundaryRefiner` looks at; the shipped weights are trained at size + 2 margin = 96.

    Args:
        size: side of a patch, pixels of the frame.
        margin: pixels around a patch that the network sees and whose result is not used.
        overlap: greatest intersection over union of two patches.
        batch: patches that go through the network together; memory grows with it, not with the frame.

    Raises:
        TypeError, ValueError: an option of another type, or out of its range, named.
    """

    size: int = 64
    margin: int = 16
    overlap: float = 0.25
    batch: int = 32

    def __post_init__(self) -> None:
        for name, low in (("size", 16), ("margin", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int | float):
            raise TypeError(f"overlap must be a number, got {type(self.overlap).__name__}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must lie in [0, 1), got {self.overlap}")


class BoundaryRefiner:
    """Refines every object in patches along its predicted boundary; what no patch covers stays as it is.

    An object's mask is where it is the likeliest. Patches around its boundary pixels, thinned by non-maximum
    suppression, go through the network with the image; where patches overlap, their probabilities are
    averaged. Where a patch was, the objects' probabilities are combined anew (`combine`), refined or not.
    It is a `Refiner`.

    Args:
        network: with trained weights; it is put into evaluation mode.
        settings: of the patches.

    Note:
        Cost: 0.1 GMAC a patch of 64 + 2 x 16 pixels (HRNet 0.22). Memory: a batch of patches, and three maps
        of the frame's size beside the result.

    Source: Tang et al., Look Closer to Segment Better: Boundary Patch Refinement for Instance Segmentation,
        CVPR 2021.
    """

    def __init__(self, network: PatchNetwork, settings: PatchSettings | None = None) -> None:
        if not isinstance(network, PatchNetwork):
            raise TypeError(f"network must be a PatchNetwork, got {type(network).__name__}")
        self.network = network.eval()
        self.patches = PatchSettings() if settings is None else settings
        self._fingerprint = fingerprint(network)

    @classmethod
    def load(cls, weights: str | Path | None = None, settings: PatchSettings | None = None) -> Self:
        """A refiner with weights from a file that `vosops train` wrote, or with those of the package.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: the file holds other weights.
        """
        path = WEIGHTS if weights is None else Path(weights)
        state = read_state_dict(path)
        network = build_network(recognise(state))
        load_weights(network, state, name=NAME, file=path.name)
        return cls(network, settings)

    @property
    def settings(self) -> dict[str, Any]:
        """Patches and weights as plain values; the batch does not count."""
        values = asdict(self.patches)
        del values["batch"]
        return {"kind": NAME, "weights": self._fingerprint, **values}

    @torch.no_grad()
    def __call__(self, frame: Frame, probabilities: Tensor) -> Tensor:
        """Refines the probabilities (1 + O, H, W) of a frame (H, W, 3); see `Refiner`.

        Raises:
            TypeError, ValueError: an argument of another shape or dtype, named.
        """
        check_frame(frame, probabilities)
        size, margin = self.patches.size, self.patches.margin
        image = padded(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1), size, margin)
        labels = probabilities.argmax(0)
        objects, touched = probabilities[1:].clone(), torch.zeros_like(labels, dtype=torch.bool)
        for number, before in enumerate(objects, start=1):
            mask = (labels == number).to(torch.uint8).cpu()
            corners = choose_patches(mask.numpy(), size, self.patches.overlap)
            if len(corners) == 0:
                continue
            mean, covered = self._refine(image, padded(mask[None], size, margin), corners, mask.shape)
            covered = covered.to(touched.device)
            before[covered] = mean.to(before.device)[covered]
            touched |= covered
        if not touched.any():
            return probabilities
        refined = probabilities.clone()
        refined[:, touched] = combine(objects[:, touched])
        return refined

    def _refine(
        self, image: Tensor, mask: Tensor, corners: Tensor, frame: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """The mean of an object's refined patches (H, W) and where there is one, from padded maps."""
        size, margin, batch = self.patches.size, self.patches.margin, self.patches.batch
        device = next(self.network.parameters()).device
        assembly = Assembly(frame[0], frame[1], size)
        for some in corners.split(batch):
            images = cut_patches(image, some, size, margin).to(device).float() / 255
            masks = cut_patches(mask, some, size, margin).to(device).float()
            found = self.network.refine(images, masks).sigmoid()[:, 0]
            assembly.add(found[:, margin : margin + size, margin : margin + size].cpu(), some)
        return assembly.mean()
