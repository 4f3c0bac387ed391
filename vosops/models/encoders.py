# SPDX-License-Identifier: Apache-2.0
"""Image and mask encoders: torchvision's ResNets up to stride 16, with the published names of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.transforms.functional import normalize

_NETWORKS = {18: resnet18, 50: resnet50}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pyramid(NamedTuple):
    """Feature maps of images (B, 3, H, W), H and W multiples of 16.

    f16: (B, 1024, H/16, W/16); 256 channels for ResNet-18.
    f8: (B, 512, H/8, W/8); 128.
    f4: (B, 256, H/4, W/4); 64.
    """

    f16: Tensor
    f8: Tensor
    f4: Tensor


def normalize_imagenet(images: Tensor) -> Tensor:
    """Images (..., 3, H, W) in [0, 1], RGB, as torchvision's ImageNet weights expect them."""
    return normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))


class ResNetTrunk(nn.Module):
    """torchvision's ResNet without its last stage and classifier: conv1, bn1 and three stages.

    Nothing is downloaded: the weights are random until a checkpoint is loaded.

    Args:
        depth: 50, or 18.
        stages: names of the stages at strides 4, 8, 16 in the checkpoint: ("res2", "layer2", "layer3") in
            STCN's and XMem's key encoder, ("res2", "res3", "res4") in STM, ("layer1", "layer2", "layer3").
        in_channels: of conv1.
        conv_bias: every convolution has a bias, as in STCN's value encoder.

    Raises:
        ValueError: another depth, or not three stages.

    Source: He et al., CVPR 2016; stride 2 in the 3x3 convolution, as torchvision has it.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        stages: Sequence[str] = ("res2", "layer2", "layer3"),
        in_channels: int = 3,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        if depth not in _NETWORKS or len(stages) != 3:
            raise ValueError(f"depth must be 18 or 50 and stages three names, got {depth}, {list(stages)}")
        network = _NETWORKS[depth](weights=None)
        self.conv1, self.bn1 = network.conv1, network.bn1
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.stages = tuple(stages)
        for name, stage in zip(stages, (network.layer1, network.layer2, network.layer3), strict=True):
            self.add_module(name, stage)
        if conv_bias:
            for part in self.modules():
                if isinstance(part, nn.Conv2d):
                    part.bias = nn.Parameter(torch.zeros(part.out_channels))

    def forward(self, x: Tensor) -> Pyramid:
        """Normalised images (B, in_channels, H, W) to their Pyramid."""
        return self.from_stem(self.conv1(x))

    def pool(self, stem: Tensor) -> Tensor:
        """conv1's output (B, 64, H/2, W/2), normalised and max-pooled: (B, 64, H/4, W/4)."""
        return F.max_pool2d(F.relu(self.bn1(stem)), 3, stride=2, padding=1)

    def from_stem(self, stem: Tensor) -> Pyramid:
        """The Pyramid from conv1's output (B, 64, H/2, W/2), before bn1; STM adds mask terms to it."""
        x = self.pool(stem)
        maps = []
        for name in self.stages:
            x = self.get_submodule(name)(x)
            maps.append(x)
        f4, f8, f16 = maps
        return Pyramid(f16, f8, f4)
