# SPDX-License-Identifier: Apache-2.0
"""Less memory for more time: the inside of residual blocks is computed again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from vosops.models.blocks import ResBlock
from vosops.models.encoders import ResNetTrunk
from vosops.models.stcn import STCN

_BLOCKS = (BasicBlock, Bottleneck, InvertedResidual, ResBlock)


def recompute_blocks(model: nn.Module) -> int:
    """Makes a model keep only the inputs of its parts for the backward pass, and compute their inside again.

    Parts are the residual blocks and the stems of ResNets; of STCN, whose `forward` calls them for one frame
    after the other, `encode_value` and `decode` as a whole. Results and gradients stay what they are. The
    model stays as it is otherwise: names, weights, inference.

    Returns:
        How many parts there are; 0 for a model that has none of these kinds.

    Note:
        Cost: one more forward pass of these parts, about a third of a step.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    calls: list[tuple[Any, str]] = []
    whole: set[nn.Module] = set()
    if isinstance(model, STCN):
        calls += [(model, "encode_value"), (model, "decode")]
        whole.update(model.value_encoder.modules(), model.decoder.modules())
    for part in model.modules():
        if part in whole:
            continue
        if isinstance(part, _BLOCKS):
            calls.append((part, "forward"))
        if isinstance(part, ResNetTrunk):
            calls.append((part, "pool"))
    for owner, name in calls:
        setattr(owner, name, partial(checkpoint, getattr(owner, name), use_reentrant=False))
    return len(calls)
