# SPDX-License-Identifier: Apache-2.0
"""STCN small enough to train and run on a CPU: a MobileNetV2, matched at stride 8."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.memory import Balanced

from .aot_encoders import MobileNetV2Encoder
from .blocks import FeatureFusion, ResBlock, UpsampleBlock, convolve_parts, map_objects, other_masks
from .encoders import Pyramid
from .session import SessionSettings
from .stcn import KEY_CHANNELS, STCN, Features, STCNSession

CHANNELS = 64
"""Of values and of all features at stride 8."""

WIDE = 128
"""Channels of features at stride 16."""

MEMORY_FRAMES = 16
"""Held by default: a matched frame costs more at stride 8, and the first 80 frames of a video fit."""


class TinyKeyEncoder(MobileNetV2Encoder):
    """MobileNetV2 up to its 320 channels at stride 32, which come down to strides 16 and 8 as a pyramid.

    Parameters features.N, as torchvision names them, and lateral_8, lateral_16, top, down. Cost: 2.2 GMAC at
    480x864; dilated at stride 16, as AOT has them, the last stages alone would cost 2.0.

    Source: Sandler et al., MobileNetV2, CVPR 2018; Lin et al., Feature Pyramid Networks, CVPR 2017.
    """

    def __init__(self) -> None:
        super().__init__(320, dilated=False)
        _, at_8, at_16, at_32 = self.channels
        self.top = nn.Conv2d(at_32, WIDE, 1)
        self.lateral_16 = nn.Conv2d(at_16, WIDE, 1)
        self.down = nn.Conv2d(WIDE, CHANNELS, 1)
        self.lateral_8 = nn.Conv2d(at_8, CHANNELS, 1)

    def forward(self, image: Tensor) -> Pyramid:  # type: ignore[override]
        """Normalised images (B, 3, H, W), sides multiples of 32, to maps of 128, 64 and 24 channels."""
        f4, f8, f16, f32 = super().forward(image)
        wide = self.lateral_16(f16) + _doubled(self.top(f32))
        return Pyramid(wide, self.lateral_8(f8) + _doubled(self.down(wide)), f4)


class TinyValueEncoder(nn.Module):
    """Values of objects from their masks, which meet the image's features on the way down to stride 8.

    What all objects share is convolved once. Cost at 480x864: 1.8 GMAC per object and 0.6 for the image.
    """

    def __init__(self, at_4: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 32, 7, stride=4, padding=3)
        self.down_8 = nn.Conv2d(at_4 + 32, CHANNELS, 3, stride=2, padding=1)
        self.fuser = FeatureFusion(2 * CHANNELS, CHANNELS)

    def forward(self, masks: Tensor, features: Features) -> Tensor:
        """Values (B, O, 64, 2h, 2w) of masks (B, O, H, W) on images with these features."""
        pairs = torch.stack((masks, other_masks(masks)), 2)  # [B, O, 2, H, W]

        def encode(objects: slice) -> Tensor:
            x = F.relu(self.stem(pairs[:, objects].flatten(0, 1)))
            x = convolve_parts(self.down_8, (features.f4, x))
            return self.fuser(x, features.f8).unflatten(0, (len(masks), -1))

        return map_objects(encode, masks.shape[1], 2 * masks[:, 0].numel(), dim=1)


class TinyDecoder(nn.Module):
    """Logits at stride 4: what an object reads at stride 8, seen once more at stride 16, with skips.

    Cost at 480x864: 1.2 GMAC for the image and 2.6 per object.
    """

    def __init__(self, at_4: int) -> None:
        super().__init__()
        self.compress = ResBlock(2 * CHANNELS, CHANNELS)
        self.context = ResBlock(CHANNELS + WIDE, CHANNELS)
        self.up_8_4 = UpsampleBlock(at_4, CHANNELS, 32)
        self.pred = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, read: Tensor, features: Features) -> Tensor:
        """(B, O, 4h, 4w) from read (B, O, 64, 2h, 2w), h = H/16, w = W/16."""
        skip4 = self.up_8_4.skip_conv(features.f4)

        def decode(objects: slice) -> Tensor:
            x = self.compress(read[:, objects].flatten(0, 1), features.thin)
            x = x + _doubled(self.context(F.avg_pool2d(x, 2), features.f16))
            return self.pred(F.relu(self.up_8_4.merge(skip4, x)))[:, 0].unflatten(0, (len(read), -1))

        return map_objects(decode, read.shape[1], skip4.numel(), dim=1)


class STCNTiny(STCN):
    """STCN's matching, memory and session around small networks: 2.7 million parameters.

    Keys and values have 64 channels, both at stride 8: thin parts and small objects have positions of their
    own there, which the smaller networks pay for.

    Note:
        Cost of a frame at 480x864: see the three networks; scores of T memory frames 2.7 T GMAC.

    Source: Cheng, Tai, Tang: STCN, NeurIPS 2021, with Sandler et al.: MobileNetV2, CVPR 2018.
    """

    stride = 32

    def _build(self) -> None:
        self.key_encoder = TinyKeyEncoder()
        self.value_encoder = TinyValueEncoder(self.key_encoder.channels[0])
        self.key_proj = nn.Conv2d(CHANNELS, KEY_CHANNELS, 3, padding=1)
        self.key_comp = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.decoder = TinyDecoder(self.key_encoder.channels[0])

    def encode(self, image: Tensor) -> Features:
        """Features of prepared images (B, 3, H, W): key and thin at stride 8."""
        f16, f8, f4 = self.key_encoder(image)
        return Features(self.key_proj(f8), self.key_comp(f8), f16, f8, f4)

    def encode_value(self, image: Tensor, masks: Tensor, features: Features) -> Tensor:
        """Memory values (B, O, 64, 2h, 2w) of masks (B, O, H, W) of the image's objects."""
        return self.value_encoder(masks, features)

    def open_session(self, settings: SessionSettings) -> STCNSession:
        """A memory with top-k 20, of every fifth frame and the previous one, 16 in all, spread evenly."""
        previous = True if settings.include_previous is None else settings.include_previous
        policy = settings.policy or Balanced(MEMORY_FRAMES)
        return STCNSession(self, replace(settings, include_previous=previous, policy=policy))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
