# SPDX-License-Identifier: Apache-2.0
"""STCN: keys from the image alone, shared by all objects; L2 similarity; a light value encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.memory import EveryNth, MemoryBank, SharedPolicy
from vosops.ops.aggregate import soft_aggregate
from vosops.ops.memory_read import memory_read

from .blocks import (
    FeatureFusion,
    ResBlock,
    UpsampleBlock,
    convolve_parts,
    freeze_batch_norm,
    map_objects,
    other_masks,
)
from .encoders import ResNetTrunk, normalize_imagenet
from .session import Session, SessionSettings, VideoModel, check_clip

KEY_CHANNELS, VALUE_CHANNELS = 64, 512
TOP_K, MEMORY_EVERY = 20, 5


class Features(NamedTuple):
    """What STCN keeps of an image (B, 3, H, W), h = H/16, w = W/16.

    key: (B, 64, h, w), query and memory key in one.
    thin: (B, 512, h, w), beside the read in the decoder.
    f16, f8, f4: of the key encoder, (B, 1024, h, w), (B, 512, 2h, 2w), (B, 256, 4h, 4w).
    """

    key: Tensor
    thin: Tensor
    f16: Tensor
    f8: Tensor
    f4: Tensor


class ValueEncoder(ResNetTrunk):
    """ResNet-18 of image, mask and the other objects' masks, fused with the image's features at stride 16."""

    def __init__(self) -> None:
        super().__init__(18, stages=("layer1", "layer2", "layer3"), in_channels=5, conv_bias=True)
        self.fuser = FeatureFusion(256 + 1024, VALUE_CHANNELS)

    def forward(self, image: Tensor, masks: Tensor, f16: Tensor) -> Tensor:  # type: ignore[override]
        """Values (B, O, 512, h, w) of images (B, 3, H, W) with masks (B, O, H, W), f16 (B, 1024, h, w)."""
        pairs = torch.stack((masks, other_masks(masks)), 2)  # [B, O, 2, H, W]

        def encode(objects: slice) -> Tensor:
            stem = convolve_parts(self.conv1, (image, pairs[:, objects].flatten(0, 1)))
            return self.fuser(self.from_stem(stem).f16, f16).unflatten(0, (len(image), -1))

        return map_objects(encode, masks.shape[1], 16 * image[:, 0].numel(), dim=1)


class KeyProjection(nn.Module):
    """Key (B, 64, h, w) of the features at stride 16.

    Args:
        in_channels: of the features.
    """

    def __init__(self, in_channels: int = 1024) -> None:
        super().__init__()
        self.key_proj = nn.Conv2d(in_channels, KEY_CHANNELS, 3, padding=1)

    def forward(self, f16: Tensor) -> Tensor:
        return self.key_proj(f16)


class Decoder(nn.Module):
    """Logits at stride 4 from what each object reads and the image's features.

    Args:
        in_channels: of value and `Features.thin` together.
        skips: channels of f8 and f4.
        widths: channels at strides 16, 8 and 4.
    """

    def __init__(
        self,
        in_channels: int = VALUE_CHANNELS + 512,
        skips: tuple[int, int] = (512, 256),
        widths: tuple[int, int, int] = (512, 256, 256),
    ) -> None:
        super().__init__()
        at_16, at_8, at_4 = widths
        self.compress = ResBlock(in_channels, at_16)
        self.up_16_8 = UpsampleBlock(skips[0], at_16, at_8)
        self.up_8_4 = UpsampleBlock(skips[1], at_8, at_4)
        self.pred = nn.Conv2d(at_4, 1, 3, padding=1)

    def forward(self, read: Tensor, features: Features) -> Tensor:
        """(B, O, 4h, 4w) from read (B, O, 512, h, w)."""
        # The image's half of the work is done once for all objects, however many chunks they take.
        skip8, skip4 = self.up_16_8.skip_conv(features.f8), self.up_8_4.skip_conv(features.f4)

        def decode(objects: slice) -> Tensor:
            x = self.compress(read[:, objects].flatten(0, 1), features.thin)
            x = self.up_8_4.merge(skip4, self.up_16_8.merge(skip8, x))
            return self.pred(F.relu(x))[:, 0].unflatten(0, (len(read), -1))

        return map_objects(decode, read.shape[1], skip4.numel(), dim=1)


class STCN(VideoModel):
    """Space-Time Correspondence Network. Reads checkpoints of the published code (`vosops.models.load`).

    The parts (encode, encode_value, decode) serve training and inference alike; the memory between them is
    the loop of `forward`, or a session.

    Note:
        Cost of a frame at 480x864: key encoder 36 GMAC; scores of T memory frames 0.17 T; decoder 38 and 61
        per object; every fifth frame a value, 16 and 27 per object.

    Source: Cheng, Tai, Tang: Rethinking Space-Time Networks with Improved Memory Coverage for Efficient
    Video Object Segmentation, NeurIPS 2021.
    """

    def __init__(self) -> None:
        super().__init__()
        self._build()
        freeze_batch_norm(self)

    def _build(self) -> None:
        """Makes the networks."""
        self.key_encoder: nn.Module = ResNetTrunk()
        self.value_encoder: nn.Module = ValueEncoder()
        self.key_proj: nn.Module = KeyProjection()
        self.key_comp = nn.Conv2d(1024, 512, 3, padding=1)
        self.decoder: nn.Module = Decoder()

    def prepare(self, frame: Tensor) -> Tensor:
        """Normalised, then zero-padded."""
        return super().prepare(normalize_imagenet(frame))

    def encode(self, image: Tensor) -> Features:
        """Features of prepared images (B, 3, H, W)."""
        f16, f8, f4 = self.key_encoder(image)
        return Features(self.key_proj(f16), self.key_comp(f16), f16, f8, f4)

    def encode_value(self, image: Tensor, masks: Tensor, features: Features) -> Tensor:
        """Memory values (B, O, 512, h, w) of prepared images with masks (B, O, H, W) of their objects."""
        return self.value_encoder(image, masks, features.f16)

    def decode(self, read: Tensor, features: Features, present: Tensor | None = None) -> Tensor:
        """Logits (B, 1+O, H, W), background first, from what O objects read (B, O, 512, h, w).

        Args:
            read, features: of the frame.
            present: (B, O) bool; the others have probability 0. None: all objects of all clips are there.
        """
        logits = F.interpolate(
            self.decoder(read, features).float(), scale_factor=4, mode="bilinear", align_corners=False
        )
        probabilities = torch.sigmoid(logits)
        if present is not None:
            probabilities = probabilities * present[..., None, None]
        return soft_aggregate(probabilities)

    def forward(self, frames: Tensor, first_mask: Tensor) -> Tensor:
        """Training: see `VideoModel.forward`; every frame is remembered with its predicted masks.

        Clips of a batch may differ in their objects: one with an empty first mask is not there.
        """
        check_clip(frames, first_mask, self.stride)
        present = first_mask.flatten(2).any(2)
        batch, time = frames.shape[:2]
        images = normalize_imagenet(frames)
        encoded = self.encode(images.flatten(0, 1))
        features = [Features(*(x.unflatten(0, (batch, time))[:, t] for x in encoded)) for t in range(time)]
        masks, values, results = first_mask, [], []
        for t in range(1, time):
            values.append(self.encode_value(images[:, t - 1], masks, features[t - 1]))
            key = torch.stack([past.key for past in features[:t]], 2)  # [B, 64, t, h, w]
            read = memory_read(features[t].key, key, torch.stack(values, 3), similarity="l2")
            assert isinstance(read, Tensor)
            results.append(self.decode(read, features[t], present))
            masks = results[-1].softmax(1)[:, 1:]
        return torch.stack(results, 1)

    def open_session(self, settings: SessionSettings) -> STCNSession:
        """A memory as published: top-k 20, every fifth frame and given masks, without limit."""
        return STCNSession(self, settings)


class STCNSession(Session[Features]):
    """STCN's memory of one video: one bank, whose objects share keys and are read together.

    Args:
        model: whose network encodes and decodes.
        settings: a `policy` decides over the frames remembered for good, all of which stay by default; with
            include_previous the previous frame takes one slot.
    """

    def __init__(self, model: STCN, settings: SessionSettings) -> None:
        self._model = model
        self._every = settings.memory_every or MEMORY_EVERY
        self._previous = bool(settings.include_previous)
        top_k = TOP_K if settings.top_k is None else settings.top_k
        self._top_k = top_k or None
        self._policy = SharedPolicy(settings.policy or EveryNth(1))
        self._bank = MemoryBank(self._policy)
        self._last = 0  # the frame last remembered for good
        self._temporary: int | None = None

    @property
    def object_ids(self) -> list[int]:
        return self._bank.object_ids

    @property
    def memory_nbytes(self) -> int:
        return self._bank.nbytes

    def encode(self, image: Tensor) -> Features:
        return self._model.encode(image)

    def segment(self, features: Features) -> Tensor:
        return self._model.decode(self.read(features), features).softmax(1)

    def read(self, features: Features) -> Tensor:
        """What every object reads from the memory: (1, O, 512, h, w)."""
        read = self._bank.read(features.key, similarity="l2", top_k=self._top_k)
        assert isinstance(read, Tensor)
        return read

    def remember(
        self,
        index: int,
        image: Tensor,
        features: Features,
        probabilities: Tensor,
        object_ids: Sequence[int],
        *,
        given: bool,
    ) -> None:
        stays = given or index - self._last >= self._every
        if stays or self._previous:
            value = self._model.encode_value(image, probabilities[:, 1:], features)
            self._bank.policy = replace(self._policy, temporary=self._temporary)
            try:
                self._bank.append(index, features.key, value, object_ids)
            finally:  # a budget too small for new objects refuses the frame, not the states from here on
                self._bank.policy = self._policy
            self._temporary = None if stays else index
            self._last = index if stays else self._last

    def remove(self, object_ids: Sequence[int]) -> None:
        self._bank.remove(object_ids)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._bank.state_dict(), "last": self._last, "temporary": self._temporary}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        last, temporary = int(state["last"]), state["temporary"]
        self._bank.load_state_dict(state["memory"])
        self._last, self._temporary = last, temporary
