# SPDX-License-Identifier: Apache-2.0
"""The decoder of AOT and DeAOT: from what LSTT read, with the image's maps, to logits at stride 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import map_objects

_GROUPS = 8  # of the group normalisation


class ConvGN(nn.Module):
    """Convolution and group normalisation: parameters conv.weight, conv.bias, gn.weight, gn.bias.

    Args:
        in_channels, out_channels: widths; out a multiple of 8.
        kernel_size: 1 or 3; the size of the map stays.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.gn = nn.GroupNorm(_GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        return self.gn(self.conv(x))


class FPNDecoder(nn.Module):
    """Feature pyramid decoder: three convolutions at strides 16, 8 and 4, each after its shortcut is added.

    Rows are groups of objects; those of one image share its shortcuts, whose adapters run once per image.
    Parameters conv_in, conv_16x, conv_8x, conv_4x (`ConvGN`), adapter_16x, adapter_8x, adapter_4x, conv_out.

    Args:
        in_channels: of all inputs together: 256 * (layers + 1) in AOT, 512 in DeAOT.
        out_channels: identities and background.
        shortcut_channels: of the encoder's maps at strides 4, 8 and 16.
        align_corners: of the resizing, as the encoder has it.
        channels: of the convolutions at stride 16, half of them at strides 8 and 4; a multiple of 16.

    Note:
        Cost at 481x849: 7.2 GMAC a row, and 2.1 an image for the adapters (R50-AOT-L). Channels-last maps
        stay so. Groups are decoded in chunks (`map_objects`): memory does not grow with their number.

    Source: Yang et al., AOT, NeurIPS 2021, after Lin et al., FPN, CVPR 2017; DeAOT, NeurIPS 2022.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 11,
        *,
        shortcut_channels: Sequence[int],
        align_corners: bool,
        channels: int = 256,
    ) -> None:
        super().__init__()
        if len(shortcut_channels) != 3:
            raise ValueError(
                f"shortcut_channels must be three widths (strides 4, 8, 16), got {list(shortcut_channels)}"
            )
        self.align_corners = align_corners
        half = channels // 2
        self.conv_in = ConvGN(in_channels, channels, 1)
        self.conv_16x = ConvGN(channels, channels, 3)
        self.conv_8x = ConvGN(channels, half, 3)
        self.conv_4x = ConvGN(half, half, 3)
        self.adapter_16x = nn.Conv2d(shortcut_channels[2], channels, 1)
        self.adapter_8x = nn.Conv2d(shortcut_channels[1], channels, 1)
        self.adapter_4x = nn.Conv2d(shortcut_channels[0], half, 1)
        self.conv_out = nn.Conv2d(half, out_channels, 1)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, inputs: Sequence[Tensor], shortcuts: Sequence[Tensor]) -> Tensor:
        """Logits of every row.

        Args:
            inputs: maps (rows, C_i, h, w) at stride 16, concatenated in this order.
            shortcuts: the encoder's maps (B, C, ., .) at strides 4, 8, 16; rows a multiple of B, the rows of
                an image consecutive.

        Returns:
            (rows, out_channels, H/4, W/4), the size of the first shortcut.

        Raises:
            ValueError: no inputs or not three shortcuts; rows no multiple of B; inputs of another size than
                the last shortcut or of other channels in sum.
        """
        f4, f8, f16 = self._check(inputs, shortcuts)
        batch = f16.shape[0]
        # [B, 1, C, ., .]: one for all rows of an image
        added = [
            adapter(maps)[:, None]
            for adapter, maps in (
                (self.adapter_16x, f16),
                (self.adapter_8x, f8),
                (self.adapter_4x, f4),
            )
        ]
        per_image = [maps.unflatten(0, (batch, -1)) for maps in inputs]

        def decode(rows: slice) -> Tensor:
            x = torch.cat([maps[:, rows].flatten(0, 1) for maps in per_image], 1)
            return self._decode(x, *added).unflatten(0, (batch, -1))

        groups = per_image[0].shape[1]
        return map_objects(decode, groups, added[2].numel(), dim=1).flatten(0, 1)

    def _decode(self, x: Tensor, at_16: Tensor, at_8: Tensor, at_4: Tensor) -> Tensor:
        # A copy: the gradient of relu needs its result. What `_resize` returns, no gradient needs.
        x = F.relu(self.conv_in(x), inplace=True).clone()
        x = F.relu(self.conv_16x(_add(x, at_16)), inplace=True)
        x = F.relu(self.conv_8x(_add(self._resize(x, at_8), at_8)), inplace=True)
        x = F.relu(self.conv_4x(_add(self._resize(x, at_4), at_4)), inplace=True)
        return self.conv_out(x)

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        size = (like.shape[-2], like.shape[-1])
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def _check(self, inputs: Sequence[Tensor], shortcuts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if len(shortcuts) != 3:
            raise ValueError(f"shortcuts must be three maps (strides 4, 8, 16), got {len(shortcuts)}")
        if not inputs:
            raise ValueError("inputs must be at least one map")
        f4, f8, f16 = shortcuts
        batch, rows = f16.shape[0], inputs[0].shape[0]
        if not rows or rows % batch:
            raise ValueError(f"the rows of inputs must be a multiple of the images, {batch}, got {rows}")
        for maps in inputs:
            if maps.shape[0] != rows or maps.shape[2:] != f16.shape[2:]:
                raise ValueError(
                    f"inputs must be ({rows}, C, {f16.shape[2]}, {f16.shape[3]}), got {tuple(maps.shape)}"
                )
        given, expected = sum(maps.shape[1] for maps in inputs), self.conv_in.conv.in_channels
        if given != expected:
            raise ValueError(f"inputs must have {expected} channels together, got {given}")
        return f4, f8, f16


def _add(x: Tensor, shared: Tensor) -> Tensor:
    """x (B * groups, C, H, W) plus shared (B, 1, C, H, W), in place: x is the largest map."""
    x.unflatten(0, (shared.shape[0], -1)).add_(shared)
    return x
