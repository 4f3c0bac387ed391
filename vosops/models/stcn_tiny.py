# SPDX-License-Identifier: Apache-2.0
"""STCN small enough to train and run on a CPU: a MobileNetV2, and values from its features and the masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .aot_encoders import MobileNetV2Encoder
from .blocks import FeatureFusion, convolve_parts, map_objects, other_masks
from .encoders import Pyramid
from .stcn import STCN, Decoder, Features, KeyProjection

CHANNELS = 128
"""Of values and of all features at stride 16."""


class TinyKeyEncoder(MobileNetV2Encoder):
    """MobileNetV2 up to its 320 channels at stride 32, which are brought to stride 16 and added there.

    Parameters features.N, as torchvision names them, lateral and top. Cost: 2.1 GMAC at 480x864; dilated
    at stride 16, as AOT has them, the last stages alone would cost 2.0.

    Source: Sandler et al., MobileNetV2, CVPR 2018; Lin et al., Feature Pyramid Networks, CVPR 2017.
    """

    def __init__(self) -> None:
        super().__init__(320, dilated=False)
        self.lateral = nn.Conv2d(self.channels[2], CHANNELS, 1)
        self.top = nn.Conv2d(self.channels[3], CHANNELS, 1)

    def forward(self, image: Tensor) -> Pyramid:  # type: ignore[override]
        """Normalised images (B, 3, H, W), sides multiples of 32, to maps of 128, 32 and 24 channels."""
        f4, f8, f16, f32 = super().forward(image)
        top = F.interpolate(self.top(f32), scale_factor=2, mode="bilinear", align_corners=False)
        return Pyramid(self.lateral(f16) + top, f8, f4)


class TinyValueEncoder(nn.Module):
    """Values of objects from their masks, which meet the image's features on the way down to stride 16.

    What all objects share is convolved once. Cost at 480x864: 1.9 GMAC per object and 0.3 for the image.
    """

    def __init__(self, skips: tuple[int, int]) -> None:
        super().__init__()
        at_8, at_4 = skips
        self.stem = nn.Conv2d(2, 32, 7, stride=4, padding=3)
        self.down_8 = nn.Conv2d(at_4 + 32, 64, 3, stride=2, padding=1)
        self.down_16 = nn.Conv2d(at_8 + 64, CHANNELS, 3, stride=2, padding=1)
        self.fuser = FeatureFusion(2 * CHANNELS, CHANNELS)

    def forward(self, masks: Tensor, features: Features) -> Tensor:
        """Values (B, O, 128, h, w) of masks (B, O, H, W) on images with these features."""
        pairs = torch.stack((masks, other_masks(masks)), 2)  # [B, O, 2, H, W]

        def encode(objects: slice) -> Tensor:
            x = F.relu(self.stem(pairs[:, objects].flatten(0, 1)))
            x = F.relu(convolve_parts(self.down_8, (features.f4, x)))
            x = convolve_parts(self.down_16, (features.f8, x))
            return self.fuser(x, features.f16).unflatten(0, (len(masks), -1))

        return map_objects(encode, masks.shape[1], 2 * masks[:, 0].numel(), dim=1)


class STCNTiny(STCN):
    """STCN's matching, memory and session around small networks: 4.3 million parameters.

    Keys have 64 channels, values 128, both at stride 16.

    Note:
        Cost of a frame at 480x864: key encoder 2.1 GMAC and keys 0.4, decoder 0.6 and 3.6 per object; every
        fifth frame a value, 0.3 and 1.9 per object.

    Source: Cheng, Tai, Tang: STCN, NeurIPS 2021, with Sandler et al.: MobileNetV2, CVPR 2018.
    """

    stride = 32

    def _build(self) -> None:
        self.key_encoder = TinyKeyEncoder()
        skips = (self.key_encoder.channels[1], self.key_encoder.channels[0])
        self.value_encoder = TinyValueEncoder(skips)
        self.key_proj = KeyProjection(CHANNELS)
        self.key_comp = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.decoder = Decoder(2 * CHANNELS, skips, (CHANNELS, 64, 32))

    def encode_value(self, image: Tensor, masks: Tensor, features: Features) -> Tensor:
        """Memory values (B, O, 128, h, w) of masks (B, O, H, W) of the image's objects."""
        return self.value_encoder(masks, features)
