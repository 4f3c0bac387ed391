# SPDX-License-Identifier: Apache-2.0
"""XMem: STCN's shared keys with shrinkage and selection, and a sensory memory that every frame updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.ops.aggregate import soft_aggregate
from vosops.ops.memory_read import memory_read

from .blocks import (
    FeatureFusion,
    UpsampleBlock,
    convolve_parts,
    freeze_batch_norm,
    object_chunks,
    other_masks,
)
from .encoders import ResNetTrunk, normalize_imagenet
from .session import SessionSettings, VideoModel, check_clip
from .xmem_memory import XMemSession

KEY_DIM, VALUE_DIM, HIDDEN_DIM = 64, 512, 64
_DEEP_UPDATES = 0.2  # of the frames in training (the published training configuration)


class Features(NamedTuple):
    """What XMem keeps of images (B, 3, H, W), h = H/16, w = W/16.

    key: (B, Ck, h, w), query and memory key in one.
    shrinkage: (B, 1, h, w) >= 1, of the key in the memory.
    selection: (B, Ck, h, w) in [0, 1], of the key as a query.
    f16, f8, f4: of the key encoder, (B, 1024, h, w), (B, 512, 2h, 2w), (B, 256, 4h, 4w).
    """

    key: Tensor
    shrinkage: Tensor
    selection: Tensor
    f16: Tensor
    f8: Tensor
    f4: Tensor


class KeyProjection(nn.Module):
    """Key, shrinkage and selection of the features at stride 16."""

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.key_proj = nn.Conv2d(1024, key_dim, 3, padding=1)
        self.d_proj = nn.Conv2d(1024, 1, 3, padding=1)
        self.e_proj = nn.Conv2d(1024, key_dim, 3, padding=1)

    def forward(self, f16: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f16 (B, 1024, h, w) to key (B, Ck, h, w), shrinkage (B, 1, h, w), selection (B, Ck, h, w)."""
        return self.key_proj(f16), self.d_proj(f16).square() + 1, torch.sigmoid(self.e_proj(f16))


class SensoryGate(nn.Module):
    """How the sensory memory takes something new: a gated recurrent unit that forgets after its update.

    h' = f h (1 - u) + u n, with f, u = sigmoid and n = tanh of a convolution of the input beside h.
    """

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.transform = nn.Conv2d(input_dim + hidden_dim, 3 * hidden_dim, 3, padding=1)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x (rows, C, h, w) and hidden (rows, Ch, h, w) to the new hidden."""
        forget, update, new = self.transform(torch.cat((x, hidden), 1)).chunk(3, 1)
        update = torch.sigmoid(update)
        return torch.sigmoid(forget) * hidden * (1 - update) + update * torch.tanh(new)


class HiddenUpdate(SensoryGate):
    """Update of the sensory memory on every frame, from the decoder's features at strides 16, 8 and 4."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__(256, hidden_dim)
        self.g16_conv = nn.Conv2d(512, 256, 1)
        self.g8_conv = nn.Conv2d(256, 256, 1)
        self.g4_conv = nn.Conv2d(256 + 1, 256, 1)

    def from_decoder(self, x16: Tensor, x8: Tensor, x4: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
        """x16 (rows, 512, h, w), x8 (rows, 256, 2h, 2w), x4 (rows, 256, 4h, 4w), logits (rows, 1, 4h, 4w) and
        hidden (rows, Ch, h, w) to the new hidden."""
        fine = (F.avg_pool2d(x4, 4), F.avg_pool2d(logits, 4))
        x = self.g16_conv(x16) + self.g8_conv(F.avg_pool2d(x8, 2)) + convolve_parts(self.g4_conv, fine)
        return self(x, hidden)


class ValueEncoder(ResNetTrunk):
    """ResNet-18 of image, mask and the other objects' masks, fused with the image's features at stride 16.

    hidden_reinforce is the deep update: it brings the sensory memory in line with the value.
    """

    def __init__(self, value_dim: int, hidden_dim: int) -> None:
        super().__init__(18, stages=("layer1", "layer2", "layer3"), in_channels=5)
        self.fuser = FeatureFusion(1024 + 256, value_dim)
        self.hidden_reinforce = SensoryGate(value_dim, hidden_dim) if hidden_dim else None

    def forward(  # type: ignore[override]
        self, image: Tensor, masks: Tensor, f16: Tensor, hidden: Tensor | None, deep_update: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Values (B, O, Cv, h, w), and the sensory memory (B, O, Ch, h, w), updated if deep_update."""
        batch, objects = masks.shape[:2]
        pairs = torch.stack((masks, other_masks(masks)), 2)  # [B, O, 2, H, W]
        values, updated = [], []
        for chunk in object_chunks(objects, 16 * image[:, 0].numel()):
            stem = convolve_parts(self.conv1, (image, pairs[:, chunk].flatten(0, 1)))
            value = self.fuser(f16, self.from_stem(stem).f16)
            values.append(value.unflatten(0, (batch, -1)))
            if deep_update and self.hidden_reinforce is not None and hidden is not None:
                new = self.hidden_reinforce(value, hidden[:, chunk].flatten(0, 1))
                updated.append(new.unflatten(0, (batch, -1)))
        return torch.cat(values, 1), torch.cat(updated, 1) if updated else hidden


class Decoder(nn.Module):
    """Logits at stride 4 from what each object reads, its sensory memory and the image's features."""

    def __init__(self, value_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fuser = FeatureFusion(1024 + value_dim + hidden_dim, 512)
        self.hidden_update = HiddenUpdate(hidden_dim) if hidden_dim else None
        self.up_16_8 = UpsampleBlock(512, 512, 256)
        self.up_8_4 = UpsampleBlock(256, 256, 256)
        self.pred = nn.Conv2d(256, 1, 3, padding=1)

    def forward(
        self, read: Tensor, features: Features, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, O, 4h, 4w) of reads (B, O, Cv, h, w); the updated sensory memory (B, O, Ch, h, w)."""
        batch, objects = read.shape[:2]
        known = read if hidden is None else torch.cat((read, hidden), 2)
        # The image's half of the work is done once for all objects, however many chunks they take.
        skip8, skip4 = self.up_16_8.skip_conv(features.f8), self.up_8_4.skip_conv(features.f4)
        results, updated = [], []
        # Two maps of the size of skip4 per object live at a time, so chunks count it twice.
        for chunk in object_chunks(objects, 2 * skip4.numel()):
            x16 = self.fuser(features.f16, known[:, chunk].flatten(0, 1))
            x8 = self.up_16_8.merge(skip8, x16)
            x4 = self.up_8_4.merge(skip4, x8)
            logits = self.pred(F.relu(x4))
            results.append(logits[:, 0].unflatten(0, (batch, -1)))
            if self.hidden_update is not None and hidden is not None:
                old = hidden[:, chunk].flatten(0, 1)
                new = self.hidden_update.from_decoder(x16, x8, x4, logits, old)
                updated.append(new.unflatten(0, (batch, -1)))
        return torch.cat(results, 1), torch.cat(updated, 1) if updated else None


class XMem(VideoModel):
    """XMem, with or without sensory memory. Reads checkpoints of the published code (`vosops.models.load`).

    The parts (encode, encode_value, decode) serve training and inference alike; the memory between them is
    the loop of `forward`, or a session.

    Args:
        key_dim: Ck, channels of key and selection.
        value_dim: Cv, channels of a value.
        hidden_dim: Ch, channels of the sensory memory; 0 for none.

    Raises:
        ValueError: a dimension out of range.

    Note:
        Cost of a frame at 480x864: key encoder 29 GMAC; decoder 46 GMAC and 71 per object; values, every
        fifth frame, 16 GMAC and 28 per object; matching 0.2 MMAC per memory position (5 GMAC at the cap,
        24,580), whatever the objects of a group.

    Source: Cheng and Schwing: XMem: Long-Term Video Object Segmentation with an Atkinson-Shiffrin Memory
    Model, ECCV 2022.
    """

    def __init__(
        self, key_dim: int = KEY_DIM, value_dim: int = VALUE_DIM, hidden_dim: int = HIDDEN_DIM
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("key_dim", key_dim, 1),
            ("value_dim", value_dim, 16),  # CBAM divides by 16
            ("hidden_dim", hidden_dim, 0),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.hidden_dim = hidden_dim
        self.key_encoder = ResNetTrunk()
        self.value_encoder = ValueEncoder(value_dim, hidden_dim)
        self.key_proj = KeyProjection(key_dim)
        self.decoder = Decoder(value_dim, hidden_dim)
        freeze_batch_norm(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> XMem:
        """A new model with the dimensions of `state`, whose weights `vosops.models.load` loads then.

        Without weights for a sensory memory it has none. Key and value dimensions that `state` does not
        tell are the published ones, so that loading it names all that is missing.
        """

        def width(name: str, default: int) -> int:
            return state[name].shape[0] if name in state and state[name].dim() == 4 else default

        return cls(
            width("key_proj.key_proj.weight", KEY_DIM),
            width("value_encoder.fuser.block2.conv2.weight", VALUE_DIM),
            width("decoder.hidden_update.transform.weight", 0) // 3,
        )

    def prepare(self, frame: Tensor) -> Tensor:
        """Normalised, then zero-padded."""
        return super().prepare(normalize_imagenet(frame))

    def encode(self, image: Tensor) -> Features:
        """Features of prepared images (B, 3, H, W)."""
        f16, f8, f4 = self.key_encoder(image)
        key, shrinkage, selection = self.key_proj(f16)
        return Features(key, shrinkage, selection, f16, f8, f4)

    def new_hidden(self, features: Features, objects: int) -> Tensor | None:
        """Sensory memory (B, O, Ch, h, w) of new objects: zeros; None without sensory memory."""
        batch, _, height, width = features.f16.shape
        if not self.hidden_dim:
            return None
        return features.f16.new_zeros(batch, objects, self.hidden_dim, height, width, dtype=torch.float32)

    def encode_value(
        self, image: Tensor, masks: Tensor, features: Features, hidden: Tensor | None, *, deep_update: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Memory values (B, O, Cv, h, w) of prepared images with masks (B, O, H, W), and the sensory memory.

        Args:
            hidden: (B, O, Ch, h, w) or None.
            deep_update: let the values update it.
        """
        return self.value_encoder(image, masks, features.f16, hidden, deep_update)

    def decode(self, read: Tensor, features: Features, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, 1+O, H, W), background first, of O objects' reads (B, O, Cv, h, w), and their sensory
        memory (B, O, Ch, h, w) after this frame."""
        logits, hidden = self.decoder(read, features, hidden)
        logits = F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)
        return soft_aggregate(torch.sigmoid(logits)), hidden

    def forward(self, frames: Tensor, first_mask: Tensor) -> Tensor:
        """Training: see `VideoModel.forward`; every frame is remembered with its predicted masks.

        The first frame has a deep update; of the others a fifth, drawn with torch's generator, in training
        mode, and none in evaluation mode.
        """
        check_clip(frames, first_mask, self.stride)
        batch, time = frames.shape[:2]
        images = normalize_imagenet(frames)
        encoded = self.encode(images.flatten(0, 1))
        features = [Features(*(x.unflatten(0, (batch, time))[:, t] for x in encoded)) for t in range(time)]
        masks, values, results = first_mask, [], []
        hidden = self.new_hidden(features[0], first_mask.shape[1])
        for t in range(1, time):
            deep = t == 1 or (self.training and bool(torch.rand(()) < _DEEP_UPDATES))
            value, hidden = self.encode_value(
                images[:, t - 1], masks, features[t - 1], hidden, deep_update=deep
            )
            values.append(value)
            read = memory_read(
                features[t].key,
                torch.stack([past.key for past in features[:t]], 2),  # [B, Ck, t, h, w]
                torch.stack(values, 3),
                similarity="l2",
                shrinkage=torch.stack([past.shrinkage for past in features[:t]], 2),
                selection=features[t].selection,
            )
            assert isinstance(read, Tensor)
            logits, hidden = self.decode(read, features[t], hidden)
            results.append(logits)
            masks = logits.softmax(1)[:, 1:]
        return torch.stack(results, 1)

    def open_session(self, settings: SessionSettings) -> XMemSession:
        """As published: top-k 30, every fifth frame and given masks, working and long-term memory."""
        return XMemSession(self, settings)
