# SPDX-License-Identifier: Apache-2.0
"""The identity embedding from labels against the convolution of the one-hot mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vosops
from vosops.ops.identity import api

from . import cuda, measure
from .case import DTYPES, Job, Operator, Settings, relative_error
from .peers import one_hot

_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "vosops": vosops.identity_embedding,
    "eager": one_hot.identity_embedding,
    "bags": one_hot.identity_embedding_bags,
    "compiled": one_hot.identity_embedding_compiled,
    **cuda.forced(vosops.identity_embedding),
}
_ON_CPU = ("vosops", "eager")
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.005}


@dataclass(frozen=True)
class IdentityShape:
    """One label map.

    Args:
        name: what `--shape` takes.
        stands_for: what the labels are.
        frame: (height, width) in pixels.
        noise: every pixel has a label of its own, instead of rectangles on a background.
        channels: C.
        classes: N, background and objects.
        kernel, stride, padding: of the convolution.
    """

    name: str
    stands_for: str
    frame: tuple[int, int]
    noise: bool = False
    channels: int = 256
    classes: int = 11
    kernel: int = 17
    stride: int = 16
    padding: int = 8


_STANDARD = (
    IdentityShape("id-480p", "AOT's identity bank at 480p, objects", (481, 849)),
    IdentityShape("id-480p-noise", "the same, a random label in every pixel", (481, 849), noise=True),
    IdentityShape("id-1080p", "AOT's identity bank at 1080p, objects", (1073, 1921)),
)
_SMALL = (IdentityShape("id-240p", "AOT's identity bank at 240p, objects", (241, 433)),)
IDENTITY_GROUPS = {
    "standard": tuple(shape.name for shape in _STANDARD),
    "small": tuple(shape.name for shape in _SMALL),
}
IDENTITY = {shape.name: shape for shape in (*_STANDARD, *_SMALL)}


class IdentityCase:
    """One label map with its weights drawn; see `case.Case`. The layout of a memory means nothing here."""

    def __init__(self, shape: IdentityShape, settings: Settings, seed: int) -> None:
        self.shape, self.settings = shape, settings
        generator = torch.Generator().manual_seed(seed)
        height, width = shape.frame
        labels = torch.zeros(1, height, width, dtype=torch.uint8)
        if shape.noise:
            labels.random_(0, shape.classes, generator=generator)
        else:
            for label in range(1, shape.classes):
                y, x = (
                    int(torch.randint(0, size * 3 // 4, (1,), generator=generator)) for size in shape.frame
                )
                labels[:, y : y + height // 4, x : x + width // 6] = label
        self.labels = labels.to(settings.device)
        size = (shape.channels, shape.classes, shape.kernel, shape.kernel)
        dtype = DTYPES[settings.dtype]
        self.weight, self.bias = (
            torch.randn(s, generator=generator).to(settings.device, dtype) for s in (size, size[:1])
        )
        cells = [(x + 2 * shape.padding - shape.kernel) // shape.stride + 1 for x in shape.frame]
        self._cells = (cells[0], cells[1])
        self._upstream = torch.randn(1, shape.channels, *cells, generator=generator).to(
            settings.device, dtype
        )
        self._options = {"stride": shape.stride, "padding": shape.padding}

    def facts(self) -> dict[str, object]:
        shape = self.shape
        return {
            "height": shape.frame[0],
            "width": shape.frame[1],
            "classes": shape.classes,
            "channels": shape.channels,
            "kernel": shape.kernel,
            "stride": shape.stride,
        }

    def refuses(self, implementation: str) -> str | None:
        if implementation not in cuda.FORCED:
            return None
        tensors = {"labels": self.labels, "weight": self.weight, "bias": self.bias}
        return cuda.refused_by(implementation, tensors, api._limits)

    def needs_bytes(self, implementation: str) -> int:
        taps = 8 * self._cells[0] * self._cells[1] * self.shape.kernel**2
        peers = {"bags": 2 * taps, "eager": 8 * self.shape.classes * self.labels.numel()}
        return peers.get(implementation, 4 * self.labels.numel())

    def call(self, implementation: str) -> Callable[[], object]:
        if self.settings.backward:
            return lambda: self._forward_backward(implementation)
        return lambda: self._forward(implementation)

    def _forward(self, implementation: str) -> Tensor:
        with torch.no_grad():
            return _IMPLEMENTATIONS[implementation](self.labels, self.weight, self.bias, **self._options)

    def _forward_backward(self, implementation: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (self.weight, self.bias)]
        result = _IMPLEMENTATIONS[implementation](self.labels, *leaves, **self._options)
        return result.detach(), *torch.autograd.grad(result, leaves, self._upstream)

    def error(self, implementation: str) -> float:
        leaves = [x.detach().double().requires_grad_() for x in (self.weight, self.bias)]
        options: dict[str, Any] = self._options
        expected = one_hot.identity_embedding(self.labels, *leaves, **options)
        wanted: tuple[Tensor, ...] = (expected.detach(),)
        got: tuple[Tensor, ...] = (self._forward(implementation),)
        if self.settings.backward:
            wanted += torch.autograd.grad(expected, leaves, self._upstream.double())
            got = self._forward_backward(implementation)
        return max(relative_error(ours, want) for ours, want in zip(got, wanted, strict=True))

    def tolerance(self) -> float:
        return _TOLERANCE[self.settings.dtype]

    def limit_ms(self) -> tuple[float, str]:
        """One addition per output cell, tap and channel, at half the rate of products with additions.

        On a GPU the larger of that and of the bytes: labels, weight, bias and result once; backward reads
        the labels again and the gradient, and writes those of weight and bias.
        """
        shape = self.shape
        rates = measure.ceilings(64, torch.float32, self.settings.device, torch.get_num_threads())
        additions = self._cells[0] * self._cells[1] * shape.kernel**2 * shape.channels
        additions *= 2 if self.settings.backward else 1
        if self.settings.device.type == "cuda":
            result = self._cells[0] * self._cells[1] * shape.channels
            passes = 2 if self.settings.backward else 1
            elements = self.weight.numel() + self.bias.numel() + result
            moved = passes * (elements * DTYPES[self.settings.dtype].itemsize + self.labels.numel())
            return cuda.floor_ms(2 * additions, moved, rates)
        words = f"{additions / 1e9:.2f} G additions at {rates.peak / 2e9:.0f} G/s"
        return 1e3 * additions / (rates.peak / 2), words


def _make_case(shape: str, settings: Settings, seed: int) -> IdentityCase:
    return IdentityCase(IDENTITY[shape], settings, seed)


_OURS = ("vosops", *cuda.FORCED)

OPERATOR = Operator(
    name="identity",
    implementations=_ON_CPU,
    shapes=tuple(IDENTITY),
    groups=IDENTITY_GROUPS,
    case=_make_case,
    everything=(
        Job(IDENTITY_GROUPS["standard"]),
        Job(("id-480p",), settings=Settings(backward=True)),
        Job(("id-480p",), settings=Settings("bfloat16")),
    ),
    cuda_implementations=("bags", "compiled", *cuda.FORCED),
    cuda_everything=(
        *(
            Job(IDENTITY_GROUPS["standard"], (*_OURS, "eager", "bags", "compiled"), Settings(dtype))
            for dtype in ("bfloat16", "float32")
        ),
        *(
            Job(("id-480p", "id-480p-noise"), (*_OURS, "eager", "bags"), Settings(dtype, backward=True))
            for dtype in ("bfloat16", "float32")
        ),
        Job(IDENTITY_GROUPS["standard"], (*_OURS, "eager", "bags"), Settings("float16")),
    ),
)
