# SPDX-License-Identifier: Apache-2.0
"""The networks that refine patches, as the training loop runs them and as files hold them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.models.aot_encoders import MobileNetV2Encoder
from vosops.models.encoders import normalize_imagenet
from vosops.models.refine import MaskRefiner
from vosops.models.session import check_clip

NAME = "boundary_refiner"
"""Under which configurations and files know them."""

_SURE = 2.0  # logit of a given mask: what a correction has to overcome
_STRIDE = 32  # of the coarsest maps of both networks


class PatchNetwork(nn.Module, ABC):
    """Corrects masks in patches that are certain everywhere, right or wrong.

    Masks are binary, whoever predicted them, so that one file serves all models. Their logits are 2 inside
    and -2 outside, and a network adds its correction, which is close to zero before it is trained.
    """

    @abstractmethod
    def refine(self, images: Tensor, masks: Tensor) -> Tensor:
        """Logits (B, 1, H, W) of the objects in patches.

        Args:
            images: (B, 3, H, W) in [0, 1], RGB; any size.
            masks: (B, 1, H, W), 0 or 1.
        """

    def forward(self, frames: Tensor, first_mask: Tensor) -> Tensor:
        """Refines the masks of patches as in training, where a clip is one patch several times.

        Args:
            frames: (B, T, 3, H, W) in [0, 1], RGB.
            first_mask: (B, O, H, W), 0 or 1: masks to refine.

        Returns:
            Logits (B, T-1, 1+O, H, W) for frames 1..T-1, those of the background 0.

        Raises:
            TypeError, ValueError: an argument of another shape or dtype, named.
        """
        check_clip(frames, first_mask)
        objects, time = first_mask.shape[1], frames.shape[1] - 1
        images = frames[:, 1:, None].expand(-1, -1, objects, -1, -1, -1)  # [B, T-1, O, 3, H, W]
        masks = first_mask[:, None, :, None].expand(-1, time, -1, -1, -1, -1)  # [B, T-1, O, 1, H, W]
        found = self.refine(images.flatten(0, 2), masks.flatten(0, 2))
        found = found.view(*first_mask.shape[:1], time, *first_mask.shape[1:])
        return torch.cat((torch.zeros_like(found[:, :, :1]), found), 2)


class HRNetRefiner(PatchNetwork, MaskRefiner):
    """SCM's `MaskRefiner`, its batch normalisation trained: HRNet-W18-small over image and mask.

    1.5 million parameters, 0.22 GMAC for a patch of 96 x 96. There are no ImageNet weights to start from.

    Source: Tang et al., CVPR 2021, whose refinement network this backbone is.
    """

    def refine(self, images: Tensor, masks: Tensor) -> Tensor:
        """See `PatchNetwork.refine`."""
        return MaskRefiner.forward(self, images, (2 * masks - 1) * _SURE)


class MobileNetRefiner(PatchNetwork):
    """MobileNetV2 on the image, and a decoder that joins its maps with the mask at strides 16, 8, 4 and 2.

    2.1 million parameters, 0.1 GMAC for a patch of 96 x 96. The encoder starts from ImageNet
    (`vosops.training.checkpoint.load_mobilenet`), sees no mask, and may stay frozen.

    Source: Sandler et al., MobileNetV2, CVPR 2018; Ronneberger et al., U-Net, MICCAI 2015 (the decoder).
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = MobileNetV2Encoder(320, dilated=False)
        widths, skips = (64, 64, 48, 32, 24), (96, 32, 24, 16)
        self.top = nn.Conv2d(320, widths[0], 1)
        self.up = nn.ModuleList(
            nn.Conv2d(wide + skip + 1, narrow, 3, padding=1)
            for wide, narrow, skip in zip(widths, widths[1:], skips, strict=False)
        )
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths[1:])
        self.out = nn.Conv2d(widths[-1], 1, 3, padding=1)
        nn.init.normal_(self.out.weight, std=1e-3)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def refine(self, images: Tensor, masks: Tensor) -> Tensor:
        """See `PatchNetwork.refine`."""
        height, width = images.shape[2:]
        given, pad = 2 * masks - 1, (0, -width % _STRIDE, 0, -height % _STRIDE)
        mask = F.pad(given, pad)
        blocks = self.encoder.features
        f2 = blocks[:2](F.pad(normalize_imagenet(images), pad))
        f4 = blocks[2:4](f2)
        f8 = blocks[4:7](f4)
        f16 = blocks[7:14](f8)
        x = F.relu(self.top(blocks[14:](f16)))
        for up, mix, skip, stride in zip(self.up, self.mix, (f16, f8, f4, f2), (16, 8, 4, 2), strict=True):
            x = torch.cat((_doubled(x), skip, F.avg_pool2d(mask, stride)), 1)
            x = F.relu(up(x))
            x = x + F.relu(mix(x))
        return given * _SURE + _doubled(self.out(x))[..., :height, :width].to(given.dtype)


NETWORKS: dict[str, type[PatchNetwork]] = {"mobilenet": MobileNetRefiner, "hrnet": HRNetRefiner}


def build_network(network: str = "mobilenet") -> PatchNetwork:
    """A network of `NETWORKS` with random weights.

    Raises:
        ValueError: there is no such network.
    """
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
    return NETWORKS[network]()


def recognise(names: Iterable[str]) -> str:
    """The network that a file with such entries is of; "mobilenet" unless they are HRNet's."""
    return "hrnet" if any(name.startswith("trunk.") for name in names) else "mobilenet"


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's kind and weights: what tells whether two refiners are the same.

    Note:
        Cost: about 10 ms for two million parameters.
    """
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
