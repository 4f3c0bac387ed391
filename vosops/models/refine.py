# SPDX-License-Identifier: Apache-2.0
"""Refinement after the decoder: a high-resolution network corrects each mask against the image."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import per_object
from .encoders import normalize_imagenet

_BACKBONE = "hrnet_w18_small"
_STRIDE = 32  # of HRNet's coarsest branch
_WIDTH = 64


class MaskRefiner(nn.Module):
    """coarse + correction(image, coarse): HRNet-W18-small over the image and one object's mask.

    HRNet's four branches (strides 4 to 32), brought to stride 4 and joined, give the context; its stem at
    stride 2 the boundaries. The last convolution starts close to zero, so that an untrained refiner leaves
    the mask nearly as it is.

    Note:
        Nothing is downloaded; timm's ImageNet weights go into `trunk`. Batch normalisation is frozen. Cost:
        9.8 GMAC per object at 480x864.

    Source: Wang et al., Deep High-Resolution Representation Learning for Visual Recognition, TPAMI 2020
        (HRNetV2: all branches joined at the finest).
    """

    def __init__(self) -> None:
        super().__init__()
        trunk: Any = timm.create_model(
            _BACKBONE, pretrained=False, features_only=True, in_chans=4, feature_location=""
        )
        stem, *branches = trunk.feature_info.channels()
        self.trunk = trunk
        self.context = nn.Conv2d(sum(branches), _WIDTH, 1)
        self.detail = nn.Conv2d(stem, _WIDTH, 1)
        self.merge = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1)
        self.correct = nn.Conv2d(_WIDTH, 1, 3, padding=1, bias=False)
        nn.init.normal_(self.correct.weight, std=1e-3)

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Refined logits of objects.

        Args:
            image: (B, 3, H, W) in [0, 1], RGB.
            coarse: (B*O, 1, H, W) logits; the network sees their sigmoid.

        Returns:
            (B*O, 1, H, W) logits.
        """
        height, width = image.shape[2:]
        rows = per_object(normalize_imagenet(image), coarse.shape[0])
        x = torch.cat((rows, coarse.sigmoid().to(rows.dtype)), 1)
        # Sides that are no multiples of 32 would give branches that do not fit each other.
        stem, *branches = self.trunk(F.pad(x, (0, -width % _STRIDE, 0, -height % _STRIDE)))
        fine = branches[0].shape[2:]
        joined = torch.cat([branches[0], *(_resize(branch, fine) for branch in branches[1:])], 1)
        merged = _resize(self.context(joined), stem.shape[2:]) + self.detail(stem)
        correction = self.correct(F.relu(self.merge(F.relu(merged))))
        correction = F.interpolate(correction, scale_factor=2, mode="bilinear", align_corners=False)
        return coarse + correction[..., :height, :width].to(coarse.dtype)


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, (size[0], size[1]), mode="bilinear", align_corners=False)
