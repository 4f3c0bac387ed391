# SPDX-License-Identifier: Apache-2.0
"""A frame of STCN and of XMem by the published formulas, with the weights of our networks.

Objects are concatenated with the image features they share before every convolution (STCN also repeats the
skip connections per object), the read forms the whole M x Q matrix, and the bank grows by torch.cat.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vosops.models.stcn import STCN
from vosops.models.xmem import XMem

from . import eager


class GrownMemory:
    """Channel-major keys and values that torch.cat copies whenever a frame is added.

    Args:
        key: (1, Ck, M).
        value: (1, O, Cv, M).
        shrinkage: (1, 1, M) of XMem, or None.
        top_k: positions kept per query.
    """

    def __init__(self, key: Tensor, value: Tensor, shrinkage: Tensor | None, top_k: int) -> None:
        self.key, self.value = key.contiguous(), value.contiguous()
        self.shrinkage = None if shrinkage is None else shrinkage.contiguous()
        self.top_k = top_k

    def read(self, features: Any) -> Tensor:
        """(1, O, Cv, h, w)."""
        options: dict[str, Any] = {"similarity": "l2", "top_k": self.top_k}
        if self.shrinkage is not None:
            options |= {"shrinkage": self.shrinkage, "selection": features.selection}
        return eager.memory_read(features.key, self.key, self.value, **options)

    def grown(self, value: Tensor, features: Any) -> GrownMemory:
        """With a frame more; this one stays, so that a benchmark can go on from it."""
        shrinkage = self.shrinkage
        if shrinkage is not None:
            shrinkage = torch.cat((shrinkage, features.shrinkage.flatten(2)), 2)
        key = torch.cat((self.key, features.key.flatten(2)), 2)
        return GrownMemory(key, torch.cat((self.value, value.flatten(3)), 3), shrinkage, self.top_k)


def stcn_value(model: STCN, image: Tensor, masks: Tensor, features: Any) -> Tensor:
    """(1, O, 512, h, w) of an image (1, 3, H, W) with masks (1, O, H, W)."""
    objects = masks.shape[1]
    others = masks.sum(1, keepdim=True) - masks
    x = torch.cat((image.expand(objects, -1, -1, -1), masks[0][:, None], others[0][:, None]), 1)
    trunk = model.value_encoder.from_stem(model.value_encoder.conv1(x)).f16
    shared = features.f16.expand(objects, -1, -1, -1)
    return model.value_encoder.fuser(torch.cat((trunk, shared), 1))[None]


def stcn_decode(model: STCN, read: Tensor, features: Any) -> Tensor:
    """Probabilities (1, 1+O, H, W) from what the objects read (1, O, 512, h, w)."""
    objects, decoder = read.shape[1], model.decoder
    x = decoder.compress(torch.cat((read[0], features.thin.expand(objects, -1, -1, -1)), 1))
    x = decoder.up_16_8(features.f8.expand(objects, -1, -1, -1), x)
    x = decoder.up_8_4(features.f4.expand(objects, -1, -1, -1), x)
    return probabilities(decoder.pred(F.relu(x)))


def xmem_value(
    model: XMem, image: Tensor, masks: Tensor, features: Any, hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Value (1, O, 512, h, w), and the sensory memory (1, O, 64, h, w) after its deep update."""
    objects, encoder = masks.shape[1], model.value_encoder
    others = masks.sum(1, keepdim=True) - masks
    x = torch.cat((image.expand(objects, -1, -1, -1), masks[0][:, None], others[0][:, None]), 1)
    trunk = encoder.from_stem(encoder.conv1(x)).f16
    value = encoder.fuser(torch.cat((features.f16.expand(objects, -1, -1, -1), trunk), 1))
    if encoder.hidden_reinforce is not None and hidden is not None:
        hidden = encoder.hidden_reinforce(value, hidden[0])[None]
    return value[None], hidden


def xmem_decode(model: XMem, read: Tensor, features: Any, hidden: Tensor | None) -> Tensor:
    """Probabilities (1, 1+O, H, W); the sensory memory is updated, and dropped."""
    objects, decoder = read.shape[1], model.decoder
    known = read[0] if hidden is None else torch.cat((read[0], hidden[0]), 1)
    x16 = decoder.fuser(torch.cat((features.f16.expand(objects, -1, -1, -1), known), 1))
    x8 = decoder.up_16_8(features.f8, x16)
    x4 = decoder.up_8_4(features.f4, x8)
    logits = decoder.pred(F.relu(x4))
    if decoder.hidden_update is not None and hidden is not None:
        decoder.hidden_update.from_decoder(x16, x8, x4, logits, hidden[0])
    return probabilities(logits)


def probabilities(logits: Tensor) -> Tensor:
    """Soft aggregation of logits (O, 1, h, w) at stride 4: (1, 1+O, 4h, 4w)."""
    objects = torch.sigmoid(F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False))
    both = torch.cat((torch.prod(1 - objects, 0, keepdim=True), objects)).clamp(1e-7, 1 - 1e-7)
    return torch.log(both / (1 - both)).softmax(0).transpose(0, 1)
