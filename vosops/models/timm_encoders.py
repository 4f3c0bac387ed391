# SPDX-License-Identifier: Apache-2.0
"""AOT's encoders that timm builds: Swin, with the published names, and any network with feature maps."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from .aot_encoders import AOTEncoder, Maps, open_branches

_DROP_PATH = 0.3
_freeze: Any = freeze_batch_norm_2d  # it has no annotations


def frozen_resnest() -> nn.Module:
    """timm's ResNeSt-101 with `FrozenBatchNorm2d`, for `ResNetEncoder`."""
    return _freeze(timm.create_model("resnest101e", pretrained=False))


def build(name: str) -> AOTEncoder:
    """The encoder of timm's network `name`: `SwinEncoder` for Swins (version 1), else `TimmEncoder`.

    Raises:
        ValueError: timm has no such network, or it cannot serve.
    """
    if not timm.is_model(name):
        raise ValueError(f"name must be of a network of timm, got 'timm:{name}'")
    return SwinEncoder(name) if name.startswith("swin_") else TimmEncoder(name)


class SwinEncoder(AOTEncoder):
    """Swin up to stride 16, each map normalised (norm0, norm1, norm2); the last map is that at stride 16.

    Maps are padded to whole windows (before the cyclic shift, with tokens that take part), so that images
    of any size pass. Stochastic depth 0.3 in training. Names of the published checkpoints: timm's, but
    layers.N.downsample stands behind the blocks of its stage, and relative_position_index is saved.

    Args:
        name: of a Swin (version 1) in timm; swin_base_patch4_window7_224 is the published one.

    Note:
        Cost: 122 GMAC at 480x848 for the published one.

    Source: Liu et al., Swin Transformer, ICCV 2021; SwinB-AOT-L, SwinB-DeAOT-L.
    """

    align_corners = False
    patch_embed: Any
    layers: Any

    def __init__(self, name: str = "swin_base_patch4_window7_224") -> None:
        super().__init__()
        network: Any = timm.create_model(
            name, pretrained=False, drop_path_rate=_DROP_PATH, strict_img_size=False, always_partition=True
        )
        self.patch_embed = network.patch_embed
        self.layers = nn.ModuleList(network.layers[:3])
        for index, stage in enumerate(self.layers):
            # A stage ends with its downsampling where timm begins the next one with it.
            stage.downsample = network.layers[index + 1].downsample if index < 2 else nn.Identity()
        widths = [int(stage.blocks[0].dim) for stage in self.layers]
        for index, channels in enumerate(widths):
            self.add_module(f"norm{index}", nn.LayerNorm(channels))
        for part in self.modules():
            if isinstance(part, WindowAttention):
                part.register_buffer("relative_position_index", part.get_buffer("relative_position_index"))
        self.channels = (widths[0], widths[1], widths[2], widths[2])

    def forward(self, image: Tensor) -> Maps:
        patch = self.patch_embed.patch_size
        x = self.patch_embed(F.pad(image, (0, -image.shape[3] % patch[1], 0, -image.shape[2] % patch[0])))
        maps = []
        for index, stage in enumerate(self.layers):
            mask = _window_mask(x, stage.blocks[-1])
            for block in stage.blocks:
                x = x + block.drop_path1(_attend(block, block.norm1(x), mask))
                x = x + block.drop_path2(block.mlp(block.norm2(x)))
            maps.append(self.get_submodule(f"norm{index}")(x).permute(0, 3, 1, 2))
            x = stage.downsample(x)
        return maps[0], maps[1], maps[2], maps[2]


def _partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C), H and W whole windows, to (B * windows, wh * ww, C)."""
    high, wide = window
    batch, height, width, channels = x.shape
    cells = x.view(batch, height // high, high, width // wide, wide, channels)
    return cells.transpose(2, 3).reshape(-1, high * wide, channels)


def _window_mask(x: Tensor, block: Any) -> Tensor:
    """(windows, n, n), -100 where the cyclic shift brings positions together that are no neighbours.

    Args:
        x: (B, H, W, C), before it is padded to windows.
        block: a shifted block of the stage.
    """
    regions = []
    for size, window, shift in zip(x.shape[1:3], block.window_size, block.shift_size, strict=True):
        padded = size + -size % window
        place = torch.arange(padded, device=x.device)
        regions.append((place >= padded - window).long() + (place >= padded - shift).long())
    labels = (3 * regions[0][:, None] + regions[1])[None, :, :, None]
    of_window = _partition(labels, block.window_size)[..., 0]
    apart = of_window[:, :, None] != of_window[:, None]
    return torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill_(apart, -100)


def _attend(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Window attention of a block, (B, H, W, C) to the same.

    timm's own shifts before it pads, the published models were trained with the shift after it.
    """
    batch, height, width, channels = x.shape
    (high, wide), (down, right) = block.window_size, block.shift_size
    x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % high))
    padded = x.shape
    shifted = bool(down or right)
    if shifted:
        x = x.roll((-down, -right), (1, 2))
    x = block.attn(_partition(x, block.window_size), mask if shifted else None)
    x = x.view(batch, padded[1] // high, padded[2] // wide, high, wide, channels)
    x = x.transpose(2, 3).reshape(padded)
    if shifted:
        x = x.roll((down, right), (1, 2))
    return x[:, :height, :width]


def _capabilities(name: str) -> tuple[dict[str, Any], list[int]]:
    """Options with which timm builds the network, dilated where it can be, and the strides of its maps."""
    failure: Exception | None = None
    candidates: list[dict[str, Any]] = [{"output_stride": 16}, {}]
    for options in candidates:
        try:
            with torch.device("meta"):  # no weights are drawn
                network: Any = timm.create_model(name, pretrained=False, features_only=True, **options)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            failure = error
        else:
            return options, network.feature_info.reduction()
    raise ValueError(f"name must be of a network with feature maps, got {name!r}: {failure}") from failure


class TimmEncoder(AOTEncoder):
    """Any network of timm with maps at strides 4, 8 and 16.

    Where the network takes an output stride, its last stage runs dilated at stride 16 and gives the last map;
    else it is dropped and the map at stride 16 is the last one as well. `align_corners` follows from the
    sizes of the maps: True where an image of 16n + 1 pixels has maps of 4n + 1, 2n + 1 and n + 1 cells.

    Args:
        name: of the network in timm. Nothing is downloaded.

    Raises:
        ValueError: timm has no such network, or it lacks one of the strides or takes only one image size.

    Source: timm; the 5th place solution (improved AOT) with EfficientNet and ResNeXt encoders.
    """

    trunk: Any

    def __init__(self, name: str) -> None:
        super().__init__()
        options, strides = _capabilities(name)
        if not {4, 8, 16} <= set(strides):
            raise ValueError(f"name must have maps at strides 4, 8 and 16, {name!r} has them at {strides}")
        at_16 = [index for index, stride in enumerate(strides) if stride == 16]
        by_stride = {stride: index for index, stride in enumerate(strides)}
        indices = sorted({by_stride[4], by_stride[8], at_16[0], at_16[-1]})
        self.trunk = timm.create_model(
            name, pretrained=False, features_only=True, out_indices=tuple(indices), **options
        )
        _freeze(self.trunk)
        open_branches(self.trunk)
        widths = self.trunk.feature_info.channels()
        self.channels = (widths[0], widths[1], widths[2], widths[-1])
        self.align_corners = self._sizes(name, 65) == [17, 9, 5, 5]
        if not self.align_corners and self._sizes(name, 64) != [16, 8, 4, 4]:
            raise ValueError(f"name must have maps of whole cells, {name!r} gives other sizes")

    def forward(self, image: Tensor) -> Maps:
        maps = self.trunk(image)
        return maps[0], maps[1], maps[2], maps[-1]

    @torch.no_grad()
    def _sizes(self, name: str, side: int) -> list[int]:
        try:
            maps = self.eval()(torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"name must be of a network for images of any size: {name!r}: {error}"
            ) from error
        finally:
            self.train()
        return [feature.shape[-1] for feature in maps]
