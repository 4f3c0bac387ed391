# SPDX-License-Identifier: Apache-2.0
"""A training step of STCN by the published formulas, with the weights of our network.

Every object is encoded and decoded by itself, joined with the image features it shares with the others, and
the read forms the whole M x Q affinity, which autograd keeps for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vosops.models.encoders import normalize_imagenet
from vosops.models.stcn import STCN

from . import eager


def forward(model: STCN, frames: Tensor, first_mask: Tensor) -> Tensor:
    """Logits (B, T-1, 1+O, H, W), as of `STCN.forward`, of clips (B, T, 3, H, W) with masks (B, O, H, W)."""
    batch, time = frames.shape[:2]
    images = normalize_imagenet(frames)
    encoded = model.encode(images.flatten(0, 1))
    key, thin, f16, f8, f4 = (x.unflatten(0, (batch, time)) for x in encoded)
    masks, values, results = first_mask, [], []
    for t in range(1, time):
        values.append(_values(model, images[:, t - 1], masks, f16[:, t - 1]))
        read = eager.memory_read(
            key[:, t], key[:, :t].transpose(1, 2), torch.stack(values, 3), similarity="l2"
        )
        objects = [_decode(model, x, thin[:, t], f8[:, t], f4[:, t]) for x in read.unbind(1)]
        results.append(_aggregate(torch.sigmoid(torch.cat(objects, 1))))
        masks = results[-1].softmax(1)[:, 1:]
    return torch.stack(results, 1)


def _values(model: STCN, image: Tensor, masks: Tensor, f16: Tensor) -> Tensor:
    """(B, O, 512, h, w), object by object."""
    encoder, values = model.value_encoder, []
    for number in range(masks.shape[1]):
        mask = masks[:, number : number + 1]
        others = masks.sum(1, keepdim=True) - mask
        x = encoder.conv1(torch.cat((image, mask, others), 1))  # type: ignore[operator]
        values.append(encoder.fuser(torch.cat((encoder.from_stem(x).f16, f16), 1)))  # type: ignore[operator]
    return torch.stack(values, 1)


def _decode(model: STCN, read: Tensor, thin: Tensor, f8: Tensor, f4: Tensor) -> Tensor:
    """Logits (B, 1, H, W) of one object."""
    decoder = model.decoder
    x = decoder.compress(torch.cat((read, thin), 1))
    x = decoder.up_8_4(f4, decoder.up_16_8(f8, x))
    return F.interpolate(decoder.pred(F.relu(x)), scale_factor=4, mode="bilinear", align_corners=False)


def _aggregate(objects: Tensor) -> Tensor:
    """Logits (B, 1+O, H, W) of probabilities (B, O, H, W), step by step."""
    background = torch.prod(1 - objects, 1, keepdim=True)
    both = torch.cat((background, objects), 1).clamp(1e-7, 1 - 1e-7)
    return torch.log(both / (1 - both))
