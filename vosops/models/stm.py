# SPDX-License-Identifier: Apache-2.0
"""STM: Video Object Segmentation using Space-Time Memory Networks (Oh, Lee, Xu, Kim, ICCV 2019)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.ops.aggregate import soft_aggregate
from vosops.ops.memory_read import memory_read
from vosops.ops.priors import KernelPrior

from .blocks import ResBlock, freeze_batch_norm, other_masks, per_object
from .encoders import IMAGENET_MEAN, IMAGENET_STD, Pyramid, ResNetTrunk
from .session import Session, SessionSettings, VideoModel, check_clip

_SLOTS = 11
_EMPTY_SLOT = math.log(1e-7 / (1 - 1e-7))
_STAGES = ("res2", "res3", "res4")


class QueryFeatures(NamedTuple):
    """A frame as the decoder takes it; nothing here depends on the objects.

    image: (B, 3, H, W) in [0, 1].
    key: (B, 128, H/16, W/16); value: (B, 512, H/16, W/16).
    skip8: (B, 256, H/8, W/8); skip4: (B, 256, H/4, W/4): the decoder's skip connections.
    """

    image: Tensor
    key: Tensor
    value: Tensor
    skip8: Tensor
    skip4: Tensor


class QueryEncoder(ResNetTrunk):
    """ResNet-50 to stride 16, for images (B, 3, H, W) in [0, 1]; `mean` and `std` are in the checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__(50, stages=_STAGES)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Pyramid:
        """Image (B, 3, H, W) to its Pyramid."""
        return self.from_stem(self.conv1((image - self.mean) / self.std))


class MemoryEncoder(QueryEncoder):
    """ResNet-50 whose first convolution also sees the object's mask and the masks of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1_m = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        self.conv1_o = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)

    def forward(self, image: Tensor, mask: Tensor, others: Tensor) -> Pyramid:  # type: ignore[override]
        """Image (B, 3, H, W), mask and others (B*O, 1, H, W) in [0, 1] to a Pyramid of B*O rows."""
        stem = self.conv1((image - self.mean) / self.std)
        return self.from_stem(per_object(stem, mask.shape[0]) + self.conv1_m(mask) + self.conv1_o(others))


class KeyValue(nn.Module):
    """Stride-16 features (rows, 1024, h, w) to keys (rows, 128, h, w) and values (rows, 512, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.Key = nn.Conv2d(1024, 128, 3, padding=1)
        self.Value = nn.Conv2d(1024, 512, 3, padding=1)

    def forward(self, f16: Tensor) -> tuple[Tensor, Tensor]:
        return self.Key(f16), self.Value(f16)


class RefinementModule(nn.Module):
    """Doubles the resolution of (rows, 256, h, w) with a skip connection that all objects share."""

    def __init__(self, skip_channels: int) -> None:
        super().__init__()
        self.convFS = nn.Conv2d(skip_channels, 256, 3, padding=1)
        self.ResFS = ResBlock(256)
        self.ResMM = ResBlock(256)

    def skip(self, features: Tensor) -> Tensor:
        """(B, skip_channels, 2h, 2w) to (B, 256, 2h, 2w)."""
        return self.ResFS(self.convFS(features))

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        grown = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)
        return self.ResMM(per_object(skip, up.shape[0]) + grown)


class Decoder(nn.Module):
    """What was read, joined with the query's value (rows, 1024, h, w), to two logits at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.convFM = nn.Conv2d(1024, 256, 3, padding=1)
        self.ResMM = ResBlock(256)
        self.RF3 = RefinementModule(512)
        self.RF2 = RefinementModule(256)
        self.pred2 = nn.Conv2d(256, 2, 3, padding=1)

    def forward(self, joined: Tensor, skip8: Tensor, skip4: Tensor) -> Tensor:
        """(rows, 2, 4h, 4w); channel 1 is the object."""
        x = self.ResMM(self.convFM(joined))
        x = self.RF2(skip4, self.RF3(skip8, x))
        return self.pred2(F.relu(x))


class STM(VideoModel):
    """Space-time memory network: query and memory keys of 128 channels, dense dot-product read.

    The mask enters the memory encoder, so keys belong to one object and are not shared. A session
    remembers a frame every 5 and the previous one.

    Args:
        encoders: memory encoder (image, mask, others) and query encoder (image), each to a Pyramid with
            1024, 512 and 256 channels; the published ResNet-50s by default.

    Note:
        Parameter names are those of the published checkpoint. Where the published decoder convolves the
        skip connections once per object, they are convolved once per frame here (61 of its 105 GMAC at
        480p); the results are equal up to rounding. Batch normalisation is frozen.
    """

    kernel: KernelPrior | None = None
    """Prior of the reads of a session; training reads without (KMN sets it)."""

    def __init__(self, encoders: tuple[nn.Module, nn.Module] | None = None) -> None:
        super().__init__()
        self.Encoder_M, self.Encoder_Q = encoders or (MemoryEncoder(), QueryEncoder())
        self.KV_M_r4 = KeyValue()
        self.KV_Q_r4 = KeyValue()
        self.Decoder = Decoder()
        freeze_batch_norm(self)

    def encode_memory(self, image: Tensor, masks: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B*O, 128, h, w) and values (B*O, 512, h, w) of a frame with its objects.

        Args:
            image: (B, 3, H, W) in [0, 1], H and W multiples of 16.
            masks: (B, O, H, W) probabilities.
            others: (B, O, H, W) for every object the masks of all others (`clamped_others`).
        """
        return self.KV_M_r4(
            self.Encoder_M(image, masks.flatten(0, 1)[:, None], others.flatten(0, 1)[:, None]).f16
        )

    def encode_query(self, image: Tensor) -> QueryFeatures:
        """Everything of a frame (B, 3, H, W) that its objects share."""
        f16, f8, f4 = self.Encoder_Q(image)
        key, value = self.KV_Q_r4(f16)
        return QueryFeatures(image, key, value, self.Decoder.RF3.skip(f8), self.Decoder.RF2.skip(f4))

    def join(self, features: QueryFeatures, read: Tensor) -> Tensor:
        """Read values (rows, 512, h, w) with the query's own: (rows, 1024, h, w)."""
        return torch.cat((read, per_object(features.value, read.shape[0])), 1)

    def coarse_logit(self, features: QueryFeatures, joined: Tensor) -> Tensor:
        """Logit of every object (rows, 1, H, W): softmax of the two of the decoder is its sigmoid."""
        background, foreground = self.Decoder(joined, features.skip8, features.skip4).split(1, 1)
        logit = foreground - background
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return F.interpolate(logit, scale_factor=4, mode="bilinear", align_corners=False)

    def decode(self, features: QueryFeatures, read: Tensor) -> Tensor:
        """Object logits (rows, 1, H, W) from the values read (rows, 512, h, w), rows = B*O."""
        return self.coarse_logit(features, self.join(features, read))

    def forward(self, frames: Tensor, first_mask: Tensor) -> Tensor:
        """Segments a clip for training: every frame reads all frames before it, with predicted masks.

        Args:
            frames: (B, T, 3, H, W) in [0, 1], RGB; T at least 2.
            first_mask: (B, O, H, W) of the first frame, one-hot or soft.

        Returns:
            Logits (B, T-1, 1+O, H, W) of frames 1 to T-1, background first (softmax over dimension 2).

        Raises:
            TypeError, ValueError: shapes or dtypes other than these.

        Note:
            Gradients flow through predicted masks into later memories. The reads are dense and without a
            prior, as in the paper (KMN trains so too).
        """
        check_clip(frames, first_mask)
        size = (frames.shape[-2], frames.shape[-1])
        batch, objects = first_mask.shape[:2]
        pad = self.padding(*size)
        images = F.pad(frames, pad).unbind(1)
        masks, keys, values, results = first_mask, [], [], []
        for image, following in pairwise(images):
            padded = F.pad(masks, pad)
            key, value = self.encode_memory(image, padded, clamped_others(padded))
            keys.append(key)
            values.append(value)
            features = self.encode_query(following)
            read = memory_read(
                per_object(features.key, batch * objects),
                torch.stack(keys, 2),
                torch.stack(values, 2)[:, None],
            )
            assert isinstance(read, Tensor)
            probabilities = (
                self.decode(features, read[:, 0]).sigmoid().unflatten(0, (batch, objects))[:, :, 0]
            )
            logits = soft_aggregate(self.restore(probabilities, size))
            results.append(logits)
            masks = merge_slots(logits)[:, 1:]
        return torch.stack(results, 1)

    def prepare(self, frame: Tensor) -> Tensor:
        """A frame (1, 3, h, w) in [0, 1] zero-padded to multiples of 16, with a fourth channel: (1, 4, H, W).

        The fourth channel is 1 on the frame and 0 on the padding: STM crops every mask to the frame before
        it is remembered, so a session needs to know where the frame ends.
        """
        return super().prepare(torch.cat((frame, torch.ones_like(frame[:, :1])), 1))

    def open_session(self, settings: SessionSettings) -> Session[QueryFeatures]:
        """A new, empty memory for one video (`STMSession`).

        Raises:
            TypeError, ValueError: a setting out of its range.
        """
        from .stm_session import STMSession

        return STMSession(self, settings)


def clamped_others(masks: Tensor) -> Tensor:
    """For every object the masks of all others, at most 1: (B, O, H, W) to the same."""
    return other_masks(masks).clamp(0, 1)


def merge_slots(logits: Tensor) -> Tensor:
    """Probabilities (B, 1+O, ...) from aggregated logits (B, 1+O, ...).

    The published code has slots for the background and ten objects, and those without an object take
    part in the softmax with the clamp's lowest logit, about -16.1. With more than ten objects there is none.
    """
    count = logits.shape[1]
    empty = logits.new_full((logits.shape[0], max(0, _SLOTS - count), *logits.shape[2:]), _EMPTY_SLOT)
    return torch.cat((logits, empty), 1).softmax(1)[:, :count]
