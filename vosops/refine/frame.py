# SPDX-License-Identifier: Apache-2.0
"""SCM's refinement of whole frames, for the masks of any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vosops.models.checkpoint import load_weights, read_state_dict
from vosops.models.refine import MaskRefiner

from .network import fingerprint
from .segmenter import Frame, check_frame, combine

_PREFIX = "refine."  # of the refiner in a checkpoint of SCM
_FAINT = 1e-4  # probabilities closer to 0 or 1 have no greater logits


class FrameRefiner:
    """Refines every object over the whole frame, as SCM does after its decoder. It is a `Refiner`.

    The network sees the image and the object's probability, and adds a correction to its logit; the objects
    are then combined anew (`combine`).

    Args:
        network: with trained weights; it is put into evaluation mode.

    Note:
        Cost: 9.8 GMAC per object at 480x864; objects go through the network one by one.
    """

    def __init__(self, network: MaskRefiner) -> None:
        if not isinstance(network, MaskRefiner):
            raise TypeError(f"network must be a MaskRefiner, got {type(network).__name__}")
        self.network = network.eval()
        self._fingerprint = fingerprint(network)

    @classmethod
    def load(cls, weights: str | Path) -> Self:
        """A refiner from a file: a checkpoint of SCM, of which it takes the refiner, or a MaskRefiner's own.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: the file holds other weights.
        """
        path = Path(weights)
        state = read_state_dict(path)
        own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        network = MaskRefiner()
        load_weights(network, own or state, name="mask_refiner", file=path.name)
        return cls(network)

    @property
    def settings(self) -> dict[str, Any]:
        """The weights as plain values."""
        return {"kind": "mask_refiner", "weights": self._fingerprint}

    @torch.no_grad()
    def __call__(self, frame: Frame, probabilities: Tensor) -> Tensor:
        """Refines the probabilities (1 + O, H, W) of a frame (H, W, 3); see `Refiner`.

        Raises:
            TypeError, ValueError: an argument of another shape or dtype, named.
        """
        check_frame(frame, probabilities)
        if len(probabilities) == 1:
            return probabilities
        device = next(self.network.parameters()).device
        image = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1)[None].float() / 255
        logits = probabilities[1:].to(device).clamp(_FAINT, 1 - _FAINT).logit()
        refined = [self.network(image, coarse[None, None])[0, 0].sigmoid() for coarse in logits]
        return combine(torch.stack(refined)).to(probabilities.device)
