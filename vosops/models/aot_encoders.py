# SPDX-License-Identifier: Apache-2.0
"""Image encoders of AOT and DeAOT: maps at strides 4, 8, 16 and 16 again, the last one for the memory.

The published ones speak the names of the published checkpoints; any other encoder comes from timm.
Batch normalisation is frozen everywhere: the batches of a few clips are too small for statistics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50, resnet101
from torchvision.ops import FrozenBatchNorm2d

Maps = tuple[Tensor, Tensor, Tensor, Tensor]

_BRANCH_SCALE = 0.2  # of residual branches: 33 blocks let the variance grow by a factor of about 4
_DROP_PATH = 0.3


class AOTEncoder(nn.Module, ABC):
    """An image encoder with four output maps.

    Attributes:
        channels: of the maps at strides 4, 8, 16 and of the last one at stride 16.
        align_corners: images are best 16n + 1 pixels wide and high, the centres of the corner cells of each
            map lie on the image's corners, and maps are resized with align_corners; else 16n.
    """

    channels: tuple[int, int, int, int]
    align_corners: bool = True

    @abstractmethod
    def forward(self, image: Tensor) -> Maps:
        """Maps (B, channels[i], H/s, W/s), s = 4, 8, 16, 16, sizes rounded up.

        Some networks of `TimmEncoder` round sizes down that are no multiples of 16.

        Args:
            image: (B, 3, H, W), normalised (`normalize_imagenet`), of any size.
        """


class _FoldedConv(nn.Conv2d):
    """A convolution and the frozen normalisation behind it as one convolution.

    The parameters stay apart, under their names; scaling the weight in every call costs about 1 % of what
    the passes over the maps would.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self._norm = (norm,)  # in a tuple: not a child, its entries belong to the norm's own name

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], shift)


class _FoldedNorm(FrozenBatchNorm2d):
    """The names and values of a normalisation that a `_FoldedConv` applies."""

    def __init__(self, norm: FrozenBatchNorm2d) -> None:
        super().__init__(norm.weight.shape[0], norm.eps)
        super().load_state_dict(norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return x


def _freeze(network: nn.Module) -> None:
    """Batch normalisation as buffers; residual branches that start at scale 0 would never open, so 0.2."""
    freeze_batch_norm_2d(network)
    for part in network.modules():
        if isinstance(part, FrozenBatchNorm2d | FrozenBatchNormAct2d) and not part.weight.is_meta:
            part.weight += _BRANCH_SCALE * (not part.weight.any())


def _freeze_and_fold(network: nn.Module) -> None:
    """As `_freeze`; then every normalisation goes into the convolution before it, in order of registration.

    In the networks below that order is the order of the calls; tests hold them to the unfolded ones.
    """
    _freeze(network)
    before: tuple[str, nn.Module] = ("", network)
    for name, part in list(network.named_modules()):
        if isinstance(part, FrozenBatchNorm2d):
            conv_name, conv = before
            if not isinstance(conv, nn.Conv2d) or conv.out_channels != part.weight.shape[0]:
                raise TypeError(f"{name} does not follow a convolution of its width, but {conv_name}")
            norm = _FoldedNorm(part)
            network.set_submodule(name, norm)
            network.set_submodule(conv_name, _FoldedConv(conv, norm))
        before = (name, part)


class MobileNetV2Encoder(AOTEncoder):
    """torchvision's MobileNetV2 at stride 16: the last stages are dilated by 2 instead of strided.

    Parameters features.N, as torchvision names them. Cost: 4.5 GMAC at 481x849.

    Source: Sandler et al., MobileNetV2, CVPR 2018; AOT-T, -S, -B, -L and DeAOT-T, -S, -B, -L.
    """

    channels = (24, 32, 96, 1280)

    def __init__(self) -> None:
        super().__init__()
        self.features = mobilenet_v2(weights=None).features
        for index, block in enumerate(self.features):
            for part in block.modules():
                if index >= 14 and isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
                    # The block that gave up its stride still sees undilated maps.
                    dilation = 1 if part.stride == (2, 2) else 2
                    part.stride, part.dilation, part.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
        _freeze_and_fold(self)

    def forward(self, image: Tensor) -> Maps:
        f4 = self.features[:4](image)
        f8 = self.features[4:7](f4)
        f16 = self.features[7:14](f8)
        return f4, f8, f16, self.features[14:](f16)


class ResNetEncoder(AOTEncoder):
    """A ResNet without its last stage; the map at stride 16 is the last one as well.

    Parameters conv1, bn1, layer1, layer2, layer3, as torchvision and timm name them.

    Args:
        network: what has these parts: torchvision's ResNet or timm's ResNeSt. The parts are taken over.

    Note:
        Cost at 481x849: 27 GMAC (ResNet-50), 59 (ResNet-101), 76 (ResNeSt-101).

    Source: He et al., CVPR 2016; Zhang et al., ResNeSt, CVPRW 2022; R50-, R101- and RS101-AOT-L.
    """

    channels = (256, 512, 1024, 1024)

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.layer1, self.layer2, self.layer3 = network.layer1, network.layer2, network.layer3
        _freeze_and_fold(self)

    def forward(self, image: Tensor) -> Maps:
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        f4 = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        f8 = self.layer2(f4)
        f16 = self.layer3(f8)
        return f4, f8, f16, f16


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
        first, second, third = (stage.blocks[0].dim for stage in self.layers)
        for index, channels in enumerate((first, second, third)):
            self.add_module(f"norm{index}", nn.LayerNorm(channels))
        for part in self.modules():
            if isinstance(part, WindowAttention):
                part.register_buffer("relative_position_index", part.relative_position_index, persistent=True)
        self.channels = (first, second, third, third)

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
    for options in ({"output_stride": 16}, {}):
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

    def __init__(self, name: str) -> None:
        super().__init__()
        options, strides = _capabilities(name)
        if not {4, 8, 16} <= set(strides):
            raise ValueError(f"name must have maps at strides 4, 8 and 16, {name!r} has them at {strides}")
        at_16 = [index for index, stride in enumerate(strides) if stride == 16]
        by_stride = {stride: index for index, stride in enumerate(strides)}
        indices = sorted({by_stride[4], by_stride[8], at_16[0], at_16[-1]})
        self.trunk: Any = timm.create_model(
            name, pretrained=False, features_only=True, out_indices=tuple(indices), **options
        )
        _freeze(self.trunk)
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


_PUBLISHED: dict[str, Callable[[], AOTEncoder]] = {
    "mobilenetv2": MobileNetV2Encoder,
    "resnet50": lambda: ResNetEncoder(resnet50(weights=None, zero_init_residual=True)),
    "resnet101": lambda: ResNetEncoder(resnet101(weights=None, zero_init_residual=True)),
    "resnest101": lambda: ResNetEncoder(timm.create_model("resnest101e", pretrained=False)),
    "swin_base": SwinEncoder,
}


def build_encoder(name: str) -> AOTEncoder:
    """An encoder with random weights.

    Args:
        name: "mobilenetv2", "resnet50", "resnet101", "resnest101", "swin_base": the published ones, with the
            names of their checkpoints; "timm:NAME": a network of timm, Swins as `SwinEncoder`, all others as
            `TimmEncoder`, such as "timm:tf_efficientnetv2_s" or "timm:resnext101_32x8d".

    Raises:
        TypeError: name is no str.
        ValueError: there is no such encoder, or it cannot serve (`TimmEncoder`).
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name in _PUBLISHED:
        return _PUBLISHED[name]()
    network = name.removeprefix("timm:")
    if network == name or not timm.is_model(network):
        raise ValueError(f"name must be one of {', '.join(_PUBLISHED)} or timm:NAME, got {name!r}")
    return SwinEncoder(network) if network.startswith("swin_") else TimmEncoder(network)
