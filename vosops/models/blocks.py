# SPDX-License-Identifier: Apache-2.0
"""Blocks that several models share, with the parameter names of the published checkpoints.

Objects lie along the batch axis. What all objects of a frame share (image features) comes once per frame and
is convolved once: a convolution of a concatenation is the sum of the convolutions of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK_ELEMENTS = 1 << 26
"""Elements of the largest map of a chunk of objects in `object_chunks`: 256 MiB in float32."""


def freeze_batch_norm(module: nn.Module) -> None:
    """Fixes every batch normalisation in `module`: evaluation mode, and no gradient to scale and offset.

    Memory networks (STM and after) train with batches of a few clips, too small for batch statistics. A
    model's constructor calls it; `module.train()` undoes the mode, so `VideoModel.train` repeats it.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval().requires_grad_(False)


def per_object(shared: Tensor, rows: int) -> Tensor:
    """Rows (B, ...) of frames as (rows, ...), each repeated for the objects of its frame, without a copy
    for B = 1.

    Raises:
        ValueError: rows is no multiple of B.
    """
    batch = shared.shape[0]
    if rows % batch:
        raise ValueError(f"rows must be a multiple of the frames, {batch}, got {rows}")
    if rows == batch:
        return shared
    if batch == 1:
        return shared.expand(rows, *shared.shape[1:])
    return shared.repeat_interleave(rows // batch, 0)


def object_chunks(objects: int, elements: int) -> Iterator[slice]:
    """Slices of `objects` objects of about equal size, so that memory does not grow with their number.

    Args:
        objects: how many there are.
        elements: of the largest map of one object.
    """
    size = max(1, _CHUNK_ELEMENTS // max(elements, 1))
    count = -(-objects // size)
    size = -(-objects // max(count, 1)) if objects else 1
    for begin in range(0, objects, size):
        yield slice(begin, min(begin + size, objects))


def convolve_parts(conv: nn.Conv2d, parts: Iterable[Tensor]) -> Tensor:
    """conv(cat(parts, 1)), where parts with fewer rows are shared by consecutive rows of the others.

    Args:
        conv: an ungrouped convolution with zero padding.
        parts: (rows, C_i, H, W), sum of C_i the convolution's input channels; a shared part has B rows,
            rows a multiple of B: row i belongs to rows i * rows/B and on.

    Note:
        Cost: a shared part is convolved B times instead of rows times. Sums in another order than the
        concatenation: equal up to rounding.
    """
    given = list(parts)
    rows = max(part.shape[0] for part in given)
    if all(part.shape[0] == rows for part in given):
        return conv(given[0] if len(given) == 1 else torch.cat(given, 1))
    own = [part for part in given if part.shape[0] == rows]
    weights = conv.weight.split([part.shape[1] for part in given], 1)
    own_weight = [weight for part, weight in zip(given, weights, strict=True) if part.shape[0] == rows]
    result = _convolve(conv, torch.cat(own, 1), torch.cat(own_weight, 1), None)
    bias = conv.bias
    for part, weight in zip(given, weights, strict=True):
        if part.shape[0] != rows:
            batch = part.shape[0]
            term = _convolve(conv, part, weight, bias)  # [B, C, H, W]
            bias = None
            result = (result.unflatten(0, (batch, -1)) + term[:, None]).flatten(0, 1)
    return result


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]


class ResBlock(nn.Module):
    """Pre-activation residual block without normalisation: x + conv2(relu(conv1(relu(x)))), both 3x3.

    Parameters conv1, conv2 and, where the widths differ, downsample (3x3, on x itself).

    Args:
        in_channels, out_channels: widths; None for out keeps the width.

    Source: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016; STM, STCN and XMem.
    """

    def __init__(self, in_channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.downsample = (
            nn.Conv2d(in_channels, out_channels, 3, padding=1) if in_channels != out_channels else None
        )
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, *parts: Tensor) -> Tensor:
        """(rows, C, H, W) of the concatenated parts (rows or B, C_i, H, W), as in `convolve_parts`."""
        residual = convolve_parts(self.conv1, [F.relu(part) for part in parts])
        # In place where autograd needs no old value: these maps are the largest of a model.
        residual = self.conv2(F.relu(residual, inplace=True))
        if self.downsample is not None:
            return residual.add_(convolve_parts(self.downsample, parts))
        if len(parts) > 1:
            rows = max(part.shape[0] for part in parts)
            return residual.add_(torch.cat([per_object(part, rows) for part in parts], 1))
        return residual.add_(parts[0])


class UpsampleBlock(nn.Module):
    """Doubles the resolution and adds a skip connection: out_conv(skip_conv(skip) + up2(x)).

    Args:
        skip_channels: of the image features, at the output's resolution.
        up_channels: of the input, at half of it.
        out_channels: of the output.

    Source: STM's refinement module as STCN and XMem write it.
    """

    def __init__(self, skip_channels: int, up_channels: int, out_channels: int) -> None:
        super().__init__()
        self.skip_conv = nn.Conv2d(skip_channels, up_channels, 3, padding=1)
        self.out_conv = ResBlock(up_channels, out_channels)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """skip (B, Cs, 2h, 2w), shared by the objects, and up (B*O, Cu, h, w) to (B*O, C, 2h, 2w)."""
        return self.merge(self.skip_conv(skip), up)

    def merge(self, skip: Tensor, up: Tensor) -> Tensor:
        """As `forward`, from skip_conv's output (B, Cu, 2h, 2w): for objects decoded in chunks."""
        grown = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out_conv(grown.add_(per_object(skip, up.shape[0])))


class _ChannelGate(nn.Module):
    """Gate of channels: the two-layer `mlp` of mean- and max-pooled features, summed."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        return x * torch.sigmoid(weight)[..., None, None]


class _GateConv(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _SpatialGate(nn.Module):
    """Gate of positions: a convolution of the channels' maximum and mean."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.spatial = _GateConv(size)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.spatial(torch.stack((x.amax(1), x.mean(1)), 1)))


class CBAM(nn.Module):
    """Attention over channels, then over positions.

    Parameters ChannelGate.mlp.1, ChannelGate.mlp.3 and SpatialGate.spatial.conv.

    Args:
        channels: of the input and output.
        reduction: of the channel gate's hidden layer.

    Source: Woo et al., CBAM, ECCV 2018, without batch normalisation, as STCN and XMem use it.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.ChannelGate = _ChannelGate(channels, reduction)
        self.SpatialGate = _SpatialGate(7)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, C, H, W) to the same."""
        return self.SpatialGate(self.ChannelGate(x))


class FeatureFusion(nn.Module):
    """Fuses image features with features per object: block2(y + attention(y)), y = block1(cat(parts)).

    Args:
        in_channels: of all parts together.
        out_channels: of the result.

    Source: STCN (Cheng et al., NeurIPS 2021), XMem (Cheng and Schwing, ECCV 2022).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block1 = ResBlock(in_channels, out_channels)
        self.attention = CBAM(out_channels)
        self.block2 = ResBlock(out_channels)

    def forward(self, *parts: Tensor) -> Tensor:
        """(rows, C, H, W) of the parts in the order of the checkpoint's channels, as in `convolve_parts`."""
        fused = self.block1(*parts)
        return self.block2(fused + self.attention(fused))


def other_masks(masks: Tensor) -> Tensor:
    """For every object the sum of the masks of all others: (B, O, H, W) to the same.

    The plain sum of STCN and XMem; STM clamps it to [0, 1].
    """
    return masks.sum(1, keepdim=True) - masks


def map_objects(function: Callable[[slice], Tensor], objects: int, elements: int, dim: int = 0) -> Tensor:
    """cat(function(slice), dim) over the slices of `object_chunks`.

    Args:
        function: from a slice of objects to what it computes for them, the objects along `dim`.
        objects, elements: as in `object_chunks`; elements counts all frames of a batch.
    """
    results = [function(chunk) for chunk in object_chunks(objects, elements)]
    return results[0] if len(results) == 1 else torch.cat(results, dim)
