# SPDX-License-Identifier: Apache-2.0
"""Context between the memory read and the decoder: atrous spatial pyramid pooling."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

_DILATIONS = (6, 12, 18)
_HIDDEN = 256


class ReadContext(nn.Module):
    """x + expand(ASPP(x)): what was read sees context of up to 18 cells, about 290 pixels, to every side.

    ASPP is torchvision's: a 1x1 convolution, three 3x3 convolutions of dilation 6, 12 and 18 (the rates of
    an output stride of 16), the frame's mean, joined to 256 channels, with dropout 0.5 in training.
    `expand` starts close to zero, so that a decoder trained without the context keeps its masks at first.

    Args:
        channels: of the input and output.

    Note:
        Batch normalisation is frozen like everywhere in the models: without a checkpoint it changes nothing
        (mean 0, variance 1, scale 1), and training leaves it so. Cost: 7.9 MMAC per cell and object at
        1024 channels, 12.8 GMAC at 480x864.

    Source: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017 (DeepLabv3).
    """

    def __init__(self, channels: int = 1024) -> None:
        super().__init__()
        self.aspp = ASPP(channels, list(_DILATIONS), _HIDDEN)
        self.expand = nn.Conv2d(_HIDDEN, channels, 1, bias=False)
        nn.init.normal_(self.expand.weight, std=1e-3)

    def forward(self, joined: Tensor) -> Tensor:
        """(rows, channels, h, w) to the same."""
        return joined + self.expand(self.aspp(joined))
