# SPDX-License-Identifier: Apache-2.0
"""Image encoders of AOT and DeAOT: maps at strides 4, 8, 16 and 16 again, the last one for the memory.

The published ones speak the names of the published checkpoints; any other encoder comes from timm. Batch
normalisation is frozen everywhere: the batches of a few clips are too small for statistics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50, resnet101
from torchvision.ops import FrozenBatchNorm2d

Maps = tuple[Tensor, Tensor, Tensor, Tensor]

_BRANCH_SCALE = 0.2  # of residual branches: 33 blocks let the variance grow by a factor of about 4


class AOTEncoder(nn.Module, ABC):
    """An image encoder with four output maps.

    Attributes:
        channels: of the maps at strides 4, 8, 16 and of the last one at stride 16.
        align_corners: images are best 16n + 1 pixels wide and high, the centres of the corner cells of each
            map lie on the image's corners, and maps are resized with align_corners; else 16n.
    """

    channels: tuple[int, int, int, int]
    align_corners: bool = True

    @abstractmethod
    def forward(self, image: Tensor) -> Maps:
        """Maps (B, channels[i], H/s, W/s), s = 4, 8, 16, 16, sizes rounded up.

        Some networks of `TimmEncoder` round sizes down that are no multiples of 16.

        Args:
            image: (B, 3, H, W), normalised (`normalize_imagenet`), of any size.
        """


class _FoldedConv(nn.Conv2d):
    """A convolution and the frozen normalisation behind it as one convolution.

    The parameters stay apart, under their names; scaling the weight in every call costs about 1 % of what
    the passes over the maps would.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self._norm = (norm,)  # in a tuple: not a child, its entries belong to the norm's own name

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], shift)


class _FoldedNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """The names and values of a normalisation that a `_FoldedConv` applies."""

    def __init__(self, norm: FrozenBatchNorm2d) -> None:
        super().__init__(norm.weight.shape[0], norm.eps)
        super().load_state_dict(norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return x


def open_branches(network: nn.Module) -> None:
    """Gives residual branches that start at scale 0 the scale 0.2: frozen at 0 they would never open."""
    for part in network.modules():
        weight = getattr(part, "weight", None)
        if hasattr(part, "running_var") and isinstance(weight, Tensor) and not weight.is_meta:
            weight.data += _BRANCH_SCALE * (not weight.any())


def _fold(network: nn.Module) -> None:
    """Puts every frozen normalisation into the convolution before it, in the order of registration.

    In the networks below that order is the order of the calls; tests hold them to the unfolded ones.
    """
    before: tuple[str, nn.Module] = ("", network)
    for name, part in list(network.named_modules()):
        if isinstance(part, FrozenBatchNorm2d):
            conv_name, conv = before
            if not isinstance(conv, nn.Conv2d) or conv.out_channels != part.weight.shape[0]:
                raise TypeError(f"{name} does not follow a convolution of its width, but {conv_name}")
            norm = _FoldedNorm(part)
            network.set_submodule(name, norm)
            network.set_submodule(conv_name, _FoldedConv(conv, norm))
        before = (name, part)


_MOBILENET_BLOCKS = {96: 14, 320: 18, 1280: 19}  # channels after so many blocks


class MobileNetV2Encoder(AOTEncoder):
    """torchvision's MobileNetV2 at stride 16: the last stages are dilated by 2 instead of strided.

    Parameters features.N, as torchvision names them. Cost: 4.5 GMAC at 481x849.

    Args:
        last: channels of the last map: 1280, or 320 or 96 of a network that ends earlier (3.7, 1.6 GMAC).
        dilated: False leaves the last stages strided: the last map has stride 32.

    Source: Sandler et al., MobileNetV2, CVPR 2018; AOT-T, -S, -B, -L and DeAOT-T, -S, -B, -L.
    """

    def __init__(self, last: int = 1280, *, dilated: bool = True) -> None:
        super().__init__()
        if last not in _MOBILENET_BLOCKS:
            raise ValueError(f"last must be one of {', '.join(map(str, _MOBILENET_BLOCKS))}, got {last}")
        self.channels = (24, 32, 96, last)
        network = mobilenet_v2(weights=None, norm_layer=FrozenBatchNorm2d)
        self.features = network.features[: _MOBILENET_BLOCKS[last]]
        for index, block in enumerate(self.features):
            for part in block.modules():
                if dilated and index >= 14 and isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
                    # The block that gave up its stride still sees undilated maps.
                    dilation = 1 if part.stride == (2, 2) else 2
                    part.stride, part.dilation, part.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
        _fold(self)

    def forward(self, image: Tensor) -> Maps:
        f4 = self.features[:4](image)
        f8 = self.features[4:7](f4)
        f16 = self.features[7:14](f8)
        return f4, f8, f16, self.features[14:](f16)


class ResNetEncoder(AOTEncoder):
    """A ResNet without its last stage; the map at stride 16 is the last one as well.

    Parameters conv1, bn1, layer1, layer2, layer3, as torchvision and timm name them.

    Args:
        network: what has these parts, with `FrozenBatchNorm2d`: torchvision's ResNet or timm's ResNeSt. The
            parts are taken over.

    Note:
        Cost at 481x849: 27 GMAC (ResNet-50), 59 (ResNet-101), 76 (ResNeSt-101).

    Source: He et al., CVPR 2016; Zhang et al., ResNeSt, CVPRW 2022; R50-, R101- and RS101-AOT-L.
    """

    channels = (256, 512, 1024, 1024)

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.layer1, self.layer2, self.layer3 = network.layer1, network.layer2, network.layer3
        open_branches(self)
        _fold(self)

    def forward(self, image: Tensor) -> Maps:
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        f4 = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        f8 = self.layer2(f4)
        f16 = self.layer3(f8)
        return f4, f8, f16, f16


def _resnet(make: Any) -> AOTEncoder:
    return ResNetEncoder(make(weights=None, norm_layer=FrozenBatchNorm2d, zero_init_residual=True))


_MOBILENETS = {"mobilenetv2": 1280, "mobilenetv2_320": 320, "mobilenetv2_96": 96}


def build_encoder(name: str) -> AOTEncoder:
    """An encoder with random weights.

    Args:
        name: "mobilenetv2", "resnet50", "resnet101", "resnest101", "swin_base": the published ones, with the
            names of their checkpoints; "mobilenetv2_320", "mobilenetv2_96", which end at so many channels;
            "timm:NAME": a network of timm, Swins (version 1) as `SwinEncoder` and others as `TimmEncoder`,
            such as "timm:tf_efficientnetv2_s" or "timm:resnext101_32x8d".

    Raises:
        TypeError: name is no str.
        ValueError: there is no such encoder, or it cannot serve (`TimmEncoder`).
        ImportError: timm is not installed, for all but MobileNets and ResNets.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name in _MOBILENETS:
        return MobileNetV2Encoder(_MOBILENETS[name])
    if name == "resnet50":
        return _resnet(resnet50)
    if name == "resnet101":
        return _resnet(resnet101)
    if name not in ("resnest101", "swin_base") and not name.startswith("timm:"):
        raise ValueError(
            "name must be mobilenetv2, resnet50, resnet101, resnest101, swin_base, mobilenetv2_320, "
            f"mobilenetv2_96 or timm:NAME, got {name!r}"
        )
    from . import timm_encoders  # a second of imports that the others do without

    if name == "resnest101":
        return ResNetEncoder(timm_encoders.frozen_resnest())
    return timm_encoders.SwinEncoder() if name == "swin_base" else timm_encoders.build(name[5:])
